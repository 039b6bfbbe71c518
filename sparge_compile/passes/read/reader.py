"""Reading a graph backwards: from a value to what computed it, through views, copies and changes in place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .axes import COPIES, Layout, before, is_layout
from .calls import Calls, Value, reads_number
from .fx_utils import asserts_metadata
from .stored import reached_by_inputs
from .writes import Writes, may_write


@dataclass(frozen=True)
class Held:
    """A graph node that holds a tensor, the axes of its dimensions, and the node that reads it."""

    node: Node
    layout: Layout
    user: Node
    copied: bool = False  # a copy stands between this node and the tensor that was asked for


class Reader:
    """One graph, to be read: what its nodes compute and hold, and what is written to in between.

    All of it speaks of the graph as it was found; a rewrite does not change what a reader says. ``stored`` are inputs
    that hold what the module stores, where the graph does not tell.
    """

    def __init__(self, owner: GraphModule, stored: Collection[Node] = ()) -> None:
        self.owner = owner
        self._stored = stored
        self._calls = Calls(owner)
        self._writes = Writes(self._calls)
        self.depth = 0  # of the formula that is being read
        self.spent = 0  # values that it has read

    def value(self, node: Node) -> Value | None:
        """The result of a node as ATen calls on its inputs; None where it is not one tensor or cannot be run."""
        return self._calls.value(node)

    def fake(self, node: Node) -> Any:
        """The fake tensor or number that stands on a node; a module's own tensor for what reads an attribute."""
        return self._calls.fake(node)

    def position(self, node: Node) -> int:
        """Where a node stands in the graph."""
        return self._writes.position[node]

    def version(self, node: Node, user: Node) -> Node | None:
        """The node whose result is what ``user`` sees of ``node``; None where it was changed through a view."""
        return self._writes.version(node, user)

    def changed(self, node: Node, since: Node, until: Node | None, ignore: Collection[Node] = ()) -> bool:
        """Whether a writer that is not ignored changes a tensor between two nodes (None: to the end)."""
        return self._writes.changed(node, since, until, ignore)

    def writers(self, node: Node) -> list[Node]:
        """The nodes that change a tensor in place, through whatever view, in graph order."""
        return self._writes.writers(node)

    def share_memory(self, one: Node, other: Node) -> bool:
        """Whether what is written to one tensor may be seen in another."""
        return self._writes.share_memory(one, other)

    def written(self, node: Node) -> list[Node]:
        """The tensors that a node changes."""
        return self._writes.written(node)

    def is_pure(self, node: Node) -> bool:
        """Whether nothing but a node's result tells that it ran; never of an input, which callers pass by position."""
        if node.op == "placeholder":
            return False
        if isinstance(node.target, torch._ops.OpOverload):
            return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
        return not may_write(node) and (reads_number(self._calls.fake(node)) or self._calls.runs_quietly(node))

    def is_dead(self, node: Node) -> bool:
        """Whether neither a result of the graph nor anything outside of it depends on a node."""
        return node in self._dead

    def dead_readers(self, node: Node) -> list[Node]:
        """The dead nodes that read a node, and those that read them, in graph order."""
        found: set[Node] = set()
        edge = [*node.users]
        while edge:
            user = edge.pop()
            if user in self._dead and user not in found:
                found.add(user)
                edge += user.users
        return sorted(found, key=self.position)

    @cached_property
    def _dead(self) -> set[Node]:
        dead: set[Node] = set()
        for node in reversed(self.owner.graph.nodes):
            if node.op.startswith("call") and all(user in dead for user in node.users) and self._may_die(node):
                dead.add(node)
        return dead

    def _may_die(self, node: Node) -> bool:
        if asserts_metadata(node):
            return True  # where the tensor goes, it goes
        return self.fake(node) is not None and not node.is_impure() and self.is_pure(node)

    def is_stored(self, value: Value | Node) -> bool:
        """Whether no input of the model reaches a value: parameters, buffers, constants, and what is made of them."""
        if isinstance(value, Node):
            return value not in self._reached
        if value.node is not None:
            return value.node not in self._reached
        return all(map(self.is_stored, value.call.inputs)) if value.call is not None else True

    @cached_property
    def _reached(self) -> set[Node]:
        return reached_by_inputs(list(self.owner.graph.nodes), self._stored, self.writers)

    def holder(self, value: Value, user: Node) -> Node | None:
        """The graph node that holds what ``user`` reads as ``value``; None for an intermediate result."""
        if value.node is None:
            return None
        seen = self._writes.version(value.node, user)
        return seen if seen is not None and isinstance(self._calls.fake(seen), Tensor) else value.node

    def definition(self, value: Value, user: Node) -> tuple[Value, Node] | None:
        """Follow a value that ``user`` reads to what computed it: a value with a call, and the node of the call."""
        while value.call is None:
            found = self.made(value, user)
            if found is None:
                return None
            value, user = found
        return value, user

    def made(self, value: Value, user: Node) -> tuple[Value, Node] | None:
        """Follow a leaf, as ``user`` sees it, to the value that its node computes; and that node."""
        node = self._writes.version(value.node, user) if value.node is not None else None
        inner = self._calls.value(node) if node is not None else None
        return None if node is None or inner is None else (inner, node)

    def holders(self, value: Value, user: Node, layout: Layout) -> list[Held]:
        """The nodes that hold a tensor in some layout, from the nearest back to where it is more than laid out anew."""
        found: list[Held] = []
        copied = False
        while True:
            node = self.holder(value, user)
            if node is not None:
                if found and self._needs_gradient(node) and not self._needs_gradient(found[-1].node):
                    return found  # a gradient is stopped between them
                found.append(Held(node, layout, user, copied))
            if value.call is None:
                made = self.made(value, user)
                if made is None:
                    return found
                value, user = made
                continue
            if not is_layout(value.call):
                return found
            earlier = before(value.call, layout)
            if earlier is None:
                return found
            copied = copied or value.call.name in COPIES
            value, layout = value.call.args[0], earlier

    def _needs_gradient(self, node: Node) -> bool:
        return bool(self._calls.fake(node).requires_grad)
