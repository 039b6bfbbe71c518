"""Ulysses: parts of a sequence with all heads are exchanged for the whole sequence with a part of the heads, and back.

``sparge::to_heads`` and ``sparge::to_rows`` are what stands in a graph around attention. They become torch's own
functional collectives between views and one copy each: what arrives of queries, keys and values is read as it lies.
An order of the heads says which of them each rank gets; it is in effect between the two ops and nowhere else.

Letters: P ranks, H query heads, Hk key heads, R = L / P rows of one rank. Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops  # noqa: F401  which defines the library
from ..errors import value_error

library = torch.library.Library("sparge", "FRAGMENT")
_RANKS = "Tensor? order, int rank, int ranks, str group"
library.define(
    f"to_heads(Tensor query, Tensor key, Tensor value, {_RANKS}) -> (Tensor query, Tensor key, Tensor value)"
)
library.define(f"to_rows(Tensor out, int key_heads, {_RANKS}) -> Tensor")
library.define("of_rank(Tensor by_head, int key_heads, Tensor? order, int rank, int ranks) -> Tensor")


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor | None, rank: int, ranks: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, H, R, D], key and value [B, Hk, R, D or Dv] to [B, H / P, L, D] and [B, Hk / P, L, ...].

    ``order`` [Hk] holds the key heads of rank 0, then those of rank 1, and so on, with their query heads; None: as they
    come.
    """
    key_heads = key.shape[1]
    if key_heads % ranks or query.shape[1] % key_heads:
        raise value_error(
            "heads cannot be exchanged",
            given=f"{query.shape[1]} query heads and {key_heads} key heads over {ranks} ranks",
            allowed="a number of key heads that the ranks divide",
            todo="Use fewer ranks for heads, and the others in a ring.",
        )
    q, k, v = (x.shape[2:] for x in (query, key, value))
    parts = [[query], [key], [value]]
    if k == v:  # those of one length and head size in one exchange
        parts = [[query, key, value]] if q == k else [[query], [key, value]]
    elif q == k:
        parts = [[query, key], [value]]
    return tuple(x for part in parts for x in _to_heads(part, order, key_heads, ranks, group))


def _to_heads(tensors: list[Tensor], order: Tensor | None, key_heads: int, ranks: int, group: str) -> Any:
    """Tensors of one head size in one exchange: sent as [P, R, B, all their heads / P, D]."""
    parts = [
        _ordered(x, order, key_heads).unflatten(1, (ranks, x.shape[1] // ranks)).permute(1, 3, 0, 2, 4) for x in tensors
    ]
    heads = [x.shape[3] for x in parts]
    came = _AllToAll.apply(torch.cat(parts, 3), ranks, group)
    return tuple(x.permute(1, 2, 0, 3) for x in came.flatten(0, 1).split(heads, 2))


def to_rows(out: Tensor, key_heads: int, order: Tensor | None, rank: int, ranks: int, group: str) -> Tensor:
    """What heads gave, [B, H / P, L, Dv], to [B, H, R, Dv], in the order in which the heads came; L = P · R."""
    parts = out.permute(2, 0, 1, 3).unflatten(0, (ranks, out.shape[2] // ranks))
    came = _AllToAll.apply(parts, ranks, group)  # [P, R, B, H / P, Dv]
    x = came.permute(2, 0, 3, 1, 4).flatten(1, 2)
    return x if order is None else _ordered(x, order.argsort(), key_heads)


def of_rank(by_head: Tensor, key_heads: int, order: Tensor | None, rank: int, ranks: int) -> Tensor:
    """The rows of [H, ...] that belong to the heads of a rank, in their order there: [H / P, ...]."""
    per_rank = key_heads // ranks
    grouped = by_head.unflatten(0, (key_heads, by_head.shape[0] // key_heads))
    mine = grouped.narrow(0, rank * per_rank, per_rank)
    if order is not None:
        mine = grouped.index_select(0, order.narrow(0, rank * per_rank, per_rank))
    return mine.flatten(0, 1)


def _ordered(x: Tensor, order: Tensor | None, key_heads: int) -> Tensor:
    """The heads of x [B, H, ...] in an order of the key heads."""
    if order is None:
        return x
    return x.unflatten(1, (key_heads, x.shape[1] // key_heads)).index_select(1, order).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Part p of x [P, ...] goes to rank p, whose part comes in its place. Its gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: str) -> Tensor:
        ctx.ranks, ctx.group = ranks, group
        return all_to_all(x, ranks, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_to_all(grad, ctx.ranks, ctx.group), None, None


def all_to_all(x: Tensor, ranks: int, group: str) -> Tensor:
    """Exchange the parts of x [P, ...] among the ranks of a group."""
    collectives = torch.ops._c10d_functional
    flat = x.contiguous().flatten(1)
    sizes = [1] * ranks
    return collectives.wait_tensor(collectives.all_to_all_single(flat, sizes, sizes, group)).view(x.shape)


def autocast(op: Any, number: int, device: str) -> Any:
    """What casts the first operands of an op as autocast does for dense attention, and runs it."""

    def run(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [x if x.dtype == torch.float64 else x.to(dtype) for x in arguments[:number]]
        with torch.amp.autocast(device, enabled=False):
            return op(*cast, *arguments[number:])

    return run


for _name, _function in (("to_heads", to_heads), ("to_rows", to_rows), ("of_rank", of_rank)):
    library.impl(_name, _function, "CompositeImplicitAutograd")
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    library.impl("to_heads", autocast(torch.ops.sparge.to_heads.default, 3, _device), _key)
