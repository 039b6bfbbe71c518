"""Our kernels beside their rivals in one run: the table of the README's section Speed, or its CPU counterpart.

    python benchmarks/attention.py                      # this machine's device; CUDA: shapes A and B
    python benchmarks/attention.py --device cpu --quick

Every result is checked against the definition before its time is printed; one that fails gets "wrong" and no speed-up.
benchmarks/sweep.py goes through lengths and densities.
"""

from __future__ import annotations

import argparse

import harness
import torch
from methods import (
    DENSE,
    FLEX,
    Inputs,
    Measured,
    Method,
    Problem,
    attempt,
    dense_rivals,
    eight_bit_methods,
    flex_methods,
    measure,
    our_methods,
    rows_of,
    thresholds_for,
)

SHAPES = {
    "A": Problem(1, 12, 12, 32760, 128),
    "B": Problem(1, 40, 40, 75600, 128),
    "C": Problem(1, 12, 12, 32760, 64),
    "cpu": Problem(1, 4, 4, 16384, 64),
    "quick": Problem(1, 2, 2, 1100, 64),
}


def measure_all(inputs: Inputs, ours: list[Method], density: float) -> list[Measured]:
    device, rivals = inputs.q.device, dense_rivals(inputs)
    if device.type == "cpu":
        return measure([m for _, make in rivals for m in make()] + ours, device)
    rivals.append((FLEX, lambda: flex_methods(inputs, density)))
    found = []
    for name, make in rivals:  # one after the other: each holds its output for the backward
        found += attempt(name, lambda make=make: measure(list(make()), device))
    return found + measure(ours, device)


def compare(name: str, dtype: torch.dtype, device: torch.device, wanted: float) -> list[dict[str, object]]:
    """Print and return the table of one shape."""
    torch.manual_seed(0)
    problem = SHAPES[name]
    inputs = Inputs.of(problem, dtype, device)
    thresholds = thresholds_for(wanted, inputs)
    ours, block_map = our_methods(inputs, thresholds)
    ours += eight_bit_methods(inputs, thresholds, block_map)
    density = harness.density(block_map, problem.visible)
    rows = rows_of(measure_all(inputs, ours, density), problem, DENSE[device.type], block_map)
    sizes = ", ".join(f"{key} {value}" for key, value in problem._asdict().items())
    print(f"\n{name}: {sizes}, {dtype}, sparsity reached {1 - density:.2%}\n{harness.table(rows)}", flush=True)
    return [{"shape": name, "sparsity": 1 - density, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), help="default: A B on CUDA, cpu on a CPU")
    parser.add_argument("--density", type=float, default=0.05, help="share of key blocks to keep (default 0.05)")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that everything runs")
    parser.add_argument("--csv", help="write all rows to this file as well")
    args = parser.parse_args()
    device, dtype = harness.start(args)
    names = args.shapes or (["quick"] if args.quick else ["A", "B"] if device.type == "cuda" else ["cpu"])
    rows = [row for name in names for row in compare(name, dtype, device, args.density)]
    if args.csv:
        harness.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
