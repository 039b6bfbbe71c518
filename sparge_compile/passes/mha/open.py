"""Larger calls that hold attention: their inside as a graph, and that graph in place of the call.

``F.multi_head_attention_forward`` is traced as it is; fused inference kernels are traced from their written-out form.
Masks that torch.nn made additive are boolean again inside, if that is all they were.
"""

from __future__ import annotations

import inspect
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
from .boolean_masks import boolean_sources, hidden, spelling
from .plain_torch import native_multi_head_attention, transformer_encoder_layer


def _multi_head_attention(**arguments: Any) -> Tensor:
    """``F.multi_head_attention_forward`` without the weights: nobody reads them, and so attention is one fused call."""
    return F.multi_head_attention_forward(**{**arguments, "need_weights": False})[0]


class Opener(NamedTuple):
    """How a call is opened: its signature, what gives its first output from arguments by name, and where it stands.

    ``child`` is the module, below the one that makes the call, to which the attention belongs.
    """

    signature: inspect.Signature
    run: Callable[..., Tensor]
    returns_weights: bool = True
    child: str = ""


_MHA = Opener(signature_of(F.multi_head_attention_forward), _multi_head_attention)
_NATIVE = Opener(signature_of(native_multi_head_attention), native_multi_head_attention)
_LAYER = Opener(signature_of(transformer_encoder_layer), transformer_encoder_layer, False, "self_attn")
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


def open_up(node: Node, reader: Reader) -> GraphModule | None:
    """The inside of a call as a graph of ATen ops over the call's tensor arguments, in the order of ``tensor_inputs``.

    None where the call cannot be opened; ``why_closed`` tells.
    """
    if why_closed(node, reader) is not None:
        return None
    inputs, arguments = tensor_inputs(node, reader), _arguments(node)
    masks = {name: arguments[name] for name in _boolean_masks(arguments, reader)}
    opener = OPENABLE[node.target]
    apart = opener is _MHA and bool(masks)  # it would make them additive again

    def call(*tensors: Tensor) -> Any:
        by_node = dict(zip(inputs, tensors, strict=True))
        closed = {name: hidden(mask, by_node) for name, mask in masks.items()}
        given = {**arguments, **({**dict.fromkeys(masks), "is_causal": False} if apart else closed)}
        values = tree_map(lambda x: by_node.get(x, value_of(x)) if isinstance(x, Node) else x, given)
        return _visible(values, closed) if apart else None, opener.run(**values)

    # Dynamo hands the graph's inputs over in another fake mode than the one it traced with, and modes do not mix.
    with _fake_mode(node, inputs) as fake_mode:
        fresh = [_blank(n, fake_mode) for n in inputs]
        inside = make_fx(call, pre_dispatch=True)(*fresh)
    return _with_mask(inside)


def why_closed(node: Node, reader: Reader) -> Reason | None:
    """Why a call cannot be opened up, or None."""
    if returns_weights(node, reader):
        return Reason.WEIGHTS_USED
    if node.op == "call_module":
        return Reason.NO_SHAPES if value_of(node) is None else Reason.OPAQUE
    values = [value_of(n) for n in tensor_inputs(node, reader)]
    if not values or not all(isinstance(value, FakeTensor) for value in values):
        return Reason.NO_SHAPES
    return Reason.NESTED if any(value.is_nested for value in values) else None


def tensor_inputs(node: Node, reader: Reader) -> list[Node]:
    """The tensors that an opened call reads: boolean masks in the place of the additive ones made of them."""
    arguments = _arguments(node)
    masks = _boolean_masks(arguments, reader)
    nodes = [x for name, value in arguments.items() if name not in masks for x in tree_leaves(value)]
    nodes += [source for sources in masks.values() for source in sources]
    return [n for n in dict.fromkeys(x for x in nodes if isinstance(x, Node)) if isinstance(value_of(n), Tensor)]


