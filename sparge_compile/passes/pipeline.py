"""The passes in the order in which they run: find, (place,) decide_sites, substitute, return_outputs,
erase_markers, check.

The first three only read the graph and are run by :func:`analyse`. A pass takes the :class:`Work` and notes in it what
it found or made; its settings are bound when a list is put together. ``place`` belongs to graphs of Dynamo
(:mod:`sparge_compile.running.graph`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import is_of_user
from ..keeping import WIDTH
from ..kernels import inventory
from ..options import Options
from ..report import Decision, Failure, Reason, Report, SiteReport
from . import find as finding
from .decide import decide, thresholds_for
from .find import Match
from .hoist.hoist import Plan, plan_gathers, write_gathers
from .match.joint import Parts
from .order import SiteOrder, order_sites
from .read.fx_utils import value_of, without_guards
from .substitute import substitute_match
from .write.orders import write_orders
from .write.outputs import dense_outputs, return_also
from .write.threshold_inputs import Marker, ThresholdInput, attached_thresholds, markers_of, new_input
from .write.threshold_inputs import erase_markers as erase_all_markers

logger = logging.getLogger("sparge_compile")

# Attached thresholds may be changed at any time, so what they hold now decides nothing: a site is replaced if it would
# pay with a tenth of the blocks.
_ATTACHED_TOPK = 0.1


class Step(NamedTuple):
    """A match and what is to become of it."""

    match: Match
    decision: Decision

    @property
    def is_sparse(self) -> bool:
        """Whether the match is, or will be, replaced."""
        return self.decision.status == "sparse"


@dataclass
class Work:
    """A graph on its way through the passes, and what they have found, decided and made so far.

    ``graph_module`` is ours to change. ``stored`` are its inputs that are parameters, buffers or constants, where nodes
    do not tell. ``substituted`` are the replaced matches with the node of the op,
    ``threshold_inputs`` the new last inputs of the graph, in order. ``orders`` are those of the tokens of its sparse
    sites, where an order was asked for.
    """

    graph_module: GraphModule
    matches: list[Match] = field(default_factory=list)
    markers: dict[Node, Marker] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    orders: dict[Node, SiteOrder] = field(default_factory=dict)
    substituted: list[tuple[Match, Node]] = field(default_factory=list)
    threshold_inputs: list[ThresholdInput] = field(default_factory=list)
    changed: bool = False
    passes: list[str] = field(default_factory=list)  # that have run
    failures: list[Failure] = field(default_factory=list)  # of an analysis: the graph stays as it is
    stored: Collection[Node] = ()

    @property
    def wide(self) -> bool:
        """Whether thresholds need room for kept tokens, whatever the options say: attached ones may have it."""
        return False

    @property
    def sparse(self) -> list[Match]:
        """The matches that are, or will be, replaced."""
        return [step.match for step in self.steps if step.is_sparse]

    @property
    def orders_by_name(self) -> dict[str, SiteOrder]:
        """The orders by the names of their sites."""
        return {match.site.name: self.orders[match.node] for match in self.sparse if match.node in self.orders}

    def update(self, report: Report) -> Report:
        """Note in a report that has the sites of this graph already what passes have done about their orders since."""
        orders = {match.site.name: decision.order for match, decision in self.steps}
        for i, row in enumerate(report.sites):
            order = orders.get(row.name, row.order)
            report.sites[i] = replace(row, decision=replace(row.decision, order=order))
        return report

    def add_to(self, report: Report) -> Report:
        """Note this graph and its sites in a report."""
        report.graphs += 1
        _note(report, self.steps)
        report.failures += self.failures
        return report


Pass = Callable[[Any], None]


def run(work: Work, *passes: Pass) -> None:
    """Run passes one after the other, without a guard on a dynamic size.

    ``TORCH_LOGS="+sparge_compile"`` shows each with its time and changes.
    """
    with without_guards(work.graph_module):
        _run(work, *passes)


def _run(work: Work, *passes: Pass) -> None:
    for each in passes:
        name = _name(each)
        work.passes.append(name)
        if not logger.isEnabledFor(logging.DEBUG):
            each(work)
            continue
        before = _fingerprint(work.graph_module)
        start = time.perf_counter()
        each(work)
        seconds = time.perf_counter() - start
        changed = _changes(before, _fingerprint(work.graph_module))
        logger.debug("pass %d, %s: %.3f ms, %d nodes changed", len(work.passes), name, seconds * 1e3, changed)


@contextmanager
def sheltered(failures: list[Failure], analysis: str) -> Iterator[None]:
    """Note a fault of ours inside an analysis, which must not take the user's model down, and go on behind it.

    Errors that tell users of a wrong value are theirs, and raised.
    """
    try:
        yield
    except Exception as error:
        if is_of_user(error):
            raise
        failures.append(Failure.of(analysis, error))
        logger.info("sparge: %s", failures[-1], exc_info=True)


def analyse(work: Work, *passes: Pass) -> None:
    """Run passes that only read the graph. After a fault in one of them nothing counts as found: the graph stays."""
    for each in () if work.failures else passes:
        with sheltered(work.failures, _name(each)):
            run(work, each)
        if work.failures:
            work.matches, work.markers, work.steps, work.orders = [], {}, [], {}
            return


def find(work: Work) -> None:
    """Every attention of the graph, and the markers that ``attach`` left for them."""
    work.matches = finding.find(work.graph_module, work.stored)
    work.markers = markers_of(work.graph_module, work.matches)
    tiles = {node: marker.tile for node, marker in work.markers.items()}
    work.matches = [replace(match, tile=tiles.get(match.node)) for match in work.matches]


def decide_sites(
    work: Work,
    options: Options,
    attached: Container[Node] = (),
    alike: Callable[[Match], Iterable[tuple[Match, bool]]] = lambda match: (),
) -> None:
    """Sparse or dense, for each match, and in which order of its tokens.

    Args:
        work: with its matches.
        options: the backend's options.
        attached: the nodes of those matches whose thresholds are attached to the model.
        alike: for a match, the same site in other modules that may run the same graph, and whether its thresholds are
            attached. Whichever comes first, the site becomes sparse if it does in one of them; where it would not
            alone, all key blocks are kept.
    """
    work.steps = decided(work.matches, options, attached, alike)
    work.orders = order_sites(work.graph_module, work.sparse, options, attached, work.markers, alike)
    texts = {node: str(order) for node, order in work.orders.items()}
    work.steps = [Step(m, replace(decision, order=texts.get(m.node, ""))) for m, decision in work.steps]


def decided(
    matches: Iterable[Match],
    options: Options,
    attached: Container[Node] = (),
    alike: Callable[[Match], Iterable[tuple[Match, bool]]] = lambda match: (),
) -> list[Step]:
    """Decide as :func:`decide_sites` does, for matches without a graph in work."""
    steps = []
    for match in matches:
        decision = _decide(match, options, match.node in attached)
        if decision.reason in (Reason.SLOWER, Reason.BY_PLAN):
            for other, other_attached in alike(match):
                there = _decide(other, options, other_attached)
                if there.status == "sparse":
                    decision = Decision(Reason.SHARED, f"as {other.site.name}", decision.prediction, there.limit)
                    break
        steps.append(Step(match, decision))
    return steps


def _note(report: Report, steps: Iterable[Step]) -> None:
    """Note sites with their decisions in a report, and which kernels run on the GPUs of the sparse ones."""
    for match, decision in steps:
        report.sites.append(SiteReport(match.site, decision))
        device = match.attention.device if match.attention and decision.status == "sparse" else None
        if device is not None and device.type == "cuda" and str(device) not in report.kernels:
            report.kernels[str(device)] = inventory.summary(device)


def _decide(match: Match, options: Options, attached: bool) -> Decision:
    if not attached:
        return decide(match, options)
    if options.is_dense_layer(match.site.name):
        match = replace(match, by_plan=True)
    order = options.token_order if options.tile_of(match.tile) is None else "tiles"
    decision = decide(match, replace(options.with_thresholds(_ATTACHED_TOPK, 0.0), token_order=order))
    detail = "; ".join(filter(None, (decision.detail, "thresholds attached")))
    return replace(decision, detail=detail)


def substitute(work: Work, options: Options, as_input: Callable[[Tensor], Any]) -> None:
    """The op in the place of each sparse site, its thresholds from a marker or from a new last input of the graph.

    ``as_input`` turns the thresholds of a site, float32 [H, 2 or 6], into what a graph input of this graph carries (a
    fake tensor).
    """
    replaced: dict[Node, Node] = {}
    # Before anything is replaced: what they are read from may lie behind another site.
    parts = {match.node: _parts(work, match, options) for match in work.sparse}
    orders = write_orders(work.graph_module, work.sparse, work.orders)
    for match, decision in filter(lambda step: step.is_sparse, work.steps):
        if match.node in work.markers:
            thresholds = attached_thresholds(match, work.markers[match.node])
        else:
            assert match.attention is not None
            pairs = thresholds_for(match, options)
            pairs = ((1.0, 0.0),) * len(pairs) if decision.reason is Reason.SHARED else pairs
            rows = options.rows_of(match.site.name, pairs, work.wide)
            values = torch.tensor(rows, dtype=torch.float32, device=match.attention.device)
            made, thresholds = new_input(match, work.graph_module, values, as_input(values))
            work.threshold_inputs.append(made)
        op = substitute_match(
            match, thresholds, replaced, decision.limit, parts[match.node], orders.get(match.node, {})
        )
        work.substituted.append((match, op))
    work.changed |= bool(work.substituted)


def _parts(work: Work, match: Match, options: Options) -> Parts:
    """What a site's sequence is put together of, where its thresholds have room for kept tokens; else nothing."""
    marker = work.markers.get(match.node)
    given = None if marker is None else value_of(marker.node.args[0])
    wide = options.keeps or work.wide if given is None else given.shape[1] == WIDTH
    return match.parts if wide and not isinstance(match.parts, str) else ()


