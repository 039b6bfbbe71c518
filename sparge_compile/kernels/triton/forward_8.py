"""Attention in eight bits over the kept key blocks: the loop of :mod:`forward` on the codes of :mod:`codes`.

Scores are products of int8, which are exact; weights and values are e4m3. Each product of a key block is added up in
float32 by itself: within a product, tensor cores keep some fourteen bits. On Hopper most calls go to
:mod:`forward_hopper_8`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import allocate, launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK
from ..eight_bits import LANES, Codes
from ..how import How
from . import codes as coding
from . import merge, recording
from .tiles import dense_prefix, diagonal_of, matrix_arguments, store_tile, tile_offsets
from .trial import TRIED_IN_EIGHT_BITS, hopper_refusal, version


@triton.jit
def _attend(
    acc, total, top, q, q_scale, k_head, k_scale_head, v_head, block, row, key_lane, column, v_column, keys, diagonal,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEYS: tl.constexpr, LANES: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax: the new (acc, total, top). top is a whole number."""
    key = block * KEYS + key_lane
    k_head += block.to(tl.int64) * (KEYS * HEAD_SIZE)
    k_ptrs = k_head + key_lane[None, :] * HEAD_SIZE + column[:, None]
    k = tl.load(k_ptrs, mask=(key < keys)[None, :] & (column < HEAD_SIZE)[:, None], other=0)
    scores = (
        tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * (q_scale * tl.load(k_scale_head + block * LANES))[:, None]
    )
    if MASKED:
        seen = (key < keys)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None] + diagonal)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.ceil(tl.max(scores, 1)))
    shift = new_top
    if MASKED:
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key: -inf - -inf is NaN
    p = tl.exp2(scores - (shift - 8.0)[:, None]).to(tl.float8e4nv)
    fade = tl.exp2(top - shift)
    v_head += block.to(tl.int64) * (KEYS * VALUE_SIZE)
    v_ptrs = v_head + v_column[:, None] * KEYS + key_lane[None, :]
    v = tl.load(v_ptrs, mask=(v_column < VALUE_SIZE)[:, None], other=0.0)
    acc = acc * fade[:, None] + tl.dot(p, tl.trans(v))
    return acc, total * fade + tl.sum(p.to(tl.float32), 1), new_top


