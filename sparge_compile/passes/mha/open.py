"""Larger calls that hold attention: their inside as a graph, and that graph in place of the call.

``F.multi_head_attention_forward`` is traced as it is; fused inference kernels and flex_attention are traced from their
written-out form. Masks that torch.nn made additive are boolean again inside, if that is all they were.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from ...report import Reason
from ..read.fx_utils import bind, signature_of, value_of
from ..read.reader import Reader
from .autograd_function import function_inputs, is_autograd_function
from .boolean_masks import boolean_sources, hidden, spelling, visible
from .flex import flex_arguments, is_flex, written_out
from .plain_torch import native_multi_head_attention, transformer_encoder_layer


def _multi_head_attention(**arguments: Any) -> Tensor:
    """``F.multi_head_attention_forward`` without the weights: nobody reads them, and so attention is one fused call."""
    return F.multi_head_attention_forward(**{**arguments, "need_weights": False})[0]


logger = logging.getLogger("sparge_compile")


class Opener(NamedTuple):
    """How a call is opened: its arguments by name, what gives its first output from them, and where it stands.

    ``child`` is the module, below the one that makes the call, to which the attention belongs. ``fused``: the attention
    inside is a call of SDPA, which tracing leaves whole; else it is written out.
    """

    arguments: Callable[[Node, Reader], Mapping[str, Any]]
    run: Callable[..., Tensor]
    returns_weights: bool = True
    child: str = ""
    fused: bool = True


def _by_signature(function: Callable[..., Any]) -> Callable[[Node, Reader], Mapping[str, Any]]:
    signature = signature_of(function)
    return lambda node, reader: bind(signature, node)


_MHA = Opener(_by_signature(F.multi_head_attention_forward), _multi_head_attention)
_NATIVE = Opener(_by_signature(native_multi_head_attention), native_multi_head_attention)
_LAYER = Opener(_by_signature(transformer_encoder_layer), transformer_encoder_layer, False, "self_attn")
_FLEX = Opener(flex_arguments, written_out, fused=False)
OPENABLE: dict[Any, Opener] = {
    F.multi_head_attention_forward: _MHA,
    torch._native_multi_head_attention: _NATIVE,
    torch.ops.aten._native_multi_head_attention.default: _NATIVE,
    torch._transformer_encoder_layer_fwd: _LAYER,
    torch.ops.aten._transformer_encoder_layer_fwd.default: _LAYER,
}
_MASKS = ("attn_mask", "key_padding_mask", "mask")
# Set on a graph module whose shapes are those of an example, which nothing guards.
EXAMPLE_SHAPES = "sparge_example_shapes"


def opener_of(node: Node) -> Opener | None:
    """How a call is opened; None where it is not."""
    return _FLEX if is_flex(node) else OPENABLE.get(node.target)


def open_up(node: Node, reader: Reader) -> GraphModule | None:
    """The inside of a call as a graph of ATen ops over the call's tensor arguments, in the order of ``tensor_inputs``.

    None where the call cannot be opened; ``why_closed`` tells.
    """
    opener = opener_of(node)
    if opener is None or why_closed(node, reader) is not None:
        return None
    inputs, arguments = tensor_inputs(node, reader), opener.arguments(node, reader)
    masks = {name: arguments[name] for name in _boolean_masks(arguments, reader)}
    apart = opener is _MHA and bool(masks)  # it would make them additive again

    def call(*tensors: Tensor) -> Any:
        by_node = dict(zip(inputs, tensors, strict=True))
        closed = {name: hidden(mask, by_node) for name, mask in masks.items()}
        given = {**arguments, **({**dict.fromkeys(masks), "is_causal": False} if apart else closed)}
        values = tree_map(lambda x: by_node.get(x, value_of(x)) if isinstance(x, Node) else x, given)
        return visible(values, closed) if apart else None, opener.run(**values)

    # Dynamo hands the graph's inputs over in another fake mode than the one it traced with, and modes do not mix.
    with _fake_mode(node, inputs) as fake_mode:
        fresh = [_blank(n, fake_mode) for n in inputs]
        try:
            inside = make_fx(call, pre_dispatch=opener.fused)(*fresh)
        except Exception as error:
            if opener is not _FLEX:
                raise
            logger.debug("cannot trace %s: %s", node.format_node(), error)  # it runs code of the user
            return None
    inside = _with_mask(inside)
    inside.graph.eliminate_dead_code()  # nothing in it writes to anything
    return inside


def why_closed(node: Node, reader: Reader) -> Reason | None:
    """Why a call cannot be opened up, or None."""
    if returns_weights(node, reader):
        return Reason.WEIGHTS_USED
    if node.op == "call_module":
        return Reason.NO_SHAPES if value_of(node) is None else Reason.OPAQUE
    values = [x for x in map(value_of, tensor_inputs(node, reader)) if not isinstance(x, torch.SymInt)]
    if not values or not all(isinstance(value, FakeTensor) for value in values):
        return Reason.NO_SHAPES
    return Reason.NESTED if any(value.is_nested for value in values) else None


def tensor_inputs(node: Node, reader: Reader) -> list[Node]:
    """The tensors that an opened call reads: boolean masks in the place of the additive ones made of them."""
    arguments = _arguments(node, reader)
    masks = _boolean_masks(arguments, reader)
    nodes = [x for name, value in arguments.items() if name not in masks for x in tree_leaves(value)]
    nodes += [source for sources in masks.values() for source in sources]
    read = dict.fromkeys(x for x in nodes if isinstance(x, Node))
    return [n for n in read if isinstance(value_of(n), (Tensor, torch.SymInt))]


def inputs_of(node: Node, reader: Reader) -> list[Node]:
    """What the inputs of a call's opened graph stand for, in order."""
    return list(function_inputs(node)) if is_autograd_function(node) else tensor_inputs(node, reader)


