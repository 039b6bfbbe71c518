"""A graph on its way through the passes: what was found, decided and made so far, and how passes are run on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch.fx import GraphModule, Node

from ..errors import is_of_user
from ..kernels import inventory
from ..report import Decision, Failure, Report, SiteReport
from .find import Match
from .order import SiteOrder
from .read.fx_utils import without_guards
from .write.threshold_inputs import Marker, ThresholdInput

logger = logging.getLogger("sparge_compile")


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


def _note(report: Report, steps: Iterable[Step]) -> None:
    """Note sites with their decisions in a report, and which kernels run on the GPUs of the sparse ones."""
    for match, decision in steps:
        report.sites.append(SiteReport(match.site, decision))
        device = match.attention.device if match.attention and decision.status == "sparse" else None
        if device is not None and device.type == "cuda" and str(device) not in report.kernels:
            report.kernels[str(device)] = inventory.summary(device)


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
