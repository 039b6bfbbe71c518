"""Gradients of attention over the kept key blocks.

Three kernels: delta = rowsum(dout * out) - dlse; dq by each query block over its list of key blocks; dk and dv by each key
block over the list of query blocks that read it, added up over a group's query heads inside one program, so that equal
inputs give equal bits. P is recomputed from lse. The definition is autograd on :func:`reference.attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import allocate, launch, lists
from .block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from .tiles import (
    LOG2_E,
    dense_prefix,
    load_tile,
    mask_arguments,
    mask_scores,
    matrix_arguments,
    store_tile,
    tile_offsets,
)


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


@triton.jit
def _load_lse(lse_ptr, row, length):
    """lse in log2 units; +inf where a row has no keys or does not exist, so that its P is exp2(-inf) = 0."""
    lse = tl.load(lse_ptr + row, mask=row < length, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * 1.4426950408889634  # LOG2_E


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, k_ptrs, v_ptrs, block, row, key_lane, column, mask_ptr, mask_stride_l, mask_stride_s,
    length, keys, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, KEYS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    MASK_KIND: tl.constexpr, MASK_IS_BOOL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = block * KEYS + key_lane
    k = load_tile(k_ptrs, key, column, keys, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=MASKED)
    v = load_tile(v_ptrs, key, column, keys, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [R, KEYS]
    if MASKED:
        scores = mask_scores(
            scores, row[:, None], key[None, :], mask_ptr, mask_stride_l, mask_stride_s, length, keys,
            IS_CAUSAL=IS_CAUSAL, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
        )  # fmt: skip
    p = tl.exp2(scores - lse[:, None])
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["heads", "group", "length", "keys", "n_tiles", "map_stride_b", "map_stride_h"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, counts_ptr, indices_ptr, mask_ptr,
    dq_ptr,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_l, dout_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_l, dq_stride_d,
    map_stride_b, map_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    heads, group, length, keys, n_tiles, n_key, scale, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)  # the order of programs is the forward's
    tile = pid % n_tiles
    if IS_CAUSAL:
        tile = n_tiles - 1 - tile
    b = (pid // n_tiles // heads).to(tl.int64)
    h = (pid // n_tiles % heads).to(tl.int64)

    first_row = tile.to(tl.int64) * ROWS
    row_lane, column, key_lane = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD), tl.arange(0, KEYS)
    row = tile * ROWS + row_lane
    q_tile = q_ptr + (b * q_stride_b + h * q_stride_h + first_row * q_stride_l) * ALIGN
    q_ptrs = q_tile + tile_offsets(row_lane, column, q_stride_l, q_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    q = load_tile(q_ptrs, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    dout_tile = dout_ptr + (b * dout_stride_b + h * dout_stride_h + first_row * dout_stride_l) * ALIGN
    dout_ptrs = dout_tile + tile_offsets(row_lane, column, dout_stride_l, dout_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    dout = load_tile(dout_ptrs, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    lse = _load_lse(lse_ptr + (b * heads + h) * length, row, length)
    delta = tl.load(delta_ptr + (b * heads + h) * length + row, mask=row < length, other=0.0)

    k_head = k_ptr + (b * k_stride_b + h // group * k_stride_h) * ALIGN
    v_head = v_ptr + (b * v_stride_b + h // group * v_stride_h) * ALIGN
    k_offsets = tile_offsets(key_lane, column, k_stride_l, k_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    v_offsets = tile_offsets(key_lane, column, v_stride_l, v_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    k_step, v_step = tl.cast(k_stride_l, tl.int64) * (ALIGN * KEYS), tl.cast(v_stride_l, tl.int64) * (ALIGN * KEYS)
    if MASK_KIND != 0:
        mask_ptr += b * mask_stride_b + h * mask_stride_h

    map_row = b * map_stride_b + h * map_stride_h + tile // TILES
    count = tl.load(counts_ptr + map_row)
    list_ptr = indices_ptr + map_row * n_key

    dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    n_dense = 0
    if MASK_KIND == 0:
        dense_blocks = keys // KEYS
        if IS_CAUSAL:
            dense_blocks = tl.minimum(dense_blocks, (tile * ROWS + 1) // KEYS)
        n_dense = dense_prefix(list_ptr, count, dense_blocks)
        for n in tl.range(0, n_dense, num_stages=STAGES):
            block = tl.load(list_ptr + n)
            dq = _dq_step(
                dq, q, dout, lse, delta, k_head + block * k_step + k_offsets, v_head + block * v_step + v_offsets,
                block, row, key_lane, column, mask_ptr, mask_stride_l, mask_stride_s, length, keys, scale_log2,
                HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, KEYS=KEYS, IS_CAUSAL=IS_CAUSAL,
                MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL, MASKED=False,
            )  # fmt: skip
    # The tail of the keys needs its mask even though k is 0 there: P = exp2(0 - lse) may be infinite.
    for n in tl.range(n_dense, count, num_stages=STAGES if MASK_KIND != 0 else 1):
        block = tl.load(list_ptr + n)
        dq = _dq_step(
            dq, q, dout, lse, delta, k_head + block * k_step + k_offsets, v_head + block * v_step + v_offsets,
            block, row, key_lane, column, mask_ptr, mask_stride_l, mask_stride_s, length, keys, scale_log2,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, KEYS=KEYS, IS_CAUSAL=IS_CAUSAL,
            MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL, MASKED=True,
        )  # fmt: skip
    dq_tile = dq_ptr + (b * dq_stride_b + h * dq_stride_h + first_row * dq_stride_l) * ALIGN
    dq_ptrs = dq_tile + tile_offsets(row_lane, column, dq_stride_l, dq_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    store_tile(dq_ptrs, dq * scale, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_ptrs, dout_ptrs, lse_ptr, delta_ptr, row, key, column, mask_ptr, mask_stride_l, mask_stride_s,
    length, keys, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # Everything is transposed, keys by rows: P and dS are then left operands as they stand.
    q = load_tile(q_ptrs, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    dout = load_tile(dout_ptrs, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    lse = _load_lse(lse_ptr, row, length)
    delta = tl.load(delta_ptr + row, mask=row < length, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [KEYS, R]
    if MASKED:
        scores = mask_scores(
            scores, row[None, :], key[:, None], mask_ptr, mask_stride_l, mask_stride_s, length, keys,
            IS_CAUSAL=IS_CAUSAL, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
        )  # fmt: skip
    p = tl.exp2(scores - lse[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _masked_prefix(list_ptr, count, first_dense):
    """How many leading entries of an ascending list are below ``first_dense`` (they need element masks)."""
    n_masked = 0
    first = tl.load(list_ptr, mask=count > 0, other=2147483647)
    while first < first_dense:
        n_masked += 1
        first = tl.load(list_ptr + n_masked, mask=n_masked < count, other=2147483647)
    return n_masked


@triton.jit(do_not_specialize=["heads", "group", "length", "keys", "n_key", "n_query", "map_stride_b", "map_stride_h"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, counts_ptr, indices_ptr, mask_ptr,
    dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_l, dout_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_l, dk_stride_d,
    dv_stride_b, dv_stride_h, dv_stride_l, dv_stride_d,
    map_stride_b, map_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    heads, group, length, keys, n_query, n_key, scale, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % n_key  # under a causal mask the first key blocks have the longest lists, and go first
    key_heads = heads // group
    b = (pid // n_key // key_heads).to(tl.int64)
    key_head = (pid // n_key % key_heads).to(tl.int64)

    row_lane, column, key_lane = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD), tl.arange(0, KEYS)
    first_key = block.to(tl.int64) * KEYS
    key = block * KEYS + key_lane
    k_tile = k_ptr + (b * k_stride_b + key_head * k_stride_h + first_key * k_stride_l) * ALIGN
    v_tile = v_ptr + (b * v_stride_b + key_head * v_stride_h + first_key * v_stride_l) * ALIGN
    k_ptrs = k_tile + tile_offsets(key_lane, column, k_stride_l, k_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    v_ptrs = v_tile + tile_offsets(key_lane, column, v_stride_l, v_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    k = load_tile(k_ptrs, key, column, keys, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    v = load_tile(v_ptrs, key, column, keys, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)

    q_offsets = tile_offsets(row_lane, column, q_stride_l, q_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    dout_offsets = tile_offsets(row_lane, column, dout_stride_l, dout_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    q_step = tl.cast(q_stride_l, tl.int64) * (ALIGN * ROWS)
    dout_step = tl.cast(dout_stride_l, tl.int64) * (ALIGN * ROWS)

    dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
    dv = tl.zeros([KEYS, HEAD_PAD], tl.float32)
    for member in tl.range(0, group):
        h = key_head * group + member
        q_head = q_ptr + (b * q_stride_b + h * q_stride_h) * ALIGN
        dout_head = dout_ptr + (b * dout_stride_b + h * dout_stride_h) * ALIGN
        lse_head = lse_ptr + (b * heads + h) * length
        delta_head = delta_ptr + (b * heads + h) * length
        mask_head = mask_ptr
        if MASK_KIND != 0:
            mask_head = mask_ptr + b * mask_stride_b + h * mask_stride_h
        map_row = b * map_stride_b + h * map_stride_h + block
        count = tl.load(counts_ptr + map_row)
        list_ptr = indices_ptr + map_row * n_query

        # A tail of the keys needs no mask: those rows of dk and dv are not stored. A tail of the queries has P = 0.
        n_masked = count
        if MASK_KIND == 0:
            n_masked = 0
            if IS_CAUSAL:
                n_masked = _masked_prefix(list_ptr, count, (block * KEYS + KEYS - 1 + ROWS * TILES - 1) // (ROWS * TILES))
        if IS_CAUSAL or MASK_KIND != 0:
            for n in tl.range(0, n_masked * TILES, num_stages=STAGES if MASK_KIND != 0 else 1):
                tile = tl.load(list_ptr + n // TILES) * TILES + n % TILES
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_head + tile * q_step + q_offsets, dout_head + tile * dout_step + dout_offsets,
                    lse_head, delta_head, tile * ROWS + row_lane, key, column, mask_head, mask_stride_l, mask_stride_s,
                    length, keys, scale_log2,
                    HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, IS_CAUSAL=IS_CAUSAL, MASK_KIND=MASK_KIND,
                    MASK_IS_BOOL=MASK_IS_BOOL, MASKED=True,
                )  # fmt: skip
        if MASK_KIND == 0:
            for n in tl.range(n_masked * TILES, count * TILES, num_stages=STAGES):
                tile = tl.load(list_ptr + n // TILES) * TILES + n % TILES
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_head + tile * q_step + q_offsets, dout_head + tile * dout_step + dout_offsets,
                    lse_head, delta_head, tile * ROWS + row_lane, key, column, mask_head, mask_stride_l, mask_stride_s,
                    length, keys, scale_log2,
                    HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, IS_CAUSAL=IS_CAUSAL, MASK_KIND=MASK_KIND,
                    MASK_IS_BOOL=MASK_IS_BOOL, MASKED=False,
                )  # fmt: skip

    dk_tile = dk_ptr + (b * dk_stride_b + key_head * dk_stride_h + first_key * dk_stride_l) * ALIGN
    dv_tile = dv_ptr + (b * dv_stride_b + key_head * dv_stride_h + first_key * dv_stride_l) * ALIGN
    dk_ptrs = dk_tile + tile_offsets(key_lane, column, dk_stride_l, dk_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    dv_ptrs = dv_tile + tile_offsets(key_lane, column, dv_stride_l, dv_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    store_tile(dk_ptrs, dk * scale, key, column, keys, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD)
    store_tile(dv_ptrs, dv, key, column, keys, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD)


def _delta(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """float32 [B, H, L]: rowsum(dout * out) - dlse, 0 in rows without keys."""
    batch, heads, length, head_size = out.shape
    delta = torch.empty_like(lse)
    head_pad = launch.pad_head(head_size)
    rows = 8192 // head_pad
    n_tiles = triton.cdiv(length, rows)
    strides = (0, 0, 0) if dlse is None else dlse.stride()
    _delta_kernel[(n_tiles * batch * heads,)](
        dout_ptr=dout, out_ptr=out, lse_ptr=lse, dlse_ptr=dlse,
        delta_ptr=delta,
        dlse_stride_b=strides[0], dlse_stride_h=strides[1], dlse_stride_l=strides[2],
        heads=heads, length=length, n_tiles=n_tiles,
        HEAD_SIZE=head_size, HEAD_PAD=head_pad, ROWS=rows, HAS_DLSE=dlse is not None,
        **matrix_arguments(rows, dout=dout, out=out),
    )  # fmt: skip
    return delta


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    bits: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes and orders of dimensions of q, k, v.

    ``dout`` [B, H, L, D] may have any strides; ``out`` and ``lse`` (float32, contiguous) come from the forward, ``dlse`` is the
    gradient of lse or None; ``bits`` is the packed map, of which B and H may be 1.
    """
    batch, heads, length, head_size = q.shape
    keys, key_heads = k.shape[2], k.shape[1]
    dq, dk, dv = allocate.dense_like(q), allocate.dense_like(k), allocate.dense_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    n_query, n_key = ceil_div(length, QUERY_BLOCK), ceil_div(keys, KEY_BLOCK)
    lse = lse.contiguous()
    common = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, dout_ptr=dout, lse_ptr=lse,
        heads=heads, group=heads // key_heads, length=length, keys=keys, n_key=n_key,
        scale=scale, scale_log2=scale * LOG2_E,
        HEAD_SIZE=head_size, HEAD_PAD=launch.pad_head(head_size), KEYS=KEY_BLOCK, IS_CAUSAL=is_causal,
        **mask_arguments(attn_mask, batch, heads),
    )  # fmt: skip
    with torch.cuda.device_of(q):
        common["delta_ptr"] = _delta(dout, out, lse, dlse)

        counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in lists.unpack(bits, n_key))
        tile = launch.attention_launch("dq", head_size, q.dtype, q.device)
        n_tiles = triton.cdiv(length, tile.rows)
        _dq_kernel[(n_tiles * batch * heads,)](
            counts_ptr=counts, indices_ptr=indices, dq_ptr=dq,
            map_stride_b=counts.stride(0), map_stride_h=counts.stride(1), n_tiles=n_tiles,
            ROWS=tile.rows, TILES=QUERY_BLOCK // tile.rows, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
            **matrix_arguments(QUERY_BLOCK, q=q, k=k, v=v, dout=dout, dq=dq), **common,
        )  # fmt: skip

        counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in lists.invert(bits, n_query, n_key))
        tile = launch.attention_launch("dkv", head_size, q.dtype, q.device)
        _dkv_kernel[(n_key * batch * key_heads,)](
            counts_ptr=counts, indices_ptr=indices, dk_ptr=dk, dv_ptr=dv,
            map_stride_b=counts.stride(0), map_stride_h=counts.stride(1), n_query=n_query,
            ROWS=tile.rows, TILES=QUERY_BLOCK // tile.rows, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
            **matrix_arguments(QUERY_BLOCK, q=q, k=k, v=v, dout=dout, dk=dk, dv=dv), **common,
        )  # fmt: skip
    return dq, dk, dv
