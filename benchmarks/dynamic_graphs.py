"""Graphs that dynamic shapes take, here and without us: video and image transformers over ten resolutions.

    python benchmarks/dynamic_graphs.py                    # beside aot_eager and Inductor, for docs/dynamic-shapes.md
    python benchmarks/dynamic_graphs.py --only flux --inner aot_eager

Each model (tiny, random) is compiled with ``dynamic=True`` and called at ten resolutions with batches of 1 to 3 and
texts of two lengths, in inference and in training. Counted is what Dynamo compiles. Every site is made sparse
(``min_seq_len=0``), or what the sizes of a call say (the default, with costs that make a break-even inside the range).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch._dynamo.utils import counters

import sparge_compile.ops  # noqa: F401

sys.path.append(str(Path(__file__).parent.parent / "tests" / "whole"))
import models

# Latent height and width, in patches; and the batch.
SIZES = [(9, 11), (12, 16), (20, 12), (16, 16), (8, 24), (24, 14), (10, 10), (30, 17), (17, 30), (32, 20)]
BATCHES = [1, 2, 3, 2, 1, 3, 3, 1, 2, 1]
TEXTS = [11, 16]
BREAK_EVEN = {
    "dense_base": 0.0,
    "dense_pair": 1e-9,
    "sparse_base": 1e-4,
    "pool": 0.0,
    "select": 0.0,
    "sparse_pair": 1e-9,
}
WAYS: dict[str, dict[str, Any]] = {
    "always": {"min_seq_len": 0},
    "by cost": {"topk": 0.3, "topp": 0.0, "costs": BREAK_EVEN},
}


def batched(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, *x.shape[1:]).clone()


def wan(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 3, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "return_dict": False,
    }


def hunyuan_video(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    padding = torch.ones(batch, text, dtype=torch.long)
    padding[:, 7:] = 0
    return {
        **wan(height, width, batch, text),
        "encoder_attention_mask": padding,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def ltx_video(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    padding = torch.ones(batch, text, dtype=torch.long)
    padding[:, 7:] = 0
    return {
        "hidden_states": torch.randn(batch, 3 * height * width, 4),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": padding,
        "num_frames": 3,
        "height": height,
        "width": width,
        "return_dict": False,
    }


def flux(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, height * width, 8),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.stack([torch.zeros(height * width), rows.flatten(), columns.flatten()], -1),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


MODELS = {each.__name__: each for each in (wan, hunyuan_video, ltx_video, flux)}


def calls(name: str) -> Iterator[dict[str, Any]]:
    for i, ((height, width), batch) in enumerate(zip(SIZES, BATCHES, strict=True)):
        yield MODELS[name](height, width, batch, TEXTS[i % len(TEXTS)])


def graphs(name: str, backend: str, train: bool, options: dict[str, Any] | None = None) -> str:
    """How many graphs Dynamo compiles for all calls; with a "+" where it gave up at its limit."""
    torch.compiler.reset()
    counters.clear()
    model = getattr(models, name)()[0].train(train)
    compiled: Any = torch.compile(model, backend=backend, dynamic=True, **({"options": options} if options else {}))
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.set_grad_enabled(train):
            for inputs in calls(name):
                out = models.tensor_of(compiled(**inputs))
                if train:
                    out.sum().backward()
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        return f"{counters['stats']['unique_graphs']}+"
    return str(counters["stats"]["unique_graphs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--inner", choices=["aot_eager", "inductor"], nargs="*", default=["aot_eager"])
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        for train in (False, True):
            for inner in arguments.inner:
                found = [graphs(name, "sparge", train, {"inner": inner, **way}) for way in WAYS.values()]
                rows.append([name, "training" if train else "inference", inner, graphs(name, inner, train), *found])
                print(*rows[-1], flush=True, file=sys.stderr)
    print(f"torch {torch.__version__}: graphs for {len(SIZES)} resolutions, batches {sorted(set(BATCHES))}\n")
    print(tabulate(rows, headers=["model", "", "compiler", "alone", *WAYS], tablefmt="github"))


if __name__ == "__main__":
    main()
