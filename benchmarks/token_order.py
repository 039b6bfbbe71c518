"""What an order of tokens by tiles of space and time costs: attention with and without it, gathers included.

The shape is that of a video model (Wan 1.3B: 12 heads of 128, a grid of 21 x 30 x 52). Queries and keys are rotated
before attention, as in a model, so that a compiler may fuse the gathers into the rotation. Each query block keeps
equally many key blocks in both orders.

    python benchmarks/token_order.py
    python benchmarks/token_order.py --device cpu --grid 3 5 7 --heads 2 --head-size 32 --budget 0.05

Each row: how it runs, the order, the share of key blocks that each query block keeps, milliseconds of map and forward,
of these and the backward, and how many times as long as in raster order, in one run. All blocks are compared with dense
attention first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from sparge_compile import Grid, attention

SHARES = (0.05, 0.1, 0.2, 0.4)
TILE = (4, 4, 4)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, L, H, D] by halves."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def layer(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, topk: float, **order: Any) -> Tensor:
    """Attention of a layer: [B, L, H · D] of q, k and v [B, L, H, D]."""
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out = attention(*(x.transpose(1, 2) for x in (q, k, v)), topk=topk, **order)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2) * 0.5


def trained(call: Callable[[], Tensor], inputs: Sequence[Tensor], weight: Tensor) -> Callable[[], object]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(call(), inputs, weight)


def is_dense_attention(grid: Grid, device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless all blocks of a smaller grid are dense attention."""
    small = Grid(0, min(grid.frames, 5), min(grid.height, 9), min(grid.width, 20), 0)
    q, k, v = (torch.randn(1, 2, small.tokens, 64, device=device, dtype=dtype) for _ in "qkv")
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, grid=small), want, atol=2e-3, rtol=2e-2)


def main(given: Sequence[str] | None = None) -> list[list[Any]]:
    """Measure, print and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), help="frames, rows and columns of tokens")
    parser.add_argument("--tile", type=int, nargs=3, default=TILE)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each time")
    args = parser.parse_args(given)
    device, dtype = harness.start(args)
    torch.manual_seed(0)
    grid, tile = Grid(0, *args.grid, 0), tuple(args.tile)
    is_dense_attention(grid, device, dtype)
    shape = (1, grid.tokens, args.heads, args.head_size)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in "qkv")
    angle = torch.randn(1, grid.tokens, 1, args.head_size // 2, device=device)
    cos, sin, weight = angle.cos(), angle.sin(), torch.randn_like(q).flatten(2)
    run: dict[str, Callable[..., Tensor]] = {"eager": layer, "Inductor": torch.compile(layer, dynamic=False)}

    ways: dict[str, tuple[list[Any], Callable[[], Tensor]]] = {}
    for how, function in run.items():
        for share in SHARES:
            for order, options in (("raster", {}), ("tiles", {"grid": grid, "tile": tile})):
                call = partial(function, q, k, v, cos, sin, share, **options)
                ways[f"{how} {order} {share}"] = [how, order, share], call
    torch._dynamo.config.recompile_limit = len(ways)
    forward = {name: torch.no_grad()(call) for name, (_, call) in ways.items()}
    both = {name: trained(call, (q, k, v), weight) for name, (_, call) in ways.items()}
    times = [harness.seconds_each(calls, device, args.budget, gpu_only=True) for calls in (forward, both)]
    rows: list[list[Any]] = []
    raster: list[float] = []
    for name, (labels, _) in ways.items():
        found = [1000 * some[name] for some in times]
        raster = found if labels[1] == "raster" else raster
        rows.append([*labels, *found, *(t / base for t, base in zip(found, raster, strict=True))])
    head = ["run", "order", "kept", "forward, ms", "and backward, ms", "forward, x raster", "both, x raster"]
    print(tabulate(rows, head, floatfmt=".3f"))
    return rows


if __name__ == "__main__":
    main()
