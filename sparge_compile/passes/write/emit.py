"""Write nodes into a graph: operands in the form that the op takes, and its result in the form that the graph expects.

ATen overloads only, so that Dynamo graphs, exported programs and plain FX graphs take them alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ...sharding import dims_of, is_sharded, placed
from ..match.attention import Attention, Factor, Mask, Operand
from ..match.joint import Part
from ..match.masks import HIDDEN
from ..read.axes import Axis, Layout, axes_of, settle, size_of
from ..read.fx_utils import value_of

aten = torch.ops.aten


def call(graph: Graph, op: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert a call of an ATen op, with the fake value that it gives where that can be told."""
    node = graph.call_function(op, args, kwargs)
    node.meta |= _noted(_fake_result(op, args, kwargs))
    return node


def values_like(node: Node) -> dict[str, Any]:
    """What the meta of a node says that holds a new tensor like that of another."""
    return _noted(_fake_result(aten.empty_like.default, (node,), {}))


def _noted(value: Any) -> dict[str, Any]:
    return {} if value is None else {"val": value, "example_value": value}


class Emitter:
    """Inserts what one attention needs, before the node that holds its result."""

    def __init__(self, graph: Graph, attention: Attention, translate: Callable[[Node], Node]) -> None:
        self.graph = graph
        self.attention = attention
        self.translate = translate

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call of an ATen op; see :func:`call`."""
        return call(self.graph, op, *args, **kwargs)

    def operands(self) -> tuple[Node, Node, Node]:
        """query [B, H, L, D], key [B, Hk, S, D], value [B, Hk, S, Dv], in the dtype that attention is computed in."""
        found = self.attention
        parts = (found.query, found.key, found.value)
        laid_out = [(part, self.operand(part)) for part in parts]
        query, key, value = (self._cast(self._broadcast(node, part, laid_out), part) for part, node in laid_out)
        for factor in found.factors:
            query = self.scaled(query, factor)
        if found.factors:
            query = self.call(aten.to.dtype, query, found.dtype)
        return query, key, value

    def operand(self, operand: Operand) -> Node:
        """Insert what lays an operand out as it is wanted; what it lacks has size 1."""
        return self.arrange(self.translate(operand.node), operand.layout, operand.wanted)

    def _broadcast(self, node: Node, operand: Operand, others: list[tuple[Operand, Node]]) -> Node:
        """Dimensions of which the operand has no axis, at their full size. Another operand has the dynamic ones."""
        sizes: list[Any] = []
        for i, dim in enumerate(operand.wanted):
            missing = bool(dim) and not operand.has(dim)
            sizes.append(self._size(dim, i, others) if missing else -1)
        return node if sizes == [-1] * len(sizes) else self.call(aten.expand.default, node, sizes)

    def size(self, part: Part) -> Any:
        """The size of a part of the sequence: a number, or the node of one."""
        known = isinstance(part.size, int)
        return part.size if known else self.call(aten.sym_size.int, self.translate(part.node), part.dim)

    def _size(self, dim: tuple[Axis, ...], position: int, others: list[tuple[Operand, Node]]) -> Any:
        size = size_of(dim)
        if isinstance(size, int):
            return size
        holder = next(node for operand, node in others if operand.has(dim))
        return self.call(aten.sym_size.int, holder, position)

    def _cast(self, node: Node, operand: Operand) -> Node:
        dtype = _dtype(self.translate(operand.node))
        return node if dtype in (None, self.attention.dtype) else self.call(aten.to.dtype, node, self.attention.dtype)

    def scaled(self, query: Node, factor: Factor) -> Node:
        """Insert the product of the query with a factor of the scores, or the quotient."""
        op = aten.div.Tensor if factor.inverse else aten.mul.Tensor
        by = self.translate(factor.operand) if isinstance(factor.operand, Node) else self.operand(factor.operand)
        return self.call(op, query, by)

    def of_rank(self, thresholds: Node) -> Node:
        """The thresholds of this rank's heads, of those of all ranks."""
        found = self.attention.exchange
        if found is None:
            return thresholds
        order = None if found.order is None else self.translate(found.order)
        return self.call(torch.ops.sparge.of_rank.default, thresholds, found.key_heads, order, found.rank, found.ranks)

    def packing(self) -> dict[str, Node | int]:
        """The arguments that say where packed sequences begin; none for other attention."""
        found = self.attention.packing
        if found is None:
            return {}
        starts = {name: getattr(found, name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        made = {name: self.translate(node) for name, node in starts.items()}
        for name, node in made.items():
            if _dtype(node) not in (None, torch.int32):
                made[name] = self.call(aten.to.dtype, node, torch.int32)
        longest = {"max_seqlen_q": found.max_seqlen_q, "max_seqlen_k": found.max_seqlen_k}
        return made | {name: self.translate(x) if isinstance(x, Node) else x for name, x in longest.items()}

    def mask(self) -> Node | None:
        """One mask [B or 1, H or 1, L or 1, S or 1] of all: boolean, or float where scores change."""
        keep: Node | None = None
        added: Node | None = None
        for mask in self.attention.masks:
            made = self._row(self.operand(mask.operand), mask)
            if mask.kind == "add":
                dtype = _dtype(self.translate(mask.operand.node))
                if dtype is not None and not dtype.is_floating_point:
                    made = self.call(aten.to.dtype, made, self.attention.dtype)
                made = self.call(aten.mul.Tensor, made, mask.factor) if mask.factor != 1 else made
                added = made if added is None else self.call(aten.add.Tensor, added, made)
                continue
            if mask.kind == "drop":
                made = self.call(aten.logical_not.default, made)
            elif mask.kind == "hide":
                made = self.call(aten.gt.Scalar, made, HIDDEN / 2 / mask.factor)
            elif _dtype(self.translate(mask.operand.node)) != torch.bool:
                made = self.call(aten.ne.Scalar, made, 0)
            keep = made if keep is None else self.call(aten.logical_and.default, keep, made)
        if added is None:
            return keep
        if keep is not None:
            added = self.call(aten.masked_fill.Scalar, added, self.call(aten.logical_not.default, keep), -torch.inf)
        return added

    def _row(self, node: Node, mask: Mask) -> Node:
        if mask.row is None:
            return node
        return self.call(aten.slice.Tensor, node, 2, *((0, 1) if mask.row == "first" else (-1, 2**63 - 1)))

    def result(self, node: Node) -> Node:
        """The op's result in the axes, dtype and strides of what it replaces."""
        found = self.attention
        axes = found.axes
        heads = (*axes.heads, *axes.group)
        made = self.arrange(node, settle((axes.batch, heads, axes.rows, axes.value_feature)), found.output_layout)
        old = found.result
        if old.dtype != found.dtype:
            made = self.call(aten.to.dtype, made, old.dtype)
        if found.rewritten:  # the op keeps its result for the backward; a product does not
            made = self.call(aten.clone.default, made, memory_format=torch.contiguous_format)
        elif not self._has_the_strides_of_the_op() and old.is_contiguous():
            made = self.call(aten.contiguous.default, made)
        if is_sharded(old):  # what reads its local part expects that of dense attention
            made = self.graph.call_function(placed, (made, dims_of(old)))
        return made

    def _has_the_strides_of_the_op(self) -> bool:
        """A fused call has, unless it broadcasts, is of another rank, or has values of another head size."""
        found = self.attention
        as_it_is = found.query.layout == found.query.wanted
        full = all(set(found.axes.batch) <= set(axes_of(part.layout)) for part in (found.key, found.value))
        alike = found.head_size == found.value_head_size
        return found.region == (found.output,) and as_it_is and full and alike

    def arrange(self, node: Node, have: Layout, want: Layout) -> Node:
        """A tensor with the axes ``have`` laid out as ``want``.

        A dimension of ``want`` of which no axis is there has size 1; where some are there, the others are broadcast.
        """
        if have == want:
            return node
        order: list[Axis] = []
        for position in reversed(range(len(have))):
            dim = have[position]
            if not dim:
                node = self.call(aten.squeeze.dim, node, position)
            elif len(dim) > 1:
                node = self.call(aten.unflatten.int, node, position, [_static(axis) for axis in dim])
            order = [*dim, *order]
        target = [axis for dim in want for axis in dim if axis in order]
        if target != order:
            node = self.call(aten.permute.default, node, [order.index(axis) for axis in target])
        rank = len(target)
        for position, dim in enumerate(want):
            present = [axis for axis in dim if axis in order]
            if not present:
                node = self.call(aten.unsqueeze.default, node, position)
                rank += 1
            elif len(dim) > 1:
                sizes: list[Any] = [-1] * (rank + len(dim) - len(present))
                for i, axis in enumerate(dim):
                    if axis not in order:
                        node = self.call(aten.unsqueeze.default, node, position + i)
                        sizes[position + i] = axis.size
                if len(present) < len(dim):
                    node = self.call(aten.expand.default, node, sizes)
                node = self.call(aten.flatten.using_ints, node, position, position + len(dim) - 1)
                rank -= len(present) - 1
        return node


def _static(axis: Axis) -> int:
    return axis.size if isinstance(axis.size, int) else -1


def _dtype(node: Node) -> torch.dtype | None:
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None


def _fake_result(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call in fake tensors; None where its arguments carry none, or are of two modes (Dynamo's)."""
    values = map_arg((args, kwargs), value_of)
    modes = {x.fake_mode for x in tree_leaves(values) if isinstance(x, FakeTensor)}
    if len(modes) != 1 or len(tree_leaves(values)) != len(tree_leaves((args, kwargs))):
        return None
    with modes.pop(), torch.no_grad():  # under checkpoint, what is saved here would count
        return op(*values[0], **values[1])
