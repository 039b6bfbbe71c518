"""Attention over the kept key blocks: out and log-sum-exp from q, k, v and a block map.

Online softmax (FlashAttention-2, arXiv 2307.08691) over each query block's list of key blocks. Lists are ascending, so
the blocks that need element masks (the tail of the keys, the causal diagonal) are the last ones: they are peeled off,
and the main loop masks nothing. On Hopper most calls go to :mod:`forward_hopper`. Where there are too few query
blocks to keep a GPU busy, several programs share the list of one, and :mod:`merge` puts their parts together.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import allocate, launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK
from ..eight_bits import Codes
from ..how import How
from . import forward_8, merge, recording
from .tiles import (
    LOG2_E,
    dense_prefix,
    diagonal_of,
    head_arguments,
    how_arguments,
    load_block,
    load_tile,
    mask_arguments,
    mask_scores,
    matrix_arguments,
    sequence,
    store_tile,
    tile_offsets,
    tile_sources,
)
from .trial import hopper_refusal


@triton.jit
def _attend(
    acc, total, top, q, k_head, v_head, k_offsets, v_offsets, k_step, v_step, b, key_head, block,
    row, key_lane, column, v_column, mask_ptr, mask_stride_l, mask_stride_s, length, k_start, keys, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax: the new (acc, total, top)."""
    key = block * KEYS + key_lane
    k = load_block(
        k_head, k_offsets, k_step, b, key_head, block, key_lane, column, k_start, keys,
        HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, ROWS=KEYS, DESCRIPTORS=DESCRIPTORS, CHECK_ROWS=MASKED, PACKED=PACKED,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [R, KEYS]
    if MASKED:
        scores = mask_scores(
            scores * scale_log2, row[:, None], key[None, :], mask_ptr, mask_stride_l, mask_stride_s, length, keys,
            CAUSAL=CAUSAL, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key: -inf - -inf is NaN
        p = tl.exp2(scores - shift[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)  # scale_log2 >= 0, see forward()
        shift = new_top
        p = tl.exp2(scores * scale_log2 - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(p, 1)
    v = load_block(
        v_head, v_offsets, v_step, b, key_head, block, key_lane, v_column, k_start, keys,
        HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD, ROWS=KEYS, DESCRIPTORS=DESCRIPTORS, CHECK_ROWS=MASKED, PACKED=PACKED,
    )  # fmt: skip
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit(
    do_not_specialize=["batch", "heads", "group", "length", "keys", "n_tiles", "counts_stride_b", "counts_stride_h"]
)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, counts_ptr, indices_ptr, mask_ptr, q_starts_ptr, k_starts_ptr,
    out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    counts_stride_b, counts_stride_h, counts_stride_i,
    indices_stride_b, indices_stride_h, indices_stride_i,
    mask_stride_b, mask_stride_h, mask_stride_l, mask_stride_s,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    batch, heads, group, length, keys, n_tiles, scale_log2,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    DESCRIPTORS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, NEGATE: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Query tiles vary fastest: the programs that run together share one head's keys and values in L2. Under a causal
    # mask the last query blocks have the longest lists and go first.
    pid = tl.program_id(0)
    tile = pid % n_tiles
    if CAUSAL:
        tile = n_tiles - 1 - tile
    n = (pid // n_tiles // heads).to(tl.int64)  # of the batch, or of packed sequences
    h = (pid // n_tiles % heads).to(tl.int64)
    b = n if not PACKED else n * 0
    out_b = b  # of the results: each part has those of the whole batch
    if PARTS > 1:
        out_b += tl.program_id(1).to(tl.int64) * batch
    lse_ptr += (out_b * heads + h) * length
    q_start, length = sequence(q_starts_ptr, n, length, PACKED=PACKED)
    k_start, keys = sequence(k_starts_ptr, n, keys, PACKED=PACKED)
    i = tile // TILES  # query block; TILES programs share it

    first_row = tile.to(tl.int64) * ROWS + q_start
    row_lane = tl.arange(0, ROWS)
    row = tile * ROWS + row_lane
    column, v_column = tl.arange(0, HEAD_PAD), tl.arange(0, VALUE_PAD)
    key_lane = tl.arange(0, KEYS)

    q_tile = q_ptr + (b * q_stride_b + h * q_stride_h + first_row * q_stride_l) * ALIGN
    q_ptrs = q_tile + tile_offsets(row_lane, column, q_stride_l, q_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    q = load_tile(q_ptrs, row, column, length, HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=True)
    if NEGATE:
        q = -q
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

    count = tl.load(counts_ptr + n * counts_stride_b + h * counts_stride_h + i.to(tl.int64) * counts_stride_i)
    list_ptr = indices_ptr + n * indices_stride_b + h * indices_stride_h + i.to(tl.int64) * indices_stride_i

    begin = 0
    if PARTS > 1:
        part, whole = tl.program_id(1), count
        begin, count = whole * part // PARTS, whole * (part + 1) // PARTS
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)

    n_dense = begin
    if MASK_KIND == 0:
        dense_blocks = keys // KEYS
        if CAUSAL:  # those that the first row sees whole
            first_sees = tl.maximum(tile * ROWS + 1 + diagonal_of(length, keys, CAUSAL), 0)
            dense_blocks = tl.minimum(dense_blocks, first_sees // KEYS)
        n_dense = tl.maximum(dense_prefix(list_ptr, count, dense_blocks), begin)
        for entry in tl.range(begin, n_dense, num_stages=STAGES):
            block = tl.load(list_ptr + entry)
            acc, total, top = _attend(
                acc, total, top, q, k_head, v_head, k_offsets, v_offsets, k_step, v_step, small_b, key_head, block, row,
                key_lane, column, v_column, mask_ptr, mask_stride_l, mask_stride_s, length, k_start, keys, scale_log2,
                HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, VALUE_SIZE=VALUE_SIZE, VALUE_PAD=VALUE_PAD, KEYS=KEYS,
                DESCRIPTORS=DESCRIPTORS, CAUSAL=CAUSAL, PACKED=PACKED, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
                MASKED=False,
            )  # fmt: skip
    for entry in tl.range(n_dense, count, num_stages=1 if MASK_KIND == 0 else STAGES):
        block = tl.load(list_ptr + entry)
        acc, total, top = _attend(
            acc, total, top, q, k_head, v_head, k_offsets, v_offsets, k_step, v_step, small_b, key_head, block,
            row, key_lane, column, v_column, mask_ptr, mask_stride_l, mask_stride_s, length, k_start, keys, scale_log2,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, VALUE_SIZE=VALUE_SIZE, VALUE_PAD=VALUE_PAD, KEYS=KEYS,
            DESCRIPTORS=DESCRIPTORS, CAUSAL=CAUSAL, PACKED=PACKED, MASK_KIND=MASK_KIND, MASK_IS_BOOL=MASK_IS_BOOL,
            MASKED=True,
        )  # fmt: skip

    # total is 0 exactly where no key was seen: then out is 0 and lse is -inf.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (top + tl.log2(total)) * 0.6931471805599453  # LN_2
    tl.store(lse_ptr + q_start + row, lse, mask=row < length)
    out_tile = out_ptr + (out_b * out_stride_b + h * out_stride_h + first_row * out_stride_l) * ALIGN
    out_ptrs = out_tile + tile_offsets(row_lane, v_column, out_stride_l, out_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    store_tile(out_ptrs, acc, row, v_column, length, HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    *how: Any,
    counter: Tensor | None = None,
    codes: Codes | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept keys: out [B, H, L, Dv] in the query's dtype and stride order, and lse.

    query [B, H, L, D], key [B, Hk, S, D] and value [B, Hk, S, Dv] may have any strides; ``counts`` and ``indices`` are
    a :class:`BlockMap`, of which B and H may be 1; ``how`` are the fields of a :class:`How`. lse [B, H, L] (natural
    logarithm) is float32. A row that sees no key gives zeros and -inf. ``codes`` are the operands in eight bits, where
    these were made with the map.
    """
    given = How(*how)
    out, lse = allocate.new_out(query, value), allocate.new_lse(query)
    nothing = out.numel() == 0 or key.shape[2] == 0
    if nothing or given.packed:  # there may be rows of no sequence
        out.zero_(), lse.fill_(-float("inf"))
    if nothing:
        return out, lse
    with torch.cuda.device_of(query):
        if given.eight_bits:
            forward_8.forward(query, key, value, counts, indices, given, out, lse, codes, counter)
            return out, lse
        parts = _parts(query, key, given)
        if parts > 1:
            found, lses = merge.new_parts(parts, out)
            _launch_portable(query, key, value, counts, indices, given, found, lses, parts)
            merge.merge(found, lses, out, lse)
            return out, lse
        if not hopper_refusal(query.device):
            from . import forward_hopper

            if forward_hopper.takes(query, key, value, out, given):
                forward_hopper.forward(query, key, value, counts, indices, given, out, lse, counter)
                return out, lse
        _launch_portable(query, key, value, counts, indices, given, out, lse)
    return out, lse


def _parts(query: Tensor, key: Tensor, how: How) -> int:
    """Over how many programs the list of a query block is split. Rows of no sequence would be no part of any."""
    _, _, n_query, n_key = allocate.map_shape(query, key, how)
    return 1 if how.packed else launch.list_parts(query.shape[0] * query.shape[1] * n_query, n_key, query.device)


def _launch_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    how: How,
    out: Tensor,
    lse: Tensor,
    parts: int = 1,
) -> None:
    """Fill out and lse by the kernel that runs on every GPU; those of several parts lie along the batch."""
    heads, length, keys = *q.shape[1:3], k.shape[2]
    batch = how.sequences(q)
    tile = launch.attention_launch("forward", max(q.shape[3], v.shape[3]), q.dtype, q.device)
    tiles = QUERY_BLOCK // tile.rows
    n_tiles = triton.cdiv(how.length(q), tile.rows)
    counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in (counts, indices))
    described, k_source, v_source = tile_sources(k, v, KEY_BLOCK, how.packed)
    recording.launch(
        _forward_kernel, (n_tiles * batch * heads, parts),
        q_ptr=q, k_ptr=k_source, v_ptr=v_source, counts_ptr=counts, indices_ptr=indices,
        out_ptr=out, lse_ptr=lse,
        counts_stride_b=counts.stride(0), counts_stride_h=counts.stride(1), counts_stride_i=counts.stride(2),
        indices_stride_b=indices.stride(0), indices_stride_h=indices.stride(1), indices_stride_i=indices.stride(2),
        batch=batch, heads=heads, group=heads // k.shape[1], length=length, keys=keys, n_tiles=n_tiles,
        # A running maximum of scaled scores is the scaled maximum only for a scale that is not negative.
        scale_log2=abs(how.scale) * LOG2_E, NEGATE=how.scale < 0,
        **head_arguments(q, v), ROWS=tile.rows, TILES=tiles, KEYS=KEY_BLOCK,
        DESCRIPTORS=described, STAGES=tile.stages, PARTS=parts,
        num_warps=tile.warps, num_stages=tile.stages,
        **matrix_arguments(QUERY_BLOCK, q=q, k=k, v=v, out=out),
        **mask_arguments(how.attn_mask, batch, heads),
        **how_arguments(how),
    )  # fmt: skip