def copy_inside(node: Node, inside: GraphModule, reader: Reader) -> tuple[dict[Node, Any], Any]:
    """Write a call's opened graph before the call; returns the copy of each node of ``inside``, and of its output."""
    placeholders = inside.graph.find_nodes(op="placeholder")
    copies: dict[Node, Any] = dict(zip(placeholders, tensor_inputs(node, reader), strict=True))
    for name, value in (*inside.named_parameters(), *inside.named_buffers()):
        raise AssertionError(f"an opened call owns no tensors, but {name} {tuple(value.shape)} was traced")
    with node.graph.inserting_before(node):
        output: Any = node.graph.graph_copy(inside.graph, copies)
    for inner, copy in copies.items():
        if inner.op != "placeholder":
            copy.meta = {**node.meta, **inner.meta, "nn_module_stack": node.meta.get("nn_module_stack")}
            copy.meta["example_value"] = inner.meta.get("val")
    return copies, output


def put_inside(graph_module: GraphModule, node: Node, inside: GraphModule, reader: Reader) -> dict[Node, Node]:
    """Replace a call by its opened graph; returns the copy of each node of ``inside``."""
    graph = graph_module.graph
    arguments = _arguments(node)
    replaced = [n for name in _boolean_masks(arguments, reader) for n in spelling(arguments[name])]
    copies, output = copy_inside(node, inside, reader)
    if OPENABLE[node.target].returns_weights:
        erase_readers_of_weights(node, reader)
        for user in list(node.users):
            user.replace_all_uses_with(output)
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(output)
    graph.erase_node(node)
    for orphan in dict.fromkeys(replaced):  # additive masks that only this call read
        if not orphan.users:
            graph.erase_node(orphan)
    return copies


def returns_weights(node: Node, reader: Reader) -> bool:
    """Whether somebody reads the second output, the attention weights, or the pair as a whole."""
    if node.op == "call_module":
        returns_both = isinstance(_module_of(node), torch.nn.MultiheadAttention)
    else:
        returns_both = OPENABLE[node.target].returns_weights
    return returns_both and not all(
        user.op == "call_function" and user.target is operator.getitem and (user.args[1] == 0 or reader.is_dead(user))
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


def _arguments(node: Node) -> Mapping[str, Any]:
    return bind(OPENABLE[node.target].signature, node)


def _boolean_masks(arguments: Mapping[str, Any], reader: Reader) -> dict[str, list[Node]]:
    """The boolean sources of each mask that a call is given; none unless all its masks have them."""
    if arguments.get("is_causal") and arguments["key_padding_mask"] is None:
        return {}  # a causal mask, which the hint replaces
    given = {name: arguments[name] for name in _MASKS if isinstance(arguments.get(name), Node)}
    sources = {name: boolean_sources(mask, reader) for name, mask in given.items()}
    return {} if None in sources.values() else sources  # type: ignore[return-value]


def _visible(arguments: Mapping[str, Any], masks: Mapping[str, Tensor]) -> Tensor:
    """The mask that ``F.multi_head_attention_forward`` hands to SDPA, as a boolean one: True attends."""
    query, heads = arguments["query"], arguments["num_heads"]
    batch = query.shape[1] if query.dim() == 3 else 1
    parts = []
    if (mask := masks.get("attn_mask")) is not None:  # [L, S] or [B·H, L, S]
        parts.append(~(mask[None, None] if mask.dim() == 2 else mask.view(batch, heads, *mask.shape[1:])))
    if (mask := masks.get("key_padding_mask")) is not None:  # [B, S] or [S]
        parts.append(~mask.view(batch, 1, 1, mask.shape[-1]))
    visible = parts[0] if len(parts) == 1 else parts[0] & parts[1]
    extra = (arguments["bias_k"] is not None) + bool(arguments["add_zero_attn"])  # keys that all queries see
    return F.pad(visible, (0, extra), value=True) if extra else visible


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
    return FakeTensorMode(shape_env=value_of(inputs[0]).fake_mode.shape_env)


def _blank(node: Node, mode: FakeTensorMode) -> Tensor:
    """A fresh tensor like a node's value: an input of the trace, without history."""
    x = value_of(node)
    sizes: Any = (x.shape, x.stride())
    if mode.shape_env is not None and mode.shape_env is not x.fake_mode.shape_env and node.op != "get_attr":
        from torch._dynamo.source import ConstantSource  # its import is slow, and imports Triton

        like = torch.empty_strided(*sizes, dtype=x.dtype, device="meta")
        sizes = mode.shape_env.create_symbolic_sizes_strides_storage_offset(like, ConstantSource(node.name))[:2]
    blank = torch.empty_strided(*sizes, dtype=x.dtype, device=x.device)
    return blank.requires_grad_(x.requires_grad)
