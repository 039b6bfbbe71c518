"""What follows on find: decide about every match, substitute those that become sparse. The first can be run alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import Options
from ..report import Decision, Reason, Report, SiteReport
from .decide import decide, thresholds_for
from .find import Match
from .outputs import return_also
from .substitute import substitute
from .thresholds_in import erase_markers, marked_thresholds, markers_of, new_thresholds

# Attached thresholds may be changed at any time, so what they hold now decides nothing: a site is replaced if it would
# pay with a tenth of the blocks.
_ATTACHED_TOPK = 0.1


@dataclass(frozen=True)
class Plan:
    """What is to be done with a graph: every match with its decision."""

    steps: tuple[tuple[Match, Decision], ...]

    def add_to(self, report: Report) -> None:
        report.graphs += 1
        report.sites += [SiteReport(match.site, decision) for match, decision in self.steps]


def plan(
    matches: Iterable[Match],
    options: Options,
    attached: Container[Node] = (),
    alike: Callable[[Match], Iterable[tuple[Match, bool]]] = lambda match: (),
) -> Plan:
    """Decide about everything that was found in a graph; the graph is not changed.

    Args:
        matches: what ``find`` found.
        options: the backend's options.
        attached: the nodes of those matches whose thresholds are attached to the model.
        alike: for a match, the same site in other modules that may run the same graph, and whether its thresholds are
            attached. Whichever comes first, the site becomes sparse if it does in one of them; where it would not
            alone, all key blocks are kept.
    """
    todo = []
    for match in matches:
        decision = _decide(match, options, match.node in attached)
        if decision.reason is Reason.SLOWER:
            for other, other_attached in alike(match):
                if _decide(other, options, other_attached).status == "sparse":
                    decision = Decision(Reason.SHARED, f"as {other.site.name}", decision.prediction)
                    break
        todo.append((match, decision))
    return Plan(tuple(todo))


def _decide(match: Match, options: Options, attached: bool) -> Decision:
    if not attached:
        return decide(match, options)
    decision = decide(match, options.with_thresholds(_ATTACHED_TOPK, 0.0))
    detail = "; ".join(filter(None, (decision.detail, "thresholds attached")))
    return Decision(decision.reason, detail, decision.prediction)


def apply(
    graph_module: GraphModule,
    todo: Plan,
    options: Options,
    as_input: Callable[[Tensor], Any],
    with_outputs: bool = False,
) -> list[Tensor]:
    """Substitute every sparse site of a plan, and remove the markers that ``attach`` left.

    ``as_input`` turns the thresholds of a site into what a graph input of this graph carries (a fake tensor).
    ``with_outputs``: what each of them gives, [B, H, L, D], becomes an output of the graph after its own ones.

    Returns:
        The thresholds of the replaced sites without a marker, float32 [H, 2] each, in the order in which they became
        new last inputs.
    """
    new_inputs: list[Tensor] = []
    touched: set[GraphModule] = set()
    replaced: dict[Node, Node] = {}
    made: list[tuple[Match, Node]] = []
    markers = markers_of(graph_module, [match for match, _ in todo.steps])
    for match, decision in todo.steps:
        if decision.status != "sparse":
            continue
        if match.node in markers:
            node = marked_thresholds(match, markers[match.node])
        else:
            assert match.attention is not None
            pairs = thresholds_for(match, options)
            pairs = ((1.0, 0.0),) * len(pairs) if decision.reason is Reason.SHARED else pairs
            values = torch.tensor(pairs, dtype=torch.float32, device=match.attention.device)
            node = new_thresholds(match, graph_module, as_input(values))
            new_inputs.append(values)
        made.append((match, substitute(match, node, replaced)))
        touched |= {graph_module, match.graph_module, *(caller.graph_module for caller in match.callers)}
    if with_outputs:
        return_also(graph_module, made)
    touched |= erase_markers(graph_module)
    for module in touched:
        module.graph.lint()
        module.recompile()
    return new_inputs
