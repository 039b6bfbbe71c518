"""Time over length and sparsity: our map, forward and backward, dense SDPA and FlexAttention, as CSV.

    python benchmarks/sweep.py --csv sweep.csv                    # about five minutes on an H200
    python benchmarks/sweep.py --device cpu --quick --csv sweep.csv
    python benchmarks/plot_sweep.py sweep.csv docs/kernel_sweep.png

Lengths and sparsities for one shape (the first), some of each for the others: D = 64, many heads, causal, grouped.
Sparsity 0 is topk = 1, dense attention through our kernels. Every result is checked against the definition before it is
timed. On CUDA the times are those of the GPU alone, which a compiled model sees: there the host is ahead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial

import harness
import methods
import torch
from methods import Inputs, Measured, Problem

BUDGET = 0.04  # seconds for each time; three runs at least
SHOWN = ("sparsity", "method", "direction", "ms", "TFLOP/s", "x dense", "x flex", "x flex built", "kernels", "trouble")


def problems(device: str, quick: bool) -> Iterator[tuple[str, Problem, tuple[float, ...], bool]]:
    """(shape's name, problem, sparsities, whether FlexAttention takes part: it is compiled anew for each problem)."""
    if quick:
        yield "D64", Problem(1, 2, 2, 512, 64), (0.0, 0.5), False
        yield "D64 causal grouped", Problem(1, 4, 2, 512, 64, True), (0.5,), False
        return
    if device == "cpu":
        for length in (1024, 2048, 4096, 8192, 16384):
            yield "D64 H4", Problem(1, 4, 4, length, 64), (0.0, 0.5, 0.75, 0.95), False
        return
    for length in (4096, 8192, 16384, 32768, 65536, 131072):
        yield "D128 H12", Problem(1, 12, 12, length, 128), (0.0, 0.5, 0.75, 0.9, 0.95, 0.97), True
    for length, flex in ((4096, False), (32768, True)):
        yield "D64 H12", Problem(1, 12, 12, length, 64), (0.0, 0.5, 0.95), flex
        yield "D128 H40", Problem(1, 40, 40, length, 128), (0.0, 0.5, 0.95), flex
        yield "D128 H12 causal", Problem(1, 12, 12, length, 128, True), (0.0, 0.5, 0.95), flex
        yield "D128 H32/8 causal", Problem(1, 32, 8, length, 128, True), (0.0, 0.5, 0.95), flex


def compare(
    name: str, problem: Problem, sparsities: tuple[float, ...], flex: bool, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, object]]:
    """The rows of one problem; dense is timed once."""
    torch.manual_seed(0)
    torch.compiler.reset()  # Dynamo gives up on a function that was compiled for too many shapes
    inputs = Inputs.of(problem, dtype, device)

    def measured(made: Iterator[methods.Method]) -> list[Measured]:
        return methods.measure(list(made), device, BUDGET, gpu_only=True)

    rival, make_dense = methods.dense_rivals(inputs)[0]
    dense = methods.attempt(rival, lambda: measured(make_dense()))
    for sparsity in sparsities:
        ours, block_map = methods.our_methods(inputs, methods.thresholds_for(1 - sparsity, inputs))
        density = harness.density(block_map, problem.visible)
        found = dense + measured(iter(ours))
        if flex:
            make = partial(methods.flex_methods, inputs, density)
            found += methods.attempt(methods.FLEX, lambda make=make: measured(make()))
        case = {"shape": name, **problem._asdict(), "wanted": sparsity, "sparsity": 1 - density}
        for row in methods.rows_of(found, problem, rival, block_map):
            yield case | row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="two tiny problems, to see that everything runs")
    parser.add_argument("--csv", required=True, help="write the rows to this file, also after each problem")
    args = parser.parse_args()
    device, dtype = harness.start(args)
    who = {"who": harness.header(device), "dtype": str(dtype).removeprefix("torch.")}
    rows: list[dict[str, object]] = []
    start = time.perf_counter()
    for name, problem, sparsities, flex in problems(device.type, args.quick):
        new: list[dict[str, object]] = []
        try:
            for row in compare(name, problem, sparsities, flex, device, dtype):
                new.append(who | row)
        except torch.OutOfMemoryError:
            new.append(who | {"shape": name, **problem._asdict(), "trouble": "out of memory"})
        rows += new
        harness.write_csv(args.csv, rows)
        print(f"\n{name}, L {problem.length}, after {time.perf_counter() - start:.0f} s", flush=True)
        print(harness.table([{key: row[key] for key in SHOWN if key in row} for row in new]), flush=True)


if __name__ == "__main__":
    main()
