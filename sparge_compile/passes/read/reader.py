"""Reading a graph backwards: from a value to what computed it, through views, copies and changes in place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from .axes import COPIES, Layout, before, is_layout
from .calls import Lowering, Value
from .writes import Mutations


@dataclass(frozen=True)
class Held:
    """A graph node that holds a tensor, the axes of its dimensions, and the node that reads it."""

    node: Node
    layout: Layout
    reader: Node
    copied: bool = False  # a copy stands between this node and the tensor that was asked for


class Reader:
    """One graph, to be read."""

    def __init__(self, owner: GraphModule) -> None:
        self.owner = owner
        self.lowering = Lowering(owner)
        self.mutations = Mutations(self.lowering)
        self.depth = 0  # of the formula that is being read
        self.spent = 0  # values that it has read

    def holder(self, value: Value, reader: Node) -> Node | None:
        """The graph node that holds what ``reader`` reads as ``value``; None for an intermediate result."""
        if value.node is None:
            return None
        seen = self.mutations.version(value.node, reader)
        return seen if seen is not None and isinstance(self.lowering.fake(seen), Tensor) else value.node

    def definition(self, value: Value, reader: Node) -> tuple[Value, Node] | None:
        """What computed a value that ``reader`` reads: a value with a call, and the node that the call belongs to."""
        while value.call is None:
            found = self._made(value, reader)
            if found is None:
                return None
            value, reader = found
        return value, reader

    def _made(self, value: Value, reader: Node) -> tuple[Value, Node] | None:
        """What the node of a leaf, as ``reader`` sees it, computes; and that node."""
        node = self.mutations.version(value.node, reader) if value.node is not None else None
        inner = self.lowering.value(node) if node is not None else None
        return None if node is None or inner is None else (inner, node)

    def holders(self, value: Value, reader: Node, layout: Layout) -> list[Held]:
        """The nodes that hold a tensor in some layout, from the nearest back to where it is more than laid out anew."""
        found: list[Held] = []
        copied = False
        while True:
            node = self.holder(value, reader)
            if node is not None:
                if found and self._needs_gradient(node) and not self._needs_gradient(found[-1].node):
                    return found  # a gradient is stopped between them
                found.append(Held(node, layout, reader, copied))
            if value.call is None:
                made = self._made(value, reader)
                if made is None:
                    return found
                value, reader = made
                continue
            if not is_layout(value.call):
                return found
            earlier = before(value.call, layout)
            if earlier is None:
                return found
            copied = copied or value.call.name in COPIES
            value, layout = value.call.args[0], earlier

    def _needs_gradient(self, node: Node) -> bool:
        return bool(self.lowering.fake(node).requires_grad)
