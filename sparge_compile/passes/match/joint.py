"""The parts of a joint sequence: text and image tokens that a model puts together, in the attention or before it.

In: an attention whose queries and keys are one sequence. Out: the sizes of the parts of the nearest ``torch.cat`` along
the tokens, or why there are none. From queries and keys one walk goes backwards through what leaves every token in its
place (:mod:`.tokens`). The graph is only read, and no size is asked anything: which part is the text, the op decides at
each call (docs/design.md, The rule).
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor
from torch.fx import Node

from ...keeping import beside_longest
from ..read.axes import Dim, Layout, broadcast, same, settle, settle_dim
from ..read.calls import Value
from ..read.fx_utils import size_hint
from ..read.reader import Reader
from .attention import Attention, Operand
from .scope import Scope
from .tokens import Part, earlier, parts_of_cat, rows_of

MOST = 4000  # values that are looked at for one operand


Parts = tuple[Part, ...]


def joint_parts(attention: Attention, scope: Scope) -> Parts | str:
    """The parts of the sequence of an attention, in order, or in words why it has none."""
    axes = attention.axes
    if attention.packing is not None:
        return "its rows hold several sequences"
    if not same(attention.length, attention.keys):
        return "queries and keys are not one sequence"
    queries = _parts(attention.query, axes.rows, scope)
    keys = _parts(attention.key, axes.keys, scope)
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


def _parts(operand: Operand, tokens: Dim, scope: Scope) -> Parts | None:
    """The parts along the axes of the tokens; None where nothing puts them together."""
    begun = rows_of(operand, tokens, scope.reader)
    if begun is None:
        return None
    value, start, token = begun
    waiting: deque[tuple[Scope, Value, Node, Layout]] = deque([(scope, value, operand.user, start)])
    seen: set[Any] = set()
    while waiting and len(seen) < MOST:
        here, value, user, layout = waiting.popleft()
        key = value if value.node is None else value.node
        if key in seen or not any(axis in dim for dim in settle(layout) for axis in settle_dim(token)):
            continue
        seen.add(key)
        value, user = _definition(value, user, here.reader)
        if value.call is None:
            waiting += _around(here, value, layout)
            continue
        found = parts_of_cat(value.call, settle(layout), settle_dim(token))
        if found is not None:  # a size is read where the attention stands, which has no other tensors
            return found if here is scope or all(isinstance(part.size, int) for part in found) else None
        waiting += ((here, earlier_value, user, at) for earlier_value, at in earlier(value.call, layout))
    return None


def _definition(value: Value, user: Node, reader: Reader) -> tuple[Value, Node]:
    """What computed a value, and the node of that; what is written into a tensor moves none of its tokens.

    Without a call it comes from another graph, or nothing is known of it.
    """
    while value.call is None:
        found = reader.made(value, user)
        if found is None and value.node is not None and (before := reader.value(value.node)) is not None:
            found = before, value.node
        if found is None:
            break
        value, user = found
    return value, user


def _around(scope: Scope, value: Value, layout: Layout) -> list[tuple[Scope, Value, Node, Layout]]:
    """What a value is in the graph around this one, or in one that is run in this."""
    found = None if value.node is None else scope.around(value.node)
    if found is None:
        return []
    there, node, user = found
    fake = there.reader.fake(node)
    if not isinstance(fake, Tensor) or len(fake.shape) != len(layout):
        return []
    return [(there, Value(tuple(fake.shape), fake.dtype, fake.device, node=node), user, broadcast(layout, fake.shape))]
