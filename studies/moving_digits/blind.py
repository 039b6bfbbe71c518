"""Can the distilled student be told from the dense model? Pairs of clips to judge without knowing which is which.

    python studies/moving_digits/blind.py --score answers.csv   # of the sheets in docs/fidelity/blind
    python studies/moving_digits/blind.py --out new             # new ones, on a GPU: new/sheet1.png … and new/key.csv
    python studies/moving_digits/blind.py --setup large         # of the large model's student
    python studies/moving_digits/blind.py --setup large --clips found/clips-0.951-*  # that were kept
    python studies/moving_digits/blind.py --setup large --clips found/clips-0.951-* --measure  # what differs in them

Answers are lines "pair,answer" under a line of these words; an answer is the row, A or B, that is held for the sparse
model's.

The two rows of a pair start from the same noise: one is the dense model's; the other the student's or, as a control
that anyone should find, the same sparsity without training. No clip is in two pairs. The score says how probable it is
to find as many by guessing.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import tempfile
from pathlib import Path

import torch
from lab import Lab
from measures import grain, seams
from pictures import EVERY, in_bytes, sheet
from safetensors.torch import load_file, save_file
from setups import Setup, add_setup
from tabulate import tabulate
from torch import Tensor

SEEDS = (0, 1, 2)
ON_A_SHEET = 6

Pair = tuple[str, Tensor, Tensor]  # its kind, the dense clip [T, side, side], the sparse clip


def paired(setup: Setup, dense: Tensor, untrained: Tensor, other: Tensor, kind: str = "distilled") -> list[Pair]:
    """Of samples of the dense model and another, every third frame; controls are of untrained ones."""
    first, controls, count = setup.blind  # clips before the first are in other pictures, with their names
    second, some = first + controls, slice(None, None, EVERY)
    kinds = {"not trained": (untrained, range(first, second)), kind: (other, range(second, second + count))}
    return [(kind, dense[i, some], sparse[i, some]) for kind, (sparse, which) in kinds.items() for i in which]


def pairs(lab: Lab) -> list[Pair]:
    """Of the student of the repository."""
    found: list[Pair] = []
    for seed in SEEDS:
        calibration, student = lab.shipped()
        distilled = lab.samples(student, seed)[0]
        untrained = lab.samples(lab.sparse(calibration), seed)[0]
        found += paired(lab.setup, lab.dense_samples(seed), untrained, distilled)
    return found


def keep_clips(found: list[Pair], path: Path) -> None:
    """Write pairs in bytes, to make sheets of them later."""
    kinds: dict[str, list[Tensor]] = {}
    for kind, *both in found:
        kinds.setdefault(kind, []).append(in_bytes(torch.stack(both)).cpu())
    save_file({kind: torch.stack(each) for kind, each in kinds.items()}, path)


def kept_clips(path: Path) -> list[Pair]:
    return [(kind, *(each / 127.5 - 1)) for kind, found in load_file(path).items() for each in found]


def write(found: list[Pair], out: Path, shuffle: random.Random, times: int = 2) -> None:
    """Sheets of pairs in random order, and the key: which row of each is sparse. Large ones are JPEGs."""
    out.mkdir(parents=True, exist_ok=True)
    shuffle.shuffle(found)
    with (out / "key.csv").open("w", newline="") as file:
        key = csv.writer(file, lineterminator="\n")
        key.writerow(("pair", "kind", "sparse"))
        for first in range(0, len(found), ON_A_SHEET):
            rows: dict[str, Tensor] = {}
            for number, (kind, dense, sparse) in enumerate(found[first : first + ON_A_SHEET], first + 1):
                sparse_row = shuffle.choice("AB")
                clips = (sparse, dense) if sparse_row == "A" else (dense, sparse)
                rows |= {f"{number} {name}": clip[None] for name, clip in zip("AB", clips, strict=True)}
                key.writerow((number, kind, sparse_row))
            kind = "png" if times > 1 else "jpg"
            sheet(rows, times, every=1).save(out / f"sheet{first // ON_A_SHEET + 1}.{kind}", quality=90)


def score(answers: Path, key: Path) -> dict[str, tuple[int, int]]:
    """Of each kind of pair how many were found, and how many there are."""
    with answers.open(newline="") as file:
        given = {row.get("pair"): (row.get("answer") or "").strip().upper() for row in csv.DictReader(file)}
    found: dict[str, tuple[int, int]] = {}
    with key.open(newline="") as file:
        for row in csv.DictReader(file):
            if (answer := given.get(row["pair"], "")) not in ("A", "B"):
                wanted = "A or B for each pair, below a line 'pair,answer'"
                raise SystemExit(f"{answers} has {answer!r} for pair {row['pair']}: it needs {wanted}")
            right, of = found.get(row["kind"], (0, 0))
            found[row["kind"]] = right + (answer == row["sparse"]), of + 1
    return found


def by_chance(right: int, of: int) -> float:
    """The probability of finding as many or more by guessing."""
    return sum(math.comb(of, count) for count in range(right, of + 1)) / 2**of


def measured(found: list[Pair]) -> list[tuple[str, str, float, float, str, float]]:
    """What differs in pairs: of each kind and measure the means of both models, in how many pairs the sparse clip has
    more of it, and how probable it is that as many or as few have by chance."""
    rows = []
    for kind in dict.fromkeys(kind for kind, *_ in found):
        dense, sparse = (torch.stack([pair[i] for pair in found if pair[0] == kind]) for i in (1, 2))
        for name, measure in {"seams": seams, "grain": grain}.items():
            a, b = measure(dense), measure(sparse)
            more, of = int((b > a).sum()), len(a)
            chance = min(1.0, 2 * by_chance(max(more, of - more), of))
            rows.append((kind, name, a.mean().item(), b.mean().item(), f"{more} of {of}", chance))
    return rows


def drawn(setup: Setup) -> list[Pair]:
    torch._dynamo.config.recompile_limit = 64
    kind = {"setup": setup, "frames": setup.frames, "batch": setup.batch, "rounds": setup.rounds}
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(out=Path(folder), sample_steps=25, minutes=math.inf, **kind)
        lab = Lab(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return pairs(lab)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup(parser)
    parser.add_argument("--score", type=Path, nargs="+", metavar="CSV", help="answers; nothing is drawn")
    parser.add_argument("--clips", type=Path, nargs="+", default=[], help="draw nothing: those that reproduce.py kept")
    parser.add_argument("--measure", action="store_true", help="no sheets: say what differs in the clips")
    parser.add_argument("--out", type=Path, help="the folder of sheets and key (blind, beside the setup's results)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    args = parser.parse_args()
    out = args.out or args.setup.results / "blind"
    if args.measure:
        found = [pair for path in args.clips for pair in kept_clips(path)] or drawn(args.setup)
        print(tabulate(measured(found), headers=("pairs", "measure", "dense", "sparse", "more in the sparse", "p")))
        return
    if not args.score:
        if (out / "key.csv").exists():
            parser.error(f"{out} holds sheets and a key already: give --out another folder")
        found = [pair for path in args.clips for pair in kept_clips(path)] or drawn(args.setup)
        write(found, out, random.Random(args.seed), 1 if args.setup.side > 100 else 2)
        return
    rows = [
        (path, kind, f"{right} of {of}", f"{by_chance(right, of):.3f}")
        for path in args.score
        for kind, (right, of) in score(path, out / "key.csv").items()
    ]
    print(tabulate(rows, headers=("answers", "pairs", "sparse row found", "p by guessing")))


if __name__ == "__main__":
    main()
