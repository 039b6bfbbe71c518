"""Where outputs live: one allocation code for real and fake kernels, so that their strides cannot differ.

Sizes may be symbols. Nothing here asks them a question whose answer would be a guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .block_map import KEY_BLOCK, QUERY_BLOCK, WORD_BITS, BlockMap, ceil_div
from .how import How
from .sizes import hint


def new_out(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, L, Dv] of q [B, H, L, D] and v [B, Hk, S, Dv]: q's dtype and order of dimensions, v's head size."""
    return torch.empty_permuted((*q.shape[:3], v.shape[3]), order_of(q), dtype=q.dtype, device=q.device)


def out_strides(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """The strides of :func:`new_out`."""
    strides, size = [0] * q.dim(), 1
    shape = (*q.shape[:3], v.shape[3])
    for d in reversed(order_of(q)):
        strides[d], size = size, size * max(shape[d], 1)
    return tuple(strides)


def dense_like(x: Tensor) -> Tensor:
    """Fresh dense memory of x's shape and dtype, rows of D in adjacent memory, the other dimensions in x's order.

    As dense attention does, an expanded dimension (stride 0) keeps its place. ``empty_like`` answers differently for
    real and fake tensors that are not dense (a slice of a fused qkv), so the order is taken from the strides here.
    """
    return torch.empty_permuted(x.shape, order_of(x), dtype=x.dtype, device=x.device)


def laid_out(made: Tensor, like: Tensor) -> Tensor:
    """``made``, in memory whose dimensions have the order of ``like``'s: as it is, if it is so."""
    wanted = torch.empty_permuted(made.shape, order_of(like), dtype=made.dtype, device=made.device)
    return made if made.stride() == wanted.stride() else wanted.copy_(made)


def order_of(x: Tensor) -> list[int]:
    """The dimensions of x from the slowest to the fastest in memory, but for the last; ties keep their order.

    Strides that are symbols are compared as they were traced. A call has other strides, but in the same order, except
    for a dimension of one entry, whose stride means nothing.
    """
    return [*_sorted(x.stride()[:-1]), x.dim() - 1]


def memory_order(x: Tensor) -> list[int]:
    """:func:`order_of` with the last dimension where it stands in memory."""
    return _sorted(x.stride())


def _sorted(strides: Sequence[Any]) -> list[int]:
    """The numbers of dimensions with these strides, the largest first; those without a stride keep their place."""
    steps = [hint(stride) for stride in strides]
    stepped = iter(sorted((d for d, step in enumerate(steps) if step != 0), key=steps.__getitem__, reverse=True))
    return [d if step == 0 else next(stepped) for d, step in enumerate(steps)]


def new_lse(q: Tensor) -> Tensor:
    """float32 [B, H, L]."""
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def map_shape(q: Tensor, k: Tensor, how: How) -> tuple[Any, Any, Any, Any]:
    """(B, H, Nq, Nk) of q [B, H, L, D] over k [B, Hk, S, D]: of a packed call, by sequences and the longest of them."""
    n_query, n_key = ceil_div(how.length(q), QUERY_BLOCK), ceil_div(how.keys(k), KEY_BLOCK)
    return how.sequences(q), q.shape[1], n_query, n_key


def new_block_map(q: Tensor, k: Tensor, how: How) -> BlockMap:
    """Lists for q [B, H, L, D] over k [B, Hk, S, D], with room for every key block."""
    batch, heads, n_query, n_key = map_shape(q, k, how)
    counts = q.new_empty((batch, heads, n_query), dtype=torch.int32)
    return BlockMap(counts, q.new_empty((batch, heads, n_query, n_key), dtype=torch.int32))


def new_bits(q: Tensor, k: Tensor, how: How) -> Tensor:
    """int32 [B, H, more than Nq, more than ceil(Nk / 32)], for the bits of a map in its first rows and words.

    Its sizes are 2 or more for all lengths: torch guards whether a symbolic size is 0 or 1. So there is room for one
    more than N packed sequences.
    """
    rows, words = how.length(q) // QUERY_BLOCK + 2, how.keys(k) // (KEY_BLOCK * WORD_BITS) + 2
    return q.new_empty((how.sequences(q) + int(how.packed), q.shape[1], rows, words), dtype=torch.int32)


def new_counter(q: Tensor) -> Tensor:
    """int32 [1]: which query block is next. ``block_map`` sets it to 0 for the ``forward`` that follows."""
    return q.new_empty(1, dtype=torch.int32)


def new_words(counts: Tensor, n_key: int) -> Tensor:
    """int32 [B, H, Nq, ceil(Nk / 32)]: bits without room to spare."""
    return counts.new_empty((*counts.shape, ceil_div(n_key, WORD_BITS)))
