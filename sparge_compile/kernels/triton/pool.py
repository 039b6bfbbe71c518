"""Block means on the GPU: of the rows of q and k that count, and of what a mask adds to scores.

The same numbers as :func:`rule.pool` and :func:`rule.pool_mask` in float32; each input is read once. The kernel that
pools a mask notes which rows count; rows that do not are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import allocate, launch, rule
from ..block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from ..how import How
from . import recording
from .tiles import how_arguments, load_tile, matrix_arguments, sequence, tile_offsets

POOL_ELEMENTS = 4096  # elements of q or k that a pooling program holds at a time
CUT_KEYS = 128  # key blocks that a program asks at a time whether they are cut
REACH_ROWS = 4096  # keys, then queries, that a program looks at at a time
NO_KEY = 1 << 30  # a position behind all


@triton.jit
def _pool_block(
    x_ptr, counted_ptr, starts_ptr, other_starts_ptr,
    mean_ptr,
    number, stride_b, stride_h, stride_l, stride_d, counted_stride_b, counted_stride_h, heads, group,
    length, other_length, n_blocks,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The mean of block ``number`` of [B, heads, blocks] of queries, or of keys; ``group`` heads share one of x."""
    number = number.to(tl.int64)
    block = number % n_blocks
    n, h = number // n_blocks // heads, number // n_blocks % heads
    b = n if not PACKED else n * 0
    start, length = sequence(starts_ptr, n, length, PACKED=PACKED)
    if CAUSAL:
        _, other_length = sequence(other_starts_ptr, n, other_length, PACKED=PACKED)
    if KEYS and CAUSAL == 1:  # TOP_LEFT: no query sees the keys after the last one's
        length = tl.minimum(length, other_length)
    if counted_ptr is not None:
        counted_ptr += b * counted_stride_b + h * counted_stride_h
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    offsets = tile_offsets(lane, column, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    total = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    rows = tl.minimum(BLOCK, length - block * BLOCK).to(tl.int32)
    if not KEYS and CAUSAL == 2:  # BOTTOM_RIGHT: the first queries may see no key
        rows -= tl.maximum(length - other_length - block * BLOCK, 0).to(tl.int32)
    if counted_ptr is not None:
        rows = tl.zeros([], tl.int32)
    for first in tl.static_range(0, BLOCK, ROWS):
        row = block * BLOCK + first
        tile = x_ptr + (b * stride_b + h // group * stride_h + (start + row) * stride_l) * ALIGN
        wanted = row + lane
        if not KEYS and CAUSAL == 2:
            wanted = tl.where(wanted >= length - other_length, wanted, length)
        if counted_ptr is not None:
            counts = tl.load(counted_ptr + wanted, mask=wanted < length, other=0) != 0
            wanted = tl.where(counts, wanted, length)  # a row that does not exist, so that it is not read
            rows += tl.sum(counts.to(tl.int32), 0)
        x = load_tile(tile + offsets, wanted, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
        total += x.to(tl.float32)
    rows = tl.maximum(rows, 1).to(tl.float32)  # the mean of no row is 0
    mean = tl.div_rn(tl.sum(total, 0), rows)  # as torch rounds: a plain / is approximate on a GPU
    tl.store(mean_ptr + number * HEAD_SIZE + column, mean, mask=column < HEAD_SIZE)


@triton.jit
def _pool_kernel(
    q_ptr, k_ptr, queries_ptr, keys_ptr, q_starts_ptr, k_starts_ptr,
    q_mean_ptr, k_mean_ptr,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    queries_stride_b, queries_stride_h, keys_stride_b, keys_stride_h,
    heads, key_heads, group, length, keys, n_query, n_key, all_query,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, QUERY_ROWS: tl.constexpr, KEY_ROWS: tl.constexpr,
    ROWS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < all_query:
        _pool_block(
            q_ptr, queries_ptr, q_starts_ptr, k_starts_ptr, q_mean_ptr,
            pid, q_stride_b, q_stride_h, q_stride_l, q_stride_d,
            queries_stride_b, queries_stride_h, heads, 1, length, keys, n_query,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, BLOCK=QUERY_ROWS, ROWS=ROWS, ALIGN=ALIGN, OFFSET=OFFSET,
            CAUSAL=CAUSAL, PACKED=PACKED, KEYS=False,
        )  # fmt: skip
    else:
        _pool_block(
            k_ptr, keys_ptr, k_starts_ptr, q_starts_ptr, k_mean_ptr,
            pid - all_query, k_stride_b, k_stride_h, k_stride_l, k_stride_d,
            keys_stride_b, keys_stride_h, key_heads, group, keys, length, n_key,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, BLOCK=KEY_ROWS, ROWS=ROWS, ALIGN=ALIGN, OFFSET=OFFSET,
            CAUSAL=CAUSAL, PACKED=PACKED, KEYS=True,
        )  # fmt: skip


def pool(q: Tensor, k: Tensor, counted: rule.Counted, how: How) -> tuple[Tensor, Tensor]:
    """float32 [B, H, Nq, D] and [B, Hk, Nk, D], contiguous: the means of the rows that count in each block.

    q [B, H, L, D] and k [B, Hk, S, D] have any strides, and at least one element each. ``counted`` is what
    :func:`pool_mask` found; keys and queries that causality alone blinds are left out here. Where query heads that
    share keys do not see the same ones, the means of the keys are [B, H, Nk, D].
    """
    head_size = q.shape[3]
    batch, heads, n_query, n_key = allocate.map_shape(q, k, how)
    group = heads // k.shape[1]
    if counted.keys is None or counted.keys.shape[1] == 1:
        pooled_heads, shared = k.shape[1], 1
    else:
        pooled_heads, shared = heads, group
    q_mean = q.new_empty((batch, heads, n_query, head_size), dtype=torch.float32)
    k_mean = q.new_empty((batch, pooled_heads, n_key, head_size), dtype=torch.float32)
    head_pad = launch.pad_head(head_size)
    all_query = batch * heads * n_query
    with torch.cuda.device_of(q):
        recording.launch(
            _pool_kernel, (all_query + batch * pooled_heads * n_key,),
            q_ptr=q, k_ptr=k,
            q_mean_ptr=q_mean, k_mean_ptr=k_mean,
            heads=heads, key_heads=pooled_heads, group=shared,
            length=q.shape[2], keys=k.shape[2], n_query=n_query, n_key=n_key,
            all_query=all_query,
            HEAD_SIZE=head_size, HEAD_PAD=head_pad, QUERY_ROWS=QUERY_BLOCK, KEY_ROWS=KEY_BLOCK,
            ROWS=min(KEY_BLOCK, POOL_ELEMENTS // head_pad), num_warps=launch.POOL_WARPS,
            **counted_arguments("queries", counted.queries), **counted_arguments("keys", counted.keys),
            **matrix_arguments(QUERY_BLOCK, q=q, k=k),
            **how_arguments(how),
        )  # fmt: skip
    return q_mean, k_mean


def counted_arguments(name: str, counted: Tensor | None) -> dict:
    """Kernel arguments for bool [B or 1, H or 1, rows], rows adjacent: pointer and strides, 0 where broadcast."""
    if counted is None:
        return {f"{name}_ptr": None, f"{name}_stride_b": 0, f"{name}_stride_h": 0}
    stride_b, stride_h = (0 if counted.shape[dim] == 1 else counted.stride(dim) for dim in (0, 1))
    return {f"{name}_ptr": counted.view(torch.uint8), f"{name}_stride_b": stride_b, f"{name}_stride_h": stride_h}


@triton.jit
def _pool_mask_kernel(
    mask_ptr,
    bias_ptr, sighted_ptr, keys_ptr, queries_ptr,
    mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    heads, rows, keys, n_query, n_key, last_row, diagonal,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, KEYS: tl.constexpr, IS_BOOL: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    j, i, bh = pid % n_key, pid // n_key % n_query, pid // n_key // n_query
    key = j * KEYS + tl.arange(0, KEYS)
    head_ptr = mask_ptr + bh // heads * mask_stride_b + bh % heads * mask_stride_h
    total = tl.zeros([ROWS, KEYS], tl.float32)
    pairs = tl.zeros([ROWS, KEYS], tl.int32)
    sighted = tl.zeros([ROWS], tl.int32)  # rows that see a key of this block
    for first in tl.static_range(0, ROW_BLOCK, ROWS):
        row = i * ROW_BLOCK + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (key < keys)[None, :]
        if IS_CAUSAL:
            reach = row if ROW_BLOCK > 1 else row + last_row  # one row of a mask speaks for all queries
            inside = inside & (key[None, :] <= reach[:, None] + diagonal)
        pointers = head_ptr + row[:, None] * mask_stride_l + key[None, :] * mask_stride_s
        value = tl.load(pointers, mask=inside, other=0)
        if IS_BOOL:
            opened = (value != 0).to(tl.int32)  # outside, 0 stands for "closed"
        else:
            value = value.to(tl.float32)
            opened = (inside & (value != float("-inf"))).to(tl.int32)
            total += tl.where(opened != 0, value, 0.0)
        pairs += opened
        sees = tl.sum(opened, 1) > 0
        sighted += sees.to(tl.int32)
        if queries_ptr is not None:  # many programs may write the same 1
            tl.store(queries_ptr + bh * rows + row, tl.full([ROWS], 1, tl.uint8), mask=sees)
    tl.store(keys_ptr + bh * keys + key, tl.full([KEYS], 1, tl.uint8), mask=tl.sum(pairs, 0) > 0)
    count = tl.sum(tl.sum(pairs, 1), 0)
    mean = tl.div_rn(tl.sum(tl.sum(total, 1), 0), tl.maximum(count, 1).to(tl.float32))
    tl.store(bias_ptr + pid, tl.where(count > 0, mean, float("-inf")))
    tl.store(sighted_ptr + pid, tl.sum(sighted, 0).to(tl.uint8))


@triton.jit
def _cut_kernel(
    seeing_ptr, sighted_ptr,
    cut_ptr,
    rows, n_query, n_key,
    ROW_BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Which blocks of a query block some of its rows see and others, that see keys elsewhere, do not."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid % n_query * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    sees = tl.load(seeing_ptr + pid // n_query * rows + row, mask=row < rows, other=0)
    seeing = tl.sum(sees.to(tl.int32), 0)
    for first in tl.range(0, n_key, KEYS):
        j = first + tl.arange(0, KEYS)
        sighted = tl.load(sighted_ptr + pid * n_key + j, mask=j < n_key, other=0)
        tl.store(cut_ptr + pid * n_key + j, (sighted.to(tl.int32) < seeing).to(tl.uint8), mask=j < n_key)


@triton.jit
def _reach_kernel(
    seen_ptr,
    queries_ptr,
    keys, length, diagonal,
    ROWS: tl.constexpr, NO_KEY: tl.constexpr,
):  # fmt: skip
    """:func:`rule.queries_that_reach`: the queries from the first key on that is seen."""
    pid = tl.program_id(0).to(tl.int64)
    first = tl.full([ROWS], NO_KEY, tl.int32)
    for start in tl.range(0, keys, ROWS):
        j = start + tl.arange(0, ROWS)
        seen = tl.load(seen_ptr + pid * keys + j, mask=j < keys, other=0)
        first = tl.minimum(first, tl.where(seen != 0, j, NO_KEY))
    first = tl.min(first, 0)
    for start in tl.range(0, length, ROWS):
        i = start + tl.arange(0, ROWS)
        tl.store(queries_ptr + pid * length + i, (i + diagonal >= first).to(tl.uint8), mask=i < length)


def pool_mask(attn_mask: Tensor, length: int, how: How, diagonal: int) -> tuple[Tensor, Tensor, rule.Counted]:
    """:func:`rule.pool_mask`, bias float32 and cut bool, each [Bm, Hm, Nq or 1, Nk], and :func:`rule.counted_rows`.

    The mask [Bm, Hm, L or 1, S] has at least one element; padding is hidden, and where each row has its own mask, sees
    nothing.
    """
    is_causal = how.is_causal
    batch, heads, rows, keys = attn_mask.shape
    one_row = rows == 1
    row_block = 1 if one_row else QUERY_BLOCK
    n_query, n_key = ceil_div(rows, row_block), ceil_div(keys, KEY_BLOCK)
    is_bool = attn_mask.dtype == torch.bool
    bias = torch.empty((batch, heads, n_query, n_key), dtype=torch.float32, device=attn_mask.device)
    sighted = torch.empty_like(bias, dtype=torch.uint8)
    # Memory that is filled, as a call that is replayed takes it.
    seen = torch.empty((batch, heads, keys), dtype=torch.bool, device=attn_mask.device).zero_()
    seeing = None
    if not one_row:
        seeing = torch.empty((batch, heads, rows), dtype=torch.bool, device=attn_mask.device).zero_()
    with torch.cuda.device_of(attn_mask):
        recording.launch(
            _pool_mask_kernel, (bias.numel(),),
            mask_ptr=attn_mask.view(torch.uint8) if is_bool else attn_mask,
            bias_ptr=bias, sighted_ptr=sighted, keys_ptr=seen.view(torch.uint8),
            queries_ptr=None if seeing is None else seeing.view(torch.uint8),
            mask_stride_b=attn_mask.stride(0), mask_stride_h=attn_mask.stride(1),
            mask_stride_l=attn_mask.stride(2), mask_stride_s=attn_mask.stride(3),
            heads=heads, rows=rows, keys=keys, n_query=n_query, n_key=n_key, last_row=length - 1, diagonal=diagonal,
            ROWS=min(row_block, 32), ROW_BLOCK=row_block, KEYS=KEY_BLOCK, IS_BOOL=is_bool, IS_CAUSAL=is_causal,
        )  # fmt: skip
    cut = torch.empty_like(sighted, dtype=torch.bool)
    if seeing is None:
        return bias, cut.zero_(), rule.Counted(seen, _reaching(seen, length, diagonal) if is_causal else None)
    with torch.cuda.device_of(attn_mask):
        recording.launch(
            _cut_kernel, (batch * heads * n_query,),
            seeing_ptr=seeing.view(torch.uint8), sighted_ptr=sighted,
            cut_ptr=cut.view(torch.uint8),
            rows=rows, n_query=n_query, n_key=n_key,
            ROW_BLOCK=row_block, KEYS=CUT_KEYS,
        )  # fmt: skip
    return bias, cut, rule.Counted(seen, seeing)


def _reaching(seen: Tensor, length: int, diagonal: int) -> Tensor:
    """:func:`rule.queries_that_reach`."""
    batch, heads, keys = seen.shape
    queries = torch.empty((batch, heads, length), dtype=torch.bool, device=seen.device)
    with torch.cuda.device_of(seen):
        recording.launch(
            _reach_kernel, (batch * heads,),
            seen_ptr=seen.view(torch.uint8),
            queries_ptr=queries.view(torch.uint8),
            keys=keys, length=length, diagonal=diagonal,
            ROWS=REACH_ROWS, NO_KEY=NO_KEY,
        )  # fmt: skip
    return queries
