"""Gradients of attention over the kept key blocks.

First delta = rowsum(dout * out) - dlse for each query row, here; then dq in :mod:`backward_query`, dk and dv in
:mod:`backward_key`. No atomics: two runs are equal bit by bit. Autograd on the reference gives the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import allocate, launch
from ..how import How
from . import recording
from .backward_key import key_gradients
from .backward_query import query_gradient
from .tiles import load_tile, matrix_arguments, tile_offsets

DELTA_ELEMENTS = 8192  # elements of out that one program multiplies


@triton.jit
def _delta_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr,
    delta_ptr,
    dout_stride_b, dout_stride_h, dout_stride_l, dout_stride_d,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    dlse_stride_b, dlse_stride_h, dlse_stride_l,
    heads, length, n_tiles,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    first_row, bh = pid % n_tiles * ROWS, pid // n_tiles
    b, h = bh // heads, bh % heads
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    row = first_row + lane
    dout_tile = dout_ptr + (b * dout_stride_b + h * dout_stride_h + first_row * dout_stride_l) * ALIGN
    dout_ptrs = dout_tile + tile_offsets(lane, column, dout_stride_l, dout_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    out_tile = out_ptr + (b * out_stride_b + h * out_stride_h + first_row * out_stride_l) * ALIGN
    out_ptrs = out_tile + tile_offsets(lane, column, out_stride_l, out_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    dout = load_tile(dout_ptrs, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    out = load_tile(out_ptrs, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_ptrs = dlse_ptr + b * dlse_stride_b + h * dlse_stride_h + row * dlse_stride_l
        delta -= tl.load(dlse_ptrs, mask=row < length, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + bh * length + row, mask=row < length, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)  # a row without keys: its dlse may be anything, even NaN
    tl.store(delta_ptr + bh * length + row, delta, mask=row < length)


def _delta(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """float32 [B, H, L]: rowsum(dout * out) - dlse, 0 in rows without keys."""
    batch, heads, length, head_size = out.shape
    delta = torch.empty_like(lse)
    head_pad = launch.pad_head(head_size)
    rows = DELTA_ELEMENTS // head_pad
    n_tiles = triton.cdiv(length, rows)
    strides = (0, 0, 0) if dlse is None else dlse.stride()
    recording.launch(
        _delta_kernel, (n_tiles * batch * heads,),
        dout_ptr=dout, out_ptr=out, lse_ptr=lse, dlse_ptr=dlse,
        delta_ptr=delta,
        dlse_stride_b=strides[0], dlse_stride_h=strides[1], dlse_stride_l=strides[2],
        heads=heads, length=length, n_tiles=n_tiles,
        HEAD_SIZE=head_size, HEAD_PAD=head_pad, ROWS=rows, HAS_DLSE=dlse is not None,
        **matrix_arguments(rows, dout=dout, out=out),
    )  # fmt: skip
    return delta


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    bits: Tensor,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in its tensor's dtype and order of dimensions.

    ``grad_out`` [B, H, L, Dv] may have any strides; ``out`` and ``lse`` come from the forward, ``grad_lse`` [B, H, L]
    is the gradient of lse or None; ``bits`` is the packed map, of which B and H may be 1. ``how`` are the fields of a
    :class:`How`.
    """
    if query.numel() == 0 or key.numel() == 0:
        return allocate.dense_like(query).zero_(), allocate.dense_like(key).zero_(), allocate.dense_like(value).zero_()
    lse = lse.contiguous()
    with torch.cuda.device_of(query):
        delta = _delta(grad_out, out, lse, grad_lse)
        dq = query_gradient(grad_out, query, key, value, lse, delta, bits, How(*how))
        dk, dv = key_gradients(grad_out, query, key, value, lse, delta, bits, How(*how))
    return dq, dk, dv
