"""The gradients of keys and values: each key block walks the list of query blocks that read it.

dv = P^T dout and dk = scale * dS^T q, added up over a group's query heads inside one program, so that equal inputs give
equal bits. On Hopper most calls go to :mod:`backward_key_hopper`. Calls come from :mod:`backward`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import allocate, launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap
from ..how import How
from . import recording
from .tiles import (
    LOG2_E,
    diagonal_of,
    head_arguments,
    how_arguments,
    load_block,
    load_lse,
    load_tile,
    mask_arguments,
    mask_scores,
    masked_prefix,
    matrix_arguments,
    sequence,
    store_tile,
    tile_offsets,
    tile_sources,
)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_head, dout_head, q_offsets, dout_offsets, q_step, dout_step, b, head, tile, lse_ptr, delta_ptr,
    row_lane, key, column, v_column, mask_ptr, mask_stride_l, mask_stride_s, q_start, length, keys, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # Everything is transposed, keys by rows: P and dS are then left operands as they stand.
    row = tile * ROWS + row_lane
    q = load_block(
        q_head, q_offsets, q_step, b, head, tile, row_lane, column, q_start, length,
        HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, ROWS=ROWS, DESCRIPTORS=DESCRIPTORS, CHECK_ROWS=True, PACKED=PACKED,
    )  # fmt: skip
    dout = load_block(
        dout_head, dout_offsets, dout_step, b, head, tile, row_lane, v_column, q_start, length,
        HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD, ROWS=ROWS, DESCRIPTORS=DESCRIPTORS, CHECK_ROWS=True, PACKED=PACKED,
    )  # fmt: skip
    lse = load_lse(lse_ptr, row, length)
    delta = tl.load(delta_ptr + row, mask=row < length, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [KEYS, R]
    if MASKED:
        scores = mask_scores(
            scores, row[None, :], key[:, None], mask_ptr, mask_stride_l, mask_stride_s, length, keys,
            CAUSAL=CAUSAL, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
        )  # fmt: skip
    p = tl.exp2(scores - lse[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["heads", "group", "length", "keys", "n_key", "n_query", "map_stride_b", "map_stride_h"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, counts_ptr, indices_ptr, mask_ptr, q_starts_ptr, k_starts_ptr,
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
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    DESCRIPTORS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % n_key  # under a causal mask the first key blocks have the longest lists, and go first
    key_heads = heads // group
    n = (pid // n_key // key_heads).to(tl.int64)  # of the batch, or of packed sequences
    key_head = (pid // n_key % key_heads).to(tl.int64)
    b = n if not PACKED else n * 0
    all_rows = length
    q_start, length = sequence(q_starts_ptr, n, length, PACKED=PACKED)
    k_start, keys = sequence(k_starts_ptr, n, keys, PACKED=PACKED)

    row_lane, column, key_lane = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD), tl.arange(0, KEYS)
    v_column = tl.arange(0, VALUE_PAD)
    first_key = block.to(tl.int64) * KEYS + k_start
    key = block * KEYS + key_lane
    k_tile = k_ptr + (b * k_stride_b + key_head * k_stride_h + first_key * k_stride_l) * ALIGN
    v_tile = v_ptr + (b * v_stride_b + key_head * v_stride_h + first_key * v_stride_l) * ALIGN
    k_ptrs = k_tile + tile_offsets(key_lane, column, k_stride_l, k_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    v_ptrs = v_tile + tile_offsets(key_lane, v_column, v_stride_l, v_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    k = load_tile(k_ptrs, key, column, keys, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    v = load_tile(v_ptrs, key, v_column, keys, HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD, CHECK_ROWS=True)

    q_offsets = tile_offsets(row_lane, column, q_stride_l, q_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    dout_offsets = tile_offsets(row_lane, v_column, dout_stride_l, dout_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    q_step = tl.cast(q_stride_l, tl.int64) * (ALIGN * ROWS)
    dout_step = tl.cast(dout_stride_l, tl.int64) * (ALIGN * ROWS)

    dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
    dv = tl.zeros([KEYS, VALUE_PAD], tl.float32)
    for member in tl.range(0, group):
        h = key_head * group + member
        q_head, dout_head = q_ptr, dout_ptr  # descriptors, if they are any
        if not DESCRIPTORS:
            first_row = tl.cast(q_start, tl.int64)
            q_head = q_ptr + (b * q_stride_b + h * q_stride_h + first_row * q_stride_l) * ALIGN
            dout_head = dout_ptr + (b * dout_stride_b + h * dout_stride_h + first_row * dout_stride_l) * ALIGN
        lse_head = lse_ptr + (b * heads + h) * all_rows + q_start
        delta_head = delta_ptr + (b * heads + h) * all_rows + q_start
        mask_head = mask_ptr
        if MASK_KIND != 0:
            mask_head = mask_ptr + b * mask_stride_b + h * mask_stride_h
        map_row = n * map_stride_b + h * map_stride_h + block
        count = tl.load(counts_ptr + map_row)
        list_ptr = indices_ptr + map_row * n_query

        # A tail of the keys needs no mask: those rows of dk and dv are not stored. A tail of the queries has P = 0.
        n_masked = count
        if MASK_KIND == 0:
            n_masked = 0
            if CAUSAL:  # blocks of which the first row sees less than all keys here
                first_dense = tl.maximum(block * KEYS + KEYS - 1 - diagonal_of(length, keys, CAUSAL), 0)
                n_masked = masked_prefix(list_ptr, count, tl.cdiv(first_dense, ROWS * TILES))
        if CAUSAL or MASK_KIND != 0:
            for turn in tl.range(0, n_masked * TILES, num_stages=STAGES if MASK_KIND != 0 else 1):
                tile = tl.load(list_ptr + turn // TILES) * TILES + turn % TILES
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_head, dout_head, q_offsets, dout_offsets, q_step, dout_step, b.to(tl.int32),
                    h.to(tl.int32), tile, lse_head, delta_head, row_lane, key, column, v_column, mask_head,
                    mask_stride_l, mask_stride_s, q_start, length, keys, scale_log2,
                    HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, VALUE_SIZE=VALUE_SIZE, VALUE_PAD=VALUE_PAD, ROWS=ROWS,
                    DESCRIPTORS=DESCRIPTORS, CAUSAL=CAUSAL, PACKED=PACKED, MASK_KIND=MASK_KIND,
                    MASK_IS_BOOL=MASK_IS_BOOL, MASKED=True,
                )  # fmt: skip
        if MASK_KIND == 0:
            for turn in tl.range(n_masked * TILES, count * TILES, num_stages=STAGES):
                tile = tl.load(list_ptr + turn // TILES) * TILES + turn % TILES
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_head, dout_head, q_offsets, dout_offsets, q_step, dout_step, b.to(tl.int32),
                    h.to(tl.int32), tile, lse_head, delta_head, row_lane, key, column, v_column, mask_head,
                    mask_stride_l, mask_stride_s, q_start, length, keys, scale_log2,
                    HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, VALUE_SIZE=VALUE_SIZE, VALUE_PAD=VALUE_PAD, ROWS=ROWS,
                    DESCRIPTORS=DESCRIPTORS, CAUSAL=CAUSAL, PACKED=PACKED, MASK_KIND=MASK_KIND,
                    MASK_IS_BOOL=MASK_IS_BOOL, MASKED=False,
                )  # fmt: skip

    dk_tile = dk_ptr + (b * dk_stride_b + key_head * dk_stride_h + first_key * dk_stride_l) * ALIGN
    dv_tile = dv_ptr + (b * dv_stride_b + key_head * dv_stride_h + first_key * dv_stride_l) * ALIGN
    dk_ptrs = dk_tile + tile_offsets(key_lane, column, dk_stride_l, dk_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    dv_ptrs = dv_tile + tile_offsets(key_lane, v_column, dv_stride_l, dv_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    store_tile(dk_ptrs, dk * scale, key, column, keys, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD)
    store_tile(dv_ptrs, dv, key, v_column, keys, HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD)


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    readers: BlockMap,
    how: How,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv [B, Hk, S, D] in the dtypes and orders of dimensions of k and v.

    ``delta`` is float32 [B, H, L]; ``readers`` says which query blocks read each key block. Hopper's kernel takes what
    it can where there is a ``counter``, one that holds 0.
    """
    heads, length = q.shape[1:3]
    key_heads, keys = k.shape[1:3]
    batch, _, n_query, n_key = allocate.map_shape(q, k, how)
    scale = how.scale
    dk, dv = allocate.dense_like(k), allocate.dense_like(v)
    if how.packed:
        dk.zero_(), dv.zero_()  # there may be rows of no sequence
    if counter is not None:
        from . import backward_key_hopper as hopper

        if hopper.takes(q, k, v, dout, how):
            hopper.key_gradients(dout, q, k, v, lse, delta, readers, how, counter, dk, dv)
            return dk, dv
    tile = launch.attention_launch("dkv", max(q.shape[3], v.shape[3]), q.dtype, q.device)
    counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in readers)
    described, q_source, dout_source = tile_sources(q, dout, tile.rows, how.packed)
    recording.launch(
        _dkv_kernel, (n_key * batch * key_heads,),
        q_ptr=q_source, k_ptr=k, v_ptr=v, dout_ptr=dout_source, lse_ptr=lse, delta_ptr=delta,
        counts_ptr=counts, indices_ptr=indices,
        dk_ptr=dk, dv_ptr=dv,
        map_stride_b=counts.stride(0), map_stride_h=counts.stride(1),
        heads=heads, group=heads // key_heads, length=length, keys=keys, n_query=n_query, n_key=n_key,
        scale=scale, scale_log2=scale * LOG2_E,
        **head_arguments(q, v), ROWS=tile.rows, TILES=QUERY_BLOCK // tile.rows, KEYS=KEY_BLOCK,
        DESCRIPTORS=described, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
        **matrix_arguments(QUERY_BLOCK, q=q, k=k, v=v, dout=dout, dk=dk, dv=dv),
        **mask_arguments(how.attn_mask, batch, heads),
        **how_arguments(how),
    )  # fmt: skip
    return dk, dv
