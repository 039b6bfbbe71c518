"""Tensors that a graph changes in place: which version of a tensor a node reads.

``scores *= c`` and ``scores.masked_fill_(...)`` change what later readers of ``scores`` see, through whatever view.
Tensors are told apart by the storages of their fake tensors. What has none of its own is held by others (a tensor
inside ``vmap``, a tensor subclass) or taken to share memory with all that has none (a sparse tensor).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .calls import Calls
from .fx_utils import submodule_of

_OPERATORS = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
    "setitem",
    "ilshift",
    "irshift",
    "iconcat",
)
_IN_PLACE = {getattr(operator, name) for name in _OPERATORS}


class Writes:
    """The nodes of one graph that change tensors in place, by storage."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.position = {node: i for i, node in enumerate(calls.owner.graph.nodes)}
        self._writers: dict[Any, list[tuple[Node, Node]]] = {}  # by storage: who writes, and to which node's tensor
        self._written: dict[Node, list[Node]] = {}
        for node in self.position:
            if may_write(node) or _runs_a_writer(node, calls.owner):
                for written in calls.mutated(node):
                    for storage in (storages := self._storages(written)):
                        self._writers.setdefault(storage, []).append((node, written))
                    if storages:
                        self._written.setdefault(node, []).append(written)

    def version(self, node: Node, user: Node) -> Node | None:
        """The node whose result is what ``user`` sees of ``node``; None where it was changed through a view."""
        seen = node
        for writer, written in self._between(node, node, user):
            if written not in (node, seen):
                return None
            seen = writer
        return seen

    def changed(self, node: Node, since: Node, until: Node | None, ignore: Collection[Node] = ()) -> bool:
        """Whether a writer that is not ignored changes a tensor between two nodes (None: to the end)."""
        return any(writer not in ignore for writer, _ in self._between(node, since, until))

    def writers(self, node: Node) -> list[Node]:
        """The nodes that change a tensor, in graph order."""
        return list(dict.fromkeys(writer for writer, _ in self._writes_to(node)))

    def share_memory(self, one: Node, other: Node) -> bool:
        """Whether what is written to one tensor may be seen in another."""
        return not set(self._storages(one)).isdisjoint(self._storages(other))

    def written(self, node: Node) -> list[Node]:
        """The tensors that a node changes."""
        return self._written.get(node, [])

    def _between(self, node: Node, since: Node, until: Node | None) -> list[tuple[Node, Node]]:
        start, end = self.position[since], self.position[until] if until is not None else len(self.position)
        return [w for w in self._writes_to(node) if start < self.position[w[0]] < end]

    def _writes_to(self, node: Node) -> list[tuple[Node, Node]]:
        """Who writes to a tensor, and to which node's, in graph order."""
        found = [self._writers.get(storage, []) for storage in self._storages(node)] if self._writers else []
        if len(found) < 2:
            return found[0] if found else []
        writes = dict.fromkeys(write for each in found for write in each)
        return sorted(writes, key=lambda write: self.position[write[0]])

    def _storages(self, node: Node) -> tuple[Any, ...]:
        fake = self._calls.fake(node)
        return tuple(_storages(fake)) if isinstance(fake, Tensor) else ()


def _storages(x: Tensor) -> Iterator[Any]:
    """A key of each storage that a tensor lies in; None for a tensor of which that cannot be told."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        yield from _storages(torch._C._functorch.get_unwrapped(x))
    elif is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            if isinstance(inner := getattr(x, name), Tensor):
                yield from _storages(inner)
    else:
        try:
            yield x.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # a layout without storage
            yield None


def may_write(node: Node) -> bool:
    """Whether a node's name, schema or arguments allow a change in place; of those, lowering tells which do change."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and bool(getattr(owner.get_submodule(str(node.target)), "inplace", False))
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(getattr(node.target, name)._schema.is_mutable for name in node.target.overloads())
    if type(node.target).__name__ == "CustomOpDef":
        return True
    name = getattr(node.target, "__name__", "")
    flagged = (
        bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None or any(x is True for x in node.args)
    )
    return node.target in _IN_PLACE or flagged or (name.endswith("_") and not name.endswith("__"))


def _runs_a_writer(node: Node, owner: GraphModule) -> bool:
    """Whether a higher-order operator runs a graph in which something may be changed in place."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    bodies = [body for argument in node.all_input_nodes if (body := submodule_of(argument, owner)) is not None]
    return any(may_write(inner) or _runs_a_writer(inner, body) for body in bodies for inner in body.graph.nodes)
