"""What becomes of the calls of a site that are alike, from the first of them: a rewritten graph, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import Module

from ..options import Options
from ..passes.pipeline import rewriting_passes
from ..passes.work import analyse, run
from ..running.graph import OpenGraph, decide_sites
from ..running.thresholds import read_attached
from ..thresholds.buffers import Attached, attached_to
from .calls import Call, call_past_the_dispatcher
from .door import open_call
from .sites import Where


@dataclass(frozen=True)
class Plan:
    """What becomes of the calls of one site that are alike: a rewritten graph, or None where they stay as they are."""

    graph: OpenGraph
    compute: Callable[..., Any] | None
    is_attached: bool
    modules: Mapping[Node, Module | None]  # where thresholds may be attached for each match

    @classmethod
    def make(cls, call: Call, where: Where, settings: Options) -> Plan:
        """Read a call, decide it, and rewrite it where it becomes sparse."""
        graph = open_call(call, where)
        analyse(graph, partial(decide_sites, options=settings))
        is_attached = bool(graph.attached)
        if graph.sparse:
            tensors = [node.meta["val"] for node in graph.graph_module.graph.find_nodes(op="placeholder")]
            mode = tensors[0].fake_mode
            run(graph, *rewriting_passes(settings, partial(mode.from_tensor, static_shapes=True)))
            if not call.is_autocast:
                call_past_the_dispatcher(graph.graph_module)
        modules = {node: slot.locator.first.module(slot.path) for node, slot in graph.slots.items()}
        return cls(graph, graph.graph_module.forward if graph.substituted else None, is_attached, modules)

    def attached(self) -> dict[Node, Attached]:
        """What holds thresholds that are attached now, for each match."""
        held = {}
        for node, module in self.modules.items():
            there = attached_to(module)
            if there is not None and there.get(self.graph.slots[node].number) is not None:
                held[node] = there
        return held

    def is_dense(self, held: Mapping[Node, Attached]) -> bool:
        """Whether the thresholds that are attached are dense by plan now."""
        return bool(held) and all(each.is_dense(self.graph.slots[node].number) for node, each in held.items())

    def __call__(self, tensors: Sequence[Tensor], held: Mapping[Node, Attached]) -> Any:
        assert self.compute is not None
        values = []
        for x in self.graph.threshold_inputs:
            there = held.get(x.match.node)
            number = self.graph.slots[x.match.node].number
            values.append(x.values if there is None else read_attached(there, number, x))
        return self.compute(*tensors, *values)
