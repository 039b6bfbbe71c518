"""The parts of a joint sequence: text and image tokens that a model puts together, in the attention or before it.

In: an attention whose queries and keys are one sequence. Out: the sizes of the parts of the nearest ``torch.cat`` along
the tokens, or why there are none. From queries and keys one walk goes backwards through what leaves every token in its
place: views, pointwise code, norms, projections, rotary embeddings. The graph is only read, and no size is asked
anything: which part is the text, the op decides at each call (docs/design.md, The rule).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ...keeping import beside_longest
from ..read.axes import Dim, Layout, before, broadcast, is_layout, new_dim, new_layout, same, settle, settle_dim
from ..read.calls import Call, Value
from ..read.fx_utils import size_hint
from ..read.reader import Reader
from .attention import Attention, Operand

MOST = 4000  # values that are looked at for one operand


class Part(NamedTuple):
    """One part of a sequence: its size, and the dimension of a node that has it."""

    size: Any
    node: Node
    dim: int


Parts = tuple[Part, ...]


def joint_parts(attention: Attention, reader: Reader) -> Parts | str:
    """The parts of the sequence of an attention, in order, or in words why it has none."""
    axes = attention.axes
    if attention.packing is not None:
        return "its rows hold several sequences"
    if not same(attention.length, attention.keys):
        return "queries and keys are not one sequence"
    queries = _parts(attention.query, axes.rows, reader)
    keys = _parts(attention.key, axes.keys, reader)
    if not queries or not keys:
        return "queries and keys are not put together of parts in this graph"
    if len(queries) != len(keys) or not all(same(q.size, k.size) for q, k in zip(queries, keys, strict=True)):
        return "queries and keys are put together of other parts"
    if len(keys) == 2 and same(keys[0].size, keys[1].size):
        return "the two parts of the sequence are equally long"
    if all(isinstance(part.size, int) for part in keys) and beside_longest(hints(keys)) == (0, 0):
        return "no part of the sequence is the longest and stands at its end"
    return keys


def hints(parts: Parts) -> list[int]:
    """The sizes of parts as they were traced; 0 for what depends on data."""
    return [size_hint(part.size) or 0 for part in parts]


def _parts(operand: Operand, tokens: Dim, reader: Reader) -> Parts | None:
    """The parts along the axes of the tokens; None where nothing puts them together."""
    wanted, layout = settle_dim(tokens), settle(operand.layout)
    places = [place for place, dim in enumerate(layout) if dim and dim == wanted]
    fake = reader.fake(operand.node)
    if len(places) != 1 or not isinstance(fake, torch.Tensor):
        return None
    start = new_layout(tuple(fake.shape))
    token = start[places[0]]
    value = Value(tuple(fake.shape), fake.dtype, fake.device, node=operand.node)
    waiting: deque[tuple[Value, Node, Layout]] = deque([(value, operand.user, start)])
    seen: set[Any] = set()
    while waiting and len(seen) < MOST:
        value, user, layout = waiting.popleft()
        key = value if value.node is None else value.node
        if key in seen or not any(axis in dim for dim in settle(layout) for axis in settle_dim(token)):
            continue
        seen.add(key)
        made = reader.definition(value, user)
        if made is None or made[0].call is None:
            continue
        found = _joined(made[0].call, settle(layout), settle_dim(token))
        if found is not None:
            return found
        waiting += ((earlier, made[1], at) for earlier, at in _earlier(made[0].call, layout))
    return None


def _joined(call: Call, layout: Layout, token: Dim) -> Parts | None:
    """The parts that a call puts together along the tokens, if it is such a call and all of them are nodes."""
    if call.name != "cat":
        return None
    dim = int(call.argument(1, "dim", 0)) % len(layout)
    parts = [Part(_number(x.shape[dim]), x.node, dim) for x in call.args[0] if x.node is not None]
    whole = layout[dim] == token and len(parts) == len(call.args[0]) > 1
    return tuple(parts) if whole else None


def _number(size: Any) -> Any:
    constant = isinstance(size, torch.SymInt) and size.node.expr.is_number
    return int(size) if constant else size


_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "linear": 0}  # which argument has the rows
_NORMS = {"native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"}


def _earlier(call: Call, layout: Layout) -> Iterator[tuple[Value, Layout]]:
    """The arguments of a call that have the same tokens at the same places, with their layouts."""
    if is_layout(call):
        if (at := before(call, layout)) is not None:
            yield call.args[0], at
    elif torch.Tag.pointwise in call.op.tags:
        yield from ((x, broadcast(layout, x.shape)) for x in call.inputs if len(x.shape) <= len(layout))
    elif call.name in _PRODUCTS:
        rows = call.args[_PRODUCTS[call.name]]
        yield rows, (*layout[:-1], new_dim(rows.shape[-1]))
    elif call.name in _NORMS:
        rank = len(layout) - len(call.args[1])  # a norm over the tokens loses them here
        yield call.args[0], (*layout[:rank], *map(new_dim, call.args[0].shape[rank:]))
    else:
        yield from _cut(call, layout)


def _cut(call: Call, layout: Layout) -> Iterator[tuple[Value, Layout]]:
    """Calls that cut or join along a dimension: the other dimensions keep their axes."""
    rank = len(layout)
    if call.name in ("slice", "split", "split_with_sizes", "chunk", "cat"):
        dim = int(call.argument(1 if call.name in ("slice", "cat") else 2, "dim", 0)) % rank
        for x in call.inputs:
            if len(x.shape) == rank:
                yield x, (*layout[:dim], new_dim(x.shape[dim]), *layout[dim + 1 :])
    elif call.name in ("select", "unbind"):
        x = call.args[0]
        dim = int(call.argument(1, "dim", 0)) % (rank + 1)
        yield x, (*layout[:dim], new_dim(x.shape[dim]), *layout[dim:])
    elif call.name == "stack":
        dim = int(call.argument(1, "dim", 0)) % rank
        yield from ((x, (*layout[:dim], *layout[dim + 1 :])) for x in call.inputs)
    elif call.name == "view_as_complex":
        yield call.args[0], (*layout, new_dim(2))
    elif call.name == "view_as_real":
        yield call.args[0], layout[:-1]
