"""Calibrations of the trained video model that choose the order of its tokens, beside ones in raster order.

    python studies/moving_digits/calibrated_orders.py --clips 4 --sparsities 0.5 0.7 0.85
    python studies/moving_digits/calibrated_orders.py --clips 1 --frames 4 --orders raster 2x4x8

Raster order, the default tile, and what is chosen for each sparsity are calibrated with the same clips, and run
through the product on clips of digits held out. Velocity error is ‖u − v‖² ÷ ‖v‖², a mean over clips and times. The
last lines say what was chosen, and what took how long.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from output_error import Batch, calls, inputs
from tabulate import tabulate
from transformer import load

import sparge_compile
from sparge_compile import Calibration
from sparge_compile.kernels.order import TILE

OPTIONS = {"min_seq_len": 0, "inner": "eager"}


@torch.no_grad()
def error(model: torch.nn.Module, thresholds: Calibration, data: list[Batch], args: argparse.Namespace) -> float:
    """The mean velocity error under these thresholds, in their order."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sparge", options={**OPTIONS, "calibration": thresholds})
    found = []
    for batch in data:
        for u, v in zip(calls(compiled, batch, args.times), calls(model, batch, args.times), strict=True):
            found.append(((u - v).square().sum() / v.square().sum()).item())
    return statistics.fmean(found)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", dest="batches", type=int, default=4, help="to calibrate on, and as many to check on")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--times", type=float, nargs="+", default=[0.9, 0.6, 0.3])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--orders", nargs="+", help="that are tried (those of sparge calibrate)")
    parser.add_argument("--influence", action="store_true", help="weigh errors of heads by influence")
    parser.add_argument("--query-blocks", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = load("teacher", args.device)
    data, others = (inputs(args, args.seed, held_out) for held_out in (False, True))
    ways = {"raster": ["raster"], "default tile": [TILE], "chosen": args.orders}
    rows, seconds, chosen = [], dict.fromkeys(ways, 0.0), {}
    for sparsity in args.sparsities:
        rows.append([f"{sparsity:.0%}"])
        for name, orders in ways.items():
            torch._dynamo.reset()
            start = time.process_time()
            found = sparge_compile.calibrate(
                model,
                data,
                call=lambda *batch: calls(model, batch, args.times),
                target_sparsity=sparsity,
                influence=args.influence,
                query_blocks=args.query_blocks,
                options={"min_seq_len": 0},
                orders=orders,
                seed=args.seed,
                progress=True,
            )
            seconds[name] += time.process_time() - start
            rows[-1].append(error(model, found, others, args))
            print(f"{sparsity:.0%}, {name}: {rows[-1][-1]:.4f}", flush=True)
        chosen[sparsity] = [found.tiles.get(site, "raster") for site in found.sites]
    print(tabulate(rows, ("sparsity", *ways), floatfmt=".4f", tablefmt="github"))
    for sparsity, tiles in chosen.items():
        print(f"{sparsity:.0%}: {', '.join(map(str, tiles))}")
    print("; ".join(f"{name} {value:.0f} s" for name, value in seconds.items()), "of the CPU")


if __name__ == "__main__":
    main()
