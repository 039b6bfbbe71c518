"""The nodes that carry the order of a site's tokens: one ``sparge::order`` for each grid and tile of a graph.

For whoever only looks they carry the grid itself, as the sizes of an empty tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from ... import ops  # noqa: F401  importing it registers the ops
from ...kernels.order import Tile, tile_of
from ...kernels.sizes import surely
from ..find import Match
from ..match.tokens import Part
from ..order import SiteOrder
from ..read.fx_utils import value_of
from ..stated import Left, SizedGrid
from .emit import call
from .threshold_inputs import hand_down

ORDER = torch.ops.sparge.order.default
_NAME, _GRID = "sparge_order", "sparge_grid"
_QUERIES, _KEYS = ("slots_q", "places_q"), ("slots_k", "places_k")  # arguments of sparge::attention


def write_orders(
    root: GraphModule, matches: Iterable[Match], orders: Mapping[Node, SiteOrder]
) -> dict[Node, dict[str, Node]]:
    """Write the nodes that carry the orders of these matches; returns what ``sparge::attention`` takes at each.

    To be done before anything is replaced: what has a size may stand behind another site.
    """
    made: dict[Any, list[Node]] = {}

    def tensors(match: Match, sized: SizedGrid | None, tile: Tile) -> list[Node]:
        if sized is None:
            return []
        assert match.attention is not None
        tile = tile_of(tile, sized.grid)
        owner = sized.owner if sized.owner in match.graphs else root
        key = (tuple(map(str, sized.grid)), tile, match.attention.device)
        if (owner, key) not in made:
            made[owner, key] = _order(owner, sized, tile, match)
        if (match.graph_module, key) not in made:
            depth = match.graphs.index(owner)
            made[match.graph_module, key] = [hand_down(match, x, depth, _NAME) for x in made[owner, key]]
        return made[match.graph_module, key]

    arguments = {}
    for match in matches:
        order = orders.get(match.node)
        if order is not None and not order.is_raster:
            assert order.tile is not None
            queries, keys = (tensors(match, sized, order.tile) for sized in (order.queries, order.keys))
            given = dict(zip(_QUERIES, queries, strict=False))
            arguments[match.node] = given | dict(zip(_KEYS, keys, strict=False))
    return arguments


def write_grids(
    root: GraphModule, matches: Iterable[Match], orders: Mapping[Node, SiteOrder]
) -> dict[Node, list[Node | None]]:
    """Write the nodes that carry the grids of the queries and the keys of these matches, by the node of the match.

    Each is a tensor [0, prefix, frames, height, width, suffix], or None where tokens are in raster order.
    """
    made: dict[Any, Node] = {}

    def tensor(match: Match, sized: SizedGrid | None) -> Node | None:
        if sized is None:
            return None
        owner = sized.owner if sized.owner in match.graphs else root
        key = (match.graph_module, owner, tuple(map(str, sized.grid)))
        if key not in made:
            with _sizes_of(owner, sized) as sizes:
                node = owner.graph.call_function(torch.empty, ((0, *sizes),))
            value = _value(match, lambda: torch.empty((0, *sized.grid)))
            node.meta |= {"val": value, "example_value": value}
            made[key] = hand_down(match, node, match.graphs.index(owner), _GRID)
        return made[key]

    found = {}
    for match in matches:
        order = orders.get(match.node)
        if order is not None and not order.is_raster:
            found[match.node] = [tensor(match, sized) for sized in (order.queries, order.keys)]
    return found


@contextmanager
def _sizes_of(owner: GraphModule, sized: SizedGrid) -> Iterator[list[Any]]:
    """The sizes of a grid as numbers and nodes of a graph that has them. What is written meanwhile stands behind."""
    graph = owner.graph
    position = {node: i for i, node in enumerate(graph.nodes)}
    sums = [(term.whole,) if isinstance(term, Left) else term for term in sized.terms]
    terms = [[_earliest(graph, x) if isinstance(x, Part) else x for x in term] for term in sums]
    held = [x.node if isinstance(x, Part) else x for term in terms for x in term]
    latest = max((position[x] for x in held if isinstance(x, Node) and x in position), default=-1)
    with graph.inserting_before(next(n for n, i in position.items() if i > latest and n.op != "placeholder")):
        sizes = [_sum(owner, term) for term in terms]
        for at, term in enumerate(sized.terms):
            if isinstance(term, Left):
                taken = reduce(partial(_result, graph, operator.mul), sizes[1:4])
                taken = _result(graph, operator.add, taken, sizes[-1 - at])
                sizes[at] = _result(graph, operator.sub, sizes[at], taken)
        yield sizes


def _order(owner: GraphModule, sized: SizedGrid, tile: Tile, match: Match) -> list[Node]:
    """The nodes of slots and places, in a graph that has the sizes of the grid."""
    graph = owner.graph
    assert match.attention is not None
    with _sizes_of(owner, sized) as sizes:
        node = graph.call_function(ORDER, (*sizes, list(tile), match.attention.device))
        parts = [graph.call_function(operator.getitem, (node, i)) for i in range(2)]
    device = match.attention.device
    values = _value(match, lambda: ORDER(*sized.grid, list(tile), device))
    for x, value in zip((node, *parts), () if values is None else (values, *values), strict=False):
        x.meta |= {"val": value, "example_value": value}
    return parts


def _earliest(graph: Graph, part: Part) -> Part | Node | int:
    """What has the size of a part before all else: a number, an input of the graph, or the part itself.

    What is computed before the order is known cannot be in it.
    """
    if isinstance(part.size, int):
        return part.size
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, SymInt) and surely(value == part.size):
            return node
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, SymInt) and surely(size == part.size):
                return Part(size, node, dim)
    return part


def _sum(owner: GraphModule, term: Iterable[Part | Node | int]) -> Any:
    """A size as a number, or as a node."""
    number, nodes = 0, []
    for x in term:
        size = x.size if isinstance(x, Part) else x
        if isinstance(size, int):
            number += size
        else:
            nodes.append(x if isinstance(x, Node) else call(owner.graph, torch.ops.aten.sym_size.int, x.node, x.dim))  # type: ignore[union-attr]
    return reduce(partial(_result, owner.graph, operator.add), nodes, number)


def _result(graph: Graph, op: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """What an operator makes of two sizes: a number, or a node."""
    if isinstance(a, int) and isinstance(b, int):
        return op(a, b)
    if op is operator.add and 0 in (a, b):
        return a if b == 0 else b
    return call(graph, op, a, b)


def _value(match: Match, make: Callable[[], Any]) -> Any:
    """What a node stands for that computes this, in the fake tensors of a match; None where there are none."""
    assert match.attention is not None
    fake = match.attention.result
    if not isinstance(fake, FakeTensor):
        return None
    with fake.fake_mode, torch.no_grad():
        return make()
