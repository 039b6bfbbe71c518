"""Modules of torch.nn that ``symbolic_trace`` leaves whole: nn.MultiheadAttention and what is built of it.

``LeafOpener`` exports the modules, for any batch and length, and puts their graphs
in place of the calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..read.fx_utils import value_of
from ..read.reader import Reader
from .open import erase_readers_of_weights, holds_attention, returns_weights

_OWNED = {InputKind.PARAMETER, InputKind.BUFFER}
_NEED_WEIGHTS = "need_weights"


class LeafOpener:
    """Opens leaves in copies of one graph; a module is exported once, whatever the number of copies."""

    def __init__(self) -> None:
        self._programs: dict[str, ExportedProgram | None] = {}

    def open(self, graph_module: GraphModule, leaves: set[str] | None = None) -> dict[Node, str]:
        """Open the leaves of these node names (None: all), in place.

        Returns what was put in, node by node, with the name of the leaf. A leaf stays whole whose attention weights are
        used, that changes its own buffers, or whose inputs or outputs have no shapes.
        """
        made: dict[Node, str] = {}
        for node in list(graph_module.graph.nodes):
            if (leaves is None or node.name in leaves) and holds_attention(node):
                if node.name not in self._programs:
                    self._programs[node.name] = _export(node, graph_module)
                program = self._programs[node.name]
                if program is not None:
                    made.update(dict.fromkeys(_inline(graph_module, node, program), node.name))
        if made:
            graph_module.graph.lint()
            graph_module.recompile()
        return made


def _export(node: Node, owner: GraphModule) -> ExportedProgram | None:
    module = owner.get_submodule(str(node.target))
    is_attention = isinstance(module, nn.MultiheadAttention)
    if is_attention and returns_weights(node, Reader(owner)):
        return None
    given = tree_leaves((node.args, node.kwargs))
    if any(isinstance(x, Node) and value_of(x) is None for x in (node, *given)):
        return None  # shapes are not known, or the module does what depends on data
    args, kwargs = _arguments(node, module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    blanks: dict[Node, Any] = {}  # one for each node: nn.MultiheadAttention asks whether query and key are the same
    with mode:
        for x in given:
            if isinstance(x, Node) and x not in blanks:
                value = value_of(x)
                blanks[x] = _blank(value) if isinstance(value, Tensor) else value
    fake_args, fake_kwargs = tree_map(lambda x: blanks[x] if isinstance(x, Node) else x, (args, kwargs))
    by_name = inspect.signature(module.forward).bind(*fake_args, **fake_kwargs).arguments
    any_size = {name: _dynamic(value) for name, value in by_name.items()}
    # Gradients are on, so that the graph serves training and has no inference kernels in it.
    with torch.enable_grad():
        program = export(module, fake_args, fake_kwargs, dynamic_shapes=any_size, strict=False)
    signature = program.graph_signature
    owned = all(spec.kind in _OWNED or spec.kind is InputKind.USER_INPUT for spec in signature.input_specs)
    pure = all(spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs)
    return program if owned and pure else None


def _arguments(node: Node, module: nn.Module) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """A call's arguments; nn.MultiheadAttention is not asked for weights, which nobody reads."""
    if not isinstance(module, nn.MultiheadAttention):
        return tuple(node.args), dict(node.kwargs)
    bound = inspect.signature(module.forward).bind(*node.args, **node.kwargs)
    bound.arguments[_NEED_WEIGHTS] = False
    return (), dict(bound.arguments)


def _inline(graph_module: GraphModule, node: Node, program: ExportedProgram) -> list[Node]:
    """Put an exported module in the place of its call; returns the new nodes."""
    graph, copies = graph_module.graph, {}
    user_inputs = iter(tree_leaves(_arguments(node, graph_module.get_submodule(str(node.target)))))
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    with graph.inserting_before(node):
        for placeholder in program.graph.find_nodes(op="placeholder"):
            spec = specs[placeholder.name]
            if spec.kind is InputKind.USER_INPUT:
                copies[placeholder] = next(user_inputs)
            else:
                copies[placeholder] = graph.get_attr(f"{node.target}.{spec.target}")
                copies[placeholder].meta = {"val": placeholder.meta["val"]}
        owned = [x for x in copies.values() if isinstance(x, Node) and x.op == "get_attr"]
        for inner in program.graph.find_nodes(op="get_attr"):  # code under no_grad or autocast is a graph of its own
            nested = f"{node.name}_{inner.target}"
            graph_module.add_submodule(nested, program.graph_module.get_submodule(str(inner.target)))
            copies[inner] = graph.get_attr(nested)
        output = graph.graph_copy(program.graph, copies)
    for inner, copy in copies.items():
        if inner.op not in ("placeholder", "get_attr"):
            copy.meta = {**inner.meta, "nn_module_stack": _stack(node, inner)}
    if isinstance(graph_module.get_submodule(str(node.target)), nn.MultiheadAttention):
        erase_readers_of_weights(node, Reader(graph_module))
    result = tree_unflatten(tree_leaves(output), program.call_spec.out_spec)
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    return owned + [copy for inner, copy in copies.items() if inner.op == "call_function"]


def _stack(node: Node, inner: Node) -> dict[str, Any]:
    """The module stack of a node inside a leaf, as the whole model's trace would have it."""
    stack = dict(node.meta.get("nn_module_stack") or {})
    for key, (path, kind) in (inner.meta.get("nn_module_stack") or {}).items():
        full = f"{node.target}.{path}" if path else str(node.target)
        stack[f"{node.name}.{key}"] = (full, kind)
    return stack


def _dynamic(value: Any) -> Any:
    """Any size in each dimension in which the module takes any."""
    leaves, spec = tree_flatten(value)
    return tree_unflatten(
        [[Dim.AUTO] * x.dim() if isinstance(x, Tensor) else None for x in leaves],
        spec,
    )


def _blank(x: Tensor) -> Tensor:
    blank = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return blank.requires_grad_(x.requires_grad)
