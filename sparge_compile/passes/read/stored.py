"""What a module stores: parameters, buffers, and what is made of these alone. No input of the model reaches it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.fx import Node

from .calls import reads_number
from .fx_utils import value_of

_FORM = {"type_as", "expand_as", "view_as", "reshape_as", "to"}  # of other arguments than the first they read the form
_CONTENT = {"item", "_local_scalar_dense"}  # numbers that depend on more than sizes


def is_stored_input(node: Node) -> bool:
    """Whether a graph of Dynamo reads a parameter or a buffer with this input."""
    if isinstance(value_of(node), torch.nn.Parameter):
        return True
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")  # torch 2.11 has a method here
    path = name() if callable(name) else name
    return "._parameters[" in path or "._buffers[" in path


def reached_by_inputs(
    nodes: Collection[Node], stored: Collection[Node], writers: Callable[[Node], list[Node]]
) -> set[Node]:
    """The nodes of a graph whose content depends on what the model is given.

    Args:
        nodes: all of the graph.
        stored: inputs of the graph that are known to be what the module stores.
        writers: the nodes that change a node's tensor in place.
    """
    changed = defaultdict(list)  # by who changes them
    for node in nodes:
        for writer in writers(node):
            changed[writer].append(node)
    inputs = (node for node in nodes if node.op == "placeholder" and node not in stored)
    edge = [node for node in inputs if not is_stored_input(node) and isinstance(value_of(node), (Tensor, type(None)))]
    reached: set[Node] = set()
    while edge:
        node = edge.pop()
        if node not in reached:
            reached.add(node)
            edge += [user for user in node.users if _reads_content(user, node)] + changed[node]
    return reached


def _reads_content(user: Node, node: Node) -> bool:
    """Whether a node reads more of another one than its sizes, dtype or device."""
    name = _name(user)
    value = value_of(user)
    if reads_number(value) or isinstance(value, torch.Size):
        return name in _CONTENT
    if name.endswith("_like") or name.startswith("new_"):
        return False
    return name not in _FORM or (bool(user.args) and user.args[0] is node)


def _name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
