"""One call of the op: whether it is sparse, its block map, and attention over it.

In: operands as the op takes them, a limit, and the face of a device (``kernels/cpu`` or ``kernels/triton``) to compute
with. Out: attention, and what its backward needs. Sizes are numbers here, so what tracing left open is checked and
decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..limit import Limit
from . import allocate, capability, dense, eight_bits
from .block_map import KEY_BLOCK, QUERY_BLOCK, WORD_BITS, BlockMap, ceil_div, visible_blocks
from .how import How


def attend(
    face: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    least_keys: int = 0,
    gain: Sequence[float] = (),
    *packed: Any,
) -> Tensor:
    """Attention [B, H, L, Dv] for inference, in the query's dtype and order of dimensions."""
    how = How(attn_mask, is_causal, scale, *packed)
    _check(query, key, value, how)
    if _is_sparse(query, key, value, how, least_keys, gain):
        return _attend_by_rule(face, query, key, value, thresholds, how)[0]
    if dense.is_sdpa(query, key, how):
        return dense.attend(query, key, value, how)
    how = how._replace(eight_bits=False)
    return face.forward(query, key, value, *full_map(query, key, how), *how)[0]


def attend_for_backward(
    face: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    least_keys: int = 0,
    gain: Sequence[float] = (),
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, L, Dv], log-sum-exp [B, H, L], the map as bits): all that the backward needs beside the operands."""
    how = How(attn_mask, is_causal, scale, *packed)
    _check(query, key, value, how)
    bits = allocate.new_bits(query, key, how)
    if _is_sparse(query, key, value, how, least_keys, gain):
        return *_attend_by_rule(face, query, key, value, thresholds, how, bits), bits
    bits.zero_()  # which nobody reads
    if dense.has_backward(query, key, value, how):
        return *dense.attend_for_backward(query, key, value, how), bits
    how = how._replace(eight_bits=False)
    return *face.forward(query, key, value, *full_map(query, key, how), *how), bits


def _attend_by_rule(
    face: Any, query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, how: How, bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) over the map that the thresholds make, which is also written to ``bits``."""
    counter = allocate.new_counter(query)
    codes, pooled = face.code(query, key, value, how) if how.eight_bits else (None, None)
    block_map = face.block_map(query, key, thresholds, *how, counter=counter, bits=bits, pooled=pooled)
    return face.forward(query, key, value, *block_map, *how, counter=counter, codes=codes)


def backward(
    face: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    bits: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; ``others`` are the fields of a How and of a Limit.

    Below the limit ``bits`` say nothing, since every visible block is kept.
    """
    how, limit = How(*others[:_FIELDS]), others[_FIELDS:]
    if _is_sparse(query, key, value, how, *limit):
        bits = used_bits(bits, query, key, how)
        if how.eight_bits:
            return _backward_in_eight_bits(face, grad_out, query, key, value, out, lse, grad_lse, bits, how)
    elif grad_lse is None and dense.has_backward(query, key, value, how):
        return dense.backward(grad_out, query, key, value, out, lse, how)
    else:
        bits = face.pack(*full_map(query, key, how))
    return face.backward(grad_out, query, key, value, out, lse, grad_lse, bits, *how)


def _backward_in_eight_bits(
    face: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    bits: Tensor,
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights are those of the forward, and its operands are taken for the ones that were given.

    The constant of the keys has a part in the gradient of the log-sum-exp alone: other gradients of a row's scores add
    up to nothing.
    """
    q, k, v, lower = face.centred(query, key, value, lse, how)
    dq, dk, dv = face.backward(grad_out, q, k, v, out, lower, grad_lse, bits, *how)
    if grad_lse is not None:
        center = eight_bits.constant(key, eight_bits.seen_keys(how, query.shape[2], key.shape[2]))
        center = center.repeat_interleave(query.shape[1] // key.shape[1], 1)
        seen = torch.where(lse == -torch.inf, 0.0, grad_lse)
        dq.add_(how.scale * seen.unsqueeze(-1) * center)
    return dq, dk, dv


_FIELDS = len(How._fields)


def used_bits(bits: Tensor, query: Tensor, key: Tensor, how: How) -> Tensor:
    """The part of a map's bits that is used: a view [B or 1, H or 1, Nq, ceil(Nk / 32)]."""
    sequences, _, n_query, n_key = allocate.map_shape(query, key, how)
    return bits[:sequences, :, :n_query, : ceil_div(n_key, WORD_BITS)]


def full_map(query: Tensor, key: Tensor, how: How) -> BlockMap:
    """The map that keeps every visible block: one for all heads, and for all batches but packed sequences."""
    _, _, n_query, n_key = allocate.map_shape(query, key, how)
    if how.packed:
        visible = visible_in_sequences(n_query, n_key, how)
    else:
        length, keys = query.shape[2], key.shape[2]
        visible = visible_blocks(
            n_query, n_key, length, how.is_causal, query.device, how.diagonal(length, keys)
        ).unsqueeze(0)
    counts = visible.sum(-1, dtype=torch.int32).unsqueeze(1)
    indices = torch.arange(n_key, dtype=torch.int32, device=query.device)
    return BlockMap(counts, indices.expand(*counts.shape, n_key))


def visible_in_sequences(n_query: int, n_key: int, how: How) -> Tensor:
    """bool [N, Nq, Nk]: the key blocks that each query block of each sequence may see."""
    assert how.cu_seqlens_q is not None and how.cu_seqlens_k is not None
    lengths, keys = (x.diff().unsqueeze(-1) for x in (how.cu_seqlens_q, how.cu_seqlens_k))  # [N, 1]
    device = lengths.device
    visible = visible_blocks(n_query, n_key, lengths, how.is_causal, device, how.diagonal(lengths, keys))
    rows = torch.arange(n_query, device=device) * QUERY_BLOCK < lengths
    return visible & rows.unsqueeze(-1) & (torch.arange(n_key, device=device) * KEY_BLOCK < keys).unsqueeze(1)


def _is_sparse(
    query: Tensor, key: Tensor, value: Tensor, how: How, least_keys: int = 0, gain: Sequence[float] = ()
) -> bool:
    """What a limit says of the sizes that are known here: of packed sequences, all queries over the longest keys."""
    batch, heads, length, head_size = query.shape
    sizes = (batch, heads, key.shape[1], length, how.keys(key), head_size, value.shape[3])
    return Limit(least_keys, tuple(gain)).holds(*sizes)


def _check(query: Tensor, key: Tensor, value: Tensor, how: How) -> None:
    """Raise a ``ValueError`` for sizes that do not fit, of which a trace with symbols may have known nothing."""
    capability.check_sizes(query, key, value)
    capability.check_packing(how, query, key)
    capability.check_slots(how, query, key)
    if how.attn_mask is not None:
        capability.check_mask_size(how.attn_mask, query, key)
