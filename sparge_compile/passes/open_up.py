"""Larger calls that hold attention: their inside as a graph, and that graph in place of the call."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from .fx_utils import bind, signature_of, value_of

OPENABLE = {F.multi_head_attention_forward}

_MHA = signature_of(F.multi_head_attention_forward)


def open_up(node: Node) -> GraphModule | None:
    """The inside of a call as a graph of ATen ops over the call's tensor arguments, in the order of ``tensor_inputs``.

    None where the inside holds no attention to replace: the attention weights are returned and used, or the graph
    carries no shapes.
    """
    inputs = tensor_inputs(node)
    if not inputs or returns_weights(node) or not all(isinstance(value_of(n), FakeTensor) for n in inputs):
        return None
    arguments = dict(bind(_MHA, node))
    arguments["need_weights"] = False  # nobody reads them, and without them attention is one fused call

    def call(*tensors: torch.Tensor) -> Any:
        by_node = dict(zip(inputs, tensors, strict=True))
        values = tree_map(lambda x: by_node.get(x, value_of(x)) if isinstance(x, Node) else x, arguments)
        return F.multi_head_attention_forward(**values)[0]

    # Dynamo hands the graph's inputs over in another fake mode than the one it traced with, and modes do not mix.
    fake_mode = FakeTensorMode(shape_env=value_of(inputs[0]).fake_mode.shape_env)
    with fake_mode:
        fresh = [_blank(value_of(n)) for n in inputs]
        return make_fx(call, pre_dispatch=True)(*fresh)


def _blank(x: torch.Tensor) -> torch.Tensor:
    blank = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return blank.requires_grad_(x.requires_grad)


def tensor_inputs(node: Node) -> list[Node]:
    """The tensors that a call reads."""
    return [n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)]


def put_inside(graph_module: GraphModule, node: Node, inside: GraphModule) -> dict[Node, Node]:
    """Replace a call by its opened graph; returns the copy of each node of ``inside``."""
    graph = graph_module.graph
    copies: dict[Node, Any] = dict(zip(inside.graph.find_nodes(op="placeholder"), tensor_inputs(node), strict=True))
    for name, value in (*inside.named_parameters(), *inside.named_buffers()):
        raise AssertionError(f"an opened call owns no tensors, but {name} {tuple(value.shape)} was traced")
    with graph.inserting_before(node):
        output: Any = graph.graph_copy(inside.graph, copies)
    for inner, copy in copies.items():
        if inner.op != "placeholder":
            copy.meta = {**node.meta, **inner.meta, "nn_module_stack": node.meta.get("nn_module_stack")}
            copy.meta["example_value"] = inner.meta.get("val")
    for user in list(node.users):
        assert user.args[1] == 0, "a call whose weights are read is not opened"
        user.replace_all_uses_with(output)
        graph.erase_node(user)
    graph.erase_node(node)
    return copies


def returns_weights(node: Node) -> bool:
    """Whether somebody reads the second output, the attention weights, or the pair as a whole."""
    return not all(
        user.op == "call_function" and user.target is operator.getitem and user.args[1] == 0 for user in node.users
    )
