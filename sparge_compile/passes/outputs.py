"""Outputs: a graph that also returns what its attention gives, and whoever listens to the calls of such graphs.

The additional outputs come last and are taken off before the caller sees a result. They are outputs like all others, so
they have gradients, in full graphs and out of checkpointed code too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import Options
from .axes import settle
from .emit import Emitter
from .find import Match
from .fused_kernels import FUSED_KERNELS
from .fx_utils import value_of
from .open_up import put_inside
from .places import Names, Place
from .runtime import Slot


class Listener(Protocol):
    """What hears of the graphs that run."""

    def ran(self, options: Options, names: list[str], outputs: Sequence[Tensor]) -> None:
        """A graph ran that was compiled with these options; ``names`` are its sparse sites, or those that were asked
        for, and ``outputs`` their results [B, H, L, D], if the graph returns them."""


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("sparge_listeners", default=())
_wanted = 0  # how many ask for graphs that return what their sparse sites give


@contextmanager
def heard_by(*listeners: Listener) -> Iterator[None]:
    """Have these, and nobody else, hear of the graphs that run meanwhile."""
    token = _listeners.set(listeners)
    try:
        yield
    finally:
        _listeners.reset(token)


def current_listeners() -> tuple[Listener, ...]:
    return _listeners.get()


def want_outputs(more: int) -> None:
    """Ask so many times more, or less, for the outputs of sites; what is compiled from now on for training has them.

    Whatever model it is for: equal models share what Dynamo compiled for the first of them.
    """
    global _wanted
    _wanted += more
    if more > 0:
        torch._dynamo.reset()  # what is there does not return them


def outputs_wanted() -> bool:
    """Whether what is being compiled now shall return the outputs of its sites. They serve training alone."""
    return torch.is_grad_enabled() and _wanted > 0


class Outlet:
    """Tells listeners of each call of a graph, and takes the additional outputs off its results.

    ``names`` are those of the model that runs it; without them it is looked for on the stack.
    """

    def __init__(self, options: Options, slots: Sequence[Slot], has_outputs: bool, names: Names | None = None) -> None:
        self._options = options
        self._names = names
        self._slots = slots
        self._count = len(slots) if has_outputs else 0

    def __call__(self, args: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
        end = len(results) - self._count
        for listener in _listeners.get():
            names = [slot.name(self._place(slot, args)) for slot in self._slots]
            listener.ran(self._options, names, results[end:])
        return results[:end] if self._count else results

    def _place(self, slot: Slot, args: Sequence[Any]) -> Place:
        return slot.locator.place(args) if self._names is None else slot.locator.where(args, self._names)


def return_also(graph_module: GraphModule, wanted: Iterable[tuple[Match, Node]]) -> None:
    """Have a graph return these nodes, which stand in the graphs of their matches, as its last outputs, in order.

    The caller lints and recompiles.
    """
    for match, node in wanted:
        for depth in reversed(range(len(match.callers))):
            owner = match.graph_module if depth + 1 == len(match.callers) else match.callers[depth + 1].graph_module
            position, caller = _append(owner, node), match.callers[depth].node
            value = value_of(node)
            for key in ("example_value", "val"):
                if isinstance(caller.meta.get(key), (tuple, list)):
                    caller.meta[key] = (*caller.meta[key], value)
            with caller.graph.inserting_after(caller):
                node = caller.graph.call_function(operator.getitem, (caller, position))
            node.meta = {"example_value": value, "val": value}
        _append(graph_module, node)


def dense_outputs(matches: Iterable[Match]) -> list[tuple[Match, Node]]:
    """For each attention of a graph that stays as it is, a node with its result as [B, H, L, D]."""
    found = []
    for match in matches:
        attention = match.attention
        assert attention is not None
        copies = put_inside(match.graph_module, match.node, match.inside) if match.inside is not None else {}
        output = copies.get(attention.output, attention.output)
        axes = attention.axes
        emitter = Emitter(match.graph_module.graph, attention, lambda node: node)
        with match.graph_module.graph.inserting_after(output):
            node = output
            if output.target in FUSED_KERNELS:
                node = emitter.call(operator.getitem, output, 0)
        with match.graph_module.graph.inserting_before(node.next):
            if attention.rewritten:  # the node is changed in place later on
                node = emitter.call(torch.ops.aten.clone.default, node)
            heads = (*axes.heads, *axes.group)
            wanted = settle((axes.batch, heads, axes.rows, axes.value_feature))
            found.append((match, emitter.arrange(node, settle(attention.output_layout), wanted)))
    return found


def _append(graph_module: GraphModule, node: Node) -> int:
    """Return a node of a graph as its last output as well; gives its position."""
    (end,) = graph_module.graph.find_nodes(op="output")
    (outputs,) = end.args
    end.args = ((*outputs, node),)
    return len(outputs)
