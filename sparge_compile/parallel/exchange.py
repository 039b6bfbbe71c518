"""Ulysses: parts of a sequence with all heads are exchanged for the whole sequence with a part of the heads, and back.

``sparge::to_heads`` and ``sparge::to_rows`` are what stands in a graph around attention. They become torch's own
functional collectives between views and one copy each: what arrives of queries, keys and values is read as it lies.
An order of the heads says which of them each rank gets; it is in effect between the two ops and nowhere else.

Letters: P ranks, H query heads, Hk key heads, R = L / P rows of one rank. Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops  # noqa: F401  which defines the library
from ..errors import value_error
from . import engines

library = torch.library.Library("sparge", "FRAGMENT")
_RANKS = "Tensor? order, int rank, int ranks, str group"
library.define(
    f"to_heads(Tensor query, Tensor key, Tensor value, {_RANKS}) -> (Tensor query, Tensor key, Tensor value)"
)
library.define(f"to_heads_in_turns(Tensor query, Tensor key, Tensor value, int[] turns, {_RANKS}) -> Tensor[]")
library.define(f"to_rows(Tensor out, int key_heads, {_RANKS}) -> Tensor")
library.define(f"to_rows_in_turns(Tensor[] outs, int key_heads, {_RANKS}) -> Tensor")
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
    q, k, v = to_heads_in_turns(query, key, value, [key_heads // ranks], order, rank, ranks, group)
    return q, k, v


def to_heads_in_turns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turns: list[int],
    order: Tensor | None,
    rank: int,
    ranks: int,
    group: str,
) -> list[Tensor]:
    """The same in turns, one behind the other: query, key and value of the first key heads of each rank, as many as
    ``turns`` begins with, then those of the next, and so on."""
    key_heads = key.shape[1]
    queries, keys, values = (
        _ordered(x, order, key_heads).unflatten(1, (ranks, x.shape[1] // ranks)).permute(1, 3, 0, 2, 4)
        for x in (query, key, value)
    )  # [P, R, B, heads / P, D] each
    in_turns = zip(
        queries.split([n * (query.shape[1] // key_heads) for n in turns], 3), keys.split(turns, 3), strict=True
    )
    # Values first: they are on their way while keys and queries are projected, if the compiler starts an exchange as
    # early as it can. Keys and queries, which most compilers write in one kernel, go together.
    together = [[values]]
    for q, k in in_turns:
        is_one = key.shape[2:] == query.shape[2:] and group not in engines.lanes
        together += [[k, q]] if is_one else [[k], [q]]
    came = _AllToAll.apply(ranks, group, *(torch.cat(some, 3) if len(some) > 1 else some[0] for some in together))
    v, *others = (
        x.permute(1, 2, 0, 3)  # [B, heads, L, D]
        for some, whole in zip(together, came, strict=True)
        for x in whole.flatten(0, 1).split([part.shape[3] for part in some], 2)
    )
    each = zip(others[1::2], others[::2], v.split(turns, 1), strict=True)
    return [x for turn in each for x in turn]


def to_rows(out: Tensor, key_heads: int, order: Tensor | None, rank: int, ranks: int, group: str) -> Tensor:
    """What heads gave, [B, H / P, L, Dv], to [B, H, R, Dv], in the order in which the heads came; L = P · R."""
    return to_rows_in_turns([out], key_heads, order, rank, ranks, group)


def to_rows_in_turns(
    outs: list[Tensor], key_heads: int, order: Tensor | None, rank: int, ranks: int, group: str
) -> Tensor:
    """The same of what the heads of each turn gave."""
    parts = [out.permute(2, 0, 1, 3).unflatten(0, (ranks, out.shape[2] // ranks)) for out in outs]
    came = _AllToAll.apply(ranks, group, *parts)  # [P, R, B, heads of the turn, Dv] each
    each = [x.permute(2, 1, 0, 3, 4) for x in came]
    x = (torch.cat(each, 3) if len(each) > 1 else each[0]).flatten(2, 3).transpose(1, 2)  # laid out as rows: one copy
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
    """Part p of each x [P, ...] goes to rank p, whose part comes in its place. Gradients go back the same way, the last
    first: a backward begins where the forward ended."""

    @staticmethod
    def forward(ctx: Any, ranks: int, group: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.group = ranks, group
        return all_to_all(tensors, ranks, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *reversed(all_to_all(grads[::-1], ctx.ranks, ctx.group))


def all_to_all(tensors: Sequence[Tensor], ranks: int, group: str) -> tuple[Tensor, ...]:
    """Exchange the parts of each x [P, ...] among the ranks of a group: all are under way before one is waited for."""
    collectives, sizes = torch.ops._c10d_functional, [1] * ranks
    if group in engines.lanes:
        sent = [torch.ops.sparge.all_to_all(x, group) for x in tensors]
        return tuple(collectives.wait_tensor(x) for x in sent)
    sent = [collectives.all_to_all_single(x.contiguous().flatten(1), sizes, sizes, group) for x in tensors]
    return tuple(collectives.wait_tensor(x).view(y.shape) for x, y in zip(sent, tensors, strict=True))


def autocast(op: Any, number: int, device: str) -> Any:
    """What casts the first operands of an op as autocast does for dense attention, and runs it."""

    def run(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [x if x.dtype == torch.float64 else x.to(dtype) for x in arguments[:number]]
        with torch.amp.autocast(device, enabled=False):
            return op(*cast, *arguments[number:])

    return run


for _function in (to_heads, to_heads_in_turns, to_rows, to_rows_in_turns, of_rank):
    library.impl(_function.__name__, _function, "CompositeImplicitAutograd")
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    library.impl("to_heads", autocast(torch.ops.sparge.to_heads.default, 3, _device), _key)
    library.impl("to_heads_in_turns", autocast(torch.ops.sparge.to_heads_in_turns.default, 3, _device), _key)
