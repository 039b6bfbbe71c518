"""Whether a bound on the error of the model's output holds on other inputs: calibrations over seeds.

    python studies/moving_digits/output_error.py --goal 0.1 --runs 100 --out output_error.csv

A run calibrates the trained model on some clips with ``target_output_error``, and measures the velocity on as many
other clips, of digits that were held out. Relative L2 errors; the velocity error of docs/fidelity.md is their square. A
run that is in the file is not made again, so several processes may share the runs: --first says where each begins.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from digits import clips
from setups import SMALL
from torch import Tensor, nn
from transformer import load

import sparge_compile
from sparge_compile import Calibration

FIELDS = ("seed", "goal", "sparsity", "said", "error", "worst", "seconds")
OPTIONS = {"min_seq_len": 0}
OTHERS = 500_000  # seeds of the clips that thresholds are checked on

Batch = tuple[Tensor, Tensor, Tensor]  # clip, noise, classes


def inputs(args: argparse.Namespace, seed: int, held_out: bool) -> list[Batch]:
    """Clips with noise and classes, one for each batch; equal seeds give equal ones."""
    found = []
    for number in range(args.batches):
        own = seed * 1000 + number + OTHERS * held_out
        video, classes = clips(1, own, args.device, held_out=held_out, frames=args.frames)
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(own)).to(video)
        found.append((video, noise, classes))
    return found


def calls(model: nn.Module, batch: Batch, times: Sequence[float]) -> list[Tensor]:
    """The velocities of a batch at some times."""
    video, noise, classes = batch
    return [model(torch.lerp(video, noise, t), torch.full((1,), t, device=video.device), classes) for t in times]


@torch.no_grad()
def errors(model: nn.Module, thresholds: Calibration, batches: Sequence[Batch], times: Sequence[float]) -> list[float]:
    """‖u − v‖ ÷ ‖v‖ of each batch, a mean over its times."""
    exact = [calls(model, batch, times) for batch in batches]
    with sparge_compile.attach(model, thresholds):
        compiled = torch.compile(model, backend="sparge", options={**OPTIONS, "inner": "eager"})
        found = [calls(compiled, batch, times) for batch in batches]
    return [
        statistics.fmean(((u.float() - v.float()).norm() / v.float().norm()).item() for u, v in zip(*pair, strict=True))
        for pair in zip(found, exact, strict=True)
    ]


def one_run(model: nn.Module, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Calibrate on the clips of a seed, and check on others."""
    start = time.perf_counter()
    found = sparge_compile.calibrate(
        model,
        inputs(args, seed, held_out=False),
        call=lambda *batch: calls(model, batch, args.times),
        target_output_error=args.goal,
        query_blocks=args.query_blocks,
        options=OPTIONS,
        orders=args.orders,
        seed=seed,
    )
    seconds = time.perf_counter() - start
    fresh = errors(model, found, inputs(args, seed, held_out=True), args.times)
    said = found.origin.output.reached["held_out_error"]
    numbers = (seed, args.goal, found.summary().sparsity, said, statistics.fmean(fresh), max(fresh), seconds)
    return dict(zip(FIELDS, numbers, strict=True))


def summary(rows: Sequence[dict[str, str]]) -> str:
    """In how many runs the bound was kept, and how near to it they came; by bound."""
    lines = []
    for goal in sorted({float(row["goal"]) for row in rows}):
        of = [row for row in rows if float(row["goal"]) == goal]
        shares = [float(row["error"]) / goal for row in of]
        kept, near = sum(share <= 1 for share in shares), sum(0.8 <= share <= 1 for share in shares)
        sparsity, seconds = (statistics.fmean(float(row[name]) for row in of) for name in ("sparsity", "seconds"))
        lines.append(
            f"bound {goal:g}: kept in {kept} of {len(of)} runs, in {near} by less than 20 %; the error is "
            f"{statistics.fmean(shares):.2f} of it on average, {min(shares):.2f} to {max(shares):.2f}; "
            f"sparsity {sparsity:.1%}; {seconds:.0f} s for a calibration"
        )
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, str]]:
    """The runs of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Make the runs that the file lacks, and sum them up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goal", type=float, default=0.1, help="the bound of the relative error of the velocity (0.1)")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first run (0)")
    parser.add_argument("--batches", type=int, default=16, help="clips to calibrate on, and as many to check on (16)")
    parser.add_argument("--times", type=float, nargs="+", default=[0.97, 0.9, 0.75, 0.4], help="at which each is shown")
    parser.add_argument("--frames", type=int, default=SMALL.frames, help=f"of a clip; 256 tokens each ({SMALL.frames})")
    parser.add_argument("--query-blocks", type=int, default=16)
    parser.add_argument("--orders", nargs="+", default=["raster"], help="of tokens, to choose from (raster)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("output_error.csv"))
    args = parser.parse_args()
    model = load("teacher", args.device, getattr(torch, args.dtype))
    for seed in range(args.first, args.first + args.runs):
        if any(int(row["seed"]) == seed and float(row["goal"]) == args.goal for row in read(args.out)):
            continue
        row = one_run(model, args, seed)
        fresh = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    print(summary(read(args.out)))


if __name__ == "__main__":
    main()
