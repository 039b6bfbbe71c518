"""Sites of one order gather nothing where that is less: what they read comes in the order of blocks already.

In: a graph with the op in it. Out: the same graph, with ``sparge::rows`` at the border of a region
(:mod:`.region`) in which everything is in the order of blocks: mostly once behind the patch embedding, once for each
table of a rotary embedding, and once at the end.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ...sharding import is_sharded
from ..match.scope import Scope
from ..read.fx_utils import value_of
from ..substitute import OP, OP_AS_GIVEN
from ..write.emit import call
from ..write.orders import ORDER
from .graphs import Gather, Graphs, Site, Use
from .order import Order
from .region import gathers_of
from .spread import Spread

logger = logging.getLogger("sparge_compile")

ROWS = torch.ops.sparge.rows.default

_at_sites: ContextVar[bool] = ContextVar("at_sites", default=False)


@contextmanager
def made_at_sites() -> Iterator[None]:
    """Leave each order at its sites in what is compiled meanwhile.

    For a graph that is tried and dropped: what its forwards gather more takes less time than a plan for it.
    """
    before = _at_sites.set(True)
    try:
        yield
    finally:
        _at_sites.reset(before)


class Plan(NamedTuple):
    """What is to be gathered so that the sites of an order gather nothing."""

    order: Order
    sites: list[Site]
    gathers: list[Gather]

    def __str__(self) -> str:
        """How often that is, as a report says it."""
        count = len(self.sites)
        return f"made by {sum(x.times for x in self.gathers)} gathers for {count} site{'s' * (count > 1)}"


def plan_gathers(root: GraphModule, done: set[Node]) -> Plan | None:
    """The next order of a graph and those nested in it that is better made elsewhere than at its sites.

    ``done`` are the nodes of orders that were looked at, and is added to. The graph is only read.
    """
    if _at_sites.get():
        return None
    for order, sites in _orders(Graphs(root)):
        if order.node not in done:
            done.add(order.node)
            gathers = gathers_of(Spread(order, sites))
            if gathers is not None and sum(x.cost for x in gathers) < sum(site.cost for site in sites):
                return Plan(order, sites, gathers)
    return None


def write_gathers(plan: Plan) -> None:
    """Write what is planned. The caller lints and recompiles."""
    order, sites, gathers = plan
    for gather in gathers:
        _write(gather, order)
    for site in sites:
        site.node.kwargs = {**site.node.kwargs, "reordered": True}
    logger.info("sparge: order of tokens %s, which would be %d there", plan, sum(len(site.gathered) for site in sites))


def _orders(graphs: Graphs) -> list[tuple[Order, list[Site]]]:
    """The orders of a graph, each with its sites."""
    sites: dict[Node, list[Site]] = defaultdict(list)
    orders: dict[Node, Order] = {}
    for graph, scope in graphs.scopes.items():
        for node in graph.nodes:
            if (
                node.target not in (OP, OP_AS_GIVEN)
                or node.kwargs.get("reordered")
                or is_sharded(value_of(node.args[0]))
            ):
                continue  # of a sequence that is sharded, each rank would gather all
            slots = [node.kwargs.get(name) for name in ("slots_q", "slots_k")]
            made = {_made(scope, x) for x in slots if isinstance(x, Node)}
            if len(made) == 1:
                where, maker = made.pop()
                sites[maker].append(Site(node, *(x is not None for x in slots)))
                if maker not in orders and maker.target is ORDER:
                    orders[maker] = Order(graphs, where, maker)
    chiefs = [x for x in orders.values() if not any(y.serves(x) and not x.serves(y) for y in orders.values())]
    served: dict[Order, list[Site]] = {chief: [] for chief in chiefs}
    for maker, order in orders.items():
        served[next(chief for chief in chiefs if chief is order or chief.serves(order))] += sites[maker]
    return list(served.items())


def _made(scope: Scope, node: Node) -> tuple[Scope, Node]:
    """By which node the slots of a site are made, and where that stands."""
    while node.op == "placeholder" and (around := scope.around(node)) is not None:
        scope, node, _ = around
    is_part = node.target is operator.getitem and isinstance(node.args[0], Node)
    return scope, node.args[0] if is_part else node  # type: ignore[return-value]


def _write(gather: Gather, order: Order) -> None:
    """Write the gather of a tensor, and have those who are to read it read that."""
    value, graph = gather.value, gather.value.graph
    slots, places = order.at(value, gather.place)
    rows = (slots, places) if gather.into else (places, slots)
    if gather.shared:
        after = max((value, slots, places), key=list(graph.nodes).index).next
        while after.op == "placeholder":
            after = after.next
        _redirect(gather.uses, value, _rows(gather, rows, after))
    else:
        for use in gather.uses:
            _redirect((use,), value, _rows(gather, rows, use.node))


def _rows(gather: Gather, rows: tuple[Node, Node], before: Node) -> Node:
    with before.graph.inserting_before(before):
        node = call(before.graph, ROWS, gather.value, *rows, gather.place.dim)
    known = gather.value.meta
    for name in ("example_value", "val"):
        if name in known:
            node.meta.setdefault(name, known[name])
    return node


def _redirect(uses: Iterable[Use], old: Node, new: Node) -> None:
    """Have nodes read another tensor, where they are to."""
    for node, places in uses:
        if places is None and node.op == "output":
            node.replace_input_with(old, new)  # whoever listens for the names of results hears of this alone
        elif places is None:
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda x: new if x is old else x)
        elif node.op == "output":
            results: tuple[Node, ...] = node.args[0]  # type: ignore[assignment]
            node.args = (tuple(new if at in places else x for at, x in enumerate(results)),)
        else:
            node.args = tuple(new if at in places else x for at, x in enumerate(node.args))
            node.kwargs = {name: new if name in places else x for name, x in node.kwargs.items()}
