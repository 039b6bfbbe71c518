"""A rank's heads in turns: while the first is attended to, queries and keys of the second are exchanged, and while the
second is attended to, the result of the first.

``to_heads``, the op and ``to_rows`` become those of ``parallel/exchange.py`` that take turns, with an op for each turn.
Left as it is: what has a mask or a limit, exchanges too short to be worth a second one, heads of one key head.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ...parallel import exchange  # noqa: F401  which defines the ops
from ..read.fx_utils import value_of
from .emit import call, values_like

sparge, aten = torch.ops.sparge, torch.ops.aten
_TO_HEADS = {sparge.to_heads, sparge.to_heads.default}
_TO_ROWS = {sparge.to_rows, sparge.to_rows.default}
# Of a rank's queries: some 0.1 ms over NVLink. A turn more takes a host 0.6 ms (two exchanges, a map, its attention);
# with fewer, a GPU does not compute for so long in a layer that its host is ahead.
LEAST_BYTES = 2**25
TURNS = 2


class Between(NamedTuple):
    """An op between two exchanges, and how many of a rank's key heads each turn has."""

    to_heads: Node
    op: Node
    to_rows: Node
    turns: list[int]


def between_exchanges(op: Node) -> Between | None:
    """What stands around an op whose heads may take turns."""
    parts = [x for x in op.args[:3] if isinstance(x, Node) and x.target is operator.getitem and len(x.users) == 1]
    makers = [x.args[0] for x in parts]
    ends = [x for x in op.users if x.target in _TO_ROWS]
    to_heads = makers[0] if makers else None
    if not isinstance(to_heads, Node) or to_heads.target not in _TO_HEADS or len(ends) != 1 or to_heads.kwargs:
        return None
    if [x.args for x in parts] != [(to_heads, i) for i in range(3)] or ends[0].kwargs:
        return None
    if op.kwargs.get("attn_mask") is not None or "least_keys" in op.kwargs:
        return None
    query, key = (value_of(x) for x in to_heads.args[:2])
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or not all(type(n) is int for n in query.shape):
        return None
    _, _, _, _, _, ranks, _ = to_heads.args
    assert isinstance(ranks, int)
    heads = int(key.shape[1]) // ranks  # of a rank
    if heads < 2 or query.numel() * query.element_size() < LEAST_BYTES:
        return None
    turns = min(TURNS, heads)
    shares = [heads * (i + 1) // turns - heads * i // turns for i in range(turns)]
    return Between(to_heads, op, ends[0], shares)  # the first has the fewest: nothing hides its exchange


def take_turns(ops: Iterable[Node]) -> None:
    """Put an op for each turn in the place of each that stands between exchanges, and their exchanges around them."""
    for op in ops:
        found = between_exchanges(op)
        if found is not None:
            _write(found)


def _write(found: Between) -> None:
    to_heads, op, to_rows, turns = found
    graph = op.graph
    query, key = (value_of(x) for x in to_heads.args[:2])
    group = query.shape[1] // key.shape[1]
    with graph.inserting_before(to_heads):
        came = call(graph, sparge.to_heads_in_turns.default, *to_heads.args[:3], turns, *to_heads.args[3:])
    came.meta = {**to_heads.meta, **came.meta}
    outs, first = [], 0
    with graph.inserting_before(op):
        for turn, heads in enumerate(turns):
            operands = [call(graph, operator.getitem, came, 3 * turn + i) for i in range(3)]
            thresholds = call(graph, aten.slice.Tensor, op.args[3], 0, first * group, (first + heads) * group)
            made = graph.call_function(op.target, (*operands, thresholds, *op.args[4:]), dict(op.kwargs))  # type: ignore[arg-type]
            made.meta = {**op.meta, **values_like(operands[0])}
            outs.append(made)
            first += heads
    if len(op.users) > 1:  # a hook wants it whole
        with graph.inserting_before(op):
            whole = call(graph, aten.cat.default, outs, 1)
        op.replace_all_uses_with(whole, lambda user: user is not to_rows)
    with graph.inserting_before(to_rows):
        rows = graph.call_function(sparge.to_rows_in_turns.default, (outs, *to_rows.args[1:]))
    rows.meta = dict(to_rows.meta)
    to_rows.replace_all_uses_with(rows)
    for node in (to_rows, op, *list(to_heads.users), to_heads):
        graph.erase_node(node)
