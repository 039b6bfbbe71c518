"""Calls of other libraries' attention (:mod:`sparge_compile.dialects`), read into the one form of :mod:`.attention`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ...dialects import BOTTOM_RIGHT, Dialect, Meaning, Unspoken, dialect_of, understand
from ...report import Reason
from ..read.axes import Dim, Layout, new_dim, same
from ..read.calls import Value
from ..read.fx_utils import value_of
from ..read.reader import Reader
from ..read.signatures import Signature, read_signature
from .attention import Attention, Packing, Refusal
from .compose import Part, compose
from .masks import Term
from .sdpa import mask_term
from .sdpa_kernels import only_attention_is_read

# Up to torch 2.13 at least: the forward is then a graph of its own, which gives what the library's backward needs.
_ONE_TENSOR_TWICE = (
    "in training, torch breaks the graph where an autograd function is given one tensor twice; "
    "let cu_seqlens_k be a copy of cu_seqlens_q"
)


class Spoken(NamedTuple):
    """A call that is known by its name and arguments."""

    node: Node
    dialect: Dialect
    signature: Signature


def spoken(node: Node) -> Spoken | None:
    """A call of another library's attention; None for every other node."""
    signature = read_signature(node.target) if node.op == "call_function" else None
    dialect = dialect_of(signature.short_name, signature.arguments) if signature is not None else None
    return None if signature is None or dialect is None else Spoken(node, dialect, signature)


def match_spoken(call: Spoken, reader: Reader) -> tuple[str, Attention | Refusal]:
    """The kind of a call, and its attention or why it cannot be replaced."""
    given = call.signature.bind(call.node)
    written = next((name for name in call.signature.written if given[name] is not None), None)
    if written is not None:
        return call.dialect.kind, Refusal(Reason.ARGUMENT, f"{written} is written to")
    meaning = understand(call.dialect, given, call.signature.defaults)
    if isinstance(meaning, Unspoken):
        return call.dialect.kind, Refusal(meaning.reason, meaning.detail)
    kind = call.dialect.packed_kind if meaning.layout == "thd" else call.dialect.kind
    return kind, match_meaning(call.node, meaning, reader)


def match_meaning(node: Node, meaning: Meaning, reader: Reader) -> Attention | Refusal:
    """The attention of a call that is understood, or why it cannot be replaced."""
    result = reader.fake(node)
    if isinstance(result, (tuple, list)) and not only_attention_is_read(node):
        twice = meaning.cu_seqlens_q is not None and meaning.cu_seqlens_q is meaning.cu_seqlens_k
        return Refusal(Reason.OUTPUTS_USED, _ONE_TENSOR_TWICE if twice else "")
    nodes = (meaning.query, meaning.key, meaning.value)
    tensors: list[Any] = [reader.fake(x) if isinstance(x, Node) else None for x in nodes]
    if result is None or not all(isinstance(x, Tensor) for x in tensors):
        return Refusal(Reason.NO_SHAPES)
    packing = _packing(meaning, reader)
    if isinstance(packing, Refusal):
        return packing
    order = meaning.layout
    if order == "thd":
        order = "lhd" if tensors[0].dim() == 3 else "blhd"
    if any(x.dim() != len(order) for x in tensors):
        return Refusal(Reason.LAYOUT, _texts(tensors))
    q, k, v = ({"b": 1, **dict(zip(order, x.shape, strict=True))} for x in tensors)
    refusal = _misfit(q, k, v, tensors)
    if refusal is not None:
        return refusal
    if packing is not None and not same(q["b"], 1):
        return Refusal(Reason.LAYOUT, "packed sequences in a batch")
    kv, group = new_dim(k["h"]), new_dim(q["h"] // k["h"])
    batch, length, keys, feature, value_feature = map(new_dim, (q["b"], q["l"], k["l"], q["d"], v["d"]))
    axes: list[dict[str, Dim]] = [
        {"b": batch, "h": (*kv, *group), "l": length, "d": feature},
        {"b": batch, "h": kv, "l": keys, "d": feature},
        {"b": batch, "h": kv, "l": keys, "d": value_feature},
    ]
    weights: Layout = (batch, (*kv, *group), length, keys)
    terms: list[Term] = []
    if meaning.mask is not None:
        refusal = mask_term(reader, meaning.mask, node, weights, (q["b"], q["h"], q["l"], k["l"]), terms)
        if refusal is not None:
            return refusal
    scale: Any = meaning.scale
    parts = [
        Part(Value(tuple(x.shape), x.dtype, x.device, node=n), node, tuple(dims[letter] for letter in order))
        for n, x, dims in zip(nodes, tensors, axes, strict=True)
    ]
    found = compose(
        reader,
        query=parts[0],
        key=parts[1],
        value=parts[2],
        weights=weights,
        keys=keys,
        output=node,
        output_layout=tuple({**axes[0], "d": value_feature}[letter] for letter in order),
        terms=terms,
        scale=1.0 if isinstance(scale, Node) else scale,
        factors=[(scale, False)] if isinstance(scale, Node) else [],
        region=(node,),
        scores_dtype=tensors[0].dtype,
        batch=batch,
        is_causal=bool(meaning.causal),
        dropout=meaning.dropout,
    )
    if isinstance(found, Refusal):
        return found
    square = meaning.cu_seqlens_q is meaning.cu_seqlens_k and (packing is not None or same(q["l"], k["l"]))
    bottom_right = meaning.causal == BOTTOM_RIGHT and not square
    return replace(found, bottom_right=bottom_right, packing=packing, autocast=False)


def _packing(meaning: Meaning, reader: Reader) -> Packing | Refusal | None:
    """Where packed sequences begin, as nodes of the graph."""
    if meaning.layout != "thd":
        return None
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        given = getattr(meaning, name)
        fake = reader.fake(given) if isinstance(given, Node) else None
        if not isinstance(fake, Tensor) or fake.dim() != 1 or fake.dtype != torch.int32:
            return Refusal(Reason.ARGUMENT, f"{name} is no int32 [N + 1]")
    for name in ("max_seqlen_q", "max_seqlen_k"):
        given = getattr(meaning, name)
        if not isinstance(given, (int, Node)) or not isinstance(value_of(given), (int, torch.SymInt)):
            return Refusal(Reason.ARGUMENT, f"{name} = {given}")
    if meaning.mask is not None:
        return Refusal(Reason.MASK_SHAPE, "a mask of packed sequences")
    return Packing(meaning.cu_seqlens_q, meaning.cu_seqlens_k, meaning.max_seqlen_q, meaning.max_seqlen_k)


def _misfit(q: dict[str, Any], k: dict[str, Any], v: dict[str, Any], tensors: list[Any]) -> Refusal | None:
    """Why sizes, by the letters of their dimensions, are not those of one attention."""
    # Where sizes are symbols of their own, every valid call passes.
    if any(q[x] != k[x] for x in "bd") or any(k[x] != v[x] for x in "blh"):
        return Refusal(Reason.LAYOUT, _texts(tensors))
    if isinstance(q["h"], torch.SymInt) or isinstance(k["h"], torch.SymInt):
        return Refusal(Reason.HEADS, "their number is dynamic, and thresholds belong to heads")
    if k["h"] == 0 or q["h"] % k["h"]:
        return Refusal(Reason.HEADS, f"{q['h']} and {k['h']}")
    return None


def _texts(tensors: list[Any]) -> str:
    shapes = (str(tuple(x.shape)) for x in tensors)
    return ", ".join(f"{name} {shape}" for name, shape in zip(("query", "key", "value"), shapes, strict=True))
