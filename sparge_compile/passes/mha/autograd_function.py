"""The inside of a ``torch.autograd.Function`` that attends: its forward as a graph, which autograd can follow.

Other libraries wrap their kernels in such a function, and with a gradient in sight Dynamo keeps it as one node, with a
graph for the forward and one for the backward. If the forward only lays out and pads what one known call of attention
takes and gives, and the backward only lays out the gradients of an attention, then the call alone, replaced by an op
with a backward of its own, is the whole function.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...report import Reason
from ..match.attention import Refusal
from ..match.dialects import Spoken, spoken
from ..match.foreign import is_backward
from ..read.axes import COPIES, PERMUTES, RESHAPES
from ..read.calls import Value
from ..read.fx_utils import clone, submodule_of, value_of
from ..read.reader import Reader

# What leaves the values of a tensor as they are, up to zeros around them.
_LAYOUT = {*RESHAPES, *COPIES, *PERMUTES, "expand", "constant_pad_nd", "detach", "unbind", "split", "split_with_sizes"}
# Memory that a backward fills, and what puts gradients into it, together, or back to where keys were repeated.
_FRESH = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_FRESH |= {"zeros", "zeros_like", "new_zeros"}
_GATHERED = {"stack", "cat", "sum", "copy", "copy_", "slice_scatter", "select_scatter"}


def is_autograd_function(node: Node) -> bool:
    """Whether a node calls an autograd function that Dynamo traced."""
    higher_order = isinstance(node.target, torch._ops.HigherOrderOperator)
    return node.op == "call_function" and higher_order and node.target.name() == "autograd_function_apply"  # type: ignore[union-attr]


def function_inputs(node: Node) -> list[Node]:
    """What a call of an autograd function hands to its forward."""
    return [x for x in node.args[2:] if isinstance(x, Node)]


def open_function(node: Node, owner: GraphModule) -> tuple[GraphModule, Spoken | Refusal] | None:
    """The forward of an autograd function with the results that are read, and the call in it that attends.

    A refusal where more is computed than that; None where nothing in it is known to attend.
    """
    forward, backward = (submodule_of(x, owner) for x in node.args[:2])
    if forward is None or backward is None or len(function_inputs(node)) != len(node.args) - 2:
        return None
    calls = [call for call in map(spoken, forward.graph.nodes) if call is not None]
    if not calls:
        return None
    name = calls[0].signature.name
    inside = _inside(node, forward)
    if inside is None or len(calls) > 1 or not _gives_the_gradients(forward, backward):
        return forward, Refusal(Reason.CUSTOM_OP, name)
    call = next(call for call in map(spoken, inside.graph.nodes) if call is not None)
    return inside, call if _only_lays_out(inside, call) else Refusal(Reason.CUSTOM_OP, name)


def _inside(node: Node, forward: GraphModule) -> GraphModule | None:
    """A copy of the forward that gives what is read of its results and nothing else; None if it cannot stand alone."""
    reader = Reader(forward)
    if any(reader.written(x) for x in forward.graph.nodes):
        return None
    if any(user.target is not operator.getitem or not isinstance(user.args[1], int) for user in node.users):
        return None
    inside = clone(forward)
    graph = inside.graph
    (end,) = graph.find_nodes(op="output")
    results: Any = end.args[0]
    if not isinstance(results, (tuple, list)) or not results or not isinstance(results[0], (tuple, list)):
        return None
    read = {user.args[1] for user in node.users if user.users}
    end.args = (tuple(x if i in read else None for i, x in enumerate(results[0])),)
    for each in reversed(list(graph.nodes)):
        if each.op == "call_method" and each.target == "detach":
            each.replace_all_uses_with(each.args[0])
        if each.op not in ("placeholder", "output") and not each.users:
            graph.erase_node(each)
    inside.recompile()
    return inside


def _only_lays_out(inside: GraphModule, call: Spoken) -> bool:
    """Whether a graph does nothing to floating-point tensors but what ``_LAYOUT`` says, and the call."""
    reader = Reader(inside)
    for node in inside.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or node is call.node:
            continue
        if node.target is operator.getitem and node.args[0] is call.node:
            continue
        value = reader.value(node)
        if value is None:
            if isinstance(reader.fake(node), torch.Tensor):
                return False
            continue
        if value.dtype.is_floating_point and not _is_laid_out(value):
            return False
    return True


def _is_laid_out(value: Value) -> bool:
    call = value.call
    return call is None or (call.name in _LAYOUT and all(map(_is_laid_out, call.inputs)))


def _gives_the_gradients(forward: GraphModule, backward: GraphModule) -> bool:
    """Whether a backward gives what an attention's backward made, and nothing else, to each input that learns."""
    inputs = forward.graph.find_nodes(op="placeholder")
    (end,) = backward.graph.find_nodes(op="output")
    gradients: Any = end.args[0]
    if not isinstance(gradients, (tuple, list)) or len(gradients) != len(inputs):
        return False
    learn = [bool(getattr(value_of(x), "requires_grad", False)) for x in inputs]
    if any(one and not isinstance(grad, Node) for one, grad in zip(learn, gradients, strict=True)):
        return False
    reader, seen = Reader(backward), set[Node]()
    edge = [x for x in gradients if isinstance(x, Node)]
    while edge:
        node = edge.pop()
        source = node.args[0] if node.target is operator.getitem else node
        if node in seen or (isinstance(source, Node) and is_backward(source.target)):
            continue
        seen.add(node)
        edge += reader.writers(node)
        if node.target is operator.setitem:
            edge += node.all_input_nodes
            continue
        value = reader.value(node)
        made_of = None if value is None or value.call is None else _made_of(value)
        if made_of is None:
            return False
        edge += made_of
    return True


def _made_of(value: Value) -> list[Node] | None:
    """The nodes whose values, laid out or gathered, are in a value; None where anything else is done to them."""
    if value.call is None:
        return [] if value.node is None else [value.node]
    if value.call.name in _FRESH:
        return []
    parts = [_made_of(x) for x in value.call.inputs] if value.call.name in _LAYOUT | _GATHERED else [None]
    return None if None in parts else [node for part in parts if part for node in part]
