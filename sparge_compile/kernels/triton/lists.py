"""Forms of a block map, converted on the GPU: lists to bits, and bits to lists, both ways.

The forms are those of :mod:`block_map`. Each program writes its own words or list in a fixed order: no atomics, so
equal input gives equal memory. How many bits are set before each one, which is its place in a list, is a product with a
triangle of ones: tensor cores do it at once, where a running sum goes from thread to thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import allocate
from ..block_map import WORD_BITS, BlockMap
from . import recording

PACK_ENTRIES = 64  # list entries that a packing program compares at a time
PACK_WORDS = 64  # words that it writes: 2048 key blocks
UNPACK_WORDS = 64  # words that an unpacking program looks at in one step: 2048 key blocks
INVERT_ROWS = 32  # query blocks that an inverting program looks at in one step


@triton.jit
def _pack_kernel(
    counts_ptr, indices_ptr,
    bits_ptr,
    counts_stride_b, counts_stride_h, counts_stride_i, indices_stride_b, indices_stride_h, indices_stride_i,
    batch, heads, n_query, rows, words, n_parts,
    ENTRIES: tl.constexpr, WORDS: tl.constexpr, WORD_SIZE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = pid // n_parts
    word = (pid % n_parts).to(tl.int32) * WORDS + tl.arange(0, WORDS)
    i, h, b = row % rows, row // rows % heads, row // rows // heads
    count_ptr = counts_ptr + b * counts_stride_b + h * counts_stride_h + i * counts_stride_i
    count = tl.load(count_ptr, mask=(i < n_query) & (b < batch), other=0)
    list_ptr = indices_ptr + b * indices_stride_b + h * indices_stride_h + i * indices_stride_i
    value = tl.zeros([WORDS], tl.int32)
    for first in tl.range(0, count, ENTRIES):
        n = first + tl.arange(0, ENTRIES)
        block = tl.load(list_ptr + n, mask=n < count, other=-WORD_SIZE)  # lands in no word
        bit = tl.full([ENTRIES], 1, tl.int32) << (block & (WORD_SIZE - 1))
        here = (block // WORD_SIZE)[:, None] == word[None, :]
        value += tl.sum(tl.where(here, bit[:, None], 0), 0)  # every block comes once, so a sum is an or
    tl.store(bits_ptr + row * words + word, value, mask=word < words)


def pack(counts: Tensor, indices: Tensor, *, bits: Tensor | None = None) -> Tensor:
    """int32 [B, H, Nq, ceil(Nk / 32)] from the lists of a map, int32 [B, H, Nq] and [B, H, Nq, Nk].

    They are written to ``bits``, if it is given: contiguous int32 with room to spare in rows and words, where zeros go.
    Of the maps of more than one sequence, there may be room for others, too.
    """
    bits = allocate.new_words(counts, indices.shape[-1]) if bits is None else bits
    room, heads, rows, words = bits.shape
    batch, n_query = len(counts) if len(counts) > 1 else room, counts.shape[2]
    if bits.numel() == 0 or indices.numel() == 0:
        return bits.zero_()
    counts, indices = counts.expand(batch, heads, -1), indices.expand(batch, heads, -1, -1)
    n_parts = triton.cdiv(words, PACK_WORDS)
    with torch.cuda.device_of(counts):
        recording.launch(
            _pack_kernel, (room * heads * rows * n_parts,),
            counts_ptr=counts, indices_ptr=indices,
            bits_ptr=bits,
            counts_stride_b=counts.stride(0), counts_stride_h=counts.stride(1), counts_stride_i=counts.stride(2),
            indices_stride_b=indices.stride(0), indices_stride_h=indices.stride(1), indices_stride_i=indices.stride(2),
            batch=batch, heads=heads, n_query=n_query, rows=rows, words=words, n_parts=n_parts,
            ENTRIES=PACK_ENTRIES, WORDS=PACK_WORDS, WORD_SIZE=WORD_BITS, num_warps=4,
        )  # fmt: skip
    return bits


@triton.jit
def _unpack_row(
    bits_ptr, counts_ptr, indices_ptr, bits_stride_b, bits_stride_h, bits_stride_i, row, heads, words, n_query, n_key,
    WORDS: tl.constexpr, WORD_SIZE: tl.constexpr,
):  # fmt: skip
    """The list of one query block."""
    i, h, b = row % n_query, row // n_query % heads, row // n_query // heads
    bits_ptr += b * bits_stride_b + h * bits_stride_h + i * bits_stride_i
    lane = tl.arange(0, WORD_SIZE)
    before = (lane[:, None] < lane[None, :]).to(tl.float16)
    count = 0
    for first in tl.range(0, words, WORDS):
        number = first + tl.arange(0, WORDS)
        word = tl.load(bits_ptr + number, mask=number < words, other=0)
        j = number[:, None] * WORD_SIZE + lane[None, :]
        kept = tl.where(j < n_key, (word[:, None] >> lane[None, :]) & 1, 0)
        in_word = tl.sum(kept, 1)
        place = (count + tl.cumsum(in_word, 0) - in_word)[:, None] + tl.dot(kept.to(tl.float16), before).to(tl.int32)
        tl.store(indices_ptr + row * n_key + place, j, mask=kept != 0)
        count += tl.sum(in_word, 0)
    tl.store(counts_ptr + row, count)


@triton.jit
def _invert_word(
    bits_ptr, counts_ptr, indices_ptr, bits_stride_b, bits_stride_h, bits_stride_i, bh, word_number, heads, n_query,
    n_key, ROWS: tl.constexpr, WORD_SIZE: tl.constexpr,
):  # fmt: skip
    """The lists of the key blocks of one word."""
    bits_ptr += bh // heads * bits_stride_b + bh % heads * bits_stride_h + word_number
    lane = tl.arange(0, WORD_SIZE)  # one word holds this many key blocks
    j = word_number * WORD_SIZE + lane
    list_ptrs = indices_ptr + (bh * n_key + j)[None, :] * n_query
    row = tl.arange(0, ROWS)
    before = (row[:, None] > row[None, :]).to(tl.float16)
    count = tl.zeros([WORD_SIZE], tl.int32)
    for first in tl.range(0, n_query, ROWS):
        i = first + row
        word = tl.load(bits_ptr + i.to(tl.int64) * bits_stride_i, mask=i < n_query, other=0)
        kept = (word[:, None] >> lane[None, :]) & 1
        place = count[None, :] + tl.dot(before, kept.to(tl.float16)).to(tl.int32)
        block = tl.broadcast_to(i[:, None], [ROWS, WORD_SIZE])
        tl.store(list_ptrs + place, block, mask=(kept != 0) & (j < n_key)[None, :])
        count += tl.sum(kept, 0)
    tl.store(counts_ptr + bh * n_key + j, count, mask=j < n_key)


@triton.jit
def _unpack_kernel(
    bits_ptr,
    counts_ptr, indices_ptr, reader_counts_ptr, reader_indices_ptr, counters_ptr,
    bits_stride_b, bits_stride_h, bits_stride_i,
    heads, words, n_query, n_key, inverting,
    WORDS: tl.constexpr, ROWS: tl.constexpr, WORD_SIZE: tl.constexpr,
):  # fmt: skip
    """The first ``inverting`` programs, which take longer, make the lists of key blocks, the others those of rows."""
    pid = tl.program_id(0).to(tl.int64)
    if counters_ptr is not None:  # noqa: SIM102  (a constant and a number)
        if pid == 0:
            tl.store(counters_ptr + tl.arange(0, 2), tl.zeros([2], tl.int32))
    if pid < inverting:
        _invert_word(
            bits_ptr, reader_counts_ptr, reader_indices_ptr, bits_stride_b, bits_stride_h, bits_stride_i,
            pid // words, pid % words, heads, n_query, n_key, ROWS=ROWS, WORD_SIZE=WORD_SIZE,
        )  # fmt: skip
    else:
        _unpack_row(
            bits_ptr, counts_ptr, indices_ptr, bits_stride_b, bits_stride_h, bits_stride_i, pid - inverting, heads,
            words, n_query, n_key, WORDS=WORDS, WORD_SIZE=WORD_SIZE,
        )  # fmt: skip


def unpack(bits: Tensor, n_query: int, n_key: int, counters: Tensor | None = None) -> tuple[BlockMap, BlockMap]:
    """The lists of a map from its bits, and the inverted ones; a row's words are adjacent.

    The inverted lists say which query blocks read each key block, ascending: counts int32 [B, H, Nk] and indices int32
    [B, H, Nk, Nq]. On the way the two ``counters`` are set to 0.
    """
    batch, heads, _, words = bits.shape
    kept, readers = (
        BlockMap(bits.new_empty((batch, heads, rows)), bits.new_empty((batch, heads, rows, columns)))
        for rows, columns in ((n_query, n_key), (n_key, n_query))
    )
    if kept.indices.numel() == 0:
        return BlockMap(kept.counts.zero_(), kept.indices), BlockMap(readers.counts.zero_(), readers.indices)
    inverting = batch * heads * words
    with torch.cuda.device_of(bits):
        recording.launch(
            _unpack_kernel, (inverting + batch * heads * n_query,),
            bits_ptr=bits,
            counts_ptr=kept.counts, indices_ptr=kept.indices,
            reader_counts_ptr=readers.counts, reader_indices_ptr=readers.indices, counters_ptr=counters,
            bits_stride_b=bits.stride(0), bits_stride_h=bits.stride(1), bits_stride_i=bits.stride(2),
            heads=heads, words=words, n_query=n_query, n_key=n_key, inverting=inverting,
            WORDS=min(UNPACK_WORDS, max(16, triton.next_power_of_2(words))), ROWS=INVERT_ROWS, WORD_SIZE=WORD_BITS,
            num_warps=1,
        )  # fmt: skip
    return kept, readers
