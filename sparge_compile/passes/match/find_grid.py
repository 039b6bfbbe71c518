"""Find the grid that the tokens of queries or keys are laid out in, where a graph shows it.

One walk goes backwards through what leaves every token in its place (:mod:`.tokens`) until a reshape tells the axes
apart (:mod:`.grid`): where the output of a patch embedding is flattened, or where the table of a rotary embedding is.
Where a sequence is put together of parts, one of them has the grid. The graph is only read.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..read.axes import Dim, Layout, broadcast, new_dim, settle
from ..read.calls import Value
from .attention import Operand
from .grid import ShownGrid, Told
from .scope import Scope
from .tokens import Cut, Part, cut_of, earlier, parts_of_cat, rows_of, written_rows

MOST = 6000  # values that are looked at for one operand


class _State(NamedTuple):
    scope: Scope
    value: Value
    user: Node
    layout: Layout
    path: tuple[Any, ...] | None  # the states that led here, nearest first: (key, rest)


class Grids:
    """Finds grids in a graph and in those nested in it; what is known of a tensor serves all that read it."""

    def __init__(self) -> None:
        self._known: dict[tuple[Node, int], ShownGrid | str | None] = {}
        self._left = 0

    def of(self, operand: Operand, tokens: Dim, scope: Scope) -> ShownGrid | str | None:
        """The grid of the tokens of queries or keys; a text that says what forbids one; None where none is shown."""
        begun = rows_of(operand, tokens, scope.reader)
        if begun is None:
            return None
        value, layout, token = begun
        self._left = MOST
        return self._search(_State(scope, value, operand.user, layout, None), token).found

    def _search(self, start: _State, token: Dim) -> Told:
        told = Told(token)
        waiting = deque([start])
        whole: list[tuple[Node, int]] = []  # tensors with all tokens in one dimension, that were met
        while waiting and self._left > 0 and not told.is_complete:
            state = waiting.popleft()
            key = state.value if state.value.node is None else state.value.node
            layout = settle(state.layout)
            if key in told.seen or not any(axis in dim for dim in layout for axis in told.axes):
                continue
            told.seen.add(key)
            self._left -= 1
            told.note(state.value, layout, state.scope.outer is None)
            place = _whole(state.value, layout, told.axes)
            if place in self._known:
                told.found = self._known[place]
            else:
                if place is not None:
                    whole.append(place)
                    state = state._replace(path=(place, state.path))
                waiting += self._next(state, told)
            if told.is_complete:
                self._keep(state.path, told.found)
        if not told.is_complete and self._left > 0:
            self._known |= dict.fromkeys(whole)
        return told

    def _next(self, state: _State, told: Told) -> list[_State]:
        """The states behind one; a grid that is told there is noted."""
        scope, value, user, layout, path = state
        while value.call is None:
            made = scope.reader.made(value, user)
            if made is None:
                return self._behind_leaf(state._replace(value=value, user=user))
            value, user = made
        state = _State(scope, value, user, settle(layout), path)
        told.look_at(value.call, state.layout)
        token = told.axes
        if (parts := parts_of_cat(value.call, state.layout, token)) is not None:
            told.found = self._of_parts(state, parts)
        elif (cut := cut_of(value, state.layout, token)) is not None:
            told.found = self._of_cut(state, cut)
        else:
            return [_State(scope, x, user, at, path) for x, at in earlier(value.call, layout)]
        return []

    def _behind_leaf(self, state: _State) -> list[_State]:
        """The states behind a value that no call of its graph gives: where it is written to, or in another graph."""
        scope, value, user, layout, path = state
        if value.node is None:
            return []
        if scope.reader.version(value.node, user) is not value.node:
            if (written := written_rows(value.node, layout, scope.reader)) is not None:
                return self._at(scope, *written, path)
            before = scope.reader.value(value.node)  # what is written into a tensor moves none of its tokens
            return [] if before is None else [_State(scope, before, value.node, layout, path)]
        around = scope.around(value.node)
        return [] if around is None else self._at(*around, layout, path)

    def _at(self, scope: Scope, node: Node, user: Node, layout: Layout, path: Any) -> list[_State]:
        fake = scope.reader.fake(node)
        if not isinstance(fake, torch.Tensor) or len(fake.shape) != len(layout):
            return []
        value = Value(tuple(fake.shape), fake.dtype, fake.device, node=node)
        return [_State(scope, value, user, broadcast(layout, fake.shape), path)]

    def _of_cut(self, state: _State, cut: Cut) -> ShownGrid | str | None:
        """The grid of a part that is cut out of a sequence."""
        scope, value, user, layout, _ = state
        assert value.call is not None
        whole = value.call.args[0]
        layout = (*layout[: cut.dim], new_dim(whole.shape[cut.dim]), *layout[cut.dim + 1 :])
        found = self._search(_State(scope, whole, user, layout, None), layout[cut.dim]).found
        return found.cut(cut.start, value.shape[cut.dim]) if isinstance(found, ShownGrid) else found

    def _of_parts(self, state: _State, parts: tuple[Part, ...]) -> ShownGrid | str | None:
        """The grid of what is put together of parts: that of the one part that has one."""
        scope, value, user, layout, _ = state
        assert value.call is not None
        found: list[tuple[int, ShownGrid]] = []
        sized: list[Part] = []
        for i, (part, x) in enumerate(zip(parts, value.call.args[0], strict=True)):
            layout = (*layout[: part.dim], new_dim(part.size), *layout[part.dim + 1 :])
            told = self._search(_State(scope, x, user, layout, None), layout[part.dim])
            if isinstance(told.found, str):
                return told.found
            if told.found is not None:
                found.append((i, told.found))
            known = part if scope.outer is None else told.whole
            if not isinstance(part.size, int) and known is None and told.found is None:
                return "the graph around this one has no size of a part"
            sized.append(known or part)
        if len(found) > 1:
            return "several parts of the sequence are grids"
        if not found:
            return None
        at, shown = found[0]
        return ShownGrid((*sized[:at], *shown.before), shown.axes, (*shown.after, *sized[at + 1 :]))

    def _keep(self, path: tuple[Any, ...] | None, found: ShownGrid | str | None) -> None:
        while path is not None:
            place, path = path
            self._known[place] = found


def _whole(value: Value, layout: Layout, axes: Dim) -> tuple[Node, int] | None:
    """A node, and the dimension in which it has all tokens."""
    places = [place for place, dim in enumerate(layout) if dim == axes]
    return (value.node, places[0]) if value.node is not None and len(places) == 1 else None
