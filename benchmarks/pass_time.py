"""What the passes cost: their share of the compile time of a 30-layer Wan transformer.

    python benchmarks/pass_time.py                # Inductor on this machine's device
    python benchmarks/pass_time.py --layers 8
    python benchmarks/pass_time.py --inner eager  # Dynamo and the passes alone: quick

Widths are small, because the time to compile hangs on the graph and not on the sizes in it. Inductor's caches are off.
The times are those that the package logs for each pass at DEBUG; they leave out the copy of Dynamo's graph before the
first pass.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from tabulate import tabulate
from torch._inductor.utils import fresh_cache
from torch.utils._pytree import tree_map_only

sys.path.append(str(Path(__file__).parent.parent / "tests" / "whole"))
import models


class PassTime(NamedTuple):
    """One pass over one graph, as the package logs it."""

    number: int
    name: str
    milliseconds: float
    nodes_changed: int


class Collector(logging.Handler):
    """Keeps what is logged about passes."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.passes: list[PassTime] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("pass %d"):
            self.passes.append(PassTime(*record.args))


@contextmanager
def pass_times() -> Iterator[list[PassTime]]:
    """A list that fills with the passes that run inside."""
    logger, collector = logging.getLogger("sparge_compile"), Collector()
    before = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # nobody else is to print what is only collected
    try:
        yield collector.passes
    finally:
        logger.removeHandler(collector)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def measure(layers: int, device: str, inner: str) -> tuple[list[PassTime], float]:
    """The passes over the model's one graph, and the seconds of the whole first call."""
    model, inputs = tree_map_only(torch.Tensor, lambda x: x.to(device), models.wan(layers))
    model.to(device).eval()
    options = {"min_seq_len": 100, "inner": inner}
    compiled = torch.compile(model, backend="sparge", options=options, fullgraph=True)
    with fresh_cache(), pass_times() as passes, torch.no_grad():
        start = time.perf_counter()
        compiled(**inputs)
        return passes, time.perf_counter() - start


def table(passes: list[PassTime], seconds: float) -> str:
    """A row for each pass, one for all of them, one for the whole compilation."""
    ours = sum(each.milliseconds for each in passes)
    rows: list[tuple[object, ...]] = [
        (each.number, each.name, each.milliseconds, f"{each.milliseconds / seconds / 1e3:.3%}", each.nodes_changed)
        for each in passes
    ]
    rows += [("", "passes together", ours, f"{ours / seconds / 1e3:.3%}"), ("", "first call", seconds * 1e3, "100%")]
    return tabulate(rows, headers=("pass", "name", "ms", "share", "nodes changed"), floatfmt=".1f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    given = parser.parse_args()
    passes, seconds = measure(given.layers, given.device, given.inner)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{given.layers} layers on {given.device}, inner {given.inner}; {versions}")
    print(table(passes, seconds))


if __name__ == "__main__":
    main()
