"""The parts of a joint sequence: text and image tokens that a model puts together, in the attention or before it.

In: an attention whose queries and keys are one sequence. Out: the sizes of the parts of the nearest ``torch.cat`` along
the tokens, or why there are none. From queries and keys one walk goes backwards through what leaves every token in its
place (:mod:`.tokens`). The graph is only read, and no size is asked anything: which part is the text, the op decides at
each call (docs/design.md, The rule).
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch.fx import Node

from ...keeping import beside_longest
from ..read.axes import Dim, Layout, same, settle, settle_dim
from ..read.calls import Value
from ..read.fx_utils import size_hint
from ..read.reader import Reader
from .attention import Attention, Operand
from .tokens import Part, earlier, parts_of_cat, rows_of

MOST = 4000  # values that are looked at for one operand


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
    begun = rows_of(operand, tokens, reader)
    if begun is None:
        return None
    value, start, token = begun
    waiting: deque[tuple[Value, Node, Layout]] = deque([(value, operand.user, start)])
    seen: set[Any] = set()
    while waiting and len(seen) < MOST:
        value, user, layout = waiting.popleft()
        key = value if value.node is None else value.node
        if key in seen or not any(axis in dim for dim in settle(layout) for axis in settle_dim(token)):
            continue
        seen.add(key)
        made = _definition(value, user, reader)
        if made is None or made[0].call is None:
            continue
        found = parts_of_cat(made[0].call, settle(layout), settle_dim(token))
        if found is not None:
            return found
        waiting += ((earlier_value, made[1], at) for earlier_value, at in earlier(made[0].call, layout))
    return None


def _definition(value: Value, user: Node, reader: Reader) -> tuple[Value, Node] | None:
    """What computed a value, and the node of that; what is written into a tensor moves none of its tokens."""
    while value.call is None:
        found = reader.made(value, user)
        if found is None and value.node is not None and (before := reader.value(value.node)) is not None:
            found = before, value.node
        if found is None:
            return None
        value, user = found
    return value, user
