"""What the passes cost: their share of the compile time of a 30-layer Wan transformer.

    python benchmarks/pass_time.py                # Inductor on this machine's device
    python benchmarks/pass_time.py --layers 8

Widths are small, because the time to compile hangs on the graph and not on the sizes in it. Inductor's caches are off.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tabulate import tabulate
from torch._inductor.utils import fresh_cache
from torch.utils._pytree import tree_map_only

from sparge_compile import backend

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import models

STEPS = ("clone", "find", "slots_of", "_plan", "pipeline.apply")


def timed(seconds: dict[str, float], name: str) -> None:
    """Note the time of one step of the backend in ``seconds``."""
    *path, attribute = name.split(".")
    owner: Any = backend
    for part in path:
        owner = getattr(owner, part)
    step: Callable[..., Any] = getattr(owner, attribute)

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return step(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    setattr(owner, attribute, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    given = parser.parse_args()
    model, inputs = tree_map_only(torch.Tensor, lambda x: x.to(given.device), models.wan(given.layers))
    model.to(given.device).eval()
    seconds: dict[str, float] = {}
    for step in STEPS:
        timed(seconds, step)
    options = {"min_seq_len": 100, "inner": given.inner}
    compiled = torch.compile(model, backend="sparge", options=options, fullgraph=True)
    with fresh_cache(), torch.no_grad():
        start = time.perf_counter()
        compiled(**inputs)
        total = time.perf_counter() - start
    ours = sum(seconds.values())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{given.layers} layers on {given.device}, inner {given.inner}; {versions}")
    rows = [(name.removeprefix("_"), spent, f"{spent / total:.2%}") for name, spent in seconds.items()]
    rows += [("passes together", ours, f"{ours / total:.2%}"), ("first call", total, "")]
    print(tabulate(rows, headers=("step", "seconds", "share"), floatfmt=".2f"))


if __name__ == "__main__":
    main()
