"""A graph and the graph around it: where a value comes from that is an input, or that a nested graph gives."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.fx import GraphModule, Node

from ..read.fx_utils import submodule_of
from ..read.reader import Reader

# Higher-order operators whose body runs once, with the operands after it as its inputs.
TRANSPARENT = {"tag_activation_checkpoint", "wrap_with_autocast", "wrap_with_set_grad_enabled"}


@dataclass(eq=False)
class Scope:
    """A graph to be read, and the call of a graph around it that runs it, with what its inputs stand for there."""

    reader: Reader
    outer: Scope | None = None
    call: Node | None = None
    operands: Sequence[Node] = ()
    _nested: dict[Node, Scope | None] = field(default_factory=dict)

    @cached_property
    def _inputs(self) -> dict[Node, Node]:
        inputs = self.reader.owner.graph.find_nodes(op="placeholder")
        return dict(zip(inputs, self.operands, strict=False))

    def around(self, node: Node) -> tuple[Scope, Node, Node] | None:
        """Where a value comes from that this graph does not compute: a scope, the node there, and who reads it."""
        if node in self._inputs and self.outer is not None and self.call is not None:
            return self.outer, self._inputs[node], self.call
        if node.target is operator.getitem and isinstance(node.args[0], Node) and isinstance(node.args[1], int):
            inside = self.nested(node.args[0])
            if inside is not None:
                (end,) = inside.reader.owner.graph.find_nodes(op="output")
                result = end.args[0][node.args[1]] if isinstance(end.args[0], (tuple, list)) else None
                return (inside, result, end) if isinstance(result, Node) else None
        return None

    def place_of(self, placeholder: Node) -> int:
        """Where the call that runs this graph has what an input stands for, among its arguments."""
        assert self.call is not None
        inputs = list(self._inputs)
        return len(self.call.args) - len(inputs) + inputs.index(placeholder)

    def nested(self, call: Node) -> Scope | None:
        """The graph that a call runs, as checkpointed code is; None for other calls."""
        if call not in self._nested:
            self._nested[call] = None
            if isinstance(call.target, torch._ops.HigherOrderOperator):
                graphs = [submodule_of(x, self.reader.owner) for x in call.all_input_nodes]
                found = [graph for graph in graphs if graph is not None]
                if len(found) == 1:
                    self._nested[call] = self.into(found[0], call)
        return self._nested[call]

    def below(self) -> Iterator[Scope]:
        """This scope and those of the graphs that are run once in it, by calls that do nothing else."""
        yield self
        for node in self.reader.owner.graph.nodes:
            if node.op == "call_function" and runs_once(node):
                inside = self.nested(node)
                if inside is not None:
                    yield from inside.below()

    def into(self, graph_module: GraphModule, call: Node, operands: Sequence[Node] = ()) -> Scope:
        """The scope of a graph that a call here runs; its operands are the last arguments of the call, if not given."""
        inputs = graph_module.graph.find_nodes(op="placeholder")
        given = operands or (call.args[-len(inputs) :] if inputs else ())
        handed = [(each, x) for each, x in zip(inputs, given, strict=False) if isinstance(x, Node)]
        reader = Reader(graph_module, [each for each, x in handed if self.reader.is_stored(x)])
        return Scope(reader, self, call, [x for _, x in handed] if len(handed) == len(inputs) else ())


def runs_once(call: Node) -> bool:
    """Whether a call of a higher-order operator runs the graph that it is given once, and nobody else runs it."""
    target = call.target
    if not isinstance(target, torch._ops.HigherOrderOperator) or target.name() not in TRANSPARENT:
        return False
    return all(len(x.users) == 1 for x in call.all_input_nodes if x.op == "get_attr")
