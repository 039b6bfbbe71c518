"""One order of tokens in a graph and those nested in it: where it is known, of which tokens, and the nodes of it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ...kernels.order import Grid
from ...kernels.sizes import surely
from ..match.scope import Scope
from ..read.fx_utils import add_input, value_of
from ..write.emit import call
from .graphs import Graphs, Place

_NAME = "sparge_order"
_aten = torch.ops.aten


class Order:
    """The order that one node of ``sparge::order`` makes.

    It moves the tokens of the grid and leaves those before and behind it where they are. So a part of the sequence with
    the whole grid in it has an order as well, and what is beside the grid is the same in both.
    """

    def __init__(self, graphs: Graphs, scope: Scope, node: Node) -> None:
        self.graphs = graphs
        self.node = node
        self._scope = scope
        self._grid = grid = Grid(*map(value_of, node.args[:5]))
        self._tokens = grid.tokens
        self._begin, self._end = grid.prefix, grid.tokens - grid.suffix
        self._made: dict[tuple[Graph, str], tuple[Node, Node]] = {}
        self._last = node

    def serves(self, other: Order) -> bool:
        """Whether another order is that of the leading tokens in this one: the same grid, with less behind it."""
        alike = all(surely(a == b) for a, b in zip(self._grid[:4], other._grid[:4], strict=True))
        made = self._scope is other._scope and self.node.args[5:] == other.node.args[5:]
        return alike and made and surely(self._tokens >= other._tokens)

    def is_known(self, node: Node) -> bool:
        """Whether the order is made before a node runs."""
        scope = self.graphs.scopes[node.graph]
        while scope is not self._scope:
            if scope.outer is None or scope.call is None:
                return False
            node, scope = scope.call, scope.outer
        return scope.reader.position(node) > max(map(scope.reader.position, self.node.users), default=0)

    def holds(self, value: Node, place: Place) -> bool:
        """Whether a tensor has the whole grid, in a part of the sequence that can be named."""
        start, stop = self._range(value, place)
        inside = surely(start >= 0) and surely(stop <= self._tokens)
        whole = surely(start <= self._begin) and surely(stop >= self._end)
        named = isinstance(start, int) or surely(start == self._begin)
        named &= isinstance(stop, int) or surely(stop == self._end) or surely(stop == self._tokens)
        return inside and whole and named

    def is_beside(self, value: Node, place: Place) -> bool:
        """Whether what a tensor has of the sequence stands before or behind the grid."""
        start, stop = self._range(value, place)
        return surely(stop <= self._begin) or surely(start >= self._end)

    def _range(self, value: Node, place: Place) -> tuple[Any, Any]:
        return place.start, place.start + self.graphs.fake(value).shape[place.dim]

    def at(self, value: Node, place: Place) -> tuple[Node, Node]:
        """Slots and places of the tokens of a tensor, as nodes of its graph."""
        start, stop = self._range(value, place)
        key = f"{start}:{stop}"
        owner = self._scope.reader.owner.graph
        if (owner, key) not in self._made:
            whole = [user for user in self.node.users if user.target is operator.getitem]
            slots, places = (next(x for x in whole if x.args[1] == number) for number in (0, 1))
            self._last = max((self._last, slots, places), key=list(owner.nodes).index)
            self._made[owner, key] = self._part(slots, start, stop), self._part(places, start, stop)
        return self._handed(self.graphs.scopes[value.graph], key)

    def _part(self, x: Node, start: Any, stop: Any) -> Node:
        """The slots or places of a part of the sequence."""
        if surely(start == 0) and surely(stop == self._tokens):
            return x
        graph = x.graph
        prefix, suffix = self.node.args[0], self.node.args[4]
        with graph.inserting_before(self._last.next):
            first = start if isinstance(start, int) else prefix
            last = stop
            if not isinstance(stop, int):
                last = call(graph, _aten.sym_size.int, x, 0)
                last = last if surely(stop == self._tokens) else call(graph, operator.sub, last, suffix)
            self._last = cut = call(graph, _aten.slice.Tensor, x, 0, first, last)
            if not surely(start == 0):
                self._last = cut = call(graph, _aten.sub.Tensor, cut, first)
        return cut

    def _handed(self, scope: Scope, key: str) -> tuple[Node, Node]:
        """The nodes in a graph, which gets them from those around it as its last inputs."""
        graph = scope.reader.owner.graph
        if (graph, key) not in self._made:
            assert scope.outer is not None
            around = self._handed(scope.outer, key)
            slots, places = (_hand(scope, x) for x in around)
            self._made[graph, key] = slots, places
        return self._made[graph, key]


def _hand(scope: Scope, given: Node) -> Node:
    """What is given to a graph as an input of it, a new last one if there is none."""
    call, owner = scope.call, scope.reader.owner
    assert call is not None
    for x, operand in zip(reversed(owner.graph.find_nodes(op="placeholder")), reversed(call.args), strict=False):
        if operand is given:
            return x
    call.args = (*call.args, given)
    return add_input(owner, _NAME, value_of(given))