def copy_inside(node: Node, inside: GraphModule, reader: Reader) -> tuple[dict[Node, Any], Any]:
    """Write a call's opened graph before the call; returns the copy of each node of ``inside``, and of its output."""
    placeholders = inside.graph.find_nodes(op="placeholder")
    copies: dict[Node, Any] = dict(zip(placeholders, inputs_of(node, reader), strict=True))
    for name, value in (*inside.named_parameters(), *inside.named_buffers()):
        raise AssertionError(f"an opened call owns no tensors, but {name} {tuple(value.shape)} was traced")
    with node.graph.inserting_before(node):
        output: Any = node.graph.graph_copy(inside.graph, copies)
    for inner, copy in copies.items():
        if inner.op != "placeholder":
            copy.meta = {**node.meta, **inner.meta, "nn_module_stack": node.meta.get("nn_module_stack")}
            copy.meta["example_value"] = value_of(inner)
    return copies, output


def put_inside(graph_module: GraphModule, node: Node, inside: GraphModule, reader: Reader) -> dict[Node, Node]:
    """Replace a call by its opened graph; returns the copy of each node of ``inside``."""
    graph = graph_module.graph
    if is_autograd_function(node):
        copies, outputs = copy_inside(node, inside, reader)
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        return copies
    arguments = _arguments(node, reader)
    replaced = [n for name in _boolean_masks(arguments, reader) for n in spelling(arguments[name])]
    replaced += [n for n in node.all_input_nodes if isinstance(reader.fake(n), GraphModule)]
    copies, output = copy_inside(node, inside, reader)
    if opener_of(node).returns_weights:  # type: ignore[union-attr]
        erase_readers_of_weights(node, reader)
        for user in list(node.users):
            user.replace_all_uses_with(output)
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(output)
    graph.erase_node(node)
    for orphan in dict.fromkeys(replaced):  # additive masks, a score_mod and a mask_mod that only this call read
        if not orphan.users:
            graph.erase_node(orphan)
    return copies


