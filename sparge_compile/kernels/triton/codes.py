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

WARPS, VALUE_WARPS = 4, 4  # for 128 columns
ROWS = 32  # queries at a time
REGISTERS = 128  # of a thread: more would leave half of the warps


@triton.jit
def _columns(HEAD_PAD: tl.constexpr, GROUP: tl.constexpr):
    """The first half of each group of columns. A thread reads both halves, so it has a group whole."""
    column = tl.arange(0, HEAD_PAD // 2)
    return column // (GROUP // 2) * GROUP + column % (GROUP // 2)


@triton.jit
def _rotated_half(x, HALF: tl.constexpr):
    """Sums and differences of neighbours, so often that each has met every other, and is where it was."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    x = x.to(tl.float32) * 0.25
    for _ in tl.static_range(3):
        x = tl.reshape(x, [ROWS, COLUMNS // HALF, HALF // 2, 2])
        even, odd = tl.split(x)
        x = tl.permute(tl.join(even + odd, even - odd), [0, 1, 3, 2])
    return tl.reshape(x, [ROWS, COLUMNS])


@triton.jit
def _rotated(low, high, GROUP: tl.constexpr):
    """Rows of float32, rotated: eight_bits.rotate. Given and returned are both halves of each 16 entries."""
    low, high = _rotated_half(low, GROUP // 2), _rotated_half(high, GROUP // 2)
    return low + high, low - high


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _step(low, high, INT8: tl.constexpr, LEAST: tl.constexpr):
    """The step between codes of each row; NaN where an entry is no finite number."""
    top = tl.reduce(_larger(tl.abs(low), tl.abs(high)), 1, _larger)
    return tl.maximum(top / INT8, LEAST, propagate_nan=tl.PropagateNan.ALL) + top * 0.0


@triton.jit
def _joined(low, high, HALF: tl.constexpr):
    """Both halves of groups, [rows, columns]."""
    ROWS: tl.constexpr = low.shape[0]
    GROUPS: tl.constexpr = low.shape[1] // HALF
    x = tl.permute(tl.reshape(tl.join(low, high), [ROWS, GROUPS, HALF, 2]), [0, 1, 3, 2])
    return tl.reshape(x, [ROWS, GROUPS * 2 * HALF])


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
    low, v_column = _columns(HEAD_PAD, GROUP), tl.arange(0, VALUE_PAD)
    high = low + GROUP // 2
    k_head = k_ptr + (bh // heads * k_stride_b + bh % heads * k_stride_h) * ALIGN
    low_some = _samples(
        k_head, seen, low, k_stride_l, k_stride_d, HEAD_SIZE=HEAD_SIZE, SAMPLES=SAMPLES, ALIGN=ALIGN, OFFSET=OFFSET
    )
    high_some = _samples(
        k_head, seen, high, k_stride_l, k_stride_d, HEAD_SIZE=HEAD_SIZE, SAMPLES=SAMPLES, ALIGN=ALIGN, OFFSET=OFFSET
    )
    low_some, high_some = _rotated(low_some, high_some, GROUP)
    tl.store(center_ptr + bh * HEAD_PAD + low, tl.sum(low_some, 0) / SAMPLES)
    tl.store(center_ptr + bh * HEAD_PAD + high, tl.sum(high_some, 0) / SAMPLES)
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
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    INT8: tl.constexpr, LEAST: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    """A block of queries, in parts: their codes, and their mean."""
    block, bh = number % n_query, number // n_query
    b, h = bh // heads, bh % heads
    lane, column, low = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD), _columns(HEAD_PAD, GROUP)
    high = low + GROUP // 2
    center_ptr += (b * (heads // group) + h // group) * HEAD_PAD
    low_center, high_center = tl.load(center_ptr + low), tl.load(center_ptr + high)
    low_offsets = tile_offsets(lane, low, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    high_offsets = tile_offsets(lane, high, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    low_total, high_total = tl.zeros([ROWS, HEAD_PAD // 2], tl.float32), tl.zeros([ROWS, HEAD_PAD // 2], tl.float32)
    for part in tl.range(PARTS, num_stages=1):
        row = (block * PARTS + part) * ROWS
        tile = q_ptr + (b * stride_b + h * stride_h + row * stride_l) * ALIGN
        row += lane
        x = load_tile(tile + low_offsets, row, low, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
        y = load_tile(tile + high_offsets, row, high, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
        seeing = (row >= first_seeing)[:, None]
        low_total += tl.where(seeing, x, 0.0)
        high_total += tl.where(seeing, y, 0.0)
        if NEGATE:
            x, y = -x, -y
        x, y = _rotated(x, y, GROUP)
        step = _step(x, y, INT8, LEAST)
        inverse = (1.0 / step)[:, None]
        x, low_codes = _whole(x * inverse)
        y, high_codes = _whole(y * inverse)
        at = bh * length + row
        inside = row < length
        tl.store(scale_ptr + at, step * scale, mask=inside)
        lift = tl.sum(x * low_center[None, :] + y * high_center[None, :], 1)
        tl.store(lift_ptr + at, lift * (step * scale), mask=inside)
        code_ptrs = code_ptr + at[:, None] * HEAD_SIZE
        codes = _joined(low_codes, high_codes, GROUP // 2)
        tl.store(code_ptrs + column[None, :], codes, mask=inside[:, None] & (column < HEAD_SIZE)[None, :])
    rows = tl.minimum((block + 1) * PARTS * ROWS, length) - tl.maximum(block * PARTS * ROWS, first_seeing)
    rows = tl.maximum(rows, 1).to(tl.float32)
    mean_ptr += number * HEAD_SIZE
    tl.store(mean_ptr + low, tl.div_rn(tl.sum(low_total, 0), rows), mask=low < HEAD_SIZE)
    tl.store(mean_ptr + high, tl.div_rn(tl.sum(high_total, 0), rows), mask=high < HEAD_SIZE)


@triton.jit
def _code_keys(
    k_ptr, center_ptr, mean_ptr, code_ptr, scale_ptr,
    number, stride_b, stride_h, stride_l, stride_d, heads, keys, seen, n_key,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr,
    LEAST: tl.constexpr, LANES: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A block of keys: its codes, and its mean."""
    block, bh = number % n_key, number // n_key
    lane, column, low = tl.arange(0, KEYS), tl.arange(0, HEAD_PAD), _columns(HEAD_PAD, GROUP)
    high = low + GROUP // 2
    tile = k_ptr + (bh // heads * stride_b + bh % heads * stride_h + block * KEYS * stride_l) * ALIGN
    center_ptr += bh * HEAD_PAD
    row = block * KEYS + lane
    low_offsets = tile_offsets(lane, low, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    high_offsets = tile_offsets(lane, high, stride_l, stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    x = load_tile(tile + low_offsets, row, low, seen, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    y = load_tile(tile + high_offsets, row, high, seen, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    rows = tl.maximum(tl.minimum(KEYS, seen - block * KEYS), 1).to(tl.float32)
    mean_ptr += number * HEAD_SIZE
    tl.store(mean_ptr + low, tl.div_rn(tl.sum(x.to(tl.float32), 0), rows), mask=low < HEAD_SIZE)
    tl.store(mean_ptr + high, tl.div_rn(tl.sum(y.to(tl.float32), 0), rows), mask=high < HEAD_SIZE)
    x, y = _rotated(x, y, GROUP)
    exists = (row < seen)[:, None]
    x = tl.where(exists, x - tl.load(center_ptr + low)[None, :], 0.0)
    y = tl.where(exists, y - tl.load(center_ptr + high)[None, :], 0.0)
    step = tl.reduce(_step(x, y, INT8, LEAST), 0, _larger)
    copies = tl.arange(0, LANES)
    tl.store(scale_ptr + number * LANES + copies, step + tl.zeros([LANES], tl.float32))
    inverse = 1.0 / step
    _, low_codes = _whole(x * inverse)
    _, high_codes = _whole(y * inverse)
    code_ptrs = code_ptr + (bh * keys + row)[:, None] * HEAD_SIZE
    inside = (row < keys)[:, None]
    codes = _joined(low_codes, high_codes, GROUP // 2)
    tl.store(code_ptrs + column[None, :], codes, mask=inside & (column < HEAD_SIZE)[None, :])


@triton.jit
def _code_kernel(
    q_ptr, k_ptr, center_ptr,
    q_mean_ptr, k_mean_ptr, q_code_ptr, q_scale_ptr, lift_ptr, k_code_ptr, k_scale_ptr,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d, k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    heads, key_heads, group, length, keys, first_seeing, seen, n_query, n_key, all_query, scale,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, INT8: tl.constexpr, LEAST: tl.constexpr,
    LANES: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    if pid < all_query:
        _code_queries(
            q_ptr, center_ptr, q_mean_ptr, q_code_ptr, q_scale_ptr, lift_ptr,
            pid, q_stride_b, q_stride_h, q_stride_l, q_stride_d, heads, group, length, first_seeing, n_query, scale,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, ROWS=ROWS, PARTS=PARTS, GROUP=GROUP, INT8=INT8, LEAST=LEAST,
            ALIGN=ALIGN, OFFSET=OFFSET, NEGATE=NEGATE,
        )  # fmt: skip
    else:
        _code_keys(
            k_ptr, center_ptr, k_mean_ptr, k_code_ptr, k_scale_ptr,
            pid - all_query, k_stride_b, k_stride_h, k_stride_l, k_stride_d, key_heads, keys, seen, n_key,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, KEYS=KEYS, GROUP=GROUP, INT8=INT8, LEAST=LEAST, LANES=LANES,
            ALIGN=ALIGN, OFFSET=OFFSET,
        )  # fmt: skip


@triton.jit
def _code_values_kernel(
    v_ptr, scale_ptr, code_ptr,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d, heads, keys, n_key,
    VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr, KEYS: tl.constexpr, E4M3: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """A block of values, transposed."""
    number = tl.program_id(0).to(tl.int64)
    block, bh = number % n_key, number // n_key
    lane, column = tl.arange(0, KEYS), tl.arange(0, VALUE_PAD)
    tile = v_ptr + (bh // heads * v_stride_b + bh % heads * v_stride_h + block * KEYS * v_stride_l) * ALIGN
    slot = lane
    if PERMUTED:  # slot 16a + 4t + 2b + c has key 16a + 8b + 2t + c: see forward_hopper_8.py
        slot = (lane & ~14) | ((lane & 2) << 2) | ((lane & 12) >> 1)
    row = block * KEYS + slot
    offsets = tile_offsets(slot, column, v_stride_l, v_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    x = load_tile(
        tile + offsets, row, column, keys, HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD, CHECK_ROWS=True
    ).to(tl.float32)  # fmt: skip
    x = x * (1.0 / tl.load(scale_ptr + bh))  # of a power of two
    x = tl.where(tl.abs(x) < float("inf"), tl.minimum(tl.maximum(x, -E4M3), E4M3), float("nan"))
    codes = tl.trans(x.to(tl.float8e4nv))
    code_ptrs = code_ptr + number * (VALUE_SIZE * KEYS) + column[:, None] * KEYS + lane[None, :]
    tl.store(code_ptrs, codes, mask=(column < VALUE_SIZE)[:, None])


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
    sizes = {"HEAD_SIZE": q.shape[3], "HEAD_PAD": head_pad}
    value_sizes = {"VALUE_SIZE": v.shape[3], "VALUE_PAD": value_pad}
    with torch.cuda.device_of(q):
        recording.launch(
            _sample_kernel, (batch * key_heads,),
            k_ptr=k, v_ptr=v, center_ptr=center, scale_ptr=codes.v_scale, heads=key_heads, seen=seen,
            **sizes, **value_sizes, SAMPLES=SAMPLES, GROUP=GROUP, LEAST=LEAST,
            **matrix_arguments(SAMPLES, k=k, v=v), num_warps=WARPS,
        )  # fmt: skip
        recording.launch(
            _code_kernel, (all_query + all_key,),
            q_ptr=q, k_ptr=k, center_ptr=center,
            q_mean_ptr=q_mean, k_mean_ptr=k_mean, q_code_ptr=codes.q, q_scale_ptr=codes.q_scale, lift_ptr=codes.lift,
            k_code_ptr=codes.k, k_scale_ptr=codes.k_scale,
            heads=heads, key_heads=key_heads, group=heads // key_heads, length=length, keys=keys,
            first_seeing=max(0, -how.diagonal(length, keys)), seen=seen,
            n_query=n_query, n_key=n_key, all_query=all_query, scale=abs(how.scale) * LOG2_E,
            **sizes, ROWS=ROWS, PARTS=QUERY_BLOCK // ROWS, KEYS=KEY_BLOCK, GROUP=GROUP, INT8=INT8, LEAST=LEAST,
            LANES=LANES, NEGATE=how.scale < 0, **matrix_arguments(QUERY_BLOCK, q=q, k=k),
            num_warps=WARPS * ceil_div(head_pad, 128), maxnreg=REGISTERS,
        )  # fmt: skip
        recording.launch(
            _code_values_kernel, (all_key,),
            v_ptr=v, scale_ptr=codes.v_scale, code_ptr=codes.v, heads=key_heads, keys=keys, n_key=n_key,
            **value_sizes, KEYS=KEY_BLOCK, E4M3=E4M3, PERMUTED=permuted, **matrix_arguments(KEY_BLOCK, v=v),
            num_warps=VALUE_WARPS,
        )  # fmt: skip
    return codes, (q_mean, k_mean)
