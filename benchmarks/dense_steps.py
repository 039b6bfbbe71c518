"""A denoising run whose first steps are dense by plan: is a dense step the dense model, and what do the steps take?

    python benchmarks/dense_steps.py                                   # a GPU: 12 blocks, L = 16,384
    python benchmarks/dense_steps.py --mode reduce-overhead            # in CUDA graphs
    python benchmarks/dense_steps.py --device cpu --layers 2 --length 2048 --heads 2 --head-size 32

Blocks of attention and an MLP, compiled by Inductor alone and by the backend: whole, and block by block. Dense steps
must give the very numbers of Inductor's dense model, sparse ones must not, and no step may compile anything. Then each
kind of step is timed beside the dense model.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import harness
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sparge_compile
from sparge_compile import Calibration

DENSE_STEPS, STEPS = 2, 4


class Block(nn.Module):
    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        width = heads * head_size
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Blocks(nn.Module):
    def __init__(self, layers: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(heads, head_size) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def compiled(model: nn.Module, by_block: bool, **how: Any) -> nn.Module:
    """The model, compiled whole or block by block."""
    if not by_block:
        return torch.compile(model, **how)  # type: ignore[return-value]
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(**how)
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--topk", type=float, default=0.1)
    parser.add_argument("--mode", help="Inductor's, as reduce-overhead")
    args = parser.parse_args()
    device, dtype = harness.start(args)
    torch.manual_seed(0)
    plain = Blocks(args.layers, args.heads, args.head_size).to(device, dtype).eval()
    x = torch.randn(1, args.length, args.heads * args.head_size, dtype=dtype, device=device)
    thresholds = Calibration({"blocks.*": [(args.topk, 0.0)]})
    rows = []
    for by_block in (False, True):
        torch.compiler.reset()
        dense = compiled(copy.deepcopy(plain), by_block, **({"mode": args.mode} if args.mode else {}))
        exact = dense(x).clone()
        model = copy.deepcopy(plain)
        handle = sparge_compile.attach(model, thresholds, dense_steps=DENSE_STEPS)
        run = compiled(model, by_block, backend="sparge", options={"min_seq_len": 0, "inductor_mode": args.mode})
        for step in range(STEPS):  # warm both up
            handle.set_step(step, STEPS)
            run(x)
        before, same = counters["stats"]["unique_graphs"], []
        for step in (*range(STEPS), *range(STEPS)):
            handle.set_step(step, STEPS)
            same.append(torch.equal(run(x), exact))
        wanted = [step < DENSE_STEPS for step in range(STEPS)] * 2
        anew = counters["stats"]["unique_graphs"] - before
        verdict = "right" if same == wanted and not anew else f"WRONG: dense in {same}, {anew} graphs compiled anew"
        seconds = {"dense model": harness.seconds_each({"": lambda dense=dense: dense(x)}, device)[""]}
        for name, step in (("dense step", 0), ("sparse step", STEPS - 1)):
            handle.set_step(step, STEPS)
            seconds[name] = harness.seconds_each({"": lambda run=run: run(x)}, device)[""]
        rows.append(("block by block" if by_block else "whole", *(1e3 * each for each in seconds.values()), verdict))
    print(tabulate(rows, headers=("compiled", "dense model, ms", "dense step, ms", "sparse step, ms", "")))


if __name__ == "__main__":
    main()
