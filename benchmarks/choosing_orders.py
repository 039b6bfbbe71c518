"""What choosing the order of tokens adds to a calibration: raster order alone beside the orders tried by default.

    python benchmarks/choosing_orders.py                     # the trained model of studies/moving_digits, on a GPU
    python benchmarks/choosing_orders.py --model wan         # three layers of Wan2.1-1.3B's shape, random weights
    python benchmarks/choosing_orders.py --device cpu --tiny --rounds 1

Each calibration has a process of its own, as from the command line, in which Dynamo traces the model; its kernels come
from caches on disk, which a first process, not measured, fills by both calibrations. The two take turns. Seconds are
those of ``calibrate`` alone, graphs those that Dynamo made, *chosen* how many orders the sites have, and the last
column is what ``progress=True`` says.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from calibration_time import StandIn
from wan_stand_in import TEXT

import sparge_compile

STUDY = Path(__file__).parent.parent / "studies/moving_digits"
WAYS: dict[str, list[str] | None] = {"raster": ["raster"], "chosen": None}
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")

Asked = dict[str, Any]  # arguments of calibrate


def digits(device: torch.device, is_tiny: bool) -> Asked:
    """The trained video model, two clips at two times, 84 % sparse."""
    sys.path.insert(0, str(STUDY))
    from output_error import calls, inputs
    from transformer import load

    model, times = load("teacher", device), [0.8, 0.5]
    given = argparse.Namespace(batches=1 if is_tiny else 2, frames=2 if is_tiny else 16, device=str(device))
    return {
        "model": model,
        "batches": inputs(given, 0, held_out=False),
        "call": lambda *batch: calls(model, batch, times),
        "target_sparsity": 0.84,
        "options": {"min_seq_len": 0},
    }


def wan(device: torch.device, is_tiny: bool) -> Asked:
    """Wan's blocks and grid, two samples, 75 % sparse."""
    layers, heads, head_size, grid = (2, 2, 64, (4, 12, 12)) if is_tiny else (3, 12, 128, (21, 30, 52))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length, width = grid[0] * grid[1] * grid[2], heads * head_size
    torch.manual_seed(0)
    with device:
        model = StandIn(layers, heads, head_size, length).to(dtype).eval()
        texts = [torch.randn(1, TEXT, width, dtype=dtype) for _ in range(2)]
    return {
        "model": model,
        "batches": [(harness.smooth(1, 1, length, width, dtype, device)[0], text) for text in texts],
        "target_sparsity": 0.75,
        "options": {"min_seq_len": TEXT + 1, "grid": grid},
    }


MODELS = {"digits": digits, "wan": wan}


@torch.no_grad()
def calibrated(asked: Asked, way: str) -> dict[str, Any]:
    """Calibrate once; what it took, and what was chosen."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    graphs, said, start = counted["unique_graphs"], io.StringIO(), time.perf_counter()
    with contextlib.redirect_stderr(said):
        found = sparge_compile.calibrate(**asked, orders=WAYS[way], progress=True)
    seconds = time.perf_counter() - start
    return {
        "orders": way,
        "seconds": seconds,
        "graphs": counted["unique_graphs"] - graphs,
        "chosen": len({found.tiles.get(site) for site in found.sites}),
        "of which": next((line for line in said.getvalue().splitlines() if line.startswith("time:")), ""),
    }


def in_a_process(arguments: Sequence[str], ways: Iterable[str], caches: str) -> list[dict[str, Any]]:
    """The rows of calibrations that a process of their own makes, one after the other."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments, "--once", *ways]
    environment = os.environ | {name: f"{caches}/{name}" for name in CACHES}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def added(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """By how much of raster's own time the choice is longer, for each round of ``rows``."""
    seconds = {way: [row["seconds"] for row in rows if row["orders"] == way] for way in WAYS}
    return [chosen / raster - 1 for raster, chosen in zip(seconds["raster"], seconds["chosen"], strict=True)]


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="digits")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny input, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=2, help="(2)")
    parser.add_argument("--once", choices=list(WAYS), nargs="+", help="in this process; prints lines of JSON")
    arguments = list(sys.argv[1:] if given is None else given)
    args = parser.parse_args(arguments)
    device = harness.require(args.device)
    if args.once:
        for way in args.once:
            print(json.dumps(calibrated(MODELS[args.model](device, args.tiny), way)), flush=True)
        return
    print(harness.header(device), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as caches:
        in_a_process(arguments, WAYS, caches)
        for number in range(1, args.rounds + 1):
            for way in WAYS:
                (row,) = in_a_process(arguments, [way], caches)
                rows.append({"round": number, **row})
                print(f"round {number}, {way}: {row['seconds']:.2f} s, {row['of which']}", flush=True)
    print(harness.table(rows))
    print(f"the choice adds {', '.join(f'{share:.0%}' for share in added(rows))} to raster's own time")


if __name__ == "__main__":
    main()