@triton.jit(do_not_specialize=["batch", "heads", "group", "length", "keys", "n_tiles", "n_key"])
def _forward_8_kernel(
    q_ptr, q_scale_ptr, lift_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, counts_ptr, indices_ptr,
    out_ptr, lse_ptr,
    counts_stride_b, counts_stride_h, counts_stride_i,
    indices_stride_b, indices_stride_h, indices_stride_i,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    batch, heads, group, length, keys, n_tiles, n_key,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    LANES: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # As in forward.py: query tiles vary fastest, and under causality the last go first.
    pid = tl.program_id(0)
    tile = pid % n_tiles
    if CAUSAL:
        tile = n_tiles - 1 - tile
    b, h = (pid // n_tiles // heads).to(tl.int64), (pid // n_tiles % heads).to(tl.int64)
    i = tile // TILES
    out_b = b
    if PARTS > 1:
        out_b += tl.program_id(1).to(tl.int64) * batch
    row_lane, key_lane = tl.arange(0, ROWS), tl.arange(0, KEYS)
    column, v_column = tl.arange(0, HEAD_PAD), tl.arange(0, VALUE_PAD)
    row = tile * ROWS + row_lane
    at = (b * heads + h) * length + row
    q_ptrs = q_ptr + at[:, None] * HEAD_SIZE + column[None, :]
    q = tl.load(q_ptrs, mask=(row < length)[:, None] & (column < HEAD_SIZE)[None, :], other=0)
    q_scale = tl.load(q_scale_ptr + at, mask=row < length, other=0.0)
    bh = b * (heads // group) + h // group  # of keys and values
    k_head, k_scale_head = k_ptr + bh * keys * HEAD_SIZE, k_scale_ptr + bh * n_key * LANES
    v_head = v_ptr + bh * n_key * (KEYS * VALUE_SIZE)
    diagonal = diagonal_of(length, keys, CAUSAL)

    count = tl.load(counts_ptr + b * counts_stride_b + h * counts_stride_h + i.to(tl.int64) * counts_stride_i)
    list_ptr = indices_ptr + b * indices_stride_b + h * indices_stride_h + i.to(tl.int64) * indices_stride_i
    begin = 0
    if PARTS > 1:
        part, whole = tl.program_id(1), count
        begin, count = whole * part // PARTS, whole * (part + 1) // PARTS
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    dense_blocks = keys // KEYS
    if CAUSAL:  # those that the first row sees whole
        dense_blocks = tl.minimum(dense_blocks, tl.maximum(tile * ROWS + 1 + diagonal, 0) // KEYS)
    n_dense = tl.maximum(dense_prefix(list_ptr, count, dense_blocks), begin)
    for entry in tl.range(begin, n_dense, num_stages=STAGES):
        acc, total, top = _attend(
            acc, total, top, q, q_scale, k_head, k_scale_head, v_head, tl.load(list_ptr + entry), row, key_lane, column,
            v_column, keys, diagonal, HEAD_SIZE=HEAD_SIZE, VALUE_SIZE=VALUE_SIZE, KEYS=KEYS, LANES=LANES,
            CAUSAL=CAUSAL, MASKED=False,
        )  # fmt: skip
    for entry in tl.range(n_dense, count, num_stages=1):
        acc, total, top = _attend(
            acc, total, top, q, q_scale, k_head, k_scale_head, v_head, tl.load(list_ptr + entry), row, key_lane, column,
            v_column, keys, diagonal, HEAD_SIZE=HEAD_SIZE, VALUE_SIZE=VALUE_SIZE, KEYS=KEYS, LANES=LANES,
            CAUSAL=CAUSAL, MASKED=True,
        )  # fmt: skip

    acc = acc * (tl.load(v_scale_ptr + bh) / tl.where(total == 0.0, 1.0, total))[:, None]
    lift = tl.load(lift_ptr + at, mask=row < length, other=0.0)
    lse = (top - 8.0 + tl.log2(total) + lift) * 0.6931471805599453  # LN_2
    tl.store(lse_ptr + (out_b * heads + h) * length + row, lse, mask=row < length)
    out_tile = out_ptr + (out_b * out_stride_b + h * out_stride_h + tile.to(tl.int64) * ROWS * out_stride_l) * ALIGN
    out_ptrs = out_tile + tile_offsets(row_lane, v_column, out_stride_l, out_stride_d, ALIGN=ALIGN, OFFSET=OFFSET)
    store_tile(out_ptrs, acc, row, v_column, length, HEAD_SIZE=VALUE_SIZE, HEAD_PAD=VALUE_PAD)


def code(
    query: Tensor, key: Tensor, value: Tensor, how: How
) -> tuple[Codes, tuple[Tensor, Tensor]] | tuple[None, None]:
    """Codes as :func:`forward` will read them, and the means of :func:`pool.pool`; None where there is nothing."""
    if 0 in (query.numel(), key.numel(), value.numel()):
        return None, None
    return coding.code(query, key, value, how, _on_hopper(query, key, value, how))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    how: How,
    out: Tensor,
    lse: Tensor,
    codes: Codes | None,
    counter: Tensor | None,
) -> None:
    """Fill ``out`` and ``lse`` as :func:`forward.forward` describes them, from codes if they were made before."""
    codes = codes or code(query, key, value, how)[0]
    assert codes is not None
    parts = _parts(query, key, how)
    if parts > 1:
        found, lses = merge.new_parts(parts, out)
        _launch_portable(codes, key, counts, indices, how, found, lses, parts)
        merge.merge(found, lses, out, lse)
    elif _on_hopper(query, key, value, how):
        from . import forward_hopper_8

        forward_hopper_8.forward(codes, counts, indices, out, lse, counter)
    else:
        _launch_portable(codes, key, counts, indices, how, out, lse)


def _parts(query: Tensor, key: Tensor, how: How) -> int:
    """Over how many programs the list of a query block is split."""
    batch, heads, n_query, n_key = allocate.map_shape(query, key, how)
    return launch.list_parts(batch * heads * n_query, n_key, query.device)


def _on_hopper(query: Tensor, key: Tensor, value: Tensor, how: How) -> bool:
    if _parts(query, key, how) > 1 or hopper_refusal(query.device) or version() not in TRIED_IN_EIGHT_BITS:
        return False
    from . import forward_hopper_8

    return forward_hopper_8.takes(query, value, how)


def _launch_portable(
    codes: Codes, key: Tensor, counts: Tensor, indices: Tensor, how: How, out: Tensor, lse: Tensor, parts: int = 1
) -> None:
    """Fill out and lse by the kernel that runs on every GPU; those of several parts lie along the batch."""
    batch, heads, length, head_size = codes.q.shape
    value_size = out.shape[3]
    tile = launch.attention_launch("forward", max(head_size, value_size), torch.int8, out.device)
    n_tiles = triton.cdiv(length, tile.rows)
    counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in (counts, indices))
    recording.launch(
        _forward_8_kernel, (n_tiles * batch * heads, parts),
        q_ptr=codes.q, q_scale_ptr=codes.q_scale, lift_ptr=codes.lift, k_ptr=codes.k, k_scale_ptr=codes.k_scale,
        v_ptr=codes.v, v_scale_ptr=codes.v_scale, counts_ptr=counts, indices_ptr=indices,
        out_ptr=out, lse_ptr=lse,
        counts_stride_b=counts.stride(0), counts_stride_h=counts.stride(1), counts_stride_i=counts.stride(2),
        indices_stride_b=indices.stride(0), indices_stride_h=indices.stride(1), indices_stride_i=indices.stride(2),
        batch=batch, heads=heads, group=heads // key.shape[1], length=length, keys=key.shape[2], n_tiles=n_tiles,
        n_key=codes.k_scale.shape[2],
        HEAD_SIZE=head_size, HEAD_PAD=max(32, launch.pad_head(head_size)),
        VALUE_SIZE=value_size, VALUE_PAD=launch.pad_head(value_size), ROWS=tile.rows, TILES=QUERY_BLOCK // tile.rows,
        KEYS=KEY_BLOCK, LANES=LANES, STAGES=tile.stages, CAUSAL=how.causality, PARTS=parts,
        num_warps=tile.warps, num_stages=tile.stages,
        **matrix_arguments(QUERY_BLOCK, out=out),
    )  # fmt: skip
