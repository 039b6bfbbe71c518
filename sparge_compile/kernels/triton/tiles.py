"""Pieces that the forward and the backward kernels share: loading a tile of rows, masking a tile of scores.

Scores are in units of log2 everywhere in the kernels (the scale and log2(e) are one factor), so that the exponential
is a bare ``exp2``. What a kernel does with the tiles is its own file's business.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launch
from ..how import How

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MAX_HEAD_SIZE = 256

FAR = 0x40000000  # 2**30: where rows of packed sequences end, in their descriptors

NO_MASK, KEY_MASK, FULL_MASK = 0, 1, 2  # MASK_KIND: none, one value per key, one value per (query, key)


def matrix_arguments(block_rows: int, **tensors: Tensor) -> dict:
    """Kernel arguments that say where [B, H, L, D] tensors lie: ``x_stride_b, _h, _l, _d``, ALIGN and OFFSET.

    The first three strides are passed in units of ALIGN elements. Triton knows by itself only whether a stride is a
    multiple of 16; rows of 72 elements, multiples of 8, would be read element by element. OFFSET is the integer that
    holds an offset inside a tile of ``block_rows`` rows; whatever lies before the tile is counted in 64 bits.
    """
    align = max(1, 16 // max(x.dtype.itemsize for x in tensors.values()))
    used = {name: [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)] for name, x in tensors.items()}
    while any(stride % align for strides in used.values() for stride in strides[:3]):
        align //= 2
    arguments = {}
    for name, strides in used.items():
        for letter, stride in zip("bhl", strides[:3], strict=True):
            arguments[f"{name}_stride_{letter}"] = stride // align
        arguments[f"{name}_stride_d"] = strides[3]
    reach = max(block_rows * strides[2] + MAX_HEAD_SIZE * strides[3] for strides in used.values())
    return arguments | {"ALIGN": align, "OFFSET": tl.int32 if reach < 2**31 else tl.int64}


def has_descriptor(x: Tensor) -> bool:
    """Whether TMA hardware takes x [B, H, L, D]: no gaps in the last dimension, 16-byte aligned memory and rows."""
    steps = [stride * x.dtype.itemsize for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    contiguous = x.stride(3) == 1 or x.shape[3] == 1
    return contiguous and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def descriptor(x: Tensor, block_rows: int, head_pad: int, packed: bool = False) -> TensorDescriptor:
    """A TMA descriptor of x [B, H, L, D] in tiles of [1, 1, block_rows, head_pad], or of sequences packed in it."""
    if packed:
        return _descriptor_of_sequences(x, block_rows, head_pad)
    aligned = 16 // x.dtype.itemsize  # for a dimension of one, which is never stepped, whatever its stride is
    strides = [aligned if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block_rows, head_pad])


def _descriptor_of_sequences(x: Tensor, block_rows: int, head_pad: int) -> TensorDescriptor:
    """A TMA descriptor of x [1, H, T, D] in tiles of [1, 1, 1, block_rows, head_pad], which ends where a sequence does.

    Hardware checks a coordinate against the size of its dimension alone. So rows are counted back from FAR, the size
    given for them: row r of n is FAR - n + r, and a row past the end lies outside, is zero when it is read and is not
    written. Two more dimensions bring the address back, which wraps at 64 bits: see :func:`sequence_coordinates`.
    The same trick as in triton.tools.ragged_tma, which has one dimension less.
    """
    _, heads, length, head_size = x.shape
    aligned = 16 // x.dtype.itemsize  # for a dimension of one, as in descriptor()
    step_h, step_l = (aligned if n == 1 else x.stride(d) for d, n in ((1, heads), (2, length)))
    shape, strides = [0x7FFF0000, 0x7FFF0000, heads, FAR, head_size], [2**34 - step_l, step_l, step_h, step_l, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, 1, block_rows, head_pad])


def tile_sources(x: Tensor, y: Tensor, block_rows: int, packed: bool) -> tuple[bool, Any, Any]:
    """How a kernel gets tiles of two tensors [B, H, L, D or Dv]: (DESCRIPTORS, source of x, source of y)."""
    wanted = launch.use_descriptors(x.dtype, x.device)
    if wanted and has_descriptor(x) and has_descriptor(y):
        pads = launch.pad_heads(x.shape[3], y.shape[3])
        made = (descriptor(z, block_rows, pad, packed) for z, pad in zip((x, y), pads, strict=True))
        return True, *made
    return False, x, y


def head_arguments(q: Tensor, v: Tensor) -> dict:
    """Kernel arguments for the head sizes of queries and keys, and of values: as they are, and padded."""
    head_pad, value_pad = launch.pad_heads(q.shape[3], v.shape[3])
    return {"HEAD_SIZE": q.shape[3], "HEAD_PAD": head_pad, "VALUE_SIZE": v.shape[3], "VALUE_PAD": value_pad}


def how_arguments(how: How) -> dict:
    """Kernel arguments that say how causality is aligned, and where packed sequences begin."""
    starts = {"q_starts_ptr": how.cu_seqlens_q, "k_starts_ptr": how.cu_seqlens_k}
    return starts | {"CAUSAL": how.causality, "PACKED": how.packed}


def mask_arguments(attn_mask: Tensor | None, batch: int, heads: int) -> dict:
    """Kernel arguments for a mask [B or 1, H or 1, L or 1, S]: pointer, strides (0 where broadcast), its kind."""
    if attn_mask is None:
        strides = {f"mask_stride_{letter}": 0 for letter in "bhls"}
        return strides | {"mask_ptr": None, "MASK_KIND": NO_MASK, "MASK_IS_BOOL": False}
    is_bool = attn_mask.dtype.itemsize == 1  # the only one-byte dtype that a mask may have
    stride_b, stride_h, stride_l, stride_s = attn_mask.stride()
    return {
        "mask_ptr": attn_mask.view(torch.uint8) if is_bool else attn_mask,
        "mask_stride_b": stride_b if attn_mask.shape[0] == batch else 0,
        "mask_stride_h": stride_h if attn_mask.shape[1] == heads else 0,
        "mask_stride_l": stride_l,
        "mask_stride_s": stride_s,
        "MASK_KIND": KEY_MASK if attn_mask.shape[2] == 1 else FULL_MASK,
        "MASK_IS_BOOL": is_bool,
    }


@triton.jit
def tile_offsets(lane, column, stride_row, stride_column, ALIGN: tl.constexpr, OFFSET: tl.constexpr):
    """[R, D] offsets of a tile's elements from its first one; the same for every tile of a tensor."""
    return lane.to(OFFSET)[:, None] * (stride_row * ALIGN) + column.to(OFFSET)[None, :] * stride_column