def return_outputs(work: Work) -> None:
    """Return the result of each substituted site, [B, H, L, D], from the graph, after its own outputs."""
    return_also(work.graph_module, work.substituted)


def return_dense(work: Work, matches: Iterable[Match]) -> None:
    """Return the dense result of each of these matches, [B, H, L, D], from the graph, after its own outputs."""
    outputs = dense_outputs(matches)
    return_also(work.graph_module, outputs)
    work.changed |= bool(outputs)


def hoist(work: Work) -> None:
    """The order of tokens made once for many sites, where that gathers less than each of them by itself."""
    done: set[Node] = set()
    texts: dict[Node, str] = {}
    while (plan := _planned(work, done)) is not None:
        write_gathers(plan)
        texts |= dict.fromkeys((site.node for site in plan.sites), f", {plan}")
    said = {match.node: texts.get(op, "") for match, op in work.substituted}
    work.steps = [Step(m, replace(d, order=d.order + said.get(m.node, ""))) for m, d in work.steps]


def foretell_orders(works: list[Work], options: Options) -> None:
    """Say what would become of the orders in these works of one graph, which is rewritten and of no more use then."""
    first = works[0]
    if first.orders:
        run(first, partial(substitute, options=options, as_input=lambda values: values), hoist)
        found = {step.match.node: step.decision.order for step in first.steps}
        for work in works[1:]:
            work.steps = [Step(m, replace(d, order=found.get(m.node, d.order))) for m, d in work.steps]


