"""Find attention: graph in, matches out. Nothing is changed and nothing is decided here.

Understood are fused calls of scaled-dot-product attention, in Dynamo graphs, ``torch.export`` programs and plain FX
graphs; ``F.multi_head_attention_forward`` and the inference kernels of torch.nn are looked into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..naming import SiteNames
from ..report import Reason, Site
from .fused_kernels import FUSED_KERNELS, only_attention_is_read
from .fused_kernels import attention_arguments as kernel_arguments
from .fx_utils import bind, signature_of, size_text, submodule_of, value_of
from .open_up import OPENABLE, holds_attention, open_up


def _sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # the argument names of SDPA, which has no Python signature
    raise AssertionError("only its signature is used")


_SDPA_SIGNATURE = signature_of(_sdpa)
_SDPA = {
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}
# Higher-order operators whose body runs once, with the operands after it as its inputs.
_TRANSPARENT = {"tag_activation_checkpoint", "wrap_with_autocast", "wrap_with_set_grad_enabled"}
# torch.func.grad, vjp and jvp; our autograd formulas are not written for them (vmap is decomposed and works).
_ENTER_TRANSFORM = {"_grad_increment_nesting", "_jvp_increment_nesting"}
_LEAVE_TRANSFORM = {"_grad_decrement_nesting", "_jvp_decrement_nesting"}


@dataclass(frozen=True)
class Caller:
    """A node that runs a nested graph, and the graph it stands in."""

    graph_module: GraphModule
    node: Node


@dataclass(frozen=True)
class Match:
    """A site and where it stands.

    ``node`` belongs to ``graph_module``, which the ``callers`` (outermost first) run. Where attention is inside a
    larger call, ``inside`` is that call as a graph. ``obstacle`` is what is around it that forbids a rewrite.
    """

    site: Site
    graph_module: GraphModule
    node: Node
    callers: tuple[Caller, ...] = ()
    inside: GraphModule | None = None
    obstacle: Reason | None = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of SDPA by name; none where the call cannot be looked into.

        Read off the node at each use: the rewrite of an earlier site may have changed them.
        """
        return attention_arguments(self.attention_node) if is_attention(self.attention_node) else {}

    @property
    def output(self) -> Any:
        """The fake tensor of the attention output, or None."""
        value = value_of(self.attention_node)
        return value[0] if isinstance(value, (tuple, list)) else value

    @property
    def attention_node(self) -> Node:
        """The attention call itself, in ``graph_module`` or in ``inside``."""
        return self.node if self.inside is None else next(filter(is_attention, self.inside.graph.nodes))


def is_attention(node: Node) -> bool:
    """Whether a node is a fused call of scaled-dot-product attention."""
    return node.op == "call_function" and (node.target in _SDPA or node.target in FUSED_KERNELS)


def attention_arguments(node: Node) -> Mapping[str, Any]:
    """The arguments of an attention call by name, with SDPA's defaults."""
    return kernel_arguments(node) or bind(_SDPA_SIGNATURE, node)


def find(graph_module: GraphModule) -> list[Match]:
    """Every attention computation of a graph and of the graphs nested in it, in order."""
    return list(_find(graph_module, SiteNames(), (), None))


def _find(
    owner: GraphModule, names: SiteNames, callers: tuple[Caller, ...], obstacle: Reason | None
) -> Iterator[Match]:
    transforms = 0  # of torch.func, entered and not yet left
    for node in owner.graph.nodes:
        if holds_attention(node):
            yield Match(Site(names.name(node), "fused"), owner, node, callers, None, obstacle)
        if node.op != "call_function":
            continue
        target = getattr(node.target, "__name__", "")
        transforms += (target in _ENTER_TRANSFORM) - (target in _LEAVE_TRANSFORM)
        around = Reason.TRANSFORM if transforms > 0 else obstacle
        where: dict[str, Any] = {"graph_module": owner, "node": node, "callers": callers, "obstacle": around}
        if is_attention(node):
            if node.target in FUSED_KERNELS and not only_attention_is_read(node):
                where["obstacle"] = Reason.OUTPUTS_USED
            yield Match(_site(names.name(node), "sdpa", node), **where)
        elif node.target in OPENABLE:
            inside, name = open_up(node), names.name(node, OPENABLE[node.target].child)
            inner = next(filter(is_attention, inside.graph.nodes), None) if inside else None
            if inner is None:
                yield Match(Site(name, "fused"), **where)
            else:
                yield Match(_site(name, "fused", inner), inside=inside, **where)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            caller = Caller(owner, node)
            for argument in node.all_input_nodes:
                nested = submodule_of(argument, owner)
                if nested is not None:
                    once = node.target.name() in _TRANSPARENT and len(argument.users) == 1
                    yield from _find(nested, names, (*callers, caller), around if once else Reason.CONTROL_FLOW)


def _site(name: str, kind: str, attention: Node) -> Site:
    arguments = attention_arguments(attention)
    query, key, mask = (value_of(arguments[x]) for x in ("query", "key", "attn_mask"))
    how: dict[str, Any] = {
        "mask": "none" if mask is None else "bool" if getattr(mask, "dtype", None) == torch.bool else "additive",
        "is_causal": arguments["is_causal"] is True,
    }
    if not isinstance(query, torch.Tensor) or not isinstance(key, torch.Tensor) or query.dim() != 4 or key.dim() != 4:
        return Site(name, kind, **how)
    batch, heads, length, head_size = map(size_text, query.shape)
    return Site(
        name,
        kind,
        batch=batch,
        heads=heads,
        kv_heads=size_text(key.shape[1]),
        length=length,
        keys=size_text(key.shape[2]),
        head_size=head_size,
        dtype=str(query.dtype).removeprefix("torch."),
        device=query.device.type,
        **how,
    )
