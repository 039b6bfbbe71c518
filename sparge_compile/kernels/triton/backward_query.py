"""The gradient of the queries: each query block walks its list of key blocks, as in the forward.

P is recomputed from lse: dS = P * (dout v^T - delta), dq = scale * dS k. delta = rowsum(dout * out) - dlse of each row
is made on the way, for :mod:`backward_key`. On Hopper most calls go to :mod:`backward_query_hopper`. Calls come from
:mod:`backward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import allocate, launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div
from ..how import How
from . import recording
from .tiles import (
    LOG2_E,
    dense_prefix,
    diagonal_of,
    head_arguments,
    how_arguments,
    load_block,
    load_lse,
    load_tile,
    mask_arguments,
    mask_scores,
    matrix_arguments,
    sequence,
    store_tile,
    tile_offsets,
    tile_sources,
)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, k_head, v_head, k_offsets, v_offsets, k_step, v_step, b, key_head, block,
    row, key_lane, column, v_column, mask_ptr, mask_stride_l, mask_stride_s, length, k_start, keys, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = block * KEYS + key_lane
    k = load_block(
        k_head, k_offsets, k_step, b, key_head, block, key_lane, column, k_start, keys,
        HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, ROWS=KEYS, DESCRIPTORS=DESCRIPTORS, CHECK_ROWS=MASKED, PACKED=PACKED,
    )  # fmt: skip
    v = load_block(
        v_head, v_offsets, v_step, b, key_head, block, key_lane, v_column, k_start, keys,
        HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD, ROWS=KEYS, DESCRIPTORS=DESCRIPTORS, CHECK_ROWS=MASKED, PACKED=PACKED,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [R, KEYS]
    if MASKED:
        scores = mask_scores(
            scores, row[:, None], key[None, :], mask_ptr, mask_stride_l, mask_stride_s, length, keys,
            CAUSAL=CAUSAL, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
        )  # fmt: skip
    p = tl.exp2(scores - lse[:, None])
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["heads", "group", "length", "keys", "n_tiles", "map_stride_b", "map_stride_h"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, out_ptr, lse_ptr, dlse_ptr, counts_ptr, indices_ptr, mask_ptr, q_starts_ptr,
    k_starts_ptr,
    dq_ptr, delta_ptr,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    dout_stride_b, dout_stride_h, dout_stride_l, dout_stride_d,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    dlse_stride_b, dlse_stride_h, dlse_stride_l,
    dq_stride_b, dq_stride_h, dq_stride_l, dq_stride_d,
    map_stride_b, map_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    heads, group, length, keys, n_tiles, n_key, scale, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    DESCRIPTORS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)  # the order of programs is the forward's
    tile = pid % n_tiles
    if CAUSAL:
        tile = n_tiles - 1 - tile
    n = (pid // n_tiles // heads).to(tl.int64)  # of the batch, or of packed sequences
    h = (pid // n_tiles % heads).to(tl.int64)
    b = n if not PACKED else n * 0
    lse_ptr += (b * heads + h) * length
    delta_ptr += (b * heads + h) * length
    dlse_head = b * dlse_stride_b + h * dlse_stride_h
    q_start, length = sequence(q_starts_ptr, n, length, PACKED=PACKED)
    k_start, keys = sequence(k_starts_ptr, n, keys, PACKED=PACKED)

    first_row = tile.to(tl.int64) * ROWS + q_start
    row_lane, column, key_lane = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD), tl.arange(0, KEYS)
    v_column = tl.arange(0, VALUE_PAD)
    row = tile * ROWS + row_lane
    q_tile = q_ptr + (b * q_stride_b + h * q_stride_h + first_row * q_stride_l) * ALIGN
    q_ptrs = q_tile + tile_offsets(row_lane, column, q_stride_l, q_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    q = load_tile(q_ptrs, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    dout_tile = dout_ptr + (b * dout_stride_b + h * dout_stride_h + first_row * dout_stride_l) * ALIGN
    dout_ptrs = dout_tile + tile_offsets(row_lane, v_column, dout_stride_l, dout_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    dout = load_tile(dout_ptrs, row, v_column, length, HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD, CHECK_ROWS=True)
    lse = load_lse(lse_ptr + q_start, row, length)
    out_tile = out_ptr + (b * out_stride_b + h * out_stride_h + first_row * out_stride_l) * ALIGN
    out_ptrs = out_tile + tile_offsets(row_lane, v_column, out_stride_l, out_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    out = load_tile(out_ptrs, row, v_column, length, HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD, CHECK_ROWS=True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_ptrs = dlse_ptr + dlse_head + (first_row + row_lane) * dlse_stride_l
        delta -= tl.load(dlse_ptrs, mask=row < length, other=0.0).to(tl.float32)
    delta = tl.where(lse == float("inf"), 0.0, delta)  # a row without keys: its dlse may be anything, even NaN
    tl.store(delta_ptr + q_start + row, delta, mask=row < length)

    small_b, key_head = b.to(tl.int32), (h // group).to(tl.int32)
    k_head, v_head = k_ptr, v_ptr  # descriptors, if they are any
    if not DESCRIPTORS:
        first_key = tl.cast(k_start, tl.int64)
        k_head = k_ptr + (b * k_stride_b + h // group * k_stride_h + first_key * k_stride_l) * ALIGN
        v_head = v_ptr + (b * v_stride_b + h // group * v_stride_h + first_key * v_stride_l) * ALIGN
    k_offsets = tile_offsets(key_lane, column, k_stride_l, k_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    v_offsets = tile_offsets(key_lane, v_column, v_stride_l, v_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    k_step, v_step = tl.cast(k_stride_l, tl.int64) * (ALIGN * KEYS), tl.cast(v_stride_l, tl.int64) * (ALIGN * KEYS)
    if MASK_KIND != 0:
        mask_ptr += b * mask_stride_b + h * mask_stride_h

    map_row = n * map_stride_b + h * map_stride_h + tile // TILES
    count = tl.load(counts_ptr + map_row)
    list_ptr = indices_ptr + map_row * n_key

    dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    n_dense = 0
    if MASK_KIND == 0:
        dense_blocks = keys // KEYS
        if CAUSAL:
            first_sees = tl.maximum(tile * ROWS + 1 + diagonal_of(length, keys, CAUSAL), 0)
            dense_blocks = tl.minimum(dense_blocks, first_sees // KEYS)
        n_dense = dense_prefix(list_ptr, count, dense_blocks)
        for entry in tl.range(0, n_dense, num_stages=STAGES):
            block = tl.load(list_ptr + entry)
            dq = _dq_step(
                dq, q, dout, lse, delta, k_head, v_head, k_offsets, v_offsets, k_step, v_step, small_b, key_head, block,
                row, key_lane, column, v_column, mask_ptr, mask_stride_l, mask_stride_s, length, k_start, keys,
                scale_log2,
                HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, VALUE_SIZE=VALUE_SIZE, VALUE_PAD=VALUE_PAD, KEYS=KEYS,
                DESCRIPTORS=DESCRIPTORS, CAUSAL=CAUSAL, PACKED=PACKED, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
                MASKED=False,
            )  # fmt: skip
    # The tail of the keys needs its mask even though k is 0 there: P = exp2(0 - lse) may be infinite.
    for entry in tl.range(n_dense, count, num_stages=1 if MASK_KIND == 0 else STAGES):
        block = tl.load(list_ptr + entry)
        dq = _dq_step(
            dq, q, dout, lse, delta, k_head, v_head, k_offsets, v_offsets, k_step, v_step, small_b, key_head, block,
            row, key_lane, column, v_column, mask_ptr, mask_stride_l, mask_stride_s, length, k_start, keys, scale_log2,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, VALUE_SIZE=VALUE_SIZE, VALUE_PAD=VALUE_PAD, KEYS=KEYS,
            DESCRIPTORS=DESCRIPTORS, CAUSAL=CAUSAL, PACKED=PACKED, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
            MASKED=True,
        )  # fmt: skip
    dq_tile = dq_ptr + (b * dq_stride_b + h * dq_stride_h + first_row * dq_stride_l) * ALIGN
    dq_ptrs = dq_tile + tile_offsets(row_lane, column, dq_stride_l, dq_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    store_tile(dq_ptrs, dq * scale, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD)


def query_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    kept: BlockMap,
    how: How,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dq [B, H, L, D] in q's dtype and order of dimensions, and delta, float32 [B, H, L].

    Hopper's kernel takes what it can where there is a ``counter``, one that holds 0.
    """
    heads, length = q.shape[1:3]
    batch, n_key, scale = how.sequences(q), ceil_div(how.keys(k), KEY_BLOCK), how.scale
    dq, delta = allocate.dense_like(q), torch.empty_like(lse)
    if how.packed:
        dq.zero_()  # there may be rows of no sequence
    if counter is not None:
        from . import backward_query_hopper as hopper

        if hopper.takes(q, k, v, dout, out, how):
            hopper.query_gradient(dout, q, k, v, out, lse, dlse, kept, how, counter, dq, delta)
            return dq, delta
    tile = launch.attention_launch("dq", max(q.shape[3], v.shape[3]), q.dtype, q.device)
    n_tiles = triton.cdiv(how.length(q), tile.rows)
    counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in kept)
    dlse_strides = (0, 0, 0) if dlse is None else dlse.stride()
    described, k_source, v_source = tile_sources(k, v, KEY_BLOCK, how.packed)
    recording.launch(
        _dq_kernel, (n_tiles * batch * heads,),
        q_ptr=q, k_ptr=k_source, v_ptr=v_source, dout_ptr=dout, out_ptr=out, lse_ptr=lse, dlse_ptr=dlse,
        counts_ptr=counts, indices_ptr=indices,
        dq_ptr=dq, delta_ptr=delta,
        dlse_stride_b=dlse_strides[0], dlse_stride_h=dlse_strides[1], dlse_stride_l=dlse_strides[2],
        map_stride_b=counts.stride(0), map_stride_h=counts.stride(1),
        heads=heads, group=heads // k.shape[1], length=length, keys=k.shape[2], n_tiles=n_tiles, n_key=n_key,
        scale=scale, scale_log2=scale * LOG2_E,
        **head_arguments(q, v), ROWS=tile.rows, TILES=QUERY_BLOCK // tile.rows, KEYS=KEY_BLOCK,
        DESCRIPTORS=described, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
        **matrix_arguments(QUERY_BLOCK, q=q, k=k, v=v, dout=dout, out=out, dq=dq),
        **mask_arguments(how.attn_mask, batch, heads),
        **how_arguments(how),
    )  # fmt: skip
    return dq, delta
