"""The gradient of the queries on Hopper, specialised by warp: one warp loads, two groups of four compute.

As in :mod:`forward_hopper` one program stays on each multiprocessor and takes query blocks as they are scheduled, and
its loader walks the lists of key blocks, from their end, and fills a ring of K and V tiles, two blocks at a time. Each
of the two consumers owns 64 of the query block's 128 rows. Delta, which :mod:`backward_key_hopper` reads too, is made
on the way. Each of q, dout and ``out`` has one place: that of q is free for the next query block after this one's last
scores, that of dout after its last dP, that of ``out`` after delta.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div
from ..how import How
from . import hopper, recording, tiles
from .hopper import (
    COLUMNS,
    ROWS,
    copy,
    descriptor,
    diagonal_of,
    item,
    load_pair,
    lse_in_log2,
    mask_scores,
    number_at,
    pair_of,
    sequence,
    start_scores,
    store_rows,
    word,
)

LOADER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # 128 threads each, of 65,536 registers
STAGES = {128: 2}  # pairs of K and V tiles in the ring, by padded head size: 227 KB hold no more


@gluon.jit
def _load_rows(
    desc, smem, full, b, h, i, start, n_rows, HALF: gl.constexpr, COLUMNS: gl.constexpr, PACKED: gl.constexpr
):
    """Start the copies of both halves of query block i."""
    mbarrier.expect(full, 2 * HALF * smem.shape[2] * 2)
    for part in gl.static_range(2):
        copy(desc, b, h, (2 * i + part) * HALF, start, n_rows, smem.index(part), full, HALF, COLUMNS, 0, PACKED)
    mbarrier.arrive(full, count=1)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, dout_desc, out_desc, counts_ptr, indices_ptr, counter_ptr, q_starts_ptr, k_starts_ptr,
    work, q_smem, dout_smem, out_smem, k_smem, v_smem, q_full, q_empty, dout_full, dout_empty, out_full, out_empty,
    k_full, k_empty, v_full, v_empty,
    map_stride_b, map_stride_h, heads, group, all_rows, all_keys, n_tiles, n_key, total,
    KEYS: gl.constexpr, HALF: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, PACKED: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The loading warp. For each query block: a message of four numbers, q, out, dout, and K and V of each pair."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    done = 0  # pairs so far, over all query blocks: says the stage of the ring of K, and its phase
    turn = 0
    number = number_at(gl.program_id(0), counter_ptr, total, TAIL)
    while number < total:
        b, h, i = item(number, n_tiles, heads, CAUSAL)
        q_start, q_rows = sequence(q_starts_ptr, b, all_rows, PACKED)
        k_start, k_rows = sequence(k_starts_ptr, b, all_keys, PACKED)
        map_row = b.to(gl.int64) * map_stride_b + h * map_stride_h + i
        count = gl.load(counts_ptr + map_row)
        list_ptr = indices_ptr + map_row * n_key
        next_place = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        key_head = h // group
        pairs = (count + 1) // 2
        # The last block of an odd list has itself for a partner, which the consumers mask.
        first = gl.load(list_ptr + 2 * pairs - 2, mask=count > 0, other=0)
        second = gl.load(list_ptr + count - 1, mask=count > 0, other=0)

        phase = turn & 1
        mbarrier.wait(q_empty, phase ^ 1)
        work.index(0).store(gl.full([1], number, gl.int32, WORD))
        work.index(1).store(gl.full([1], count, gl.int32, WORD))
        work.index(2).store(gl.full([1], first, gl.int32, WORD))
        work.index(3).store(gl.full([1], second, gl.int32, WORD))
        _load_rows(q_desc, q_smem, q_full, b, h, i, q_start, q_rows, HALF, COLUMNS, PACKED)
        if pairs > 0:  # the first scores need no more than q and K
            load_pair(
                k_desc, k_smem, k_full, k_empty, done, b, key_head, first, second, k_start, k_rows,
                KEYS, STAGES, COLUMNS, PACKED,
            )  # fmt: skip
        mbarrier.wait(out_empty, phase ^ 1)
        _load_rows(out_desc, out_smem, out_full, b, h, i, q_start, q_rows, HALF, COLUMNS, PACKED)
        mbarrier.wait(dout_empty, phase ^ 1)
        _load_rows(dout_desc, dout_smem, dout_full, b, h, i, q_start, q_rows, HALF, COLUMNS, PACKED)
        turn += 1
        next_number = number_at(next_place, counter_ptr, total, TAIL)

        for n in range(pairs):
            next_first, next_second = pair_of(list_ptr, pairs - n - 2, n + 2 <= pairs)
            if n > 0:
                load_pair(
                    k_desc, k_smem, k_full, k_empty, done, b, key_head, first, second, k_start, k_rows,
                    KEYS, STAGES, COLUMNS, PACKED,
                )  # fmt: skip
            load_pair(
                v_desc, v_smem, v_full, v_empty, done, b, key_head, first, second, k_start, k_rows,
                KEYS, STAGES, COLUMNS, PACKED,
            )  # fmt: skip
            done += 1
            first = next_first
            second = next_second
        number = next_number
    mbarrier.wait(q_empty, (turn & 1) ^ 1)  # the last message: no more work
    work.index(0).store(gl.full([1], total, gl.int32, WORD))
    mbarrier.arrive(q_full, count=2)


@gluon.jit
def _step(
    scores, dout, k_smem, v_smem, q_empty, dout_empty, k_empty, v_full, v_empty, dq, lse, delta, done, is_last,
    first, second, last_key, keys, scale_log2,
    KEYS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What a pair of key blocks adds to dq, of which the scores are on their way.

    ``first`` and ``second`` are its blocks, if MASKED.
    """
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * KEYS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    stage = done % STAGES
    k = k_smem.index(stage)
    HALF: gl.constexpr = dout.shape[0]
    zeros = gl.zeros([HALF, 2 * KEYS], gl.float32, SCORE)
    mbarrier.wait(v_full.index(stage), (done // STAGES) & 1)
    dp = warpgroup_mma(dout, v_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(q_empty, count=1, pred=is_last)
    if MASKED:
        scores = mask_scores(scores, first, second, last_key, keys, KEYS, SCORE, CAUSAL)
    p = gl.exp2(scores * scale_log2 - lse[:, None])
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(stage), count=1)
    mbarrier.arrive(dout_empty, count=1, pred=is_last)
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(k.dtype), OPERAND)
    dq = warpgroup_mma_wait(0, deps=[warpgroup_mma(ds, k, dq, is_async=True)])
    mbarrier.arrive(k_empty.index(stage), count=1)
    return dq


@gluon.jit
def _delta(dout, out, dout_full, out_full, out_empty, dlse, lse, turn, OUT: gl.constexpr, ROW: gl.constexpr):
    """rowsum(dout * out) - dlse, once dout and ``out`` are there."""
    mbarrier.wait(out_full, turn & 1)
    mbarrier.wait(dout_full, turn & 1)
    products = dout.load(OUT).to(gl.float32) * out.load(OUT).to(gl.float32)
    mbarrier.arrive(out_empty, count=1)
    delta = gl.convert_layout(gl.sum(products, 1), ROW) - dlse
    return gl.where(lse == float("inf"), 0.0, delta)  # a row without keys: its dlse may be anything, even NaN


@gluon.jit
def _consume(
    q_smem, dout_smem, out_smem, k_smem, v_smem, q_full, q_empty, dout_full, dout_empty, out_full, out_empty,
    k_full, k_empty, v_full, v_empty, work, indices_ptr, lse_ptr, dlse_ptr, dq_ptr, delta_ptr, q_starts_ptr,
    k_starts_ptr,
    map_stride_b, map_stride_h, dlse_stride_b, dlse_stride_h, dlse_stride_l, dq_stride_b, dq_stride_h, dq_stride_l,
    heads, all_rows, all_keys, n_tiles, n_key, total, scale, scale_log2,
    PART: gl.constexpr, HEAD_SIZE: gl.constexpr, HEAD_PAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, WITH_DLSE: gl.constexpr,
):  # fmt: skip
    """A consumer: dq and delta of rows PART * HALF and on of every query block."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_PAD, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    done = 0
    turn = 0
    q, dout, out = q_smem.index(PART), dout_smem.index(PART), out_smem.index(PART)
    mbarrier.wait(q_full, 0)
    number = word(work, 0)
    while number < total:
        b, h, i = item(number, n_tiles, heads, CAUSAL)
        q_start, length = sequence(q_starts_ptr, b, all_rows, PACKED)
        _, keys = sequence(k_starts_ptr, b, all_keys, PACKED)
        diagonal = diagonal_of(length, keys, CAUSAL)
        count = word(work, 1)
        first = word(work, 2)
        second = word(work, 3)
        first_row = (2 * i + PART) * HALF
        row = first_row + gl.arange(0, HALF, layout=ROW)
        last_key = row + diagonal  # that causality lets each row see
        pairs = (count + 1) // 2
        head = h.to(gl.int64) if PACKED else (b * heads + h).to(gl.int64)
        line = head * all_rows + q_start + row
        lse = lse_in_log2(gl.load(lse_ptr + line, mask=row < length, other=float("inf")))

        dlse = gl.zeros([HALF], gl.float32, ROW)
        if WITH_DLSE:
            dlse_head = dlse_ptr + h.to(gl.int64) * dlse_stride_h
            if not PACKED:
                dlse_head += b.to(gl.int64) * dlse_stride_b
            dlse = gl.load(dlse_head + (q_start + row) * dlse_stride_l, mask=row < length, other=0.0).to(gl.float32)
        dq = gl.zeros([HALF, HEAD_PAD], gl.float32, OUT)
        if pairs > 0:
            scores = start_scores(q, k_smem, k_full, done, STAGES, SCORE)
            delta = _delta(dout, out, dout_full, out_full, out_empty, dlse, lse, turn, OUT, ROW)
            dq = _step(
                scores, dout, k_smem, v_smem, q_empty, dout_empty, k_empty, v_full, v_empty, dq, lse, delta, done,
                pairs == 1, first, second, last_key, keys, scale_log2, KEYS, STAGES, CAUSAL, True,
            )  # fmt: skip
            done += 1
            left = pairs - 1
            if CAUSAL:  # the diagonal crosses two or three blocks, and a caller's own list may go on beyond it
                list_ptr = indices_ptr + (b.to(gl.int64) * map_stride_b + h * map_stride_h + i) * n_key
                dense_blocks = gl.maximum(2 * i * HALF + 1 + diagonal, 0) // KEYS  # those that the first row sees whole
                first, second = pair_of(list_ptr, left - 1, left > 0)
                while (left > 0) & (second >= dense_blocks):
                    scores = start_scores(q, k_smem, k_full, done, STAGES, SCORE)
                    dq = _step(
                        scores, dout, k_smem, v_smem, q_empty, dout_empty, k_empty, v_full, v_empty, dq, lse, delta,
                        done, left == 1, first, second, last_key, keys, scale_log2, KEYS, STAGES, CAUSAL, True,
                    )  # fmt: skip
                    done += 1
                    left -= 1
                    first, second = pair_of(list_ptr, left - 1, left > 0)
            while left > 0:
                scores = start_scores(q, k_smem, k_full, done, STAGES, SCORE)
                dq = _step(
                    scores, dout, k_smem, v_smem, q_empty, dout_empty, k_empty, v_full, v_empty, dq, lse, delta, done,
                    left == 1, 0, 0, last_key, keys, scale_log2, KEYS, STAGES, CAUSAL, False,
                )  # fmt: skip
                done += 1
                left -= 1
        else:
            delta = _delta(dout, out, dout_full, out_full, out_empty, dlse, lse, turn, OUT, ROW)
            mbarrier.arrive(q_empty, count=1)
            mbarrier.arrive(dout_empty, count=1)
        turn += 1
        gl.store(delta_ptr + line, delta, mask=row < length)
        store_rows(
            dq * scale, dq_ptr, b, h, q_start, dq_stride_b, dq_stride_h, dq_stride_l, 2 * i + PART, length,
            HALF, HEAD_SIZE, HEAD_PAD, PACKED,
        )  # fmt: skip
        mbarrier.wait(q_full, turn & 1)
        number = word(work, 0)


@gluon.jit(
    do_not_specialize=["heads", "group", "length", "keys", "n_tiles", "n_key", "total", "map_stride_b", "map_stride_h"]
)
def _dq_hopper_kernel(
    q_desc, k_desc, v_desc, dout_desc, out_desc, counts_ptr, indices_ptr, q_starts_ptr, k_starts_ptr, counter_ptr,
    lse_ptr, dlse_ptr, dq_ptr, delta_ptr,
    map_stride_b, map_stride_h, dlse_stride_b, dlse_stride_h, dlse_stride_l, dq_stride_b, dq_stride_h, dq_stride_l,
    heads, group, length, keys, n_tiles, n_key, total, scale, scale_log2,
    HEAD_SIZE: gl.constexpr, HEAD_PAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, WITH_DLSE: gl.constexpr,
    LOADER_REGS: gl.constexpr, CONSUMER_REGS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD_PAD], dtype)
    PAIR: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * KEYS, HEAD_PAD], dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [2, HALF, HEAD_PAD], TILE)
    dout_smem = gl.allocate_shared_memory(dtype, [2, HALF, HEAD_PAD], TILE)
    out_smem = gl.allocate_shared_memory(dtype, [2, HALF, HEAD_PAD], TILE)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 2 * KEYS, HEAD_PAD], PAIR)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 2 * KEYS, HEAD_PAD], PAIR)
    # The loader's message: number of a query block, length of its list, the list's last two blocks.
    work = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    dout_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    dout_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    out_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    out_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=2)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(dout_full, count=2)
    mbarrier.init(dout_empty, count=2)
    mbarrier.init(out_full, count=2)
    mbarrier.init(out_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_consume, (
                q_smem, dout_smem, out_smem, k_smem, v_smem, q_full, q_empty, dout_full, dout_empty, out_full,
                out_empty, k_full, k_empty, v_full, v_empty, work,
                indices_ptr, lse_ptr, dlse_ptr, dq_ptr, delta_ptr, q_starts_ptr, k_starts_ptr,
                map_stride_b, map_stride_h, dlse_stride_b, dlse_stride_h, dlse_stride_l,
                dq_stride_b, dq_stride_h, dq_stride_l,
                heads, length, keys, n_tiles, n_key, total, scale, scale_log2,
                0, HEAD_SIZE, HEAD_PAD, KEYS, HALF, STAGES, CAUSAL, PACKED, WITH_DLSE,
            )),
            (_consume, (
                q_smem, dout_smem, out_smem, k_smem, v_smem, q_full, q_empty, dout_full, dout_empty, out_full,
                out_empty, k_full, k_empty, v_full, v_empty, work,
                indices_ptr, lse_ptr, dlse_ptr, dq_ptr, delta_ptr, q_starts_ptr, k_starts_ptr,
                map_stride_b, map_stride_h, dlse_stride_b, dlse_stride_h, dlse_stride_l,
                dq_stride_b, dq_stride_h, dq_stride_l,
                heads, length, keys, n_tiles, n_key, total, scale, scale_log2,
                1, HEAD_SIZE, HEAD_PAD, KEYS, HALF, STAGES, CAUSAL, PACKED, WITH_DLSE,
            )),
            (_load, (
                q_desc, k_desc, v_desc, dout_desc, out_desc, counts_ptr, indices_ptr, counter_ptr, q_starts_ptr,
                k_starts_ptr, work, q_smem, dout_smem, out_smem, k_smem, v_smem, q_full, q_empty, dout_full, dout_empty,
                out_full, out_empty, k_full, k_empty, v_full, v_empty, map_stride_b, map_stride_h,
                heads, group, length, keys, n_tiles, n_key, total,
                KEYS, HALF, COLUMNS, STAGES, CAUSAL, PACKED, TAIL,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, LOADER_REGS],
    )  # fmt: skip


def takes(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, how: How) -> bool:
    """Whether :func:`query_gradient` computes this call: see :func:`hopper.takes`."""
    return how.scale > 0 and hopper.takes(STAGES, how, q, k, v, dout, out)  # masked scores are -inf before the scale


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
    counter: Tensor,
    dq: Tensor,
    delta: Tensor,
) -> None:
    """Fill ``dq``, whose columns are adjacent, and ``delta``; ``counter`` is one that holds 0.

    It is alone, or a schedule's (schedule.py). The rest as :func:`backward_query.query_gradient`.
    """
    heads, length, head_size = q.shape[1:]
    batch, packed, head_pad = how.sequences(q), how.packed, launch.pad_head(head_size)
    n_tiles, n_key = ceil_div(how.length(q), QUERY_BLOCK), ceil_div(how.keys(k), KEY_BLOCK)
    total = n_tiles * batch * heads
    counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in kept)
    starts = (counter if x is None else x for x in (how.cu_seqlens_q, how.cu_seqlens_k))  # else they are not read
    dlse_strides = (0, 0, 0) if dlse is None else dlse.stride()
    recording.launch(
        _dq_hopper_kernel, (min(launch.multiprocessors(q.device), total),),
        descriptor(q, ROWS, COLUMNS, packed), descriptor(k, KEY_BLOCK, COLUMNS, packed),
        descriptor(v, KEY_BLOCK, COLUMNS, packed), descriptor(dout, ROWS, COLUMNS, packed),
        descriptor(out, ROWS, COLUMNS, packed),
        counts, indices, *starts, counter, lse, lse if dlse is None else dlse, dq, delta,
        counts.stride(0), counts.stride(1), *dlse_strides, *dq.stride()[:3],
        heads, heads // k.shape[1], length, k.shape[2], n_tiles, n_key, total, how.scale, how.scale * tiles.LOG2_E,
        HEAD_SIZE=head_size, HEAD_PAD=head_pad, KEYS=KEY_BLOCK, HALF=ROWS, COLUMNS=COLUMNS, STAGES=STAGES[head_pad],
        CAUSAL=how.causality, PACKED=packed, WITH_DLSE=dlse is not None,
        LOADER_REGS=LOADER_REGISTERS, CONSUMER_REGS=CONSUMER_REGISTERS, TAIL=counter.numel() - 1, num_warps=4,
    )  # fmt: skip
