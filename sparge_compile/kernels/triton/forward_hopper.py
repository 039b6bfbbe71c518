"""Attention over the kept key blocks on Hopper, specialised by warp: one warp loads, two groups of four compute.

The portable kernel (:mod:`forward`) leaves to Triton when a product is awaited. Here that is written out, in Gluon. One
program stays on each multiprocessor and takes query blocks as they are scheduled (schedule.py). Its loader walks the
lists of key blocks and fills a ring of K and V tiles, two blocks at a time, ahead of the consumers and into the next
query block. Each of the two consumers owns 64 of the query block's 128 rows. It starts the scores of the next pair of
blocks, then the output product of this pair, and does the next softmax while that product runs (FlashAttention-3, arXiv
2407.08608, section 3.2). The consumers drift apart, so that one's softmax also hides behind the other's products.

Lists are walked from their end, so that the blocks which need element masks (the tail of the keys, the causal diagonal)
come first, before the products overlap.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
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
    mask_scores,
    number_at,
    pair_of,
    reinterpret,
    sequence,
    start_scores,
    tma_store,
    word,
)
from .schedule import counter_of_forward

LOADER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # 128 threads each, of 65,536 registers
STAGES = {64: 3, 128: 2}  # pairs of K and V tiles in the ring, by padded head size: 227 KB hold no more


@gluon.jit
def _next(number, counter_ptr, q_starts_ptr, n_tiles, heads, total, HALF: gl.constexpr, CAUSAL: gl.constexpr):
    """The first work item from ``number`` on whose query block is not past the end of its sequence."""
    b, _, i = item(number, n_tiles, heads, CAUSAL)
    start = gl.load(q_starts_ptr + b, mask=number < total, other=0)
    rows = gl.load(q_starts_ptr + b + 1, mask=number < total, other=0) - start
    while (number < total) & (2 * i * HALF >= rows):
        number = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        b, _, i = item(number, n_tiles, heads, CAUSAL)
        start = gl.load(q_starts_ptr + b, mask=number < total, other=0)
        rows = gl.load(q_starts_ptr + b + 1, mask=number < total, other=0) - start
    return number


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, counts_ptr, indices_ptr, counter_ptr, q_starts_ptr, k_starts_ptr,
    work, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    counts_stride_b, counts_stride_h, counts_stride_i, indices_stride_b, indices_stride_h, indices_stride_i,
    heads, group, length, keys, n_tiles, total,
    HEAD_PAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, PACKED: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The loading warp. For each query block: a message of four numbers, q, then K and V of each pair of key blocks."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    done = 0  # pairs so far, over all query blocks: says the stage of the ring, and its phase
    turn = 0
    number = number_at(gl.program_id(0), counter_ptr, total, TAIL)
    if PACKED:
        number = _next(number, counter_ptr, q_starts_ptr, n_tiles, heads, total, HALF, CAUSAL)
    while number < total:
        b, h, i = item(number, n_tiles, heads, CAUSAL)
        q_start, q_rows = sequence(q_starts_ptr, b, length, PACKED)
        k_start, k_rows = sequence(k_starts_ptr, b, keys, PACKED)
        count = gl.load(counts_ptr + b.to(gl.int64) * counts_stride_b + h * counts_stride_h + i * counts_stride_i)
        list_ptr = indices_ptr + b.to(gl.int64) * indices_stride_b + h.to(gl.int64) * indices_stride_h
        list_ptr += i.to(gl.int64) * indices_stride_i
        next_place = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if PACKED:
            next_place = _next(next_place, counter_ptr, q_starts_ptr, n_tiles, heads, total, HALF, CAUSAL)
        key_head = h // group
        pairs = (count + 1) // 2
        # The last block of an odd list has itself for a partner, which the consumers mask.
        first = gl.load(list_ptr + 2 * pairs - 2, mask=count > 0, other=0)
        second = gl.load(list_ptr + count - 1, mask=count > 0, other=0)

        slot = turn % 2
        mbarrier.wait(q_empty.index(slot), ((turn // 2) & 1) ^ 1)
        work.index(4 * slot + 0).store(gl.full([1], number, gl.int32, WORD))
        work.index(4 * slot + 1).store(gl.full([1], count, gl.int32, WORD))
        work.index(4 * slot + 2).store(gl.full([1], first, gl.int32, WORD))
        work.index(4 * slot + 3).store(gl.full([1], second, gl.int32, WORD))
        mbarrier.expect(q_full.index(slot), 2 * HALF * HEAD_PAD * 2)
        for part in gl.static_range(2):
            tile = q_smem.index(2 * slot + part)
            row = (2 * i + part) * HALF
            copy(q_desc, b, h, row, q_start, q_rows, tile, q_full.index(slot), HALF, COLUMNS, 0, PACKED)
        turn += 1
        next_number = number_at(next_place, counter_ptr, total, TAIL)

        for n in range(pairs):
            next_first, next_second = pair_of(list_ptr, pairs - n - 2, n + 2 <= pairs)
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
    slot = turn % 2  # the last message: no more work
    mbarrier.wait(q_empty.index(slot), ((turn // 2) & 1) ^ 1)
    work.index(4 * slot).store(gl.full([1], total, gl.int32, WORD))
    mbarrier.arrive(q_full.index(slot), count=1)


@gluon.jit
def _outputs(p, v_smem, v_full, acc, done, STAGES: gl.constexpr):
    """Start acc + p v for pair number ``done`` of the ring."""
    stage = done % STAGES
    mbarrier.wait(v_full.index(stage), (done // STAGES) & 1)
    return warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)


@gluon.jit
def _lane_sum(p):
    """Sums over the columns that one thread holds, [rows, 4]: the four threads of a row are summed once, at the end."""
    ROWS: gl.constexpr = p.shape[0]
    PARTS: gl.constexpr = p.shape[1] // 8
    return gl.sum(gl.sum(p.reshape([ROWS, PARTS, 4, 2]), 3), 1)


@gluon.jit
def _softmax(scores, top, weight, scale_log2, MASKED: gl.constexpr):
    """A step of the online softmax: p, the factor for what came before, the new top and weight. scale_log2 is > 0."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    shift = new_top
    if MASKED:
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key: -inf - -inf is NaN
    p = gl.exp2(scores * scale_log2 - shift[:, None])
    fade = gl.exp2(top - shift)
    LANES: gl.constexpr = gl.SliceLayout(1, weight.type.layout)
    return p, fade, new_top, weight * gl.convert_layout(fade, LANES)[:, None] + _lane_sum(p)


