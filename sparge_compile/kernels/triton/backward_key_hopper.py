"""The gradients of keys and values on Hopper, specialised by warp: two groups of four compute, a warp loads for each.

As in :mod:`backward_key` each key block walks the list of query blocks that read it, and everything is transposed, keys
by rows, so that P and dS are left operands as they stand in registers. One program stays on each multiprocessor. Its
two consumers work on key blocks of their own, which they take as they are scheduled (schedule.py), and so drift apart:
where one begins or ends, the other computes. The loader of each fills a ring of q, and one of dout with lse and delta,
64 rows at a time, and brings K and V of the next key block as soon as the last products that read them are done.
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

from .. import allocate, launch
from ..block_map import KEY_BLOCK, BlockMap
from ..how import How
from . import hopper, recording, tiles
from .hopper import COLUMNS, ROWS, copy, descriptor, diagonal_of, lse_in_log2, number_at, sequence, store_rows, word

LOADER_REGISTERS, CONSUMER_REGISTERS = 32, 240  # 128 threads each, of 65,536 registers
# Tiles in each consumer's rings of q, which are kept longest, and of dout, by padded head size: 227 KB hold no more.
STAGES = {64: (6, 5), 128: (3, 2)}


@gluon.jit
def _item(number, n_key, key_heads):
    """(b, key head, key block) of a number: key blocks vary fastest. Of packed sequences b is the number."""
    return number // n_key // key_heads, number // n_key % key_heads, number % n_key


@gluon.jit
def _load_keys(
    k_desc, v_desc, items, k_smem, v_smem, kv_full, kv_empty, turn, number, count, b, head, row, start, n_rows,
    WHO: gl.constexpr, KEYS: gl.constexpr, COLUMNS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """A message of two numbers, K and V of a key block, once those of the last one are read."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    k, v = k_smem.index(WHO), v_smem.index(WHO)
    ready = kv_full.index(WHO)
    mbarrier.wait(kv_empty.index(WHO), (turn & 1) ^ 1)
    items.index(2 * WHO).store(gl.full([1], number, gl.int32, WORD))
    items.index(2 * WHO + 1).store(gl.full([1], count, gl.int32, WORD))
    mbarrier.expect(ready, 2 * KEYS * k.shape[1] * 2)
    copy(k_desc, b, head, row, start, n_rows, k, ready, KEYS, COLUMNS, 0, PACKED)
    copy(v_desc, b, head, row, start, n_rows, v, ready, KEYS, COLUMNS, 0, PACKED)
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _map_row(number, n_key, heads, group, map_stride_b, map_stride_h):
    """Where in the map's lists those of a work item begin."""
    b, key_head, block = _item(number, n_key, heads // group)
    return b.to(gl.int64) * map_stride_b + key_head * group * map_stride_h + block


@gluon.jit
def _load_row(lse_ptr, delta_ptr, row, length):
    """lse and delta of rows of a head; of one that does not exist P is to be exp2(-inf)."""
    lse = gl.load(lse_ptr + row, mask=row < length, other=float("inf"))
    return lse, gl.load(delta_ptr + row, mask=row < length, other=0.0)


@gluon.jit
def _load_tile(
    q_desc, dout_desc, q_smem, dout_smem, lse_smem, delta_smem, rows, q_full, q_empty, dout_full, dout_empty,
    number, b, h, row, start, n_rows, lse, delta,
    WHO: gl.constexpr, COLUMNS: gl.constexpr, Q_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """q, dout, lse and delta of 64 rows into places ``number`` of the rings, once they are free."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    HALF: gl.constexpr = q_smem.shape[1]
    HEAD_PAD: gl.constexpr = q_smem.shape[2]
    place = WHO * Q_STAGES + number % Q_STAGES
    ready = q_full.index(place)
    mbarrier.wait(q_empty.index(place), ((number // Q_STAGES) & 1) ^ 1)
    mbarrier.expect(ready, HALF * HEAD_PAD * 2)
    copy(q_desc, b, h, row, start, n_rows, q_smem.index(place), ready, HALF, COLUMNS, 0, PACKED)

    place = WHO * DOUT_STAGES + number % DOUT_STAGES
    ready = dout_full.index(place)
    mbarrier.wait(dout_empty.index(place), ((number // DOUT_STAGES) & 1) ^ 1)
    mbarrier.expect(ready, HALF * HEAD_PAD * 2)
    copy(dout_desc, b, h, row, start, n_rows, dout_smem.index(place), ready, HALF, COLUMNS, 0, PACKED)
    lse_smem.index(place).store(lse_in_log2(lse))
    delta_smem.index(place).store(delta)
    rows.index(place).store(gl.full([1], row, gl.int32, WORD))
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, dout_desc, counts_ptr, indices_ptr, counter_ptr, lse_ptr, delta_ptr, q_starts_ptr,
    k_starts_ptr, items, rows, k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, kv_full, kv_empty, q_full,
    q_empty, dout_full, dout_empty, map_stride_b, map_stride_h, heads, group, all_rows, all_keys, n_query, n_key, total,
    WHO: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, COLUMNS: gl.constexpr, Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr, PACKED: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """A loading warp. For each key block: a first tile of q and dout, a message, K, V, then the other tiles."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    LINE: gl.constexpr = gl.BlockedLayout([HALF // 32], [32], [1], [0])
    lane = gl.arange(0, HALF, layout=LINE)
    done = 0  # halves of query blocks so far: says the stages of the rings, and their phases
    turn = 0
    number = number_at(gl.program_id(0) + WHO * gl.num_programs(0), counter_ptr, total, TAIL)
    map_row = _map_row(number, n_key, heads, group, map_stride_b, map_stride_h)
    next_count = gl.load(counts_ptr + map_row, mask=number < total, other=0)
    next_block = gl.load(indices_ptr + map_row * n_query, mask=number < total, other=0)
    count = next_count
    query_block = gl.where(count > 0, next_block, 0)
    while number < total:
        b, key_head, block = _item(number, n_key, heads // group)
        q_start, length = sequence(q_starts_ptr, b, all_rows, PACKED)
        k_start, keys = sequence(k_starts_ptr, b, all_keys, PACKED)
        next_place = 2 * gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        next_row = map_row
        next_number = next_place
        in_all = count
        for member in range(1, group):
            in_all += gl.load(counts_ptr + map_row + member * map_stride_h)
        for member in range(group):
            h = key_head * group + member
            if member > 0:
                map_row += map_stride_h
                count = gl.load(counts_ptr + map_row)
                query_block = gl.load(indices_ptr + map_row * n_query, mask=count > 0, other=0)
            list_ptr = indices_ptr + map_row * n_query
            head = (h if PACKED else b * heads + h).to(gl.int64) * all_rows + q_start
            # lse and delta are loaded a tile ahead, the number of a query block two tiles ahead.
            row = 2 * query_block * HALF
            lse, delta = _load_row(lse_ptr + head, delta_ptr + head, row + lane, length)
            turns = 2 * count
            if member == 0:
                turns = gl.maximum(turns, 1)
            for n in range(turns):
                next_tile = (2 * query_block + (n + 1) % 2) * HALF
                query_block = gl.load(list_ptr + n // 2 + 1, mask=n + 2 < 2 * count, other=0)
                next_lse, next_delta = _load_row(lse_ptr + head, delta_ptr + head, next_tile + lane, length)
                if count > 0:
                    _load_tile(
                        q_desc, dout_desc, q_smem, dout_smem, lse_smem, delta_smem, rows, q_full, q_empty, dout_full,
                        dout_empty, done, b, h, row, q_start, length, lse, delta,
                        WHO, COLUMNS, Q_STAGES, DOUT_STAGES, PACKED,
                    )  # fmt: skip
                    done += 1
                if (n == 0) & (member == 0):  # the first tile goes ahead of K and V, and of what is next
                    _load_keys(
                        k_desc, v_desc, items, k_smem, v_smem, kv_full, kv_empty, turn, number, in_all, b, key_head,
                        block * KEYS, k_start, keys, WHO, KEYS, COLUMNS, PACKED,
                    )  # fmt: skip
                    next_number = number_at(next_place, counter_ptr, total, TAIL)
                    next_row = _map_row(next_number, n_key, heads, group, map_stride_b, map_stride_h)
                    next_count = gl.load(counts_ptr + next_row, mask=next_number < total, other=0)
                    next_block = gl.load(indices_ptr + next_row * n_query, mask=next_number < total, other=0)
                row = next_tile
                lse = next_lse
                delta = next_delta
        turn += 1
        number = next_number
        map_row = next_row
        count = next_count
        query_block = gl.where(count > 0, next_block, 0)
    mbarrier.wait(kv_empty.index(WHO), (turn & 1) ^ 1)  # the last message: no more work
    items.index(2 * WHO).store(gl.full([1], total, gl.int32, WORD))
    mbarrier.arrive(kv_full.index(WHO), count=2)


@gluon.jit
def _step(
    k, v, q_smem, dout_smem, lse_smem, delta_smem, rows, kv_empty, q_full, q_empty, dout_full, dout_empty, dk, dv,
    done, is_last, block, diagonal, scale_log2,
    WHO: gl.constexpr, Q_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """What half a query block adds to dk and dv."""
    KEYS: gl.constexpr = k.shape[0]
    HALF: gl.constexpr = q_smem.shape[1]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    zeros = gl.zeros([KEYS, HALF], gl.float32, SCORE)
    q_place = WHO * Q_STAGES + done % Q_STAGES
    q = q_smem.index(q_place)
    mbarrier.wait(q_full.index(q_place), (done // Q_STAGES) & 1)
    scores = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dout_place = WHO * DOUT_STAGES + done % DOUT_STAGES
    dout = dout_smem.index(dout_place)
    mbarrier.wait(dout_full.index(dout_place), (done // DOUT_STAGES) & 1)
    dp = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = lse_smem.index(dout_place).load(ROW)
    scores = warpgroup_mma_wait(1, deps=[scores]) * scale_log2
    if CAUSAL:
        key = block * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORE))
        last_key = word(rows, dout_place) + gl.arange(0, HALF, layout=ROW) + diagonal
        scores = gl.where(key[:, None] <= last_key[None, :], scores, float("-inf"))
    p = gl.exp2(scores - lse[None, :])
    dv = warpgroup_mma(gl.convert_layout(p.to(dout.dtype), OPERAND), dout, dv, is_async=True)
    delta = delta_smem.index(dout_place).load(ROW)
    dp = warpgroup_mma_wait(1, deps=[dp])
    mbarrier.arrive(kv_empty.index(WHO), count=1, pred=is_last)
    ds = p * (dp - delta[None, :])
    dk = warpgroup_mma(gl.convert_layout(ds.to(q.dtype), OPERAND), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv])
    mbarrier.arrive(dout_empty.index(dout_place), count=1)
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(q_empty.index(q_place), count=1)
    return dk, dv


@gluon.jit
def _consume(
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, items, rows, kv_full, kv_empty, q_full, q_empty,
    dout_full, dout_empty, dk_ptr, dv_ptr, q_starts_ptr, k_starts_ptr,
    dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    heads, group, all_rows, all_keys, n_key, total, scale, scale_log2,
    WHO: gl.constexpr, HEAD_SIZE: gl.constexpr, HEAD_PAD: gl.constexpr, KEYS: gl.constexpr,
    Q_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """A consumer: dk and dv of the key blocks that its loader brings."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_PAD, 16])
    done = 0
    turn = 0
    k, v = k_smem.index(WHO), v_smem.index(WHO)
    mbarrier.wait(kv_full.index(WHO), 0)
    number = word(items, 2 * WHO)
    while number < total:
        b, key_head, block = _item(number, n_key, heads // group)
        _, length = sequence(q_starts_ptr, b, all_rows, PACKED)
        k_start, keys = sequence(k_starts_ptr, b, all_keys, PACKED)
        diagonal = diagonal_of(length, keys, CAUSAL)
        left = 2 * word(items, 2 * WHO + 1)
        mbarrier.arrive(kv_empty.index(WHO), count=1, pred=left == 0)
        dk = gl.zeros([KEYS, HEAD_PAD], gl.float32, OUT)
        dv = gl.zeros([KEYS, HEAD_PAD], gl.float32, OUT)
        while left > 0:
            dk, dv = _step(
                k, v, q_smem, dout_smem, lse_smem, delta_smem, rows, kv_empty, q_full, q_empty, dout_full, dout_empty,
                dk, dv, done, left == 1, block, diagonal, scale_log2, WHO, Q_STAGES, DOUT_STAGES, CAUSAL,
            )  # fmt: skip
            done += 1
            left -= 1
        store_rows(
            dk * scale, dk_ptr, b, key_head, k_start, dk_stride_b, dk_stride_h, dk_stride_s, block, keys,
            KEYS, HEAD_SIZE, HEAD_PAD, PACKED,
        )  # fmt: skip
        store_rows(
            dv, dv_ptr, b, key_head, k_start, dv_stride_b, dv_stride_h, dv_stride_s, block, keys,
            KEYS, HEAD_SIZE, HEAD_PAD, PACKED,
        )  # fmt: skip
        turn += 1
        mbarrier.wait(kv_full.index(WHO), turn & 1)
        number = word(items, 2 * WHO)


@gluon.jit(
    do_not_specialize=["heads", "group", "length", "keys", "n_query", "n_key", "total", "map_stride_b", "map_stride_h"]
)
def _dkv_hopper_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_ptr, delta_ptr, counts_ptr, indices_ptr, q_starts_ptr, k_starts_ptr,
    counter_ptr, dk_ptr, dv_ptr,
    map_stride_b, map_stride_h, dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    heads, group, length, keys, n_query, n_key, total, scale, scale_log2,
    HEAD_SIZE: gl.constexpr, HEAD_PAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, COLUMNS: gl.constexpr,
    Q_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
    LOADER_REGS: gl.constexpr, CONSUMER_REGS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD_PAD], dtype)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(dtype, [2, KEYS, HEAD_PAD], TILE)
    v_smem = gl.allocate_shared_memory(dtype, [2, KEYS, HEAD_PAD], TILE)
    q_smem = gl.allocate_shared_memory(dtype, [2 * Q_STAGES, HALF, HEAD_PAD], TILE)
    dout_smem = gl.allocate_shared_memory(dtype, [2 * DOUT_STAGES, HALF, HEAD_PAD], TILE)
    lse_smem = gl.allocate_shared_memory(gl.float32, [2 * DOUT_STAGES, HALF], LINE)
    delta_smem = gl.allocate_shared_memory(gl.float32, [2 * DOUT_STAGES, HALF], LINE)
    items = gl.allocate_shared_memory(gl.int32, [2 * 2, 1], LINE)  # number of a key block, query blocks to come
    rows = gl.allocate_shared_memory(gl.int32, [2 * DOUT_STAGES, 1], LINE)  # the first row of each tile of dout
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * Q_STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * Q_STAGES, 1], BARRIER)
    dout_full = gl.allocate_shared_memory(gl.int64, [2 * DOUT_STAGES, 1], BARRIER)
    dout_empty = gl.allocate_shared_memory(gl.int64, [2 * DOUT_STAGES, 1], BARRIER)
    for who in gl.static_range(2):
        mbarrier.init(kv_full.index(who), count=2)
        mbarrier.init(kv_empty.index(who), count=1)
    for place in gl.static_range(2 * Q_STAGES):
        mbarrier.init(q_full.index(place), count=1)
        mbarrier.init(q_empty.index(place), count=1)
    for place in gl.static_range(2 * DOUT_STAGES):
        mbarrier.init(dout_full.index(place), count=2)
        mbarrier.init(dout_empty.index(place), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_consume, (
                k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, items, rows, kv_full, kv_empty, q_full,
                q_empty, dout_full, dout_empty, dk_ptr, dv_ptr, q_starts_ptr, k_starts_ptr,
                dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
                heads, group, length, keys, n_key, total, scale, scale_log2,
                0, HEAD_SIZE, HEAD_PAD, KEYS, Q_STAGES, DOUT_STAGES, CAUSAL, PACKED,
            )),
            (_consume, (
                k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, items, rows, kv_full, kv_empty, q_full,
                q_empty, dout_full, dout_empty, dk_ptr, dv_ptr, q_starts_ptr, k_starts_ptr,
                dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
                heads, group, length, keys, n_key, total, scale, scale_log2,
                1, HEAD_SIZE, HEAD_PAD, KEYS, Q_STAGES, DOUT_STAGES, CAUSAL, PACKED,
            )),
            (_load, (
                q_desc, k_desc, v_desc, dout_desc, counts_ptr, indices_ptr, counter_ptr, lse_ptr, delta_ptr,
                q_starts_ptr, k_starts_ptr, items, rows, k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem,
                kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, map_stride_b, map_stride_h,
                heads, group, length, keys, n_query, n_key, total,
                0, KEYS, HALF, COLUMNS, Q_STAGES, DOUT_STAGES, PACKED, TAIL,
            )),
            (_load, (
                q_desc, k_desc, v_desc, dout_desc, counts_ptr, indices_ptr, counter_ptr, lse_ptr, delta_ptr,
                q_starts_ptr, k_starts_ptr, items, rows, k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem,
                kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, map_stride_b, map_stride_h,
                heads, group, length, keys, n_query, n_key, total,
                1, KEYS, HALF, COLUMNS, Q_STAGES, DOUT_STAGES, PACKED, TAIL,
            )),
        ],
        [4, 1, 1],
        [CONSUMER_REGS, LOADER_REGS, LOADER_REGS],
    )  # fmt: skip


def takes(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, how: How) -> bool:
    """Whether :func:`key_gradients` computes this call: see :func:`hopper.takes`."""
    return hopper.takes(STAGES, how, q, k, v, dout)


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    readers: BlockMap,
    how: How,
    counter: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fill ``dk`` and ``dv``, whose columns are adjacent; ``counter`` is one that holds 0.

    It is alone, or a schedule's (schedule.py). The rest as :func:`backward_key.key_gradients`.
    """
    heads, length, head_size = q.shape[1:]
    key_heads, keys = k.shape[1:3]
    batch, _, n_query, n_key = allocate.map_shape(q, k, how)
    head_pad, packed = launch.pad_head(head_size), how.packed
    q_stages, dout_stages = STAGES[head_pad]
    total = n_key * batch * key_heads
    counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in readers)
    starts = (counter if x is None else x for x in (how.cu_seqlens_q, how.cu_seqlens_k))  # else they are not read
    recording.launch(
        _dkv_hopper_kernel, (min(launch.multiprocessors(q.device), total),),
        descriptor(q, ROWS, COLUMNS, packed), descriptor(k, KEY_BLOCK, COLUMNS, packed),
        descriptor(v, KEY_BLOCK, COLUMNS, packed), descriptor(dout, ROWS, COLUMNS, packed),
        lse, delta, counts, indices, *starts, counter, dk, dv,
        counts.stride(0), counts.stride(1), *dk.stride()[:3], *dv.stride()[:3],
        heads, heads // key_heads, length, keys, n_query, n_key, total, how.scale, how.scale * tiles.LOG2_E,
        HEAD_SIZE=head_size, HEAD_PAD=head_pad, KEYS=KEY_BLOCK, HALF=ROWS, COLUMNS=COLUMNS,
        Q_STAGES=q_stages, DOUT_STAGES=dout_stages, CAUSAL=how.causality, PACKED=packed,
        LOADER_REGS=LOADER_REGISTERS, CONSUMER_REGS=CONSUMER_REGISTERS, TAIL=counter.numel() - 1, num_warps=4,
    )  # fmt: skip
