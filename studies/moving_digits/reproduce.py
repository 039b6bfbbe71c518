"""The findings of SpargeAttention2 (arXiv 2602.13515), asked of the trained models of moving digits, on one GPU.

    python studies/moving_digits/reproduce.py                       # everything: docs/fidelity/*.csv, *.png, tables
    python studies/moving_digits/reproduce.py --parts rules losses  # some parts
    python studies/moving_digits/reproduce.py --parts               # tables and pictures alone; needs no GPU
    python studies/moving_digits/reproduce.py --setup large --seeds 0 --minutes 8.5        # of the large model, a piece
    python studies/moving_digits/reproduce.py --setup large --parts arms --arms '*0.951, not trained'
    python studies/moving_digits/reproduce.py --setup large --parts --add FOUND            # rows measured elsewhere

Every result is a row of a CSV file, written as soon as it is there; what is there is not measured again. A run may be
stopped, and other parts or seeds may be measured beside it on another GPU: they add to the same files, or to another
folder whose rows --add brings here. Parts: attention (error split, ranking, structured inputs), floor (dense values,
other noise), rounded (the dense model in bfloat16), defaults (thresholds without an aim at sparsity), rules (Top-k,
Top-p, hybrid, training-free), orders (raster and tiles, training-free), chosen-orders (those that calibration
chooses), distilled-orders (the same after long distillation), rates (learning rates of distillation), losses
(distillation against the plain loss, matched and shifted data), distilled (the rules after distillation), students
(long distillation; pictures), shipped (the student of the repository); of the large model arms (rules, orders,
sparsities, ways to train: arms.py), ship (the student of the repository, others that go on from it, sparse models with
the dense weights), spread (a dense model that is trained on; of it and of those of ship clips are kept for the blind
test), apart (where a student's error is), timing.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import arms
import parts
import torch
from case import TABLES, Table
from fidelity import PAGE, fill, tables
from journal import where as place
from lab import Lab, OutOfTime
from plots import plot_orders, plot_ranking, plot_rules
from setups import CLASSES, Setup, add_setup
from speed import timing
from tabular import read, where

PARTS = {
    "attention": parts.attention,
    "floor": parts.floor,
    "rounded": parts.rounded,
    "defaults": parts.defaults,
    "rules": parts.rules,
    "orders": parts.orders,
    "chosen-orders": parts.chosen_orders,
    "distilled-orders": parts.distilled_orders,
    "rates": parts.rates,
    "losses": parts.losses,
    "distilled": parts.distilled,
    "students": parts.students,
    "shipped": parts.shipped,
    "arms": arms.measure_arms,
    "spread": arms.spread,
    "apart": arms.apart,
    "timing": timing,
    "ship": arms.ship,
}
PICTURES = ("*.png", "*.jpg")
FLAT, DEEP = (
    list(PARTS)[:13],
    ["floor", "arms", "spread", "ship", "apart", "timing", "rounded", "attention"],
)  # of the small model, of the large


def report(out: Path, setup: Setup) -> None:
    """Write the pictures into ``out``, and its tables into docs/fidelity.md if it is a folder of that; or print
    them."""
    if quality := read(out / "quality.csv"):
        if where(quality, part="rules"):
            plot_rules(quality, out / "rules.png", setup.digits / CLASSES)
        if where(quality, part="orders"):
            plot_orders(quality, out / "orders.png")
    if ranking := read(out / "ranking.csv"):
        plot_ranking(ranking, out / "ranking.png")
    made = tables(out)
    if PAGE.parent in out.resolve().parents:
        fill(PAGE, made)
        print(f"wrote {len(made)} tables into {PAGE}")
    else:
        for name, table in made.items():
            print(f"\n{name}\n{table}")


def add(found: Path, out: Path) -> None:
    """Add the rows and pictures of another folder, which has results of the same kind of run."""
    check_settings(out / "settings.txt", (found / "settings.txt").read_text())
    for name in TABLES:
        if rows := read(found / f"{name}.csv"):
            Table(out, name).add(rows)
    for path in (path for kind in PICTURES for path in found.rglob(kind)):
        copy = out / path.relative_to(found)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def settings(args: argparse.Namespace, device: torch.device) -> str:
    lengths = f"{args.steps} steps of fine-tuning, {args.long_steps} of the students, "
    if args.setup.is_deep:
        lengths = "" if args.scale == 1 else f"{args.scale:g} of the arms' steps, "
    return (
        f"torch {torch.__version__}, {place(device)}; clips of {args.frames} frames; {lengths}on batches of "
        f"{args.batch} clips; {args.rounds * args.batch} held-out clips and {args.rounds * (args.batch // 2)} samples "
        f"of {args.sample_steps} steps for a figure\n"
    )


def check_settings(path: Path, wanted: str) -> None:
    """One folder holds results of one kind of run; the first part, where it ran, is a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(wanted)
        return
    (there, kind), (here, wanted_kind) = (text.split("; ", 1) for text in (path.read_text(), wanted))
    if kind != wanted_kind:
        raise SystemExit(
            f"{path.parent} has results of another kind of run:\n  there: {kind}  this run: {wanted_kind}"
            "Repeat those settings, or give --out a new folder. (--parts alone measures nothing.)"
        )
    places = [*there.split(" and "), *(place for place in here.split(" and ") if place not in there)]
    path.write_text(f"{' and '.join(places)}; {kind}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup(parser)
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="in their order (all of the setup)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and noise (0 1 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing that takes longer (no limit)")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning, of the small model (200)")
    parser.add_argument("--long-steps", type=int, default=1000, help="of the students (1000)")
    parser.add_argument("--arms", default="*", help="pattern of their names: arms, chosen-orders, distilled-orders (*)")
    parser.add_argument("--students", nargs="+", default=["*"], help=f"patterns: {', '.join(arms.shipped())} (*)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the arms' steps, to try them out (1)")
    parser.add_argument("--batch", type=int, help="clips; samples are drawn from half as many (16; large 4)")
    parser.add_argument("--rounds", type=int, help="batches of held-out clips and of samples (4; large 16)")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--frames", type=int, help="a multiple of 4 (those of the setup)")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="folders of results to take over first")
    parser.add_argument("--out", type=Path, help="a folder (docs/fidelity, or that of the setup in it)")
    args = parser.parse_args()
    setup = args.setup
    if args.parts is None:
        args.parts = DEEP if setup.is_deep else FLAT
    args.frames, args.out = args.frames or setup.frames, args.out or setup.results
    args.batch, args.rounds = args.batch or setup.batch, args.rounds or setup.rounds
    if args.frames % 4 or args.batch < 2:
        parser.error("--frames must be a multiple of 4, --batch at least 2")
    return args


def main() -> None:
    args = arguments()
    for folder in args.add:
        add(folder, args.out)
    if args.parts:
        torch._dynamo.config.recompile_limit = 64  # one class, compiled dense and sparse, to train and to run
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_settings(args.out / "settings.txt", settings(args, device))
        lab = Lab(args, device)
        try:
            for part in args.parts:
                for seed in args.seeds:
                    PARTS[part](lab, seed)
        except OutOfTime as left:
            print(f"{left}; the same command goes on")
    report(args.out, args.setup)


if __name__ == "__main__":
    main()
