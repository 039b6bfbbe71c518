"""Packed sequences on a CPU: each by itself, as if it were called alone.

In: rows of all sequences one after the other, [1, H, T, D], and where each begins. Out: maps, which have the sequences
where others have the batch, and attention and gradients in the places of the rows. Rows of no sequence are zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from torch import Tensor

from ...errors import value_error
from .. import allocate
from ..block_map import KEY_BLOCK, QUERY_BLOCK, WORD_BITS, BlockMap, ceil_div
from ..how import How
from . import attention
from .batches import wide_dtype

Sequence = tuple[int, slice, slice]  # its number, its rows of the queries, and its rows of the keys


def sequences(query: Tensor, key: Tensor, how: How) -> Iterator[Sequence]:
    """The sequences of a packed call.

    Raises:
        ValueError: they lie outside the tensors, or are longer than was said.
    """
    places = []
    given = ((how.cu_seqlens_q, how.max_seqlen_q, query, "q"), (how.cu_seqlens_k, how.max_seqlen_k, key, "k"))
    for starts, longest, x, letter in given:
        assert starts is not None
        rows = starts.tolist()
        some = [slice(*pair) for pair in itertools.pairwise(rows)]
        if rows[0] < 0 or rows[-1] > x.shape[2] or any(not 0 <= at.stop - at.start <= longest for at in some):
            raise value_error(
                f"cu_seqlens_{letter} does not fit",
                given=rows,
                allowed=f"ascending row numbers up to {x.shape[2]}, no more than max_seqlen_{letter}={longest} apart",
                todo="Give where each sequence begins and the last one ends, and the longest length.",
            )
        places.append(some)
    yield from ((n, *at) for n, at in enumerate(zip(*places, strict=True)))


def block_map(query: Tensor, key: Tensor, thresholds: Tensor, how: How) -> BlockMap:
    """The maps of all sequences: counts [N, H, Nq] and indices [N, H, Nq, Nk], with blocks of the longest ones."""
    found = allocate.new_block_map(query, key, how)
    found.counts.zero_(), found.indices.zero_()  # equal inputs give equal memory
    for n, rows, keys in sequences(query, key, how):
        counts, indices = attention.block_map(query[:, :, rows], key[:, :, keys], thresholds, how.of_one())
        n_query, n_key = indices.shape[-2:]
        found.counts[n, :, :n_query], found.indices[n, :, :n_query, :n_key] = counts[0], indices[0]
    return found


def forward(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, how: How
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence: out [1, H, T, Dv] and lse [1, H, T]."""
    out = allocate.new_out(query, value).zero_()
    lse = allocate.new_lse(query).to(wide_dtype(query)).fill_(-math.inf)
    for n, rows, keys in sequences(query, key, how):
        part = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        n_query, n_key = _blocks(rows, keys)
        at = min(n, len(counts) - 1)  # a map may hold for all sequences
        lists = counts[at : at + 1, :, :n_query], indices[at : at + 1, :, :n_query, :n_key]
        out[:, :, rows], lse[:, :, rows] = attention.forward(*part, *lists, how.of_one())
    return out, lse


def backward(
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
    """Gradients of query, key and value, from those of each sequence."""
    dq, dk, dv = (allocate.dense_like(x).zero_() for x in (query, key, value))
    for n, rows, keys in sequences(query, key, how):
        dout, q, some_out, some_lse = (x[:, :, rows] for x in (grad_out, query, out, lse))
        k, v = key[:, :, keys], value[:, :, keys]
        dlse = None if grad_lse is None else grad_lse[:, :, rows]
        n_query, n_key = _blocks(rows, keys)
        at = min(n, len(bits) - 1)
        words = bits[at : at + 1, :, :n_query, : ceil_div(n_key, WORD_BITS)]
        some = attention.backward(dout, q, k, v, some_out, some_lse, dlse, words, how.of_one())
        dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = some
    return dq, dk, dv


def _blocks(rows: slice, keys: slice) -> tuple[int, int]:
    """Nq and Nk of a sequence."""
    return ceil_div(rows.stop - rows.start, QUERY_BLOCK), ceil_div(keys.stop - keys.start, KEY_BLOCK)
