"""From which rows of its inputs each row of a node's result comes: whether a node may run in another order of tokens.

In: a node, and the dimension of its result that tokens lie along. Out: its inputs and the dimensions of theirs of which
each row gives the row at the same place and no other; or None, where rows mix or that cannot be told. For permuted rows
such a node gives the permuted result. Of what is put together along the tokens, or cut out, a row is at another place.
A step is :func:`.tokens.earlier`; what mixes is told by :func:`.tokens.mixes`.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.fx import Node

from ..read.axes import Dim, Layout, new_layout, same, settle
from ..read.calls import Value
from ..read.reader import Reader
from .sdpa import arguments_of, is_sdpa
from .tokens import cut_of, earlier, mixes, start_of

# What holds the same everywhere, whatever the tensor holds that it is like.
_FILLED = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
    "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "scalar_tensor",
}  # fmt: skip
_ASK = {"size", "dim", "numel", "shape", "ndim", "dtype", "device", "sym_size", "sym_numel", "is_floating_point"}


class Origin(NamedTuple):
    """Where the rows of a result are in an input: along which dimension, and how many rows further."""

    dim: int
    shift: Any = 0


Carried = dict[Node, Origin]


class Rows:
    """Which rows the nodes of one graph read. Each question is answered once."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._carried: dict[tuple[Node, int], Carried | None] = {}
        self._read: dict[Node, set[Node]] = {}

    def carried(self, node: Node, dim: int) -> Carried | None:
        """The inputs whose rows those of the result along ``dim`` are made of, and along which dimension of theirs."""
        if (node, dim) not in self._carried:
            if is_sdpa(node):
                found = _of_sdpa(node, dim, self.reader)
            elif node.target is operator.setitem:
                found = _of_setitem(node, dim, self.reader)
            else:
                value = self.reader.value(node)
                found = None if value is None else _followed(value, dim)
            self._carried[node, dim] = found
        return self._carried[node, dim]

    def is_read(self, given: Node, node: Node) -> bool:
        """Whether a node reads what a tensor holds, and not only what it looks like."""
        if node not in self._read:
            value = self.reader.value(node)
            name = str(node.args[1]) if node.target is getattr else str(getattr(node.target, "__name__", node.target))
            if value is not None:
                self._read[node] = _leaves(value)
            else:
                self._read[node] = set() if name.split(".")[0] in _ASK else set(node.all_input_nodes)
        return given in self._read[node]


class _State(NamedTuple):
    value: Value
    layout: Layout
    token: Dim  # of the layout's dimensions that which has the rows
    shift: Any


def _followed(value: Value, dim: int) -> Carried | None:
    """Follow the rows of a value to the nodes that it is computed of."""
    start = new_layout(value.shape)
    found: dict[Node, tuple[Origin, Dim]] = {}
    others: set[Node] = set()
    waiting = [_State(value, start, start[dim], 0)]
    while waiting:
        state = waiting.pop()
        value, token = state.value, state.token
        layout = settle(state.layout)
        if not _is_whole(token):
            return None  # of size 1, or rows are told apart by more than their place
        at = [place for place, axes in enumerate(layout) if token[0] in axes]
        if not at:
            others |= _leaves(value)
        elif value.node is not None:
            origin = Origin(at[0], state.shift)
            if layout[at[0]] != token or found.setdefault(value.node, (origin, token))[0] != origin:
                return None
        else:
            steps = _steps(state._replace(layout=layout), at[0])
            if steps is None:
                return None
            waiting += steps
    if not all(_is_whole(token) for _, token in found.values()) or not others.isdisjoint(found):
        return None
    return {node: origin for node, (origin, _) in found.items()}


def _is_whole(token: Dim) -> bool:
    return len(token) == 1 and token[0].parts is None


def _steps(state: _State, at: int) -> list[_State] | None:
    """What a value is computed of, that has its rows in the dimension ``at``; None where rows mix."""
    value, layout, token, shift = state
    call = value.call
    if call is None:
        return None
    if call.name in _FILLED:
        return []
    mixed, steps = mixes(call, len(layout)), list(earlier(call, layout))
    if mixed is None or len(steps) != len(call.inputs):
        return None
    if at not in mixed:
        return [_State(x, given, token, shift) for x, given in steps]
    if (cut := cut_of(value, layout, token)) is not None:
        return [_State(x, given, given[at], shift + cut.start) for x, given in steps]
    if call.name != "cat":
        return None
    moved = []
    for x, given in steps:
        moved.append(_State(x, given, given[at], shift))
        shift = shift - x.shape[at]
    return moved


def _leaves(value: Value) -> set[Node]:
    """The nodes that a value is computed of."""
    found: set[Node] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value.node is not None:
            found.add(value.node)
        elif value.call is not None and value.call.name not in _FILLED:
            waiting += value.call.inputs
    return found


def _of_sdpa(node: Node, dim: int, reader: Reader) -> Carried | None:
    """Dense attention: each query by itself. Keys and values are no rows of the result."""
    given = arguments_of(node)
    query, result, mask = given["query"], reader.fake(node), given["attn_mask"]
    if not isinstance(result, Tensor) or dim != result.dim() - 2 or given["is_causal"] or given["dropout_p"] != 0:
        return None
    shape: tuple[Any, ...] = () if mask is None else tuple(reader.fake(mask).shape)
    has_rows = len(shape) > 1 and not same(shape[-2], 1)
    return None if has_rows else {query: Origin(reader.fake(query).dim() - 2)}


def _of_setitem(node: Node, dim: int, reader: Reader) -> Carried | None:
    """``x[..., a:b] = rows``, whose result is x: what is not written to stays as it is."""
    x, index, rows = cast(tuple[Node, Any, Any], node.args)
    rank = reader.fake(x).dim()
    items: list[Any] = list(index if isinstance(index, tuple) else (index,))
    if not all(item is Ellipsis or type(item) in (int, slice) for item in items):
        return None
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    items += [slice(None)] * (rank - len(items))
    start, step = (items[dim].start, items[dim].step) if isinstance(items[dim], slice) else (0, 0)
    start = start_of(reader.fake(start) if isinstance(start, Node) else start or 0, reader.fake(x).shape[dim])
    if step not in (None, 1) or start is None:
        return None
    behind = sum(isinstance(item, slice) for item in items[dim:])  # dimensions of the part from this one on
    shape = reader.fake(rows).shape if isinstance(rows, Node) and isinstance(reader.fake(rows), Tensor) else ()
    at = len(shape) - behind
    if at >= 0 and not same(shape[at], 1):
        return {x: Origin(dim), rows: Origin(at, -start)}
    return {x: Origin(dim)} if items[dim] == slice(None) else None
