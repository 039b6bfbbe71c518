"""The operands of a call brought into the order of blocks, and its result back: gathers along the tokens.

They are torch's own ops beside the one op that attends, so that Inductor fuses them into what makes queries and keys
and into what reads the output, and writes each of them once. The gradient of a gather is the gather that undoes it:
nothing is added up atomically.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import sharding
from .allocate import memory_order
from .how import How
from .order import Orders


def into_order(
    query: Tensor, key: Tensor, value: Tensor, how: How, orders: Orders, reordered: bool = False
) -> tuple[Tensor, Tensor, Tensor, How]:
    """The operands and the mask [B or 1, H or 1, L or 1, S] of ``how``, in the order of blocks.

    ``reordered``: the operands are in it already, the mask is not.
    """
    slots_q, places_q, slots_k, places_k = _beside(query, orders)
    mask, rows = how.attn_mask, torch.ops.sparge.rows.default
    if slots_k is not None:
        key, value = (key, value) if reordered else (rows(x, slots_k, places_k) for x in (key, value))
        mask = None if mask is None else mask.index_select(3, slots_k)
    if slots_q is not None:
        query = query if reordered else rows(query, slots_q, places_q)
        mask = mask if mask is None or mask.shape[2] == 1 else mask.index_select(2, slots_q)
    return query, key, value, how._replace(attn_mask=mask, slots_q=slots_q, slots_k=slots_k)


def out_of_order(x: Tensor, orders: Orders) -> Tensor:
    """A result [B, H, L, ...] in the order of the tokens."""
    slots, places, *_ = _beside(x, orders)
    return x if slots is None else torch.ops.sparge.rows.default(x, places, slots)


def _beside(x: Tensor, orders: Orders) -> Orders:
    """Orders as tensors of the kind that x is."""
    return Orders(*sharding.on_the_mesh_of(x, *orders)) if sharding.is_sharded(x) else orders


def rows(x: Tensor, index: Tensor, inverse: Tensor, dim: int = 2) -> Tensor:
    """Rows ``index`` of x [B, H, L, ...], or along another dimension; a permutation that ``inverse`` undoes.

    The op of this name is what passes put into a graph, and becomes torch's own ops behind it.
    """
    return _Gather.apply(x, index, inverse, dim)


class _Gather(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
        return _gather(x, index, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.dim = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _, inverse = ctx.saved_tensors
        return _gather(grad, inverse, ctx.dim), None, None, None


def _gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows ``index`` of x along a dimension; its memory keeps the order of its dimensions.

    It is a view of itself by strides, and so a tensor in memory to Inductor. Else each reader would gather for itself:
    a sum over rows that are read by an index is not split, and takes some ten times as long.
    """
    order = memory_order(x)
    undone = sorted(range(x.dim()), key=order.__getitem__)
    made = x.permute(order).index_select(order.index(dim), index).permute(undone)
    return made if sharding.is_sharded(made) else made.as_strided(made.shape, made.stride())
