"""The block map on the GPU: selection by the hybrid Top-k + Top-p rule from pooled queries and keys.

Goes in: q, k, thresholds, a mask. Comes out: the lists of :class:`BlockMap`, equal to those of
:func:`reference.block_map` up to rounding. A program holds some rows of block scores in registers and finds each row's
cut by bisection, so nothing is sorted and no score reaches memory. Thresholds are read by the kernel, not by the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import allocate, launch, reference
from .block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, diagonal_blocks, visible_blocks
from .pool import pool, pool_mask

SCORE_PART = 1024  # key blocks of one product; four parts make up SELECT_MAX_KEY_BLOCKS
FALLBACK_SCORES = 1 << 24  # scores of one chunk of the torch path; its sort takes some 40 bytes for each


@triton.jit
def _ordered(score):
    """int32 that compares as the float does; both zeros are one number."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores_1(
    q_ptrs, k_ptrs, q_mask, n_key, scale, first, STEP: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, N] scores of the key blocks first, first + STEP, first + 2 STEP, ..."""
    j = first + tl.arange(0, N) * STEP
    depth = tl.arange(0, DEPTH)
    score = tl.zeros([q_ptrs.shape[0], N], tl.float32)
    for start in tl.range(0, HEAD_PAD, DEPTH):
        d = start + depth
        q = tl.load(q_ptrs + d[None, :], mask=q_mask & (d < HEAD_SIZE)[None, :], other=0.0)
        k_mask = (j < n_key)[:, None] & (d < HEAD_SIZE)[None, :]
        k = tl.load(k_ptrs + j[:, None] * HEAD_SIZE + d[None, :], mask=k_mask, other=0.0)
        score = tl.dot(q * scale, tl.trans(k), score, input_precision=PRECISION)
    return score


@triton.jit
def _interleave(even, odd):
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])


@triton.jit
def _scores_2(
    q_ptrs, k_ptrs, q_mask, n_key, scale, first, STEP: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    return _interleave(
        _scores_1(q_ptrs, k_ptrs, q_mask, n_key, scale, first, 2 * STEP, HEAD_SIZE, HEAD_PAD, DEPTH, N // 2, PRECISION),
        _scores_1(
            q_ptrs, k_ptrs, q_mask, n_key, scale, first + STEP, 2 * STEP, HEAD_SIZE, HEAD_PAD, DEPTH, N // 2, PRECISION
        ),
    )


@triton.jit
def _scores_4(
    q_ptrs, k_ptrs, q_mask, n_key, scale, first, STEP: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    return _interleave(
        _scores_2(q_ptrs, k_ptrs, q_mask, n_key, scale, first, 2 * STEP, HEAD_SIZE, HEAD_PAD, DEPTH, N // 2, PRECISION),
        _scores_2(
            q_ptrs, k_ptrs, q_mask, n_key, scale, first + STEP, 2 * STEP, HEAD_SIZE, HEAD_PAD, DEPTH, N // 2, PRECISION
        ),
    )


@triton.jit
def _select_kernel(
    q_mean_ptr, k_mean_ptr, thresholds_ptr, bias_ptr, cut_ptr,
    counts_ptr, indices_ptr,
    thresholds_stride_h, thresholds_stride_t, bias_stride_b, bias_stride_h, bias_stride_i,
    heads, group, length, n_query, n_key, n_tiles, scale,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, N_PAD: tl.constexpr,
    PART: tl.constexpr, QUERY_ROWS: tl.constexpr, KEY_ROWS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, ANCHOR: tl.constexpr, CEIL_SLACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = (pid // n_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    i = pid % n_tiles * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, N_PAD)
    wide_i = i.to(tl.int64)
    real = (i < n_query)[:, None] & (j < n_key)[None, :]

    # Scores [ROWS, N_PAD], built in up to four interleaved parts: a product's keys pass through shared memory.
    q_ptrs = q_mean_ptr + (bh * n_query + wide_i)[:, None] * HEAD_SIZE
    k_ptrs = k_mean_ptr + (b * (heads // group) + h // group) * n_key * HEAD_SIZE
    q_mask = (i < n_query)[:, None]
    if N_PAD <= PART:
        score = _scores_1(q_ptrs, k_ptrs, q_mask, n_key, scale, 0, 1, HEAD_SIZE, HEAD_PAD, DEPTH, N_PAD, PRECISION)
    elif N_PAD == 2 * PART:
        score = _scores_2(q_ptrs, k_ptrs, q_mask, n_key, scale, 0, 1, HEAD_SIZE, HEAD_PAD, DEPTH, N_PAD, PRECISION)
    else:
        score = _scores_4(q_ptrs, k_ptrs, q_mask, n_key, scale, 0, 1, HEAD_SIZE, HEAD_PAD, DEPTH, N_PAD, PRECISION)

    # Visibility.
    visible = real
    forced = (j < 0)[None, :]  # none
    if IS_CAUSAL:
        forced = j[None, :] // (QUERY_ROWS // KEY_ROWS) == i[:, None]
        last_row = tl.minimum((i + 1) * QUERY_ROWS, length) - 1
        visible = visible & (j[None, :] * KEY_ROWS <= last_row[:, None])
    if HAS_MASK:
        pooled = b * bias_stride_b + h * bias_stride_h + wide_i[:, None] * bias_stride_i + j[None, :]
        bias = tl.load(bias_ptr + pooled, mask=real, other=0.0)
        visible = visible & (bias != float("-inf"))
        forced = forced | (tl.load(cut_ptr + pooled, mask=real, other=0) != 0)
        score += tl.where(visible, bias, 0.0)
    broken = tl.max((visible & ~(tl.abs(score) < float("inf"))).to(tl.int32), 1) > 0
    n = tl.sum(visible.to(tl.int32), 1)

    # Softmax over the visible blocks, and the rule's two demands.
    score = tl.where(visible, score, float("-inf"))
    top = tl.where(n > 0, tl.max(score, 1), 0.0)
    mass = tl.where(visible, tl.exp(score - top[:, None]), 0.0)
    mass = mass / tl.where(n > 0, tl.sum(mass, 1), 1.0)[:, None]
    topk = tl.load(thresholds_ptr + h * thresholds_stride_h)
    topp = tl.load(thresholds_ptr + h * thresholds_stride_h + thresholds_stride_t)
    a = tl.maximum(tl.ceil(topk * n.to(tl.float32) - CEIL_SLACK), 1.0)
    a = tl.where(topp >= 1.0, tl.maximum(a, n.to(tl.float32)), a)  # rounding may not stop short of all
    wanted = tl.where(topp <= 0.0, -1.0, topp)  # 0 is no demand: nothing falls short of -1
    image = tl.where(visible, _ordered(score), -2147483648)

    # The largest cut for which the blocks at or above it meet both demands; it stays at its lowest value, below every
    # visible block, where no cut does (rounding can keep the total mass under topp).
    low = tl.full([ROWS], -2147483647, tl.int32)
    high = tl.full([ROWS], 2147483647, tl.int32)
    for _ in tl.range(32):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # high - low may not fit in 32 bits
        above = image >= middle[:, None]
        enough = tl.sum(above.to(tl.int32), 1).to(tl.float32) >= a
        enough = enough & (tl.sum(tl.where(above, mass, 0.0), 1) >= wanted)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)

    # Above the cut all stay; of those at the cut, the lower indices, while a demand is open.
    above = image > low[:, None]
    equal = image == low[:, None]
    one = tl.max(tl.where(equal, mass, 0.0), 1)  # the mass of each block at the cut
    before = tl.cumsum(equal.to(tl.int32), 1) - 1
    before = before.to(tl.float32)
    rank = tl.sum(above.to(tl.int32), 1).to(tl.float32)[:, None] + before
    passed = tl.sum(tl.where(above, mass, 0.0), 1)[:, None] + before * one[:, None]
    kept = above | (equal & ((rank < a[:, None]) | (passed < wanted)))
    if ANCHOR:
        uncut = visible & ~forced
        best = tl.max(tl.where(uncut, image, -2147483648), 1)
        best_j = tl.min(tl.where(uncut & (image == best[:, None]), j[None, :], N_PAD), 1)
        kept = kept | (uncut & (j[None, :] == best_j[:, None]))
    kept = (kept | forced | broken[:, None]) & visible

    # The kept blocks and then the dropped ones, each ascending. The latter are never read, but so equal inputs give
    # equal memory.
    count = tl.sum(kept.to(tl.int32), 1)
    so_far = tl.cumsum(kept.to(tl.int32), 1)  # up to and with j
    place = tl.where(kept, so_far - 1, count[:, None] + j[None, :] - so_far)
    row_ptrs = indices_ptr + (bh * n_query + wide_i)[:, None] * n_key
    tl.store(row_ptrs + place, tl.broadcast_to(j[None, :], [ROWS, N_PAD]), mask=real)
    tl.store(counts_ptr + bh * n_query + i, count, mask=i < n_query)


def _select_in_chunks(
    q_mean: Tensor,
    k_mean: Tensor,
    thresholds: Tensor,
    pooled: tuple[Tensor, ...],
    is_causal: bool,
    anchor: bool,
    scale: float,
    length: int,
) -> BlockMap:
    """The rule by torch code, some query blocks at a time: for rows of scores that no program can hold."""
    batch, heads, n_query, _ = q_mean.shape
    n_key = k_mean.shape[2]
    key = k_mean.repeat_interleave(heads // k_mean.shape[1], dim=1).mT
    visible = visible_blocks(n_query, n_key, length, is_causal, q_mean.device)
    forced = diagonal_blocks(n_query, n_key, q_mean.device) if is_causal else torch.zeros_like(visible)
    chunk = max(1, FALLBACK_SCORES // (batch * heads * n_key))
    counts = torch.empty((batch, heads, n_query), dtype=torch.int32, device=q_mean.device)
    indices = torch.empty((batch, heads, n_query, n_key), dtype=torch.int32, device=q_mean.device)
    for start in range(0, n_query, chunk):
        rows = slice(start, min(start + chunk, n_query))
        scores, seen, always = (q_mean[:, :, rows] * scale) @ key, visible[rows], forced[rows]
        if pooled:
            parts = [x if x.shape[2] == 1 else x[:, :, rows] for x in pooled]
            scores, seen, always = reference.apply_pooled_mask(scores, seen, always, *parts)
        kept = reference.select(scores, seen, thresholds, always, anchor)
        counts[:, :, rows], indices[:, :, rows] = BlockMap.from_dense(kept)
    return BlockMap(counts, indices)


def block_map(
    q: Tensor, k: Tensor, thresholds: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> BlockMap:
    """The block map of q [B, H, L, D] over k [B, Hk, S, D], by the rule of DESIGN section 3.

    ``thresholds`` is float32 [H, 2] on q's device; ``attn_mask`` is bool or float [B or 1, H or 1, L or 1, S].
    """
    batch, heads, length, head_size = q.shape
    result = allocate.new_block_map(q, k)
    n_query, n_key = result.indices.shape[-2:]
    if result.indices.numel() == 0:
        return BlockMap(result.counts.zero_(), result.indices)
    q_mean, k_mean = pool(q, QUERY_BLOCK), pool(k, KEY_BLOCK)
    pooled = () if attn_mask is None else pool_mask(attn_mask, length)
    anchor = reference.needs_anchor(attn_mask, is_causal)
    if n_key > launch.SELECT_MAX_KEY_BLOCKS:
        return _select_in_chunks(q_mean, k_mean, thresholds, pooled, is_causal, anchor, scale, length)

    bias, cut = pooled or (None, None)

    tile = launch.select_launch(n_key)
    n_tiles = triton.cdiv(n_query, tile.rows)
    with torch.cuda.device_of(q):
        _select_kernel[(batch * heads * n_tiles,)](
            q_mean_ptr=q_mean, k_mean_ptr=k_mean, thresholds_ptr=thresholds,
            bias_ptr=bias, cut_ptr=None if cut is None else cut.view(torch.uint8),
            counts_ptr=result.counts, indices_ptr=result.indices,
            thresholds_stride_h=thresholds.stride(0), thresholds_stride_t=thresholds.stride(1),
            bias_stride_b=0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
            bias_stride_h=0 if bias is None or bias.shape[1] == 1 else bias.stride(1),
            bias_stride_i=0 if bias is None or bias.shape[2] == 1 else bias.stride(2),
            heads=heads, group=heads // k.shape[1], length=length, n_query=n_query, n_key=n_key, n_tiles=n_tiles,
            scale=scale,
            HEAD_SIZE=head_size, HEAD_PAD=launch.pad_head(head_size), DEPTH=16, ROWS=tile.rows,
            N_PAD=max(16, triton.next_power_of_2(n_key)), PART=SCORE_PART, QUERY_ROWS=QUERY_BLOCK, KEY_ROWS=KEY_BLOCK,
            IS_CAUSAL=is_causal, HAS_MASK=bias is not None, ANCHOR=anchor, CEIL_SLACK=reference.CEIL_SLACK,
            PRECISION="ieee",
            num_warps=tile.warps, num_stages=1,
            enable_fp_fusion=False,  # topk * n - slack must round as torch does, before the ceiling
        )  # fmt: skip
    return result