@gluon.jit
def _step(
    q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, acc, p, top, weight, done,
    first, second, last_key, keys, scale_log2,
    KEYS: gl.constexpr, STAGES: gl.constexpr, SCORE: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of pair ``done + 1`` and their softmax, while the output product of pair ``done`` runs.

    ``first`` and ``second`` are its blocks, if MASKED.
    """
    OUT: gl.constexpr = acc.type.layout
    s_token = start_scores(q, k_smem, k_full, done + 1, STAGES, SCORE)
    o_token = _outputs(p, v_smem, v_full, acc, done, STAGES)
    scores = warpgroup_mma_wait(1, deps=[s_token])
    mbarrier.arrive(k_empty.index((done + 1) % STAGES), count=1)
    if MASKED:
        scores = mask_scores(scores, first, second, last_key, keys, KEYS, SCORE, CAUSAL)
    new_p, fade, top, weight = _softmax(scores, top, weight, scale_log2, MASKED)
    acc = warpgroup_mma_wait(0, deps=[o_token])
    mbarrier.arrive(v_empty.index(done % STAGES), count=1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
    return acc, gl.convert_layout(new_p.to(p.dtype), p.type.layout), top, weight


@gluon.jit
def _consume(
    q_smem, k_smem, v_smem, out_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    out_desc, indices_ptr, q_starts_ptr, k_starts_ptr, lse_ptr, work,
    indices_stride_b, indices_stride_h, indices_stride_i,
    heads, all_rows, all_keys, n_tiles, total, scale_log2,
    PART: gl.constexpr, HEAD_PAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """A consumer: attention of rows PART * HALF and on of every query block."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_PAD, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    ROW_OF_OUT: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = q_smem.dtype

    done = 0
    turn = 0
    mbarrier.wait(q_full.index(0), 0)
    number = word(work, 0)
    while number < total:
        slot = turn % 2
        b, h, i = item(number, n_tiles, heads, CAUSAL)
        q_start, length = sequence(q_starts_ptr, b, all_rows, PACKED)
        _, keys = sequence(k_starts_ptr, b, all_keys, PACKED)
        diagonal = diagonal_of(length, keys, CAUSAL)
        count = word(work, 4 * slot + 1)
        first = word(work, 4 * slot + 2)
        second = word(work, 4 * slot + 3)
        row = (2 * i + PART) * HALF + gl.arange(0, HALF, layout=ROW)
        last_key = row + diagonal  # that causality lets each row see
        pairs = (count + 1) // 2

        acc = gl.zeros([HALF, HEAD_PAD], gl.float32, OUT)
        weight = _lane_sum(gl.zeros([HALF, 2 * KEYS], gl.float32, SCORE))
        top = gl.full([HALF], float("-inf"), gl.float32, ROW)

        q = q_smem.index(2 * slot + PART)
        if pairs > 0:
            scores = warpgroup_mma_wait(0, deps=[start_scores(q, k_smem, k_full, done, STAGES, SCORE)])
            mbarrier.arrive(k_empty.index(done % STAGES), count=1)
            scores = mask_scores(scores, first, second, last_key, keys, KEYS, SCORE, CAUSAL)
            p, _fade, top, weight = _softmax(scores, top, weight, scale_log2, True)
            p_op = gl.convert_layout(p.to(dtype), OPERAND)
            left = pairs - 1
            if CAUSAL:  # the diagonal crosses two or three blocks, and a caller's own list may go on beyond it
                list_ptr = indices_ptr + b.to(gl.int64) * indices_stride_b + h.to(gl.int64) * indices_stride_h
                list_ptr += i.to(gl.int64) * indices_stride_i
                dense_blocks = gl.maximum(2 * i * HALF + 1 + diagonal, 0) // KEYS  # those that the first row sees whole
                first, second = pair_of(list_ptr, left - 1, left > 0)
                while (left > 0) & (second >= dense_blocks):
                    acc, p_op, top, weight = _step(
                        q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, acc, p_op, top, weight, done,
                        first, second, last_key, keys, scale_log2, KEYS, STAGES, SCORE, CAUSAL, True,
                    )  # fmt: skip
                    done += 1
                    left -= 1
                    first, second = pair_of(list_ptr, left - 1, left > 0)
            for _ in range(left):
                acc, p_op, top, weight = _step(
                    q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, acc, p_op, top, weight, done,
                    0, 0, last_key, keys, scale_log2, KEYS, STAGES, SCORE, CAUSAL, False,
                )  # fmt: skip
                done += 1
            mbarrier.arrive(q_empty.index(slot), count=1)
            acc = warpgroup_mma_wait(0, deps=[_outputs(p_op, v_smem, v_full, acc, done, STAGES)])
            mbarrier.arrive(v_empty.index(done % STAGES), count=1)
            done += 1
        else:
            mbarrier.arrive(q_empty.index(slot), count=1)

        # total_weight is 0 exactly where no key was seen: then out is 0 and lse is -inf.
        total_weight = gl.convert_layout(gl.sum(weight, 1), ROW)
        inverse = 1.0 / gl.where(total_weight == 0.0, 1.0, total_weight)
        lse = (top + gl.log2(total_weight)) * 0.6931471805599453  # LN_2
        acc = acc * gl.convert_layout(inverse, ROW_OF_OUT)[:, None]
        first_row = (2 * i + PART) * HALF
        out = acc.to(dtype)
        tma.store_wait(0)  # the one before has left out_smem
        tile = out_smem.index(PART)
        tile.store(out)
        fence_async_shared()
        if PACKED:
            tile = reinterpret(tile, out_desc.dtype, [1, 1, 1, HALF, HEAD_PAD], out_desc.layout)
            tma_store(out_desc, [0x40000000, q_start + length, h, 0x40000000 - length + first_row, 0], tile)
            lse_head = lse_ptr + h.to(gl.int64) * all_rows + q_start
        else:
            tile = reinterpret(tile, out_desc.dtype, [1, 1, HALF, HEAD_PAD], out_desc.layout)
            tma_store(out_desc, [b, h, first_row, 0], tile)
            lse_head = lse_ptr + (b * heads + h).to(gl.int64) * all_rows
        gl.store(lse_head + row, lse, mask=row < length)
        turn += 1
        mbarrier.wait(q_full.index(turn % 2), (turn // 2) & 1)
        number = word(work, 4 * (turn % 2))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["heads", "group", "length", "keys", "n_tiles", "total", "counts_stride_b", "counts_stride_h"]
)
def _forward_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, counts_ptr, indices_ptr, q_starts_ptr, k_starts_ptr,
    counter_ptr, lse_ptr,
    counts_stride_b, counts_stride_h, counts_stride_i, indices_stride_b, indices_stride_h, indices_stride_i,
    heads, group, length, keys, n_tiles, total, scale_log2,
    HEAD_PAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
    COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
    LOADER_REGS: gl.constexpr, CONSUMER_REGS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD_PAD], q_desc.dtype)
    PAIR: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * KEYS, HEAD_PAD], q_desc.dtype)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [4, HALF, HEAD_PAD], TILE)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 2 * KEYS, HEAD_PAD], PAIR)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 2 * KEYS, HEAD_PAD], PAIR)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2, HALF, HEAD_PAD], TILE)
    # The loader's messages: number of a query block, length of its list, the list's last two blocks.
    work = gl.allocate_shared_memory(gl.int32, [2 * 4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_consume, (
                q_smem, k_smem, v_smem, out_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_desc, indices_ptr, q_starts_ptr, k_starts_ptr, lse_ptr, work,
                indices_stride_b, indices_stride_h, indices_stride_i,
                heads, length, keys, n_tiles, total, scale_log2,
                0, HEAD_PAD, KEYS, HALF, STAGES, CAUSAL, PACKED,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, out_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_desc, indices_ptr, q_starts_ptr, k_starts_ptr, lse_ptr, work,
                indices_stride_b, indices_stride_h, indices_stride_i,
                heads, length, keys, n_tiles, total, scale_log2,
                1, HEAD_PAD, KEYS, HALF, STAGES, CAUSAL, PACKED,
            )),
            (_load, (
                q_desc, k_desc, v_desc, counts_ptr, indices_ptr, counter_ptr, q_starts_ptr, k_starts_ptr,
                work, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                counts_stride_b, counts_stride_h, counts_stride_i,
                indices_stride_b, indices_stride_h, indices_stride_i,
                heads, group, length, keys, n_tiles, total,
                HEAD_PAD, KEYS, HALF, COLUMNS, STAGES, CAUSAL, PACKED, TAIL,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, LOADER_REGS],
    )  # fmt: skip


def takes(q: Tensor, k: Tensor, v: Tensor, out: Tensor, how: How) -> bool:
    """Whether :func:`forward` computes this call: see :func:`hopper.takes`."""
    return how.scale > 0 and hopper.takes(STAGES, how, q, k, v, out)  # a scaled maximum is that of scaled scores


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    how: How,
    out: Tensor,
    lse: Tensor,
    counter: Tensor | None = None,
) -> None:
    """Fill ``out`` and ``lse`` as :func:`forward.forward` describes them; ``counter`` is one that holds 0."""
    heads, length, head_size = q.shape[1:]
    batch, packed = how.sequences(q), how.packed
    counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in (counts, indices))
    head_pad = launch.pad_head(head_size)
    n_tiles = ceil_div(how.length(q), QUERY_BLOCK)
    total = n_tiles * batch * heads
    n_key = 0 if packed else ceil_div(how.keys(k), KEY_BLOCK)  # packed sequences go by number
    counter = counter_of_forward(counts, n_key, how.is_causal, counter)
    starts = (
        counter if x is None else x for x in (how.cu_seqlens_q, how.cu_seqlens_k)
    )  # what is not given is not read
    recording.launch(
        _forward_hopper_kernel, (min(launch.multiprocessors(q.device), total),),
        descriptor(q, ROWS, COLUMNS, packed), descriptor(k, KEY_BLOCK, COLUMNS, packed),
        descriptor(v, KEY_BLOCK, COLUMNS, packed), descriptor(out, ROWS, head_pad, packed),
        counts, indices, *starts, counter, lse,
        *counts.stride(), *indices.stride()[:3],
        heads, heads // k.shape[1], length, k.shape[2], n_tiles, total, how.scale * tiles.LOG2_E,
        HEAD_PAD=head_pad, KEYS=KEY_BLOCK, HALF=ROWS, COLUMNS=COLUMNS, STAGES=STAGES[head_pad],
        CAUSAL=how.causality, PACKED=packed,
        LOADER_REGS=LOADER_REGISTERS, CONSUMER_REGS=CONSUMER_REGISTERS, TAIL=counter.numel() - 1, num_warps=4,
    )  # fmt: skip
