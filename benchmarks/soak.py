"""A soak: thousands of calls over hundreds of shapes, in one process. Nothing may grow.

    python benchmarks/soak.py                       # 10,000 calls over 200 shapes, inference and training by turns
    python benchmarks/soak.py --calls 1000 --every 100

A small block is compiled with ``dynamic=True``. Printed at intervals: resident memory, tensors
and Python objects alive, graphs that Dynamo compiled, threads, open files. It ends with an error if one of the counts
grew after the first quarter, or memory by more than a tenth.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch._dynamo.utils import counters

import sparge_compile.ops  # noqa: F401

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from toys import Stack

WIDTH = 32  # of the toy
PAGE = os.sysconf("SC_PAGE_SIZE")


class State(NamedTuple):
    """What a process holds."""

    calls: int
    mebibytes: float
    objects: int
    graphs: int
    threads: int
    files: int


def state(calls: int) -> State:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    return State(
        calls,
        round(resident / 2**20, 1),
        len(gc.get_objects()),
        counters["stats"]["unique_graphs"],
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
    )


def soak(calls: int, shapes: int, every: int, inner: str) -> list[State]:
    draw = random.Random(0)
    sizes = [(draw.randint(1, 3), draw.randint(1, 700)) for _ in range(shapes)]
    options: dict[str, Any] = {"min_seq_len": 256, "inner": inner, "topk": 0.3, "topp": 0.0}
    compiled: Any = torch.compile(Stack(), backend="sparge", dynamic=True, options=options)
    states = []
    for i in range(calls):
        batch, length = sizes[i % shapes]
        x = torch.randn(batch, length, WIDTH)
        with torch.set_grad_enabled(i % 2 == 1):
            out = compiled(x)
            if out.requires_grad:
                out.sum().backward()
                compiled.zero_grad()
        if (i + 1) % every == 0:
            states.append(state(i + 1))
            print(*states[-1], flush=True, file=sys.stderr)
    return states


def grown(states: list[State]) -> list[str]:
    """What grew after the first quarter of the run."""
    early, late = states[len(states) // 4], states[-1]
    limits = early._replace(mebibytes=early.mebibytes * 1.1, objects=int(early.objects * 1.01))
    return [name for name in State._fields[1:] if getattr(late, name) > getattr(limits, name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--inner", default="aot_eager", choices=["aot_eager", "inductor"])
    arguments = parser.parse_args()
    logging.getLogger("sparge_compile").setLevel(logging.ERROR)
    states = soak(arguments.calls, arguments.shapes, arguments.every, arguments.inner)
    headers = ["calls", "MiB", "objects", "graphs", "threads", "open files"]
    print(tabulate(states, headers=headers, tablefmt="github"))
    if more := grown(states):
        raise SystemExit(f"These grew: {', '.join(more)}.")


if __name__ == "__main__":
    main()
