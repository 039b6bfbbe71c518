"""Block means on the GPU: of the rows of q and k, and of what a mask adds to scores.

The same numbers as :func:`reference.pool` and :func:`reference.pool_mask` in float32; each input is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from .tiles import load_tile, matrix_arguments, tile_offsets

POOL_ELEMENTS = 4096  # elements of x that a pooling program holds at a time


@triton.jit
def _pool_kernel(
    x_ptr,
    mean_ptr,
    x_stride_b, x_stride_h, x_stride_l, x_stride_d,
    heads, length, n_blocks,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    block = pid % n_blocks
    b, h = pid // n_blocks // heads, pid // n_blocks % heads
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    offsets = tile_offsets(lane, column, x_stride_l, x_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    total = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for first in tl.static_range(0, BLOCK, ROWS):
        row = block * BLOCK + first
        tile = x_ptr + (b * x_stride_b + h * x_stride_h + row * x_stride_l) * ALIGN
        x = load_tile(
            tile + offsets, row + lane, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True
        )
        total += x.to(tl.float32)
    rows = tl.minimum(BLOCK, length - block * BLOCK).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 0), rows)  # as torch rounds: a plain / is approximate on a GPU
    tl.store(mean_ptr + pid * HEAD_SIZE + column, mean, mask=column < HEAD_SIZE)


def pool(x: Tensor, block: int) -> Tensor:
    """float32 [B, H, N, D], contiguous: the means of the rows that exist in each block of x [B, H, L, D]."""
    batch, heads, length, head_size = x.shape
    n_blocks = ceil_div(length, block)
    mean = x.new_empty((batch, heads, n_blocks, head_size), dtype=torch.float32)
    if mean.numel() == 0:
        return mean
    head_pad = launch.pad_head(head_size)
    with torch.cuda.device_of(x):
        _pool_kernel[(batch * heads * n_blocks,)](
            x_ptr=x,
            mean_ptr=mean,
            heads=heads, length=length, n_blocks=n_blocks,
            HEAD_SIZE=head_size, HEAD_PAD=head_pad, BLOCK=block, ROWS=min(block, max(1, POOL_ELEMENTS // head_pad)),
            **matrix_arguments(block, x=x),
        )  # fmt: skip
    return mean


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
    """reference.pool_mask: bias float32 and cut bool, each [Bm, Hm, Nq or 1, Nk]."""
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
