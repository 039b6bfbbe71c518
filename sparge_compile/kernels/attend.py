"""One call of the op: whether it is sparse, its block map, and attention over it.

In: operands as the op takes them, a limit, and the face of a device (``kernels/cpu`` or ``kernels/triton``) to compute
with. Out: attention, and what its backward needs. Sizes are numbers here, so what tracing left open is checked and
decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..limit import Limit
from . import allocate, capability
from .block_map import KEY_BLOCK, QUERY_BLOCK, WORD_BITS, BlockMap, ceil_div, visible_blocks


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
) -> Tensor:
    """Attention [B, H, L, D] for inference, in the query's dtype and order of dimensions."""
    _check(query, key, value, attn_mask)
    if _is_sparse(query, key, least_keys, gain):
        block_map = face.block_map(query, key, thresholds, attn_mask, is_causal, scale)
    elif attn_mask is None:
        return _dense(query, key, value, is_causal, scale)
    else:
        block_map = full_map(query, key, is_causal)
    return face.forward(query, key, value, *block_map, attn_mask, is_causal, scale)[0]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, L, D], log-sum-exp [B, H, L], the map as bits): all that the backward needs beside the operands."""
    _check(query, key, value, attn_mask)
    if _is_sparse(query, key, least_keys, gain):
        block_map = face.block_map(query, key, thresholds, attn_mask, is_causal, scale)
    else:
        block_map = full_map(query, key, is_causal)
    out, lse = face.forward(query, key, value, *block_map, attn_mask, is_causal, scale)
    bits = allocate.new_bits(query, key).zero_()
    used_bits(bits, query, key).copy_(face.pack(*block_map))
    return out, lse, bits


def used_bits(bits: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The part of a map's bits that is used: a view [B or 1, H or 1, Nq, ceil(Nk / 32)]."""
    n_query, n_key = ceil_div(query.shape[2], QUERY_BLOCK), ceil_div(key.shape[2], KEY_BLOCK)
    return bits[:, :, :n_query, : ceil_div(n_key, WORD_BITS)]


def full_map(query: Tensor, key: Tensor, is_causal: bool) -> BlockMap:
    """The map that keeps every visible block: one for all batches and heads."""
    n_query, n_key = ceil_div(query.shape[2], QUERY_BLOCK), ceil_div(key.shape[2], KEY_BLOCK)
    counts = visible_blocks(n_query, n_key, query.shape[2], is_causal, query.device).sum(-1, dtype=torch.int32)
    indices = torch.arange(n_key, dtype=torch.int32, device=query.device).expand(1, 1, n_query, n_key)
    return BlockMap(counts.view(1, 1, n_query), indices)


def _is_sparse(query: Tensor, key: Tensor, least_keys: int, gain: Sequence[float]) -> bool:
    (batch, heads, length, head_size), (kv_heads, keys) = query.shape, key.shape[1:3]
    return Limit(least_keys, tuple(gain)).holds(batch, heads, kv_heads, length, keys, head_size)


def _dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    """What torch takes for the fastest dense attention, where the op promises it."""
    shared = query.shape[1] != key.shape[1]
    found = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=shared)
    return found if found.stride() == allocate.dense_strides(query) else allocate.dense_like(query).copy_(found)


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Raise a ``ValueError`` for sizes that do not fit, of which a trace with symbols may have known nothing."""
    capability.check_sizes(query, key, value)
    if attn_mask is not None:
        capability.check_mask_size(attn_mask, query, key)
