"""Attention in eight bits on Hopper, specialised by warp: the plan of :mod:`forward_hopper` on codes.

One loading warp follows the lists, two consumers of 64 rows compute; two key blocks a step. Scores are int8 products,
which are exact. Weights go to the product with the values in registers, as they come out of the scores: there a thread
has columns 8i + 2t and 8i + 2t + 1 of each 32, where the operand has 4t to 4t + 3 and 16 + 4t to 16 + 4t + 3. So the
keys of a block of values stand in an order in which that is the same (``PERMUTED`` in codes.py): nothing is exchanged.

Tensor cores add up e4m3 products with some fourteen bits, so the outputs of each pair of blocks begin at zero, and are
added in float32. They come in two halves of the head, each behind the exponentials of one block: whole ones would not
fit into registers beside the scores. Sums of weights are products with ones, so they are of the rounded weights.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import launch
from ..block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from ..eight_bits import LANES, Codes
from ..how import How
from . import recording
from .hopper import (
    GLUON_TYPES,
    ROWS,
    copy,
    descriptor,
    item,
    mask_scores,
    number_at,
    pair_of,
    reinterpret,
    tma_load,
    tma_store,
    word,
)
from .schedule import counter_of_forward

LOADER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # 128 threads each, of 65,536 registers
STAGES = {64: 6, 128: 4}  # pairs of K and V tiles in the ring, by head size
SUMS = gl.constexpr(8)  # equal columns of the product with ones: the fewest there are


@gluon.jit
def _load_block(desc, tile, ready, b, head, row):
    """Start the copy of one block, which is a whole tile."""
    to = reinterpret(tile, desc.dtype, [1, 1, tile.shape[0], tile.shape[1]], desc.layout)
    tma_load(desc, [b, head, row, 0], ready, to)


@gluon.jit
def _load(
    q_desc, k_desc, k_scale_desc, v_desc, counts_ptr, indices_ptr, counter_ptr,
    work, q_smem, k_smem, scale_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    counts_stride_b, counts_stride_h, counts_stride_i, indices_stride_b, indices_stride_h, indices_stride_i,
    heads, group, n_tiles, total,
    HEAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, LANES: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """The loading warp. For each query block: a message of four numbers, q, then K and V of each pair of key blocks."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    done = 0  # pairs so far, over all query blocks: says the stage of the ring, and its phase
    turn = 0
    number = number_at(gl.program_id(0), counter_ptr, total, TAIL)
    while number < total:
        b, h, i = item(number, n_tiles, heads, False)
        count = gl.load(counts_ptr + b.to(gl.int64) * counts_stride_b + h * counts_stride_h + i * counts_stride_i)
        list_ptr = indices_ptr + b.to(gl.int64) * indices_stride_b + h.to(gl.int64) * indices_stride_h
        list_ptr += i.to(gl.int64) * indices_stride_i
        next_place = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
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
        mbarrier.expect(q_full.index(slot), 2 * HALF * HEAD)
        for part in gl.static_range(2):
            _load_block(q_desc, q_smem.index(2 * slot + part), q_full.index(slot), b, h, (2 * i + part) * HALF)
        turn += 1
        next_number = number_at(next_place, counter_ptr, total, TAIL)

        for n in range(pairs):
            next_first, next_second = pair_of(list_ptr, pairs - n - 2, n + 2 <= pairs)
            stage = done % STAGES
            free = ((done // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), free)
            ready = k_full.index(stage)
            mbarrier.expect(ready, 2 * KEYS * HEAD + 2 * LANES * 4)
            tile = k_smem.index(stage)
            copy(k_desc, b, key_head, first * KEYS, 0, 0, tile, ready, KEYS, HEAD, 0, False)
            copy(k_desc, b, key_head, second * KEYS, 0, 0, tile, ready, KEYS, HEAD, 1, False)
            _load_block(k_scale_desc, scale_smem.index(2 * stage), ready, b, key_head, first)
            _load_block(k_scale_desc, scale_smem.index(2 * stage + 1), ready, b, key_head, second)
            mbarrier.wait(v_empty.index(stage), free)
            ready = v_full.index(stage)
            mbarrier.expect(ready, 2 * KEYS * HEAD)
            _load_block(v_desc, v_smem.index(2 * stage), ready, b, key_head, first * HEAD)
            _load_block(v_desc, v_smem.index(2 * stage + 1), ready, b, key_head, second * HEAD)
            done += 1
            first = next_first
            second = next_second
        number = next_number
    slot = turn % 2  # the last message: no more work
    mbarrier.wait(q_empty.index(slot), ((turn // 2) & 1) ^ 1)
    work.index(4 * slot).store(gl.full([1], total, gl.int32, WORD))
    mbarrier.arrive(q_full.index(slot), count=1)


@gluon.jit
def _start_scores(q, k_smem, k_full, done, STAGES: gl.constexpr, SCORE: gl.constexpr):
    """Start q k^T for pair number ``done`` of the ring."""
    stage = done % STAGES
    mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
    SHAPE: gl.constexpr = [q.shape[0], k_smem.shape[1]]
    zeros = gl.zeros(SHAPE, gl.int32, SCORE)
    return warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_outputs(p, other_p, v_smem, PART: gl.constexpr, done, STAGES: gl.constexpr, OUT: gl.constexpr):
    """Start p v for half PART of the head and pair number ``done`` of the ring, whose values are there."""
    stage = done % STAGES
    HALF_HEAD: gl.constexpr = v_smem.shape[1] // 2
    SHAPE: gl.constexpr = [p.shape[0], HALF_HEAD]
    v = v_smem.index(2 * stage).slice(PART * HALF_HEAD, HALF_HEAD, 0)
    other_v = v_smem.index(2 * stage + 1).slice(PART * HALF_HEAD, HALF_HEAD, 0)
    out = warpgroup_mma(p, v.permute((1, 0)), gl.zeros(SHAPE, gl.float32, OUT), use_acc=False, is_async=True)
    return warpgroup_mma(other_p, other_v.permute((1, 0)), out, is_async=True)


@gluon.jit
def _start_sums(p, other_p, ones, SUM: gl.constexpr):
    """Start p 1: sums [rows, 8]."""
    SHAPE: gl.constexpr = [p.shape[0], SUMS]
    sums = warpgroup_mma(p, ones.permute((1, 0)), gl.zeros(SHAPE, gl.float32, SUM), use_acc=False, is_async=True)
    return warpgroup_mma(other_p, ones.permute((1, 0)), sums, is_async=True)


@gluon.jit
def _faded(acc, fade, x):
    """What came before, at the new top, and what a pair adds."""
    return acc * gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout))[:, None] + x


@gluon.jit
def _halves(x):
    """The columns of the first key block and of the second, each [rows, keys]."""
    ROWS: gl.constexpr = x.shape[0]
    KEYS: gl.constexpr = x.shape[1] // 2
    return x.reshape([ROWS, 2, KEYS]).permute([0, 2, 1]).split()


@gluon.jit
def _packed(p):
    """Weights [rows, keys] in e4m3, four in a number [rows, keys / 4]: slots 16a + 4t to 16a + 4t + 3 of each 32, which
    are columns 16a + 2t, + 1, + 8, + 9. A thread has them all; as numbers they pass from one step to the next."""
    ROWS: gl.constexpr = p.shape[0]
    PARTS: gl.constexpr = p.shape[1] // 16
    p = p.reshape([ROWS, PARTS, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, PARTS * 4, 2, 2])
    even, odd = p.split()
    first, third = even.split()
    second, fourth = odd.split()
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f", [first, second, third, fourth], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _operand(p, OPERAND: gl.constexpr):
    """What :func:`_packed` gives, as an operand [rows, keys] in registers.

    A sum with 0, of which the assembler does not know, has other registers than those that the next weights come into:
    it awaits every product where they are the same.
    """
    ROWS: gl.constexpr = p.shape[0]
    KEYS: gl.constexpr = p.shape[1] * 4
    p = gl.join(p, p)
    p = p + gl.program_id(2)
    p = gl.convert_layout(gl.join(p, p).reshape([ROWS, KEYS]), OPERAND)  # a thread has the four of a number in a row
    p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [p], dtype=gl.int8, is_pure=False, pack=4)
    return p.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _top(some, others, top, some_scale, others_scale, MASKED: gl.constexpr):
    """The new top of rows, a whole number, what is taken from scores, and the factor for what came before."""
    ROW: gl.constexpr = gl.SliceLayout(1, some.type.layout)
    old = gl.convert_layout(top, ROW)
    # Maxima of whole numbers as such: of three at a time, and conversions hide behind the exponentials.
    highest = gl.max(some, 1).to(gl.float32) * some_scale
    highest = gl.maximum(highest, gl.max(others, 1).to(gl.float32) * others_scale)
    # A step is 0 where all is 0: 0 times a hidden score of -inf is NaN, of which a maximum takes the other.
    new_top = gl.maximum(old, gl.ceil(highest))
    shift = new_top
    if MASKED:
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key: -inf - -inf is NaN
    return gl.convert_layout(new_top, top.type.layout), shift - 8.0, gl.exp2(old - shift)


@gluon.jit
def _weights(scores, scale, shift):
    """Weights of a block, packed."""
    return _packed(gl.exp2(scores.to(gl.float32) * scale[:, None] - shift[:, None]))


@gluon.jit
def _step(
    q, k_smem, scale_smem, v_smem, ones, k_full, k_empty, v_full, v_empty, acc, other_acc, weight, p, other_p, fade,
    top, row_scale, done,
    STAGES: gl.constexpr, LANES: gl.constexpr, SCORE: gl.constexpr,
):  # fmt: skip
    """Scores of pair ``done + 1`` and their softmax, while the output products of pair ``done`` run.

    The assembler moves a wait for a product in front of whatever does not need it, but not over a branch: that of a
    wait for values which are there keeps it behind the exponentials.
    """
    OUT: gl.constexpr = acc.type.layout
    SUM: gl.constexpr = weight.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
    p = _operand(p, OPERAND)  # before a product starts: the assembler would await every one otherwise
    other_p = _operand(other_p, OPERAND)
    s_token = _start_scores(q, k_smem, k_full, done + 1, STAGES, SCORE)
    ready = v_full.index(done % STAGES)
    phase = (done // STAGES) & 1
    mbarrier.wait(ready, phase)
    w_token = _start_sums(p, other_p, ones, SUM)
    o_token = _start_outputs(p, other_p, v_smem, 0, done, STAGES, OUT)
    stage = (done + 1) % STAGES
    k_scale = word(scale_smem, 2 * stage * LANES)
    other_k_scale = word(scale_smem, (2 * stage + 1) * LANES)
    scores = warpgroup_mma_wait(4, deps=[s_token])
    mbarrier.arrive(k_empty.index(stage), count=1)
    some, others = _halves(scores)
    scale = gl.convert_layout(row_scale, gl.SliceLayout(1, some.type.layout))
    top, shift, new_fade = _top(some, others, top, scale * k_scale, scale * other_k_scale, False)
    new_p = _weights(some, scale * k_scale, shift)
    mbarrier.wait(ready, phase)
    out, sums = warpgroup_mma_wait(0, deps=[o_token, w_token])
    o_token = _start_outputs(p, other_p, v_smem, 1, done, STAGES, OUT)
    acc = _faded(acc, fade, out)
    weight = _faded(weight, fade, sums)
    new_other_p = _weights(others, scale * other_k_scale, shift)
    mbarrier.wait(ready, phase)
    out = warpgroup_mma_wait(0, deps=[o_token])
    mbarrier.arrive(v_empty.index(done % STAGES), count=1)
    other_acc = _faded(other_acc, fade, out)
    return acc, other_acc, weight, new_p, new_other_p, new_fade, top


@gluon.jit
def _consume(
    q_smem, k_smem, scale_smem, v_smem, ones, out_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    out_desc, q_scale_ptr, lift_ptr, v_scale_ptr, lse_ptr, work,
    heads, group, length, keys, n_tiles, total,
    PART: gl.constexpr, HEAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
    LANES: gl.constexpr,
):  # fmt: skip
    """A consumer: attention of rows PART * HALF and on of every query block."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * KEYS, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD // 2, 32])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SUMS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    scale_words = reinterpret(scale_smem, gl.float32, [2 * STAGES * LANES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    done = 0
    turn = 0
    mbarrier.wait(q_full.index(0), 0)
    number = word(work, 0)
    while number < total:
        slot = turn % 2
        b, h, i = item(number, n_tiles, heads, False)
        count = word(work, 4 * slot + 1)
        first = word(work, 4 * slot + 2)
        second = word(work, 4 * slot + 3)
        row = (2 * i + PART) * HALF + gl.arange(0, HALF, layout=ROW)
        pairs = (count + 1) // 2
        head_rows = (b * heads + h).to(gl.int64) * length
        row_scale = gl.load(q_scale_ptr + head_rows + row, mask=row < length, other=0.0)
        lift = gl.load(lift_ptr + head_rows + row, mask=row < length, other=0.0)
        v_scale = gl.load(v_scale_ptr + b * (heads // group) + h // group)

        acc = gl.zeros([HALF, HEAD // 2], gl.float32, OUT)
        other_acc = gl.zeros([HALF, HEAD // 2], gl.float32, OUT)
        weight = gl.zeros([HALF, SUMS], gl.float32, SUM)
        top = gl.full([HALF], float("-inf"), gl.float32, ROW)

        q = q_smem.index(2 * slot + PART)
        if pairs > 0:
            scores = warpgroup_mma_wait(0, deps=[_start_scores(q, k_smem, k_full, done, STAGES, SCORE)])
            stage = done % STAGES
            k_scale = word(scale_words, 2 * stage * LANES)
            other_k_scale = word(scale_words, (2 * stage + 1) * LANES)
            mbarrier.arrive(k_empty.index(stage), count=1)
            scores = mask_scores(scores.to(gl.float32), first, second, row, keys, KEYS, SCORE, False)
            some, others = _halves(scores)
            scale = gl.convert_layout(row_scale, gl.SliceLayout(1, some.type.layout))
            top, shift, fade = _top(some, others, top, scale * k_scale, scale * other_k_scale, True)
            p, other_p = _weights(some, scale * k_scale, shift), _weights(others, scale * other_k_scale, shift)
            for _ in range(pairs - 1):
                acc, other_acc, weight, p, other_p, fade, top = _step(
                    q, k_smem, scale_words, v_smem, ones, k_full, k_empty, v_full, v_empty, acc, other_acc, weight, p,
                    other_p, fade, top, row_scale, done, STAGES, LANES, SCORE,
                )  # fmt: skip
                done += 1
            mbarrier.arrive(q_empty.index(slot), count=1)
            p, other_p = _operand(p, OPERAND), _operand(other_p, OPERAND)
            mbarrier.wait(v_full.index(done % STAGES), (done // STAGES) & 1)
            w_token = _start_sums(p, other_p, ones, SUM)
            o_token = _start_outputs(p, other_p, v_smem, 0, done, STAGES, OUT)
            other_token = _start_outputs(p, other_p, v_smem, 1, done, STAGES, OUT)
            sums, out, other_out = warpgroup_mma_wait(0, deps=[w_token, o_token, other_token])
            weight = _faded(weight, fade, sums)
            acc = _faded(acc, fade, out)
            other_acc = _faded(other_acc, fade, other_out)
            mbarrier.arrive(v_empty.index(done % STAGES), count=1)
            done += 1
        else:
            mbarrier.arrive(q_empty.index(slot), count=1)

        # total_weight is 0 exactly where no key was seen: then out is 0 and lse is -inf.
        total_weight = gl.convert_layout(gl.max(weight, 1), ROW)  # of equal columns
        lse = (top - 8.0 + gl.log2(total_weight) + lift) * 0.6931471805599453  # LN_2
        factor = v_scale / gl.where(total_weight == 0.0, 1.0, total_weight)
        factor = gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        tma.store_wait(0)  # the one before has left out_smem
        out_smem.index(2 * PART).store((acc * factor).to(out_desc.dtype))
        out_smem.index(2 * PART + 1).store((other_acc * factor).to(out_desc.dtype))
        fence_async_shared()
        for part in gl.static_range(2):
            tile = out_smem.index(2 * PART + part)
            tile = reinterpret(tile, out_desc.dtype, [1, 1, HALF, HEAD // 2], out_desc.layout)
            tma_store(out_desc, [b, h, (2 * i + PART) * HALF, part * (HEAD // 2)], tile)
        gl.store(lse_ptr + head_rows + row, lse, mask=row < length)
        turn += 1
        mbarrier.wait(q_full.index(turn % 2), (turn // 2) & 1)
        number = word(work, 4 * (turn % 2))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["heads", "group", "length", "keys", "n_tiles", "total", "counts_stride_b", "counts_stride_h"]
)
def _forward_hopper_8_kernel(
    q_desc, k_desc, k_scale_desc, v_desc, out_desc, counts_ptr, indices_ptr, q_scale_ptr, lift_ptr, v_scale_ptr,
    counter_ptr, lse_ptr,
    counts_stride_b, counts_stride_h, counts_stride_i, indices_stride_b, indices_stride_h, indices_stride_i,
    heads, group, length, keys, n_tiles, total,
    HEAD: gl.constexpr, KEYS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, LANES: gl.constexpr,
    LOADER_REGS: gl.constexpr, CONSUMER_REGS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD], q_desc.dtype)
    OUT_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD // 2], out_desc.dtype)
    VALUES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEAD, KEYS], v_desc.dtype)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [4, HALF, HEAD], TILE)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 2 * KEYS, HEAD], TILE)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2 * STAGES, HEAD, KEYS], VALUES)
    scale_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, LANES], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [4, HALF, HEAD // 2], OUT_TILE)
    # By their bits, four at a time: of a constant converted to e4m3 the assembler (12.8) made other numbers.
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SUMS, KEYS], v_desc.dtype)
    ones = gl.allocate_shared_memory(v_desc.dtype, [SUMS, KEYS], ONES)
    words = reinterpret(ones, gl.int32, [SUMS * KEYS // 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    words.store(gl.full([SUMS * KEYS // 4], 0x38383838, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
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
                q_smem, k_smem, scale_smem, v_smem, ones, out_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_desc, q_scale_ptr, lift_ptr, v_scale_ptr, lse_ptr, work,
                heads, group, length, keys, n_tiles, total,
                0, HEAD, KEYS, HALF, STAGES, LANES,
            )),
            (_consume, (
                q_smem, k_smem, scale_smem, v_smem, ones, out_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_desc, q_scale_ptr, lift_ptr, v_scale_ptr, lse_ptr, work,
                heads, group, length, keys, n_tiles, total,
                1, HEAD, KEYS, HALF, STAGES, LANES,
            )),
            (_load, (
                q_desc, k_desc, k_scale_desc, v_desc, counts_ptr, indices_ptr, counter_ptr,
                work, q_smem, k_smem, scale_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                counts_stride_b, counts_stride_h, counts_stride_i,
                indices_stride_b, indices_stride_h, indices_stride_i,
                heads, group, n_tiles, total,
                HEAD, KEYS, HALF, STAGES, LANES, TAIL,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, LOADER_REGS],
    )  # fmt: skip


def takes(query: Tensor, value: Tensor, how: How) -> bool:
    """Whether :func:`forward` computes a call: equal head sizes of 64 or 128, results of 16 bits, no causality, and a
    scale, of which it takes that 0 times a hidden score of -inf is none."""
    equal = query.shape[3] == value.shape[3]
    hidden_stay = not how.is_causal and how.scale != 0
    return equal and query.shape[3] in STAGES and query.dtype in GLUON_TYPES and hidden_stay


def _tiles(x: Tensor, rows: int, dtype: gl.dtype) -> TensorDescriptor:
    """A TMA descriptor of contiguous x [B, H, N, D] in tiles of ``rows`` whole rows."""
    block = [1, 1, rows, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def forward(
    codes: Codes, counts: Tensor, indices: Tensor, out: Tensor, lse: Tensor, counter: Tensor | None = None
) -> None:
    """Fill ``out`` and ``lse`` as :func:`forward.forward` describes them; ``counter`` is one that holds 0."""
    batch, heads, length, head_size = codes.q.shape
    key_heads, keys = codes.k.shape[1:3]
    counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in (counts, indices))
    n_tiles = ceil_div(length, QUERY_BLOCK)
    total = n_tiles * batch * heads
    counter = counter_of_forward(counts, codes.k_scale.shape[2], False, counter)
    recording.launch(
        _forward_hopper_8_kernel, (min(launch.multiprocessors(out.device), total),),
        _tiles(codes.q, ROWS, gl.int8), _tiles(codes.k, KEY_BLOCK, gl.int8), _tiles(codes.k_scale, 1, gl.float32),
        _tiles(codes.v.flatten(2, 3), head_size, gl.float8e4nv), descriptor(out, ROWS, head_size // 2, False),
        counts, indices, codes.q_scale, codes.lift, codes.v_scale, counter, lse,
        *counts.stride(), *indices.stride()[:3],
        heads, heads // key_heads, length, keys, n_tiles, total,
        HEAD=head_size, KEYS=KEY_BLOCK, HALF=ROWS, STAGES=STAGES[head_size], LANES=LANES,
        LOADER_REGS=LOADER_REGISTERS, CONSUMER_REGS=CONSUMER_REGISTERS, TAIL=counter.numel() - 1, num_warps=4,
    )  # fmt: skip
