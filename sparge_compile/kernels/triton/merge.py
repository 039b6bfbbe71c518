"""Attention over the parts of a list, put together by their log-sum-exps.

Each part is attention over some of the keys of a row. Of two parts, lse = log(exp(lse1) + exp(lse2)), and out is the
mean of theirs by the weights exp(lse1 - lse) and exp(lse2 - lse); a part without keys has -inf and no weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from . import recording
from .tiles import LN_2, LOG2_E, matrix_arguments, store_tile, tile_offsets

ELEMENTS = 4096  # of an output, that one program merges


@triton.jit(do_not_specialize=["batch", "heads", "length", "n_tiles"])
def _merge_kernel(
    found_ptr, lses_ptr,
    out_ptr, lse_ptr,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    batch, heads, length, n_tiles,
    VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    OFFSET: tl.constexpr, LOG2_E: tl.constexpr, LN_2: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    bh, first_row = pid // n_tiles, pid % n_tiles * ROWS
    lane, column = tl.arange(0, ROWS), tl.arange(0, VALUE_PAD)
    row = first_row + lane
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        at = ((part * batch * heads + bh) * length) + row
        top = tl.maximum(top, tl.load(lses_ptr + at, mask=row < length, other=float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for part in tl.static_range(PARTS):
        at = ((part * batch * heads + bh) * length) + row
        weight = tl.exp2((tl.load(lses_ptr + at, mask=row < length, other=float("-inf")) - shift) * LOG2_E)
        inside = (row < length)[:, None] & (column < VALUE_SIZE)[None, :]
        found = tl.load(found_ptr + at[:, None] * VALUE_SIZE + column[None, :], mask=inside, other=0.0)
        total += weight
        acc += weight[:, None] * found
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(lse_ptr + bh * length + row, shift + tl.log2(total) * LN_2, mask=row < length)
    b, h = bh // heads, bh % heads
    out_tile = out_ptr + (b * out_stride_b + h * out_stride_h + first_row * out_stride_l) * ALIGN
    out_ptrs = out_tile + tile_offsets(lane, column, out_stride_l, out_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    store_tile(out_ptrs, acc, row, column, length, HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD)


def new_parts(parts: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the outputs and log-sum-exps of so many parts, float32 [parts * B, H, L, Dv] and [parts * B, H, L]."""
    batch, heads, length, value_size = out.shape
    lses = torch.empty((parts * batch, heads, length), dtype=torch.float32, device=out.device)
    return lses.new_empty((parts * batch, heads, length, value_size)), lses


def merge(found: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fill ``out`` [B, H, L, Dv] and ``lse`` [B, H, L] from the parts of :func:`new_parts`."""
    batch, heads, length, value_size = out.shape
    value_pad = launch.pad_head(value_size)
    rows = max(16, min(ELEMENTS // value_pad, triton.next_power_of_2(length)))
    n_tiles = triton.cdiv(length, rows)
    recording.launch(
        _merge_kernel, (n_tiles * batch * heads,),
        found_ptr=found, lses_ptr=lses,
        out_ptr=out, lse_ptr=lse,
        batch=batch, heads=heads, length=length, n_tiles=n_tiles,
        VALUE_SIZE=value_size, VALUE_PAD=value_pad, ROWS=rows, PARTS=len(found) // batch, LOG2_E=LOG2_E, LN_2=LN_2,
        **matrix_arguments(rows, out=out),
    )  # fmt: skip
