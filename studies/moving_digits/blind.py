"""Can the distilled student be told from the dense model? Pairs of clips to judge without knowing which is which.

    python studies/moving_digits/blind.py --score answers.csv   # of the sheets in docs/fidelity/blind
    python studies/moving_digits/blind.py --out new             # new ones, on a GPU: new/sheet1.png … and new/key.csv

Answers are lines "pair,answer" under a line of these words; an answer is the row, A or B, that is held for the sparse
model's.

The two rows of a pair start from the same noise: one is the dense model's; the other the student's or, as a control
that anyone should find, the same sparsity without training. No clip is in two pairs.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
from pathlib import Path

import torch
from digits import FRAMES
from lab import Lab
from pictures import sheet
from tabulate import tabulate
from torch import Tensor

SEEDS = (0, 1, 2)
FIRST = 10  # clips before it are in other pictures, with their names
CONTROLS, PAIRS = 2, 10  # for each seed
ON_A_SHEET = 6
OUT = Path(__file__).resolve().parents[2] / "docs" / "fidelity" / "blind"

Pair = tuple[str, Tensor, Tensor]  # its kind, the dense clip [T, 64, 64], the sparse clip


def pairs(lab: Lab) -> list[Pair]:
    found: list[Pair] = []
    for seed in SEEDS:
        dense = lab.dense_samples(seed)
        calibration, student = lab.shipped()
        distilled = lab.samples(student, seed)[0]
        untrained = lab.samples(lab.sparse(calibration), seed)[0]
        controls, others = range(FIRST, FIRST + CONTROLS), range(FIRST + CONTROLS, FIRST + CONTROLS + PAIRS)
        found += [("not trained", dense[i], untrained[i]) for i in controls]
        found += [("distilled", dense[i], distilled[i]) for i in others]
    return found


def write(found: list[Pair], out: Path, shuffle: random.Random) -> None:
    """Sheets of pairs in random order, every third frame of each clip, and the key: which row of each is sparse."""
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
            sheet(rows, 2).save(out / f"sheet{first // ON_A_SHEET + 1}.png")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", type=Path, nargs="+", metavar="CSV", help="answers; nothing is drawn")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of sheets and key (docs/fidelity/blind)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    args = parser.parse_args()
    if args.score:
        found = {str(path): score(path, args.out / "key.csv") for path in args.score}
        rows = [(name, *(f"{right} of {of}" for right, of in each.values())) for name, each in found.items()]
        print(tabulate(rows, headers=("sparse row found by", *next(iter(found.values())))))
        return
    if (args.out / "key.csv").exists():
        parser.error(f"{args.out} holds sheets and a key already: give --out another folder")
    torch._dynamo.config.recompile_limit = 64
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(out=Path(folder), batch=16, rounds=3, frames=FRAMES, sample_steps=25)
        lab = Lab(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        write(pairs(lab), args.out, random.Random(args.seed))


if __name__ == "__main__":
    main()
