"""Block means on the GPU: of the rows of q and k, and of what a mask adds to scores.

The same numbers as :func:`rule.pool` and :func:`rule.pool_mask` in float32; each input is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from .tiles import load_tile, matrix_arguments, tile_offsets

POOL_ELEMENTS = 4096  # elements of q or k that a pooling program holds at a time


@triton.jit
def _pool_block(
    x_ptr,
    mean_ptr,
    number, stride_b, stride_h, stride_l, stride_d, heads, length, n_blocks,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The mean of block ``number``, counted over batch, heads and blocks."""
    number = number.to(tl.int64)
    block = number % n_blocks
    b, h = number // n_blocks // heads, number // n_blocks % heads
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    offsets = tile_offsets(lane, column, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    total = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for first in tl.static_range(0, BLOCK, ROWS):
        row = block * BLOCK + first
        tile = x_ptr + (b * stride_b + h * stride_h + row * stride_l) * ALIGN
        x = load_tile(
            tile + offsets, row + lane, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True
        )
        total += x.to(tl.float32)
    rows = tl.minimum(BLOCK, length - block * BLOCK).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 0), rows)  # as torch rounds: a plain / is approximate on a GPU
    tl.store(mean_ptr + number * HEAD_SIZE + column, mean, mask=column < HEAD_SIZE)


@triton.jit
def _pool_kernel(
    q_ptr, k_ptr,
    q_mean_ptr, k_mean_ptr,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    heads, key_heads, length, keys, n_query, n_key, all_query,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, QUERY_ROWS: tl.constexpr, KEY_ROWS: tl.constexpr,
    ROWS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < all_query:
        _pool_block(
            q_ptr, q_mean_ptr, pid, q_stride_b, q_stride_h, q_stride_l, q_stride_d, heads, length, n_query,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, BLOCK=QUERY_ROWS, ROWS=ROWS, ALIGN=ALIGN, OFFSET=OFFSET,
        )  # fmt: skip
    else:
        _pool_block(
            k_ptr, k_mean_ptr, pid - all_query, k_stride_b, k_stride_h, k_stride_l, k_stride_d, key_heads, keys, n_key,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, BLOCK=KEY_ROWS, ROWS=ROWS, ALIGN=ALIGN, OFFSET=OFFSET,
        )  # fmt: skip


def pool(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [B, H, Nq, D] and [B, Hk, Nk, D], contiguous: the means of the rows that exist in each block.

    q [B, H, L, D] and k [B, Hk, S, D] have any strides, and at least one element each.
    """
    batch, heads, length, head_size = q.shape
    key_heads, keys = k.shape[1:3]
    n_query, n_key = ceil_div(length, QUERY_BLOCK), ceil_div(keys, KEY_BLOCK)
    q_mean = q.new_empty((batch, heads, n_query, head_size), dtype=torch.float32)
    k_mean = q.new_empty((batch, key_heads, n_key, head_size), dtype=torch.float32)
    head_pad = launch.pad_head(head_size)
    all_query = batch * heads * n_query
    with torch.cuda.device_of(q):
        _pool_kernel[(all_query + batch * key_heads * n_key,)](
            q_ptr=q, k_ptr=k,
            q_mean_ptr=q_mean, k_mean_ptr=k_mean,
            heads=heads, key_heads=key_heads, length=length, keys=keys, n_query=n_query, n_key=n_key,
            all_query=all_query,
            HEAD_SIZE=head_size, HEAD_PAD=head_pad, QUERY_ROWS=QUERY_BLOCK, KEY_ROWS=KEY_BLOCK,
            ROWS=min(KEY_BLOCK, POOL_ELEMENTS // head_pad), num_warps=launch.POOL_WARPS,
            **matrix_arguments(QUERY_BLOCK, q=q, k=k),
        )  # fmt: skip
    return q_mean, k_mean


@triton.jit
def _pool_mask_kernel(
    mask_ptr,
    bias_ptr, cut_ptr,
    mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    heads, rows, keys, n_query, n_key,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, KEYS: tl.constexpr, IS_BOOL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    j, i, bh = pid % n_key, pid // n_key % n_query, pid // n_key // n_query
    key = j * KEYS + tl.arange(0, KEYS)
    head_ptr = mask_ptr + bh // heads * mask_stride_b + bh % heads * mask_stride_h
    total = tl.zeros([ROWS, KEYS], tl.float32)
    pairs = tl.zeros([ROWS, KEYS], tl.int32)
    blind = tl.zeros([ROWS], tl.int32)  # rows that see no key of this block
    for first in tl.static_range(0, ROW_BLOCK, ROWS):
        row = i * ROW_BLOCK + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (key < keys)[None, :]
        pointers = head_ptr + row[:, None] * mask_stride_l + key[None, :] * mask_stride_s
        value = tl.load(pointers, mask=inside, other=0)
        if IS_BOOL:
            opened = (value != 0).to(tl.int32)  # outside, 0 stands for "closed"
        else:
            value = value.to(tl.float32)
            opened = (inside & (value != float("-inf"))).to(tl.int32)
            total += tl.where(opened != 0, value, 0.0)
        pairs += opened
        blind += ((row < rows) & (tl.sum(opened, 1) == 0)).to(tl.int32)
    count = tl.sum(tl.sum(pairs, 1), 0)
    mean = tl.div_rn(tl.sum(tl.sum(total, 1), 0), tl.maximum(count, 1).to(tl.float32))
    tl.store(bias_ptr + pid, tl.where(count > 0, mean, float("-inf")))
    tl.store(cut_ptr + pid, ((count > 0) & (tl.sum(blind, 0) > 0)).to(tl.uint8))


def pool_mask(attn_mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """:func:`rule.pool_mask`: bias float32 and cut bool, each [Bm, Hm, Nq or 1, Nk]."""
    batch, heads, rows, keys = attn_mask.shape
    row_block = QUERY_BLOCK if rows == length else 1
    n_query, n_key = ceil_div(rows, row_block), ceil_div(keys, KEY_BLOCK)
    is_bool = attn_mask.dtype == torch.bool
    bias = torch.empty((batch, heads, n_query, n_key), dtype=torch.float32, device=attn_mask.device)
    cut = torch.empty_like(bias, dtype=torch.bool)
    if bias.numel() == 0:
        return bias, cut
    with torch.cuda.device_of(attn_mask):
        _pool_mask_kernel[(bias.numel(),)](
            mask_ptr=attn_mask.view(torch.uint8) if is_bool else attn_mask,
            bias_ptr=bias, cut_ptr=cut.view(torch.uint8),
            mask_stride_b=attn_mask.stride(0), mask_stride_h=attn_mask.stride(1),
            mask_stride_l=attn_mask.stride(2), mask_stride_s=attn_mask.stride(3),
            heads=heads, rows=rows, keys=keys, n_query=n_query, n_key=n_key,
            ROWS=min(row_block, 32), ROW_BLOCK=row_block, KEYS=KEY_BLOCK, IS_BOOL=is_bool,
        )  # fmt: skip
    return bias, cut
