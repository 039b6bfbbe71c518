"""Fused calls of scaled-dot-product attention, read into the one form of :mod:`.attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...report import Reason
from ..read.axes import Layout, broadcast, new_dim, same
from ..read.calls import Value
from ..read.fx_utils import bind, signature_of
from ..read.reader import Reader
from .attention import Attention, Refusal
from .compose import Part, compose
from .masks import Term
from .sdpa_kernels import SDPA_KERNELS, only_attention_is_read
from .sdpa_kernels import attention_arguments as kernel_arguments


def _sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # the argument names of SDPA, which has no Python signature
    raise AssertionError("only its signature is used")


_SIGNATURE = signature_of(_sdpa)
_SDPA = {
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}


def is_sdpa(node: Node) -> bool:
    """Whether a node is a fused call of scaled-dot-product attention."""
    return node.op == "call_function" and node.target in _SDPA | SDPA_KERNELS


def arguments_of(node: Node) -> Mapping[str, Any]:
    """The arguments of an attention call by name, with SDPA's defaults."""
    return kernel_arguments(node) or bind(_SIGNATURE, node)


def match_sdpa(node: Node, reader: Reader) -> Attention | Refusal:
    """The attention of a fused call, or why it cannot be replaced."""
    if node.target in SDPA_KERNELS and not only_attention_is_read(node):
        return Refusal(Reason.OUTPUTS_USED)
    given = arguments_of(node)
    tensors = [
        reader.fake(given[name]) if isinstance(given[name], Node) else None for name in ("query", "key", "value")
    ]
    output = reader.fake(node)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, Tensor) or not all(isinstance(x, Tensor) for x in tensors):
        return Refusal(Reason.NO_SHAPES)
    if any(x.is_nested for x in tensors):  # type: ignore[union-attr]
        return Refusal(Reason.NESTED)
    query, key, value = tensors
    assert query is not None and key is not None and value is not None
    if not query.dim() == key.dim() == value.dim() == 4:
        return Refusal(Reason.LAYOUT, f"query has {query.dim()} dimensions")
    # Where sizes are symbols of their own these become guards, which every valid call passes.
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3]:
        return Refusal(Reason.LAYOUT, f"query {_text(query)}, key {_text(key)}, value {_text(value)}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if isinstance(heads, torch.SymInt) or isinstance(kv_heads, torch.SymInt):
        return Refusal(Reason.HEADS, "their number is dynamic, and thresholds belong to heads")
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads or not (given["enable_gqa"] or kv_heads == 1)):
        return Refusal(Reason.HEADS, f"{heads} and {kv_heads}")
    batch, length, keys, size, value_size = map(
        new_dim, (query.shape[0], query.shape[2], key.shape[2], query.shape[3], value.shape[3])
    )
    kv, group = new_dim(kv_heads), new_dim(heads // kv_heads if kv_heads else 0)
    weights: Layout = (batch, (*kv, *group), length, keys)
    terms: list[Term] = []
    mask = given["attn_mask"]
    if mask is not None:
        if given["is_causal"]:
            return Refusal(Reason.CAUSAL_AND_MASK)
        refused = _mask_term(reader, mask, node, weights, (*query.shape[:3], key.shape[2]), terms)
        if refused is not None:
            return refused
    return compose(
        reader,
        query=_part(given["query"], query, node, (batch, (*kv, *group), length, size)),
        key=_part(given["key"], key, node, (batch, kv, keys, size)),
        value=_part(given["value"], value, node, (batch, kv, keys, value_size)),
        weights=weights,
        keys=keys,
        output=node,
        output_layout=(batch, (*kv, *group), length, value_size),
        terms=terms,
        scale=given["scale"],
        region=(node,),
        scores_dtype=output.dtype,
        batch=batch,
        is_causal=bool(given["is_causal"]),
        dropout=given["dropout_p"],
    )


def _part(node: Node, fake: Tensor, user: Node, layout: Layout) -> Part:
    return Part(Value(tuple(fake.shape), fake.dtype, fake.device, node=node), user, layout)


def _mask_term(
    reader: Reader, node: Node, attention: Node, weights: Layout, target: tuple[Any, ...], terms: list[Term]
) -> Refusal | None:
    mask = reader.fake(node)
    if not isinstance(mask, Tensor):
        return Refusal(Reason.NO_SHAPES)
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(
        not same(have, want) and not same(have, 1) for have, want in zip(padded, target, strict=True)
    ):
        return Refusal(Reason.MASK_SHAPE, f"{_text(mask)} for {target}")
    value = Value(tuple(mask.shape), mask.dtype, mask.device, node=node)
    kind = "keep" if mask.dtype == torch.bool else "number"
    terms.append(Term(value, attention, broadcast(weights, mask.shape), kind))
    return None


def _text(x: Tensor) -> str:
    return str(tuple(x.shape))
