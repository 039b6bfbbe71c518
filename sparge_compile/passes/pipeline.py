"""What follows on find: decide about every match, substitute those that become sparse. The first can be run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import Options
from ..report import Decision, Report, SiteReport
from .decide import decide, thresholds_for
from .find import Match
from .substitute import substitute


@dataclass(frozen=True)
class Plan:
    """What is to be done with a graph: every match with its decision."""

    steps: tuple[tuple[Match, Decision], ...]

    def add_to(self, report: Report) -> None:
        report.graphs += 1
        report.sites += [SiteReport(match.site, decision) for match, decision in self.steps]


def plan(matches: Iterable[Match], options: Options) -> Plan:
    """Decide about everything that was found in a graph; the graph is not changed."""
    return Plan(tuple((match, decide(match, options)) for match in matches))


def apply(graph_module: GraphModule, todo: Plan, options: Options, as_input: Callable[[Tensor], Any]) -> list[Tensor]:
    """Substitute every sparse site of a plan.

    ``as_input`` turns the thresholds of a site into what a graph input of this graph carries (a fake tensor).

    Returns:
        The thresholds of the replaced sites, float32 [H, 2] each, in the order in which they became new last inputs.
    """
    new_inputs: list[Tensor] = []
    touched = {graph_module}
    replaced: dict[Node, Node] = {}
    for match, decision in todo.steps:
        if decision.status == "sparse":
            assert match.attention is not None
            device = match.attention.device
            thresholds = torch.tensor(thresholds_for(match, options), dtype=torch.float32, device=device)
            substitute(match, graph_module, as_input(thresholds), replaced)
            new_inputs.append(thresholds)
            touched |= {match.graph_module, *(caller.graph_module for caller in match.callers)}
    if new_inputs:
        for module in touched:
            module.graph.lint()
            module.recompile()
    return new_inputs
