"""The block map on the GPU: selection by the hybrid Top-k + Top-p rule from pooled queries and keys.

Goes in: q, k, thresholds, a mask. Comes out: the lists of :class:`BlockMap`, equal to those of
:func:`cpu.block_map` up to rounding. Scores are written to where the indices will be, so that they take no memory
of their own; then a program for each query block holds its row in registers and finds the row's cut by bisection:
nothing is sorted. Thresholds are read by the kernel, not by the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...keeping import OF_GRAPH, WIDTH, beside_longest
from .. import allocate, launch, rule
from ..block_map import KEY_BLOCK, QUERY_BLOCK, WORD_BITS, BlockMap
from ..how import How
from . import recording
from .kept import holds_tokens, kept_arguments, tokens_of_range
from .pool import pool, pool_mask
from .tiles import diagonal_of, how_arguments, sequence

SCORE_ROWS, SCORE_KEYS, SCORE_DEPTH = 64, 64, 16  # the tile of a score program, and its step along D
LINEAR_STEPS = 16  # halvings of scores, before halvings of their images


@triton.jit
def _score_kernel(
    q_mean_ptr, k_mean_ptr,
    scores_ptr,
    heads, group, n_query, n_key, row_tiles, key_tiles, scale,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [B, H, Nq, Nk]: scale * q_mean k_mean^T."""
    pid = tl.program_id(0)
    bh = (pid // key_tiles // row_tiles).to(tl.int64)
    i = (pid // key_tiles % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (pid % key_tiles * KEYS + tl.arange(0, KEYS)).to(tl.int64)
    key_head = bh // heads * (heads // group) + bh % heads // group
    q_ptrs = q_mean_ptr + (bh * n_query + i)[:, None] * HEAD_SIZE
    k_ptrs = k_mean_ptr + (key_head * n_key + j)[:, None] * HEAD_SIZE
    score = tl.zeros([ROWS, KEYS], tl.float32)
    for start in tl.range(0, HEAD_PAD, DEPTH):
        d = start + tl.arange(0, DEPTH)
        q = tl.load(q_ptrs + d[None, :], mask=(i < n_query)[:, None] & (d < HEAD_SIZE)[None, :], other=0.0)
        k = tl.load(k_ptrs + d[None, :], mask=(j < n_key)[:, None] & (d < HEAD_SIZE)[None, :], other=0.0)
        score = tl.dot(q * scale, tl.trans(k), score, input_precision=PRECISION)
    inside = (i < n_query)[:, None] & (j < n_key)[None, :]
    tl.store(scores_ptr + (bh * n_query + i)[:, None] * n_key + j[None, :], score, mask=inside)


@triton.jit
def _ordered(score):
    """int32 that compares as the float does; both zeros are one number."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(image):
    """The float of which :func:`_ordered` makes this int32."""
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _only_if(condition, mask):
    """A mask where a condition on one number holds, else nothing. Triton 3.9 makes integers of ``condition & mask``."""
    return tl.where(condition, mask, mask & ~mask)


@triton.jit
def _store_words(bits_ptr, word, b, h, i, heads, rows, words, N_WORDS: tl.constexpr):
    """The words of one row, and zeros in the room for one or two more."""
    row_ptr = bits_ptr + ((b * heads + h) * rows + i) * words
    lane = tl.arange(0, N_WORDS)
    tl.store(row_ptr + lane, word, mask=lane < words)
    spare = N_WORDS + tl.arange(0, 2)
    tl.store(row_ptr + spare, tl.zeros([2], tl.int32), mask=spare < words)


@triton.jit
def _select_kernel(
    thresholds_ptr, bias_ptr, cut_ptr, q_starts_ptr, k_starts_ptr, q_kept_ptr, k_kept_ptr,
    counts_ptr, indices_ptr, counter_ptr, bits_ptr,
    thresholds_stride_h, thresholds_stride_t, bias_stride_b, bias_stride_h, bias_stride_i,
    batch, heads, length, keys, n_query, n_key, found_start, found_stop, bit_batch, bit_rows, bit_words,
    N_PAD: tl.constexpr, QUERY_ROWS: tl.constexpr, KEY_ROWS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, ANCHOR: tl.constexpr, CEIL_SLACK: tl.constexpr, LINEAR_STEPS: tl.constexpr,
    KEEPS: tl.constexpr, ORDERED: tl.constexpr, OF_GRAPH: tl.constexpr, WORD_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of [B, H, Nq]
    if counter_ptr is not None:  # noqa: SIM102  (a constant and a number)
        if row == 0:
            tl.store(counter_ptr, 0)
    i, h, b = (row % n_query).to(tl.int32), row // n_query % heads, row // n_query // heads
    j = tl.arange(0, N_PAD)
    row_ptr = indices_ptr + row * n_key
    score = tl.load(row_ptr + j, mask=j < n_key, other=0).to(tl.float32, bitcast=True)

    # Visibility.
    visible = j < n_key
    forced = j < 0  # none
    if PACKED:
        _, length = sequence(q_starts_ptr, b, length, PACKED=PACKED)
        _, keys = sequence(k_starts_ptr, b, keys, PACKED=PACKED)
        visible = _only_if(i * QUERY_ROWS < length, visible & (j * KEY_ROWS < keys))
    if CAUSAL:
        diagonal = diagonal_of(length, keys, CAUSAL)
        first_sees, last_sees = i * QUERY_ROWS + diagonal, (i + 1) * QUERY_ROWS - 1 + diagonal
        forced = (j * KEY_ROWS + KEY_ROWS - 1 >= first_sees) & (j * KEY_ROWS <= last_sees)
        visible = visible & (j * KEY_ROWS <= tl.minimum((i + 1) * QUERY_ROWS, length) - 1 + diagonal)
    if HAS_MASK:
        pooled = b * bias_stride_b + h * bias_stride_h + i.to(tl.int64) * bias_stride_i + j
        bias = tl.load(bias_ptr + pooled, mask=j < n_key, other=0.0)
        visible = visible & (bias != float("-inf"))
        forced = forced | (tl.load(cut_ptr + pooled, mask=j < n_key, other=0) != 0)
        score += tl.where(visible, bias, 0.0)
    whole = tl.max((visible & ~(tl.abs(score) < float("inf"))).to(tl.int32), 0) > 0
    always = j < 0  # none
    if KEEPS:
        ranges_ptr = thresholds_ptr + h * thresholds_stride_h + 2 * thresholds_stride_t
        if k_kept_ptr is not None:
            always = visible & (tl.load(k_kept_ptr + h * n_key + j, mask=j < n_key, other=0) != 0)
        else:
            start, stop = tokens_of_range(ranges_ptr, thresholds_stride_t, found_start, found_stop, keys, OF_GRAPH)
            always = visible & holds_tokens(j, KEY_ROWS, start, stop)
        if q_kept_ptr is not None:
            whole = whole | (tl.load(q_kept_ptr + h * n_query + i) != 0)
        elif not ORDERED:
            ranges_ptr += 2 * thresholds_stride_t
            start, stop = tokens_of_range(ranges_ptr, thresholds_stride_t, found_start, found_stop, length, OF_GRAPH)
            whole = whole | ((length == keys) & holds_tokens(i, QUERY_ROWS, start, stop))
        visible = visible & ~always  # the rule is over the others
    n = tl.sum(visible.to(tl.int32), 0)

    # Softmax over the visible blocks, and the rule's two demands.
    score = tl.where(visible, score, float("-inf"))
    top = tl.where(n > 0, tl.max(score, 0), 0.0)
    mass = tl.where(visible, tl.exp(score - top), 0.0)
    mass = mass / tl.where(n > 0, tl.sum(mass, 0), 1.0)
    topk = tl.load(thresholds_ptr + h * thresholds_stride_h)
    topp = tl.load(thresholds_ptr + h * thresholds_stride_h + thresholds_stride_t)
    a = tl.maximum(tl.ceil(topk * n.to(tl.float32) - CEIL_SLACK), 1.0)
    a = tl.where(topp >= 1.0, tl.maximum(a, n.to(tl.float32)), a)  # rounding may not stop short of all
    wanted = tl.where(topp <= 0.0, -1.0, topp)  # 0 is no demand: nothing falls short of -1
    image = tl.where(visible, _ordered(score), -2147483648)

    # The cut is the largest score for which the blocks at or above it meet both demands; the lowest, where none does
    # (rounding can keep the total mass under topp). It stays in [low, high), until one block or one number is left
    # there. Halving the floats finds it in about log2(n) steps, halving their images in 32 at the most.
    low = tl.min(tl.where(visible, image, 2147483646), 0)
    high = tl.maximum(tl.max(image, 0), low) + 1
    n_low, n_high = n, 0  # visible blocks at or above low, and high
    step = 0
    while (n_low - n_high > 1) & (low + 1 < high):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # high - low may not fit in 32 bits
        if step < LINEAR_STEPS:
            between = _ordered(0.5 * _unordered(low) + 0.5 * _unordered(high))
            middle = tl.maximum(tl.minimum(between, high - 1), low + 1)
        above = image >= middle
        n_middle = tl.sum(above.to(tl.int32), 0)
        enough = (n_middle.to(tl.float32) >= a) & (tl.sum(tl.where(above, mass, 0.0), 0) >= wanted)
        low, n_low = tl.where(enough, middle, low), tl.where(enough, n_middle, n_low)
        high, n_high = tl.where(enough, high, middle), tl.where(enough, n_high, n_middle)
        step += 1
    at_cut = tl.min(tl.where(image >= low, image, 2147483647), 0)

    # Above the cut all stay; of those at the cut, the lower indices, while a demand is open.
    kept = image > at_cut
    equal = visible & (image == at_cut)
    rank = tl.sum(kept.to(tl.int32), 0).to(tl.float32)
    passed = tl.sum(tl.where(kept, mass, 0.0), 0)
    before = tl.zeros([N_PAD], tl.float32)  # of those at the cut, how many come first
    if n_low - n_high > 1:
        before = (tl.cumsum(equal.to(tl.int32), 0) - 1).to(tl.float32)
    one = tl.max(tl.where(equal, mass, 0.0), 0)  # the mass of each block at the cut
    kept = kept | (equal & ((rank + before < a) | (passed + before * one < wanted)))
    if ANCHOR:
        uncut = visible & ~forced
        best = tl.max(tl.where(uncut, image, -2147483648), 0)
        best_j = tl.min(tl.where(uncut & (image == best), j, N_PAD), 0)
        kept = kept | (uncut & (j == best_j))
    kept = tl.where(whole, visible, (kept | forced) & visible) | always

    # What follows the kept blocks is never read: scores are left there, so that equal inputs give equal memory.
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(row_ptr + place, j, mask=kept)
    tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32), 0))
    if bits_ptr is not None:
        value = kept.to(tl.int32) << (j & (WORD_SIZE - 1))
        word = tl.sum(tl.reshape(value, [N_PAD // WORD_SIZE, WORD_SIZE]), 1)  # every bit comes once: a sum is an or
        _store_words(bits_ptr, word, b, h, i, heads, bit_rows, bit_words, N_WORDS=N_PAD // WORD_SIZE)
        # Zeros in the room to spare: of rows, and of sequences.
        if i == n_query - 1:
            for extra in range(n_query, bit_rows):
                _store_words(bits_ptr, word * 0, b, h, extra, heads, bit_rows, bit_words, N_WORDS=N_PAD // WORD_SIZE)
        if b == batch - 1:
            for extra_b in range(batch, bit_batch):
                for extra in range(i, tl.where(i == n_query - 1, bit_rows, i + 1)):
                    _store_words(
                        bits_ptr, word * 0, extra_b, h, extra, heads, bit_rows, bit_words, N_WORDS=N_PAD // WORD_SIZE
                    )


def block_map(
    query: Tensor,
    key: Tensor,
    thresholds: Tensor,
    *how: Any,
    counter: Tensor | None = None,
    bits: Tensor | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
) -> BlockMap:
    """The block map of query [B, H, L, D] over key [B, Hk, S, D], by the rule (rule.py).

    ``thresholds`` is float32 [H, 2 or 6] on the query's device; ``how`` are the fields of a :class:`How`.
    On the way ``counter`` is set to 0, and the map's bits are written to ``bits``, contiguous int32 with at most two
    rows and words to spare, where zeros go. ``pooled`` are the means of pool.pool, if they are known.
    """
    given = How(*how)
    attn_mask, is_causal, *_ = given
    length, keys = query.shape[2], key.shape[2]
    result = allocate.new_block_map(query, key, given)
    if result.indices.numel() == 0:
        _ = bits is None or bits.zero_()
        return BlockMap(result.counts.zero_(), result.indices)
    bias, cut, counted = None, None, rule.Counted(None, None)
    if attn_mask is not None:
        diagonal = given.diagonal(length, keys)
        bias, cut, counted = pool_mask(rule.without_copies(attn_mask), length, given, diagonal)
    q_mean, k_mean = pooled or pool(query, key, counted, given)
    _select(
        result, q_mean, k_mean, thresholds, given, length, keys, counter, bits,
        bias_ptr=bias, cut_ptr=None if cut is None else cut.view(torch.uint8),
        bias_stride_b=0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        bias_stride_h=0 if bias is None or bias.shape[1] == 1 else bias.stride(1),
        bias_stride_i=0 if bias is None or bias.shape[2] == 1 else bias.stride(2),
        HAS_MASK=bias is not None, ANCHOR=rule.needs_anchor(attn_mask, is_causal),
    )  # fmt: skip
    return result


def means(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [B, H, Nq, D] and [B, Hk, Nk, D]: the means of all blocks, of which ``select`` takes some."""
    return pool(query, key, rule.Counted(None, None), How(None, False, 1.0))


def select(q_mean: Tensor, k_mean: Tensor, thresholds: Tensor, scale: float) -> BlockMap:
    """The block map by means [B, H, Nq, D] and [B, Hk, Nk, D], contiguous, where nothing is masked."""
    shape, n_key = q_mean.shape[:3], k_mean.shape[2]
    result = BlockMap(*(q_mean.new_empty(size, dtype=torch.int32) for size in (shape, (*shape, n_key))))
    _select(
        result, q_mean, k_mean, thresholds, How(None, False, scale), 0, n_key * KEY_BLOCK, None, None,
        bias_ptr=None, cut_ptr=None, bias_stride_b=0, bias_stride_h=0, bias_stride_i=0, HAS_MASK=False, ANCHOR=False,
    )  # fmt: skip
    return result


def _select(
    result: BlockMap,
    q_mean: Tensor,
    k_mean: Tensor,
    thresholds: Tensor,
    how: How,
    length: int,
    keys: int,
    counter: Tensor | None,
    bits: Tensor | None,
    **masked: Any,
) -> None:
    """Write the map of L queries over S keys by the means of their blocks; ``masked`` tells the kernel of a mask."""
    batch, heads, n_query, n_key = result.indices.shape
    head_size = q_mean.shape[3]
    row_tiles, key_tiles = triton.cdiv(n_query, SCORE_ROWS), triton.cdiv(n_key, SCORE_KEYS)
    n_pad = max(WORD_BITS, triton.next_power_of_2(n_key))
    bit_batch, _, bit_rows, bit_words = (0, 0, 0, 0) if bits is None else bits.shape
    found_start, found_stop = beside_longest(how.parts)
    with torch.cuda.device_of(q_mean):
        recording.launch(
            _score_kernel, (batch * heads * row_tiles * key_tiles,),
            q_mean_ptr=q_mean, k_mean_ptr=k_mean,
            scores_ptr=result.indices.view(torch.float32),
            heads=heads, group=heads // k_mean.shape[1], n_query=n_query, n_key=n_key,
            row_tiles=row_tiles, key_tiles=key_tiles, scale=how.scale,
            HEAD_SIZE=head_size, HEAD_PAD=max(SCORE_DEPTH, launch.pad_head(head_size)), DEPTH=SCORE_DEPTH,
            ROWS=SCORE_ROWS, KEYS=SCORE_KEYS, PRECISION=launch.score_precision(q_mean.device),
            num_warps=4, num_stages=2,
        )  # fmt: skip
        recording.launch(
            _select_kernel, (batch * heads * n_query,),
            thresholds_ptr=thresholds,
            counts_ptr=result.counts, indices_ptr=result.indices, counter_ptr=counter, bits_ptr=bits,
            thresholds_stride_h=thresholds.stride(0), thresholds_stride_t=thresholds.stride(1),
            batch=batch, heads=heads, length=length, keys=keys, n_query=n_query, n_key=n_key,
            found_start=found_start, found_stop=found_stop,
            bit_batch=bit_batch, bit_rows=bit_rows, bit_words=bit_words,
            **kept_arguments(thresholds, how, length, keys),
            N_PAD=n_pad, QUERY_ROWS=QUERY_BLOCK, KEY_ROWS=KEY_BLOCK, **how_arguments(how), **masked,
            CEIL_SLACK=rule.CEIL_SLACK, LINEAR_STEPS=LINEAR_STEPS,
            KEEPS=thresholds.shape[1] == WIDTH, OF_GRAPH=OF_GRAPH, WORD_SIZE=WORD_BITS,
            num_warps=launch.select_warps(n_pad), num_stages=1,
            enable_fp_fusion=False,  # topk * n - slack must round as torch does, before the ceiling
        )  # fmt: skip
