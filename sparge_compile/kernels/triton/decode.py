"""What the codes of codes.py stand for, in the operands' own dtype: eight_bits.centred on the GPU, for a backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import allocate, launch
from ..block_map import KEY_BLOCK, ceil_div
from ..eight_bits import GROUP, LANES, LOG2_E
from ..how import How
from . import codes as coding
from . import recording
from .tiles import matrix_arguments, store_tile, tile_offsets

WARPS = 4
LOWER_ROWS = 1024  # of a program


@triton.jit
def _rows_kernel(
    code_ptr, step_ptr,
    out_ptr,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d, heads, rows, n_blocks,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A block of queries, each with its step, or, of LANES above 0, of keys, which share one: rotated back."""
    number = tl.program_id(0).to(tl.int64)
    block, bh = number % n_blocks, number // n_blocks
    lane, low = tl.arange(0, ROWS), coding._columns(HEAD_PAD, GROUP)
    high = low + GROUP // 2
    row = block * ROWS + lane
    code_ptrs = code_ptr + (bh * rows + row)[:, None] * HEAD_SIZE
    low_inside = (row < rows)[:, None] & (low < HEAD_SIZE)[None, :]
    high_inside = (row < rows)[:, None] & (high < HEAD_SIZE)[None, :]
    x = tl.load(code_ptrs + low[None, :], mask=low_inside, other=0).to(tl.float32)
    y = tl.load(code_ptrs + high[None, :], mask=high_inside, other=0).to(tl.float32)
    if LANES > 0:
        step = tl.load(step_ptr + number * LANES)
    else:
        step = tl.load(step_ptr + bh * rows + row, mask=row < rows, other=0.0)[:, None]
    x, y = coding._rotated(x * step, y * step, GROUP)
    tile = out_ptr + (bh // heads * out_stride_b + bh % heads * out_stride_h + block * ROWS * out_stride_l) * ALIGN
    low_offsets = tile_offsets(lane, low, out_stride_l, out_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    high_offsets = tile_offsets(lane, high, out_stride_l, out_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    tl.store(tile + low_offsets, x.to(out_ptr.dtype.element_ty), mask=low_inside)
    tl.store(tile + high_offsets, y.to(out_ptr.dtype.element_ty), mask=high_inside)


@triton.jit
def _values_kernel(
    code_ptr, scale_ptr,
    out_ptr,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d, heads, rows, n_blocks,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A block of values, which lie transposed."""
    number = tl.program_id(0).to(tl.int64)
    block, bh = number % n_blocks, number // n_blocks
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    code_ptrs = code_ptr + number * (HEAD_SIZE * ROWS) + column[:, None] * ROWS + lane[None, :]
    x = tl.load(code_ptrs, mask=(column < HEAD_SIZE)[:, None], other=0.0).to(tl.float32) * tl.load(scale_ptr + bh)
    tile = out_ptr + (bh // heads * out_stride_b + bh % heads * out_stride_h + block * ROWS * out_stride_l) * ALIGN
    offsets = tile_offsets(lane, column, out_stride_l, out_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    store_tile(tile + offsets, tl.trans(x), block * ROWS + lane, column, rows, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD)


@triton.jit
def _lower_kernel(lse_ptr, lift_ptr, out_ptr, total, scale, ROWS: tl.constexpr):
    """lse without what the constant of the keys adds to it."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + at, mask=at < total, other=0.0)
    lift = tl.load(lift_ptr + at, mask=at < total, other=0.0)
    tl.store(out_ptr + at, lse - lift * scale, mask=at < total)


def centred(query: Tensor, key: Tensor, value: Tensor, lse: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of :func:`eight_bits.centred`, dense in the order of what was given, and lse without its lift."""
    if 0 in (query.numel(), key.numel(), value.numel()):
        return query, key, value, lse
    # A scale of which the step of a query is the step alone.
    codes, _ = coding.code(query, key, value, how._replace(scale=1 / LOG2_E), permuted=False)
    q, k, v = map(allocate.dense_like, (query, key, value))
    lower = lse.new_empty(lse.shape)
    with torch.cuda.device_of(query):
        for source, step, out, lanes in ((codes.q, codes.q_scale, q, 0), (codes.k, codes.k_scale, k, LANES)):
            n_blocks = ceil_div(out.shape[2], KEY_BLOCK)
            recording.launch(
                _rows_kernel, (out.shape[0] * out.shape[1] * n_blocks,),
                code_ptr=source, step_ptr=step, out_ptr=out, heads=out.shape[1], rows=out.shape[2],
                n_blocks=n_blocks,
                HEAD_SIZE=out.shape[3], HEAD_PAD=launch.pad_head(out.shape[3]), ROWS=KEY_BLOCK, GROUP=GROUP,
                LANES=lanes, **matrix_arguments(KEY_BLOCK, out=out), num_warps=WARPS,
            )  # fmt: skip
        n_blocks = codes.v.shape[2]
        recording.launch(
            _values_kernel, (v.shape[0] * v.shape[1] * n_blocks,),
            code_ptr=codes.v, scale_ptr=codes.v_scale, out_ptr=v, heads=v.shape[1], rows=v.shape[2],
            n_blocks=n_blocks, HEAD_SIZE=v.shape[3], HEAD_PAD=launch.pad_head(v.shape[3]), ROWS=KEY_BLOCK,
            **matrix_arguments(KEY_BLOCK, out=v), num_warps=WARPS,
        )  # fmt: skip
        recording.launch(
            _lower_kernel, (ceil_div(lse.numel(), LOWER_ROWS),),
            lse_ptr=lse, lift_ptr=codes.lift, out_ptr=lower, total=lse.numel(), scale=how.scale, ROWS=LOWER_ROWS,
        )  # fmt: skip
    return q, k, v, lower
