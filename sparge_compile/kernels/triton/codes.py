"""Operands in eight bits on the GPU, in the pass that pools them: the codes of eight_bits.py, and block means.

Each operand is read once. A program takes a block of 128 queries, of 64 keys, or of 64 values, beside 32 rows of keys
or values that tell the constant or the scale, which stay in L2. Values are written transposed, block by block: a
product of eight bits wants the keys of both operands in adjacent memory. In each block keys are in the order in which
the kernel for Hopper has its weights in registers, if it is to run (``PERMUTED``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import allocate, launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from ..eight_bits import E4M3, GROUP, INT8, LANES, LEAST, LOG2_E, SAMPLES, Codes, seen_keys
from ..how import How
from . import recording
from .tiles import load_tile, matrix_arguments, tile_offsets

WARPS = 2  # for 128 columns; of 1, 2, 4 and 8 the quickest or near it on an H200


@triton.jit
def _rotated(x, GROUP: tl.constexpr):
    """float32 rows of x, each 16 entries rotated: eight_bits.rotate. Four times each sum and difference of neighbours,
    put so that the next neighbours are others; then all are where they were."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    x = x.to(tl.float32) * 0.25
    for _ in tl.static_range(4):
        x = tl.reshape(x, [ROWS, COLUMNS // GROUP, GROUP // 2, 2])
        even, odd = tl.split(x)
        x = tl.permute(tl.join(even + odd, even - odd), [0, 1, 3, 2])
    return tl.reshape(x, [ROWS, COLUMNS])


@triton.jit
def _samples(
    head_ptr, seen, column, stride_l, stride_d,
    HEAD_SIZE: tl.constexpr, SAMPLES: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """eight_bits.samples."""
    row = (tl.arange(0, SAMPLES).to(tl.int64) * seen // SAMPLES)[:, None]
    inside = (row < seen) & (column < HEAD_SIZE)[None, :]
    x = tl.load(head_ptr + row * stride_l * ALIGN + column.to(OFFSET)[None, :] * stride_d, mask=inside, other=0.0)
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _sample_kernel(
    k_ptr, v_ptr,
    center_ptr, scale_ptr,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d, v_stride_b, v_stride_h, v_stride_l, v_stride_d, heads, seen,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    SAMPLES: tl.constexpr, GROUP: tl.constexpr, LEAST: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """What some rows of a head tell: the constant of its keys, rotated, and the scale of its values."""
    bh = tl.program_id(0).to(tl.int64)
    column, v_column = tl.arange(0, HEAD_PAD), tl.arange(0, VALUE_PAD)
    k_head = k_ptr + (bh // heads * k_stride_b + bh % heads * k_stride_h) * ALIGN
    some = _samples(
        k_head, seen, column, k_stride_l, k_stride_d, HEAD_SIZE=HEAD_SIZE, SAMPLES=SAMPLES, ALIGN=ALIGN, OFFSET=OFFSET
    )
    tl.store(center_ptr + bh * HEAD_PAD + column, tl.sum(_rotated(some, GROUP), 0) / SAMPLES)
    v_head = v_ptr + (bh // heads * v_stride_b + bh % heads * v_stride_h) * ALIGN
    some = _samples(
        v_head, seen, v_column, v_stride_l, v_stride_d, HEAD_SIZE=VALUE_SIZE, SAMPLES=SAMPLES, ALIGN=ALIGN,
        OFFSET=OFFSET,
    )  # fmt: skip
    top = tl.max(tl.max(tl.abs(some), 1), 0)
    half = ((top.to(tl.int32, bitcast=True) >> 23) - 1) << 23  # of the largest power of two that is not above
    tl.store(scale_ptr + bh, tl.where(top < LEAST, 1.0, half.to(tl.float32, bitcast=True)))


@triton.jit
def _whole(x):
    """The nearest whole numbers, ties to even, of numbers below 2^7: as floats, and as int8."""
    x += 12582912.0  # 1.5 * 2^23, behind whose lowest bit no other is left
    return x - 12582912.0, x.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _code_queries(
    q_ptr, center_ptr, mean_ptr, code_ptr, scale_ptr, lift_ptr,
    number, stride_b, stride_h, stride_l, stride_d, heads, group, length, first_seeing, n_query, scale,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr,
    LEAST: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    """Two halves of a block of queries: their codes, and their mean."""
    block, bh = number % n_query, number // n_query
    b, h = bh // heads, bh % heads
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    center = tl.load(center_ptr + (b * (heads // group) + h // group) * HEAD_PAD + column)
    offsets = tile_offsets(lane, column, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    total = tl.zeros([HEAD_PAD], tl.float32)
    for half in tl.range(2, num_stages=1):
        row = block * 2 * ROWS + half * ROWS
        tile = q_ptr + (b * stride_b + h * stride_h + row * stride_l) * ALIGN
        row += lane
        x = load_tile(tile + offsets, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
        total += tl.sum(tl.where((row >= first_seeing)[:, None], x, 0.0).to(tl.float32), 0)
        if NEGATE:
            x = -x
        x = _rotated(x, GROUP)
        step = tl.maximum(tl.max(tl.abs(x), 1) / INT8, LEAST) + tl.sum(x * 0.0, 1)  # a maximum hides NaN
        x, codes = _whole(x * (1.0 / step)[:, None])
        at = bh * length + row
        inside = row < length
        tl.store(scale_ptr + at, step * scale, mask=inside)
        tl.store(lift_ptr + at, tl.sum(x * center[None, :], 1) * (step * scale), mask=inside)
        code_ptrs = code_ptr + at[:, None] * HEAD_SIZE + column[None, :]
        tl.store(code_ptrs, codes, mask=inside[:, None] & (column < HEAD_SIZE)[None, :])
    rows = tl.minimum(block * 2 * ROWS + 2 * ROWS, length) - tl.maximum(block * 2 * ROWS, first_seeing)
    mean = tl.div_rn(total, tl.maximum(rows, 1).to(tl.float32))
    tl.store(mean_ptr + number * HEAD_SIZE + column, mean, mask=column < HEAD_SIZE)


@triton.jit
def _code_keys(
    k_ptr, center_ptr, mean_ptr, code_ptr, scale_ptr,
    number, stride_b, stride_h, stride_l, stride_d, heads, keys, seen, n_key,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr,
    LEAST: tl.constexpr, LANES: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A block of keys: its codes, and its mean."""
    block, bh = number % n_key, number // n_key
    lane, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    head = k_ptr + (bh // heads * stride_b + bh % heads * stride_h) * ALIGN
    center = tl.load(center_ptr + bh * HEAD_PAD + column)
    row = block * ROWS + lane
    offsets = tile_offsets(lane, column, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    x = load_tile(
        head + block * ROWS * stride_l * ALIGN + offsets, row, column, seen,
        HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True,
    )  # fmt: skip
    rows = tl.maximum(tl.minimum(ROWS, seen - block * ROWS), 1)
    mean = tl.div_rn(tl.sum(x.to(tl.float32), 0), rows.to(tl.float32))
    tl.store(mean_ptr + number * HEAD_SIZE + column, mean, mask=column < HEAD_SIZE)
    x = _rotated(x, GROUP)
    x = tl.where((row < seen)[:, None], x - center[None, :], 0.0)
    step = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / INT8, LEAST) + tl.sum(tl.sum(x * 0.0, 1), 0)
    copies = tl.arange(0, LANES)
    tl.store(scale_ptr + number * LANES + copies, step + tl.zeros([LANES], tl.float32))
    _, codes = _whole(x * (1.0 / step))
    code_ptrs = code_ptr + (bh * keys + row)[:, None] * HEAD_SIZE + column[None, :]
    tl.store(code_ptrs, codes, mask=(row < keys)[:, None] & (column < HEAD_SIZE)[None, :])


@triton.jit
def _code_values(
    v_ptr, scale_ptr, code_ptr,
    number, stride_b, stride_h, stride_l, stride_d, heads, keys, n_key,
    VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr, E4M3: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """A block of values, transposed."""
    block, bh = number % n_key, number // n_key
    lane, column = tl.arange(0, ROWS), tl.arange(0, VALUE_PAD)
    head = v_ptr + (bh // heads * stride_b + bh % heads * stride_h) * ALIGN
    slot = lane
    if PERMUTED:  # slot 16a + 4t + 2b + c has key 16a + 8b + 2t + c: see forward_hopper_8.py
        slot = (lane & ~14) | ((lane & 2) << 2) | ((lane & 12) >> 1)
    row = block * ROWS + slot
    offsets = tile_offsets(slot, column, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    x = load_tile(
        head + block * ROWS * stride_l * ALIGN + offsets, row, column, keys,
        HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD, CHECK_ROWS=True,
    ).to(tl.float32)  # fmt: skip
    x = x * (1.0 / tl.load(scale_ptr + bh))  # of a power of two
    x = tl.where(tl.abs(x) < float("inf"), tl.minimum(tl.maximum(x, -E4M3), E4M3), float("nan"))
    codes = tl.trans(x.to(tl.float8e4nv))
    code_ptrs = code_ptr + number * (VALUE_SIZE * ROWS) + column[:, None] * ROWS + lane[None, :]
    tl.store(code_ptrs, codes, mask=(column < VALUE_SIZE)[:, None])


@triton.jit
def _code_kernel(
    q_ptr, k_ptr, v_ptr, center_ptr, v_scale_ptr,
    q_mean_ptr, k_mean_ptr, q_code_ptr, q_scale_ptr, lift_ptr, k_code_ptr, k_scale_ptr, v_code_ptr,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    heads, key_heads, group, length, keys, first_seeing, seen, n_query, n_key, all_query, all_key, scale,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr, E4M3: tl.constexpr, LEAST: tl.constexpr,
    LANES: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, NEGATE: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    if pid < all_query:
        _code_queries(
            q_ptr, center_ptr, q_mean_ptr, q_code_ptr, q_scale_ptr, lift_ptr,
            pid, q_stride_b, q_stride_h, q_stride_l, q_stride_d, heads, group, length, first_seeing, n_query, scale,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, ROWS=ROWS, GROUP=GROUP, INT8=INT8, LEAST=LEAST,
            ALIGN=ALIGN, OFFSET=OFFSET, NEGATE=NEGATE,
        )  # fmt: skip
    elif pid < all_query + all_key:
        _code_keys(
            k_ptr, center_ptr, k_mean_ptr, k_code_ptr, k_scale_ptr,
            pid - all_query, k_stride_b, k_stride_h, k_stride_l, k_stride_d, key_heads, keys, seen, n_key,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, ROWS=ROWS, GROUP=GROUP, INT8=INT8, LEAST=LEAST, LANES=LANES,
            ALIGN=ALIGN, OFFSET=OFFSET,
        )  # fmt: skip
    else:
        _code_values(
            v_ptr, v_scale_ptr, v_code_ptr,
            pid - all_query - all_key, v_stride_b, v_stride_h, v_stride_l, v_stride_d, key_heads, keys, n_key,
            VALUE_SIZE=VALUE_SIZE, VALUE_PAD=VALUE_PAD, ROWS=ROWS, E4M3=E4M3,
            ALIGN=ALIGN, OFFSET=OFFSET, PERMUTED=PERMUTED,
        )  # fmt: skip


def new_codes(q: Tensor, k: Tensor, v: Tensor, n_key: int) -> Codes:
    """Memory for the codes of q [B, H, L, D], k [B, Hk, S, D] and v [B, Hk, S, Dv]."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty(shape, dtype=dtype)

    return Codes(
        new(*q.shape, dtype=torch.int8), new(*q.shape[:3]), new(*q.shape[:3]),
        new(*k.shape, dtype=torch.int8), new(*k.shape[:2], n_key, LANES),
        new(*v.shape[:2], n_key, v.shape[3], KEY_BLOCK, dtype=torch.float8_e4m3fn), new(*v.shape[:2]),
    )  # fmt: skip


def code(q: Tensor, k: Tensor, v: Tensor, how: How, permuted: bool) -> tuple[Codes, tuple[Tensor, Tensor]]:
    """The codes of q, k and v, values [B, Hk, Nk, Dv, 64], and the means of pool.pool; one element each at least.

    ``permuted`` says whether the kernel for Hopper reads them.
    """
    batch, heads, n_query, n_key = allocate.map_shape(q, k, how)
    key_heads, length, keys = k.shape[1], q.shape[2], k.shape[2]
    codes = new_codes(q, k, v, n_key)
    q_mean = q.new_empty((batch, heads, n_query, q.shape[3]), dtype=torch.float32)
    k_mean = q.new_empty((batch, key_heads, n_key, q.shape[3]), dtype=torch.float32)
    all_query, all_key = batch * heads * n_query, batch * key_heads * n_key
    seen, head_pad, value_pad = seen_keys(how, length, keys), launch.pad_head(q.shape[3]), launch.pad_head(v.shape[3])
    center = q.new_empty((batch * key_heads, head_pad), dtype=torch.float32)
    sizes = {"HEAD_SIZE": q.shape[3], "HEAD_PAD": head_pad, "VALUE_SIZE": v.shape[3], "VALUE_PAD": value_pad}
    warps = WARPS * ceil_div(max(head_pad, value_pad), 128)  # wider rows would spill
    with torch.cuda.device_of(q):
        recording.launch(
            _sample_kernel, (batch * key_heads,),
            k_ptr=k, v_ptr=v, center_ptr=center, scale_ptr=codes.v_scale, heads=key_heads, seen=seen,
            **sizes, SAMPLES=SAMPLES, GROUP=GROUP, LEAST=LEAST, **matrix_arguments(SAMPLES, k=k, v=v), num_warps=warps,
        )  # fmt: skip
        recording.launch(
            _code_kernel, (all_query + 2 * all_key,),
            q_ptr=q, k_ptr=k, v_ptr=v, center_ptr=center, v_scale_ptr=codes.v_scale,
            q_mean_ptr=q_mean, k_mean_ptr=k_mean, q_code_ptr=codes.q, q_scale_ptr=codes.q_scale, lift_ptr=codes.lift,
            k_code_ptr=codes.k, k_scale_ptr=codes.k_scale, v_code_ptr=codes.v,
            heads=heads, key_heads=key_heads, group=heads // key_heads, length=length, keys=keys,
            first_seeing=max(0, -how.diagonal(length, keys)), seen=seen,
            n_query=n_query, n_key=n_key, all_query=all_query, all_key=all_key, scale=abs(how.scale) * LOG2_E,
            **sizes, ROWS=KEY_BLOCK, GROUP=GROUP, INT8=INT8, E4M3=E4M3, LEAST=LEAST, LANES=LANES,
            NEGATE=how.scale < 0, PERMUTED=permuted, num_warps=warps, **matrix_arguments(QUERY_BLOCK, q=q, k=k, v=v),
        )  # fmt: skip
    return codes, (q_mean, k_mean)
