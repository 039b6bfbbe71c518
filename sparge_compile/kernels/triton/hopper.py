"""What the kernels for Hopper share, in Gluon: copies by TMA, messages, products, masks, and what calls they take.

Gluon is experimental: names of Triton 3.8 and 3.9, else those before them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import launch
from ..block_map import QUERY_BLOCK
from ..how import How
from . import tiles

ROWS = QUERY_BLOCK // 2  # of one consumer
COLUMNS = 64  # elements of 16 bits in the 128 bytes of one swizzled line
GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_shared = gl.shared_memory_descriptor
reinterpret = getattr(_shared, "reinterpret", None) or _shared._reinterpret


@gluon.jit
def item(number, n_tiles, heads, CAUSAL: gl.constexpr):
    """(b, h, query block) of work item ``number``: query blocks vary fastest, so that a head's keys stay in L2.

    Of packed sequences b is the number.
    """
    i = number % n_tiles
    if CAUSAL:
        i = n_tiles - 1 - i  # the longest lists first
    h = number // n_tiles % heads
    b = number // n_tiles // heads
    return b, h, i


@gluon.jit
def number_at(place, counter_ptr, total, TAIL: gl.constexpr):
    """The number of the item that is taken after ``place`` others; with a TAIL, an order follows the counter
    (schedule.py)."""
    if TAIL == 0:
        return place
    else:
        late = place - gl.maximum(total - TAIL, 0)
        listed = (late >= 0) & (place < total)
        return gl.where(listed, gl.load(counter_ptr + 1 + late, mask=listed, other=0), place)


@gluon.jit
def sequence(starts_ptr, b, rows, PACKED: gl.constexpr):
    """(first row, rows) of a sequence of a packed tensor; else all rows."""
    if PACKED:
        start = gl.load(starts_ptr + b)
        return start, gl.load(starts_ptr + b + 1) - start
    else:
        return 0, rows


@gluon.jit
def diagonal_of(length, keys, CAUSAL: gl.constexpr):
    """How many keys after its own number a query sees under causality: see How.diagonal."""
    if CAUSAL == 2:  # BOTTOM_RIGHT
        return keys - length
    else:
        return 0


@gluon.jit
def pair_of(list_ptr, pair, wanted):
    """Blocks 2 * pair and 2 * pair + 1 of a list, if wanted; else any."""
    return gl.load(list_ptr + 2 * pair, mask=wanted, other=0), gl.load(list_ptr + 2 * pair + 1, mask=wanted, other=0)


@gluon.jit
def copy(
    desc, b, h, row, start, n_rows, tile, full,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, PART: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Start the copy of ROWS rows of a head, from ``row`` on, into rows PART * ROWS and on of ``tile``.

    A packed sequence begins at row ``start`` and has ``n_rows``: what is past its end comes as zeros, so that nothing
    of the next one gets into a product (tiles.sequence_coordinates).

    ``tile`` is swizzled: its memory holds, for each COLUMNS columns, all rows one after the other.
    """
    across: gl.constexpr = tile.shape[1] // COLUMNS
    down: gl.constexpr = tile.shape[0] // ROWS
    PIECE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], desc.dtype)
    pieces = reinterpret(tile, desc.dtype, [across * down, ROWS, COLUMNS], PIECE)
    for c in gl.static_range(across):
        if PACKED:
            to = reinterpret(pieces.index(down * c + PART), desc.dtype, [1, 1, 1, ROWS, COLUMNS], desc.layout)
            tma_load(desc, [0x40000000, start + n_rows, h, 0x40000000 - n_rows + row, c * COLUMNS], full, to)
        else:
            to = reinterpret(pieces.index(down * c + PART), desc.dtype, [1, 1, ROWS, COLUMNS], desc.layout)
            tma_load(desc, [b, h, row, c * COLUMNS], full, to)


