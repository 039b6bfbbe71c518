"""Where outputs live: one allocation code for real and fake kernels, so that their strides cannot differ."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_map import KEY_BLOCK, QUERY_BLOCK, WORD_BITS, BlockMap, ceil_div


def dense_like(x: Tensor) -> Tensor:
    """Fresh dense memory of x's shape and dtype, rows of D in adjacent memory, the other dimensions in x's order.

    As dense attention does, an expanded dimension (stride 0) keeps its place. ``empty_like`` answers differently for
    real and fake tensors that are not dense (a slice of a fused qkv), so the order is taken from the strides here.
    """
    outer = range(x.dim() - 1)
    stepped = iter(sorted((d for d in outer if x.stride(d) != 0), key=x.stride, reverse=True))  # stable
    order = [d if x.stride(d) == 0 else next(stepped) for d in outer]
    return torch.empty_permuted(x.shape, [*order, x.dim() - 1], dtype=x.dtype, device=x.device)


def new_lse(q: Tensor) -> Tensor:
    """float32 [B, H, L]."""
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def new_block_map(q: Tensor, k: Tensor) -> BlockMap:
    """Lists for q [B, H, L, D] over k [B, Hk, S, D], with room for every key block."""
    batch, heads, length = q.shape[:3]
    n_query, n_key = ceil_div(length, QUERY_BLOCK), ceil_div(k.shape[2], KEY_BLOCK)
    counts = q.new_empty((batch, heads, n_query), dtype=torch.int32)
    return BlockMap(counts, q.new_empty((batch, heads, n_query, n_key), dtype=torch.int32))


def new_bits(counts: Tensor, n_key: int) -> Tensor:
    """int32 [B, H, Nq, ceil(Nk / 32)]."""
    return counts.new_empty((*counts.shape, ceil_div(n_key, WORD_BITS)))
