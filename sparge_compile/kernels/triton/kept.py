"""Kept tokens on the GPU: the ranges of thresholds [H, 6] as tokens, and as blocks of them: see ``kernels/kept.py``.

Where a sequence stands as it is, a block's tokens are known by its number, and the kernel that selects asks for itself.
Where it is in another order, a kernel of its own looks at the tokens of each block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...keeping import OF_GRAPH, WIDTH, beside_longest
from ..block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from ..how import How
from . import recording


@triton.jit
def tokens_of_range(range_ptr, stride, found_start, found_stop, length, OF_GRAPH: tl.constexpr):
    """(start, stop) of a range of tokens, float32, within a sequence of this length."""
    start, stop = tl.load(range_ptr), tl.load(range_ptr + stride)
    of_graph = start == OF_GRAPH
    start = tl.where(of_graph, found_start * 1.0, start)
    stop = tl.where(of_graph, found_stop * 1.0, stop)
    end = length * 1.0  # not .to: a length of 1 is a constant
    start = tl.minimum(tl.maximum(tl.where(start < 0, start + end, start), 0.0), end)
    stop = tl.minimum(tl.maximum(tl.where(stop < 0, stop + end, stop), 0.0), end)
    return start, tl.where(start < stop, stop, -1.0)  # an empty range stops before every block


@triton.jit
def holds_tokens(block, ROWS: tl.constexpr, start, stop):
    """Whether a block of so many rows holds a token of a range."""
    first = (block * ROWS).to(tl.float32)
    return (first < stop) & (first + ROWS > start)


@triton.jit
def _kept_kernel(
    thresholds_ptr, slots_ptr,
    kept_ptr,
    thresholds_stride_h, thresholds_stride_t,
    n_blocks, length, found_start, found_stop,
    COLUMN: tl.constexpr, ROWS: tl.constexpr, OF_GRAPH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h, block = pid // n_blocks, pid % n_blocks
    range_ptr = thresholds_ptr + h * thresholds_stride_h + COLUMN * thresholds_stride_t
    start, stop = tokens_of_range(range_ptr, thresholds_stride_t, found_start, found_stop, length, OF_GRAPH)
    slot = block * ROWS + tl.arange(0, ROWS)
    token = tl.load(slots_ptr + slot, mask=slot < length, other=-1).to(tl.float32)
    tl.store(kept_ptr + pid, tl.max(((token >= start) & (token < stop)).to(tl.int32), 0).to(tl.uint8))


def kept_arguments(thresholds: Tensor, how: How, length: int, keys: int) -> dict:
    """Kernel arguments for what thresholds [H, 6] keep of tokens in another order: uint8 [H, Nk], and [H, Nq].

    Dense rows are those of kept tokens, so there are none where queries are other tokens than keys.
    """
    k_kept = q_kept = None
    if thresholds.shape[1] == WIDTH:
        k_kept = _kept(thresholds, 2, how.slots_k, KEY_BLOCK, how)
        if k_kept is not None and length == keys:
            q_kept = _kept(thresholds, 4, how.slots_q, QUERY_BLOCK, how)
    return {"q_kept_ptr": q_kept, "k_kept_ptr": k_kept, "ORDERED": thresholds.shape[1] == WIDTH and how.ordered}


def _kept(thresholds: Tensor, column: int, slots: Tensor | None, rows: int, how: How) -> Tensor | None:
    if slots is None:
        return None
    heads, length = len(thresholds), len(slots)
    n_blocks = ceil_div(length, rows)
    kept = torch.empty((heads, n_blocks), dtype=torch.uint8, device=slots.device)
    found_start, found_stop = beside_longest(how.parts)
    recording.launch(
        _kept_kernel, (heads * n_blocks,),
        thresholds_ptr=thresholds, slots_ptr=slots,
        kept_ptr=kept,
        thresholds_stride_h=thresholds.stride(0), thresholds_stride_t=thresholds.stride(1),
        n_blocks=n_blocks, length=length, found_start=found_start, found_stop=found_stop,
        COLUMN=column, ROWS=rows, OF_GRAPH=OF_GRAPH,
    )  # fmt: skip
    return kept