@triton.jit
def load_tile(pointers, row, column, n_rows, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Rows of a matrix of HEAD_SIZE columns; zeros past n_rows (if CHECK_ROWS) and past HEAD_SIZE."""
    if CHECK_ROWS and HEAD_PAD != HEAD_SIZE:
        return tl.load(pointers, mask=(row < n_rows)[:, None] & (column < HEAD_SIZE)[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=(row < n_rows)[:, None], other=0.0)
    elif HEAD_PAD != HEAD_SIZE:
        return tl.load(pointers, mask=(column < HEAD_SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def sequence(starts_ptr, number, rows, PACKED: tl.constexpr):
    """(first row, rows) of a sequence of a packed tensor; else all rows."""
    if PACKED:
        start = tl.load(starts_ptr + number)
        return start, tl.load(starts_ptr + number + 1) - start
    else:
        return 0, rows


@triton.jit
def diagonal_of(length, keys, CAUSAL: tl.constexpr):
    """How many keys after its own number a query sees under causality: see How.diagonal."""
    if CAUSAL == 2:  # BOTTOM_RIGHT
        return keys - length
    else:
        return 0


@triton.jit
def sequence_coordinates(start, n_rows, head, row):
    """Where row ``row`` of a head of a packed sequence is, for a descriptor: see _descriptor_of_sequences.

    FAR · (2^34 - step) + (start + n_rows) · step + (FAR - n_rows + row) · step is (start + row) · step, modulo 2^64.
    """
    return [0x40000000, start + n_rows, head, 0x40000000 - n_rows + row, 0]  # FAR


@triton.jit
def load_block(
    source, offsets, step, b, head, block, lane, column, start, n_rows,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    CHECK_ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Tile number ``block`` of one head: [ROWS, HEAD_PAD].

    ``source`` is a descriptor of the whole tensor, or a pointer at this head (of the sequence that begins at row
    ``start``, if packed), from which ``step`` leads to the next tile and ``offsets`` to a tile's elements. A
    descriptor's loads are zero outside the tensor, or the sequence, at no cost.
    """
    if DESCRIPTORS and PACKED:
        return tl.reshape(source.load(sequence_coordinates(start, n_rows, head, block * ROWS)), [ROWS, HEAD_PAD])
    elif DESCRIPTORS:
        return tl.reshape(source.load([b, head, block * ROWS, 0]), [ROWS, HEAD_PAD])
    else:
        return load_tile(
            source + block * step + offsets, block * ROWS + lane, column, n_rows,
            HEAD_SIZE=HEAD_SIZE, HEAD_PAD=HEAD_PAD, CHECK_ROWS=CHECK_ROWS,
        )  # fmt: skip


@triton.jit
def store_tile(pointers, tile, row, column, n_rows, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Store a tile at the pointers that lie inside the tensor, in the dtype of its memory."""
    keep = (row < n_rows)[:, None]
    if HEAD_PAD != HEAD_SIZE:
        keep = keep & (column < HEAD_SIZE)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=keep)


@triton.jit
def mask_scores(
    scores, row, column, mask_ptr, mask_stride_l, mask_stride_s, length, keys,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, MASK_IS_BOOL: tl.constexpr,
):  # fmt: skip
    """Scores in log2 units with -inf where attention must not look, and an additive mask added.

    ``row`` and ``column`` are the query and key numbers, shaped to broadcast to ``scores`` ([R, 1] and [1, C], or the
    other way round for transposed scores); ``mask_ptr`` points at the mask of this batch and head.
    """
    allowed = column < keys
    if CAUSAL:
        allowed = allowed & (column <= row + diagonal_of(length, keys, CAUSAL))
    if MASK_KIND != 0:
        pointers = mask_ptr + column.to(tl.int64) * mask_stride_s
        inside = column < keys
        if MASK_KIND == 2:
            pointers = pointers + row.to(tl.int64) * mask_stride_l
            inside = inside & (row < length)
        if MASK_IS_BOOL:
            allowed = allowed & (tl.load(pointers, mask=inside, other=0) != 0)
        else:
            value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            allowed = allowed & (value != float("-inf"))
            scores = scores + value * 1.4426950408889634  # LOG2_E
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def dense_prefix(list_ptr, count, dense_blocks):
    """How many leading entries of an ascending list are below ``dense_blocks`` (the rest need element masks).

    Walks from the end: the rule leaves at most two blocks to mask, but a caller's own map may hold more.
    """
    n_dense = count
    last = tl.load(list_ptr + n_dense - 1, mask=n_dense > 0, other=-1)
    while last >= dense_blocks:
        n_dense -= 1
        last = tl.load(list_ptr + n_dense - 1, mask=n_dense > 0, other=-1)
    return n_dense


@triton.jit
def masked_prefix(list_ptr, count, first_dense):
    """How many leading entries of an ascending list are below ``first_dense`` (they need element masks)."""
    n_masked = 0
    first = tl.load(list_ptr, mask=count > 0, other=2147483647)
    while first < first_dense:
        n_masked += 1
        first = tl.load(list_ptr + n_masked, mask=n_masked < count, other=2147483647)
    return n_masked


@triton.jit
def load_lse(lse_ptr, row, length):
    """lse in log2 units; +inf where a row has no keys or does not exist, so that its P is exp2(-inf) = 0."""
    lse = tl.load(lse_ptr + row, mask=row < length, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * 1.4426950408889634  # LOG2_E