def returns_weights(node: Node, reader: Reader) -> bool:
    """Whether somebody reads the second output, the attention weights, or the pair as a whole."""
    if node.op == "call_module":
        returns_both = isinstance(_module_of(node), torch.nn.MultiheadAttention)
    else:
        returns_both = opener_of(node).returns_weights  # type: ignore[union-attr]
    return returns_both and not all(
        user.op == "call_function"
        and user.target is operator.getitem
        and (user.args[1] == 0 or not user.users or reader.is_dead(user))
        for user in node.users
    )


def erase_readers_of_weights(node: Node, reader: Reader) -> None:
    """Remove what reads the second output of a call for nobody: without the weights it has nothing to read."""
    reads = [user for user in node.users if user.args[1] != 0]
    for each in sorted({each for user in reads for each in (user, *reader.dead_readers(user))}, key=reader.position)[
        ::-1
    ]:
        node.graph.erase_node(each)


def holds_attention(node: Node) -> bool:
    """Whether a node calls a module that is, or is built of, nn.MultiheadAttention: a leaf of ``symbolic_trace``."""
    module = _module_of(node) if node.op == "call_module" else None
    if module is None or isinstance(module, GraphModule):
        return False
    return any(isinstance(inner, torch.nn.MultiheadAttention) for inner in module.modules())


def _module_of(node: Node) -> torch.nn.Module | None:
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))


def _arguments(node: Node, reader: Reader) -> Mapping[str, Any]:
    opener = opener_of(node)
    assert opener is not None
    return opener.arguments(node, reader)


def _boolean_masks(arguments: Mapping[str, Any], reader: Reader) -> dict[str, list[Node]]:
    """The boolean sources of each mask that a call is given; none unless all its masks have them."""
    if arguments.get("is_causal") and arguments["key_padding_mask"] is None:
        return {}  # a causal mask, which the hint replaces
    given = {name: arguments[name] for name in _MASKS if isinstance(arguments.get(name), Node)}
    sources = {name: boolean_sources(mask, reader) for name, mask in given.items()}
    return {} if None in sources.values() else sources  # type: ignore[return-value]


def _with_mask(inside: GraphModule) -> GraphModule:
    """From a graph of (mask or None, output) the graph of the output alone, whose attention reads the mask."""
    graph = inside.graph
    (end,) = graph.find_nodes(op="output")
    mask, output = end.args[0]
    end.args = (output,)
    if mask is not None:
        sdpa = torch.ops.aten.scaled_dot_product_attention.default
        (attention,) = graph.find_nodes(op="call_function", target=sdpa)
        attention.kwargs = {**attention.kwargs, "attn_mask": mask}
    return inside


def _fake_mode(node: Node, inputs: list[Node]) -> FakeTensorMode:
    """A mode to trace in. Where shapes are only an example, sizes are symbols of their own."""
    owner = node.graph.owning_module
    if owner is not None and owner.meta.get(EXAMPLE_SHAPES):
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        return FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    given = value_of(inputs[0]).fake_mode
    # An exported program has one mode, and asks that all its values are of it.
    return given if "val" in inputs[0].meta else FakeTensorMode(shape_env=given.shape_env)


def _blank(node: Node, mode: FakeTensorMode) -> Any:
    """A fresh tensor like a node's value: an input of the trace, without history. A number stands for itself."""
    x = value_of(node)
    if isinstance(x, torch.SymInt):
        return x
    sizes: Any = (x.shape, x.stride())
    if mode.shape_env is not None and mode.shape_env is not x.fake_mode.shape_env and node.op != "get_attr":
        from torch._dynamo.source import ConstantSource  # its import is slow, and imports Triton

        like = torch.empty_strided(*sizes, dtype=x.dtype, device="meta")
        sizes = mode.shape_env.create_symbolic_sizes_strides_storage_offset(like, ConstantSource(node.name))[:2]
    blank = torch.empty_strided(*sizes, dtype=x.dtype, device=x.device)
    return blank.requires_grad_(x.requires_grad)
