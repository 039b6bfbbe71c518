"""Fused calls of scaled-dot-product attention, read into the one form of :mod:`.attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ...report import Reason
from ..read.axes import Dim, Layout, axes_of, broadcast, new_dim, new_layout, same
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
    lead = _lead(query, key, value, output, bool(given["enable_gqa"]))
    if isinstance(lead, Refusal):
        return lead
    sizes = (query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    length, keys, size, value_size = map(new_dim, sizes)
    weights: Layout = (*lead.query, length, keys)
    terms: list[Term] = []
    mask = given["attn_mask"]
    if mask is not None:
        if given["is_causal"]:
            return Refusal(Reason.CAUSAL_AND_MASK)
        refused = mask_term(reader, mask, node, weights, (*output.shape[:-1], key.shape[-2]), terms)
        if refused is not None:
            return refused
    return compose(
        reader,
        query=_part(given["query"], query, node, (*lead.query, length, size)),
        key=_part(given["key"], key, node, (*lead.kv, keys, size)),
        value=_part(given["value"], value, node, (*lead.kv, keys, value_size)),
        weights=weights,
        keys=keys,
        output=node,
        output_layout=(*lead.query, length, value_size),
        terms=terms,
        scale=given["scale"],
        region=(node,),
        scores_dtype=output.dtype,
        batch=lead.batch,
        is_causal=bool(given["is_causal"]),
        dropout=given["dropout_p"],
    )


class _Lead(NamedTuple):
    """The axes of the dimensions before rows and keys. ``batch`` are those before the heads; None: it is not known."""

    query: Layout
    kv: Layout
    batch: Dim | None


def _lead(query: Tensor, key: Tensor, value: Tensor, output: Tensor, enable_gqa: bool) -> _Lead | Refusal:
    """The axes that come before rows, of queries and of keys; sizes that differ broadcast, but for grouped heads."""
    heads, kv_heads, value_heads = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    sizes = output.shape[:-2]
    batch = new_layout(sizes[:-1])
    if len(sizes) == 1 and not enable_gqa:  # of a batch or of heads: how they were split will tell
        lead = new_layout(sizes)
        return _Lead(lead, lead, None)
    if isinstance(heads, torch.SymInt) or isinstance(kv_heads, torch.SymInt):
        return Refusal(Reason.HEADS, "their number is dynamic, and thresholds belong to heads")
    before = axes_of(batch)
    if all(x in (1, *sizes[-1:]) for x in (heads, kv_heads, value_heads)):
        lead = (*batch, *map(new_dim, sizes[-1:]))
        return _Lead(lead, lead, before)
    if not enable_gqa or kv_heads != value_heads or kv_heads == 0 or heads % kv_heads:
        return Refusal(Reason.HEADS, f"{heads} and {kv_heads}")
    kv, group = new_dim(kv_heads), new_dim(heads // kv_heads)
    return _Lead((*batch, (*kv, *group)), (*batch, kv), before)


def _part(node: Node, fake: Tensor, user: Node, layout: Layout) -> Part:
    return Part(Value(tuple(fake.shape), fake.dtype, fake.device, node=node), user, broadcast(layout, fake.shape))


def mask_term(
    reader: Reader, node: Node, attention: Node, weights: Layout, target: tuple[Any, ...], terms: list[Term]
) -> Refusal | None:
    """Note the mask of a fused call, which broadcasts to ``target``, as a term of its scores; or why that cannot be."""
    mask = reader.fake(node)
    if not isinstance(mask, Tensor):
        return Refusal(Reason.NO_SHAPES)
    rank = mask.dim()
    sizes = zip(mask.shape, target[-rank:], strict=False)
    if rank > len(target) or not all(same(have, want) or same(have, 1) for have, want in sizes):
        return Refusal(Reason.MASK_SHAPE, f"{_text(mask)} for {target}")
    value = Value(tuple(mask.shape), mask.dtype, mask.device, node=node)
    kind = "keep" if mask.dtype == torch.bool else "number"
    terms.append(Term(value, attention, broadcast(weights, mask.shape), kind))
    return None


def _text(x: Tensor) -> str:
    return str(tuple(x.shape))
