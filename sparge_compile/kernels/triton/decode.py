"""What the codes of codes.py stand for, in the operands' own dtype: eight_bits.centred on the GPU, for a backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..block_map import KEY_BLOCK, ceil_div
from ..eight_bits import GROUP, LANES, LOG2_E
from ..how import How
from . import codes as coding
from . import recording

WARPS = 4
LOWER_ROWS = 1024  # of a program


@triton.jit
def _rows_kernel(
    code_ptr, step_ptr, out_ptr,
    rows, n_blocks,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A block of queries, each with its step, or, of LANES above 0, of keys, which share one: rotated back."""
    number = tl.program_id(0).to(tl.int64)
    block, bh = number % n_blocks, number // n_blocks
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    row = block * ROWS + lane
    at = (bh * rows + row)[:, None] * HEAD_SIZE + column[None, :]
    inside = (row < rows)[:, None] & (column < HEAD_SIZE)[None, :]
    x = tl.load(code_ptr + at, mask=inside, other=0).to(tl.float32)
    if LANES > 0:
        x = x * tl.load(step_ptr + number * LANES)
    else:
        x = x * tl.load(step_ptr + bh * rows + row, mask=row < rows, other=0.0)[:, None]
    tl.store(out_ptr + at, coding._rotated(x, GROUP).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _values_kernel(
    code_ptr, scale_ptr, out_ptr,
    rows, n_blocks,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of values, which lie transposed."""
    number = tl.program_id(0).to(tl.int64)
    block, bh = number % n_blocks, number // n_blocks
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    code_ptrs = code_ptr + number * (HEAD_SIZE * ROWS) + column[:, None] * ROWS + lane[None, :]
    x = tl.load(code_ptrs, mask=(column < HEAD_SIZE)[:, None], other=0.0).to(tl.float32) * tl.load(scale_ptr + bh)
    row = block * ROWS + lane
    at = (bh * rows + row)[:, None] * HEAD_SIZE + column[None, :]
    inside = (row < rows)[:, None] & (column < HEAD_SIZE)[None, :]
    tl.store(out_ptr + at, tl.trans(x).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lower_kernel(lse_ptr, lift_ptr, out_ptr, total, scale, ROWS: tl.constexpr):
    """lse without what the constant of the keys adds to it."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + at, mask=at < total, other=0.0)
    lift = tl.load(lift_ptr + at, mask=at < total, other=0.0)
    tl.store(out_ptr + at, lse - lift * scale, mask=at < total)


def centred(query: Tensor, key: Tensor, value: Tensor, lse: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of :func:`eight_bits.centred`, contiguous, and lse without its lift."""
    if 0 in (query.numel(), key.numel(), value.numel()):
        return query, key, value, lse
    # A scale of which the step of a query is the step alone.
    codes, _ = coding.code(query, key, value, how._replace(scale=1 / LOG2_E), permuted=False)
    q, k, v = (x.new_empty(x.shape) for x in (query, key, value))
    lower = lse.new_empty(lse.shape)
    with torch.cuda.device_of(query):
        for source, step, out, lanes in ((codes.q, codes.q_scale, q, 0), (codes.k, codes.k_scale, k, LANES)):
            n_blocks = ceil_div(out.shape[2], KEY_BLOCK)
            recording.launch(
                _rows_kernel, (out.shape[0] * out.shape[1] * n_blocks,),
                code_ptr=source, step_ptr=step, out_ptr=out, rows=out.shape[2], n_blocks=n_blocks,
                HEAD_SIZE=out.shape[3], HEAD_PAD=launch.pad_head(out.shape[3]), ROWS=KEY_BLOCK, GROUP=GROUP,
                LANES=lanes, num_warps=WARPS,
            )  # fmt: skip
        n_blocks = codes.v.shape[2]
        recording.launch(
            _values_kernel, (v.shape[0] * v.shape[1] * n_blocks,),
            code_ptr=codes.v, scale_ptr=codes.v_scale, out_ptr=v, rows=v.shape[2], n_blocks=n_blocks,
            HEAD_SIZE=v.shape[3], HEAD_PAD=launch.pad_head(v.shape[3]), ROWS=KEY_BLOCK, num_warps=WARPS,
        )  # fmt: skip
        recording.launch(
            _lower_kernel, (ceil_div(lse.numel(), LOWER_ROWS),),
            lse_ptr=lse, lift_ptr=codes.lift, out_ptr=lower, total=lse.numel(), scale=how.scale, ROWS=LOWER_ROWS,
        )  # fmt: skip
    return q, k, v, lower