def _planned(work: Work, done: set[Node]) -> Plan | None:
    """The next order that is better made elsewhere. To be without it is slower, not wrong."""
    if work.orders:
        with sheltered(work.failures, "hoist"):
            return plan_gathers(work.graph_module, done)
    return None


def erase_markers(work: Work) -> None:
    """Remove the markers that ``attach`` left, those without a site too."""
    work.changed |= erase_all_markers(work.graph_module)


def check(work: Work) -> None:
    """Lint and recompile the graph and those nested in it, if something changed."""
    for module in graphs_of(work.graph_module) if work.changed else ():
        module.graph.lint()
        module.recompile()


def rewriting_passes(options: Options, as_input: Callable[[Tensor], Any], with_outputs: bool = False) -> list[Pass]:
    """The passes that change a graph, after ``decide_sites``."""
    passes: list[Pass] = [partial(substitute, options=options, as_input=as_input)]
    return [*passes, *[return_outputs] * with_outputs, hoist, erase_markers, check]


def graphs_of(graph_module: GraphModule) -> Iterator[GraphModule]:
    """A graph module and those below it."""
    return (module for module in graph_module.modules() if isinstance(module, GraphModule))


def _name(each: Pass) -> str:
    return str(getattr(each, "func", each).__name__)


def _fingerprint(graph_module: GraphModule) -> dict[Node, tuple[Any, ...]]:
    return {
        node: (node.target, node.args, node.kwargs) for module in graphs_of(graph_module) for node in module.graph.nodes
    }


def _changes(before: dict[Node, tuple[Any, ...]], after: dict[Node, tuple[Any, ...]]) -> int:
    """How many nodes were added, removed, or given other arguments."""
    kept = before.keys() & after.keys()
    return len(before.keys() ^ after.keys()) + sum(before[node] != after[node] for node in kept)
