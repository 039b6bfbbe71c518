"""How long a model of the study takes: a step of training by attention and batch; sampling and attention by sparsity.

    python studies/moving_digits/speed.py --setup large --batches 8 16 --keep 0.5 0.2 0.1   # steps of training

``timing`` is a part of ``reproduce.py``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from arms import ORDERS, TARGETS
from attention_study import record
from case import Case, Table
from choose import thresholds
from digits import noise_of
from journal import where
from lab import Lab
from setups import Stage, add_setup
from tabulate import tabulate
from torch import nn
from train import Run, precision
from transformer import sample

import sparge_compile

TIMED_STEPS = 5  # of sampling
TIMED = list(itertools.product(ORDERS, sorted(TARGETS)))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_time(args: argparse.Namespace, device: torch.device, keep: float | None, size: int) -> tuple[float, float]:
    """Milliseconds of a step (the median) and the seconds until the first was done."""
    stage = Stage(1000, size, 1e-5, args.frames or args.setup.frames, keep)
    with TemporaryDirectory() as folder:
        began, times = time.perf_counter(), []
        run = Run(replace(args.setup, stages=(stage,)), device, 0, Path(folder) / "none", Path(folder))
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            run.advance()
            wait(device)
            times.append(time.perf_counter() - start)
        first = time.perf_counter() - began - sum(times[1:])
    return 1000 * statistics.median(times[1:]), first


def timing(lab: Lab, seed: int) -> None:
    """Sampling and one layer's attention, dense and sparse, in the same run; the map and the order of tokens count."""
    table = Table(lab.args.out, "timing")
    if table.has(where(lab.device), "attention, a layer and clip", *TIMED[-1]):
        return
    lab.check_time("timing", 60)
    noise, classes = noise_of(lab.setup, seed, lab.args.batch // 2, lab.device, lab.args.frames)
    mixed, when, _, given = next(lab.held_out(seed))
    with precision(lab.device):
        site = record(lab.plain, mixed, when, given)[len(lab.plain.blocks) // 2]
    dtype = torch.bfloat16 if lab.device.type == "cuda" else torch.float32
    q, k, v = (x.to(dtype) for x in (site.q, site.k, site.v))

    def sampling(model: nn.Module) -> float:
        with torch.no_grad(), precision(lab.device):
            return spent(lambda: sample(model, noise, classes, TIMED_STEPS), lab.device, 2) / TIMED_STEPS / len(noise)

    def attending(**how: Any) -> float:
        return spent(lambda: sparge_compile.attention(q, k, v, **how), lab.device, 20) / len(q)

    dense = {"sampling, a step and clip": sampling(lab.dense)}
    dense["attention, a layer and clip"] = spent(lambda: F.scaled_dot_product_attention(q, k, v), lab.device, 20) / len(
        q
    )
    for order, target in TIMED:
        calibration = thresholds(lab, seed, Case("timing", thresholds="one pair", target=target, order=order))
        topk, topp = next(iter(calibration.sites.values()))[0]
        grid = {"grid": site.grid} if order == "tiles" else {}
        kept = sparge_compile.attention(q, k, v, topk=topk, topp=topp, return_sparsity=True, **grid)[1].item()
        found = {
            "sampling, a step and clip": (
                lab.sparsity(calibration, next(lab.held_out(seed))),
                sampling(lab.sparse(calibration)),
            ),
            "attention, a layer and clip": (kept, attending(topk=topk, topp=topp, **grid)),
        }
        for what, (sparsity, sparse) in found.items():
            key = {"device": where(lab.device), "what": what, "order": order, "target": target}
            table.add([{**key, "sparsity": sparsity, "dense ms": dense[what], "sparse ms": sparse}])


def spent(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of a call, the median."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup(parser)
    parser.add_argument("--frames", type=int, help="of a clip (those of the setup)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--keep", type=float, nargs="*", default=[1.0, 0.2, 0.1], help="shares of key blocks")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{where(device)}, {args.setup}, grid of tokens {args.setup.grid(args.frames)}")
    rows = []
    for size in args.batches:
        for keep in (None, *args.keep):
            found, first = step_time(args, device, keep, size)
            rows.append(("torch's" if keep is None else f"{keep:.0%} kept", size, found, found / size, first))
            print(*rows[-1], flush=True)
    print(tabulate(rows, ("attention", "clips", "ms a step", "ms a clip", "s to the first"), floatfmt=".1f"))


if __name__ == "__main__":
    main()