@gluon.jit
def load_pair(
    desc, smem, full, empty, number, b, head, first, second, start, rows,
    KEYS: gl.constexpr, STAGES: gl.constexpr, COLUMNS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Start the copies of two key blocks into place ``number`` of a ring, once that is free."""
    stage = number % STAGES
    mbarrier.wait(empty.index(stage), ((number // STAGES) & 1) ^ 1)
    ready = full.index(stage)
    tile = smem.index(stage)
    mbarrier.expect(ready, 2 * KEYS * tile.shape[1] * 2)
    copy(desc, b, head, first * KEYS, start, rows, tile, ready, KEYS, COLUMNS, 0, PACKED)
    copy(desc, b, head, second * KEYS, start, rows, tile, ready, KEYS, COLUMNS, 1, PACKED)


@gluon.jit
def lse_in_log2(lse):
    """lse in log2 units; +inf where a row has no keys, or does not exist, so that its P is exp2(-inf) = 0."""
    return gl.where(lse == float("-inf"), float("inf"), lse) * 1.4426950408889634  # LOG2_E


@gluon.jit
def word(words, place):
    """One number of a loader's message."""
    EVERYWHERE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(words.index(place).load(EVERYWHERE), 0)


@gluon.jit
def start_scores(q, k_smem, k_full, done, STAGES: gl.constexpr, SCORE: gl.constexpr):
    """Start q k^T for pair number ``done`` of the ring."""
    stage = done % STAGES
    mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
    SHAPE: gl.constexpr = [q.shape[0], k_smem.shape[1]]
    zeros = gl.zeros(SHAPE, gl.float32, SCORE)
    return warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def mask_scores(scores, first, second, last_key, keys, KEYS: gl.constexpr, SCORE: gl.constexpr, CAUSAL: gl.constexpr):
    """-inf for keys past the end or the last that a query sees, and the missing partner of an odd list's last block."""
    column = gl.arange(0, 2 * KEYS, layout=gl.SliceLayout(0, SCORE))
    key = gl.where(column < KEYS, first * KEYS, (second - 1) * KEYS) + column
    seen = ((key < keys) & ((column < KEYS) | (second > first)))[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= last_key[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def store_rows(
    x, out_ptr, b, h, first, stride_b, stride_h, stride_s, block, keys,
    KEYS: gl.constexpr, HEAD_SIZE: gl.constexpr, HEAD_PAD: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Store a tile of a gradient, of whose columns those past HEAD_SIZE do not exist."""
    LAYOUT: gl.constexpr = x.type.layout
    lane = gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, HEAD_PAD, layout=gl.SliceLayout(0, LAYOUT))
    out_ptr += h.to(gl.int64) * stride_h + (first + block * KEYS).to(gl.int64) * stride_s
    if not PACKED:
        out_ptr += b.to(gl.int64) * stride_b
    keep = (block * KEYS + lane < keys)[:, None]
    if HEAD_PAD != HEAD_SIZE:
        keep = keep & (column < HEAD_SIZE)[None, :]
    gl.store(out_ptr + lane[:, None] * stride_s + column[None, :], x.to(out_ptr.dtype.element_ty), mask=keep)


def descriptor(x: Tensor, rows: int, columns: int, packed: bool) -> TensorDescriptor:
    """A TMA descriptor of x [B, H, L, D] in tiles of ``rows`` and ``columns``, for Gluon."""
    plain = tiles.descriptor(x, rows, columns, packed)
    layout = gl.NVMMASharedLayout.get_default_for(plain.block_shape, GLUON_TYPES[x.dtype])
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


def takes(head_pads: Collection[int], how: How, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether kernels for these padded head sizes compute a call: 16 bits, one head size, no mask, memory for TMA."""
    return (
        how.attn_mask is None
        and launch.pad_head(q.shape[3]) in head_pads
        and q.shape[3] == v.shape[3]
        and q.dtype in GLUON_TYPES
        and all(tiles.has_descriptor(x) for x in (q, k, v, *others))
    )
