"""The order in which programs that stay on their multiprocessor take items of work: the last ones longest list first.

Items are taken by their numbers, so that those that run at once read the same head. But lists differ in length, and
while a long one that was begun last is walked, all other multiprocessors are idle: hence the last :data:`TAIL` items,
some for each program, go by the length of their lists, where that pays. What each gives does not depend on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..how import How
from . import recording

TAIL = 1024  # items that go by length
RANKED, WARPS = 16, 4  # items of which one program finds the ranks
# Where a launch of its own pays: from so many key blocks on (measured with 72, where a forward lost 3 % and a backward
# gained 8, and with 512), and up to so many items for a multiprocessor: of more, the last take no time to speak of.
LEAST_FORWARD, LEAST_BACKWARD, ROUNDS = 256, 64, 64


class Lists(NamedTuple):
    """Of each item, one list or those of ``group`` heads: counts [B, H, N] of any strides.

    Items are numbered along N, backwards if ``reverse``, then by head and batch.
    """

    counts: Tensor
    group: int = 1
    reverse: bool = False


@triton.jit
def _lengths(counts_ptr, number, stride_b, stride_h, stride_n, heads, n, group, total, REVERSE: tl.constexpr):
    """How long the lists of items are; -1 where there is no item."""
    exists = number < total
    i = number % n
    if REVERSE:
        i = n - 1 - i
    row_ptrs = counts_ptr + (number // n // heads).to(tl.int64) * stride_b + i * stride_n
    row_ptrs += (number // n % heads * group).to(tl.int64) * stride_h
    length = tl.zeros(number.shape, tl.int32)
    for member in range(group):
        length += tl.load(row_ptrs + member * stride_h, mask=exists, other=0)
    return tl.where(exists, length, -1)


@triton.jit
def _rank(
    counts_ptr, order_ptr, stride_b, stride_h, stride_n, heads, n, group, total, part,
    TAIL: tl.constexpr, RANKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Put some of the last items where they belong: behind all that are longer, or as long and of a lower number."""
    first = tl.maximum(total - TAIL, 0)
    number, other = first + part * RANKED + tl.arange(0, RANKED), first + tl.arange(0, TAIL)
    length = _lengths(counts_ptr, number, stride_b, stride_h, stride_n, heads, n, group, total, REVERSE)[:, None]
    lengths = _lengths(counts_ptr, other, stride_b, stride_h, stride_n, heads, n, group, total, REVERSE)[None, :]
    ahead = (lengths > length) | ((lengths == length) & (other[None, :] < number[:, None]))
    tl.store(order_ptr + 1 + tl.sum(ahead.to(tl.int32), 1), number, mask=number < total)
    if part == 0:
        tl.store(order_ptr, 0)


@triton.jit(do_not_specialize=["a_heads", "a_n", "a_group", "a_total", "b_heads", "b_n", "b_group", "b_total"])
def _schedule_kernel(
    a_counts_ptr, a_order_ptr, b_counts_ptr, b_order_ptr,
    a_stride_b, a_stride_h, a_stride_n, a_heads, a_n, a_group, a_total,
    b_stride_b, b_stride_h, b_stride_n, b_heads, b_n, b_group, b_total,
    TAIL: tl.constexpr, RANKED: tl.constexpr, A_REVERSE: tl.constexpr, B_REVERSE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    if part < TAIL // RANKED:
        _rank(
            a_counts_ptr, a_order_ptr, a_stride_b, a_stride_h, a_stride_n, a_heads, a_n, a_group, a_total,
            part, TAIL=TAIL, RANKED=RANKED, REVERSE=A_REVERSE,
        )  # fmt: skip
    else:
        _rank(
            b_counts_ptr, b_order_ptr, b_stride_b, b_stride_h, b_stride_n, b_heads, b_n, b_group, b_total,
            part - TAIL // RANKED, TAIL=TAIL, RANKED=RANKED, REVERSE=B_REVERSE,
        )  # fmt: skip


def schedule(*lists: Lists) -> list[Tensor]:
    """For each of one or two kinds of items, int32 [1 + TAIL]: a counter, 0, and the numbers of the last items."""
    found = [x.counts.new_empty(1 + TAIL) for x in lists]
    named: dict[str, Any] = {}
    for name, (counts, group, reverse), order in zip("ab", (lists[0], lists[-1]), (found[0], found[-1]), strict=True):
        _, heads, n = counts.shape
        named |= {f"{name}_counts_ptr": counts, f"{name}_order_ptr": order}
        named |= {f"{name}_stride_{x}": stride for x, stride in zip("bhn", counts.stride(), strict=True)}
        named |= {f"{name}_heads": heads // group, f"{name}_n": n, f"{name}_group": group}
        named |= {f"{name}_total": counts.numel() // group, f"{name.upper()}_REVERSE": reverse}
    with torch.cuda.device_of(found[0]):
        recording.launch(
            _schedule_kernel, (len(lists) * TAIL // RANKED,), **named, TAIL=TAIL, RANKED=RANKED, num_warps=WARPS
        )
    return found


def of_backward(kept: Tensor, readers: Tensor, q: Tensor, k: Tensor, how: How) -> list[Tensor]:
    """Schedules of dq and of dk and dv, from the lengths of the lists and of the inverted ones."""
    batch, heads = how.sequences(q), q.shape[1]
    rows, columns = (x.expand(batch, heads, -1) for x in (kept, readers))
    return schedule(Lists(rows, reverse=how.is_causal), Lists(columns, heads // k.shape[1]))


def pays_backward(readers: Tensor, q: Tensor, k: Tensor, how: How) -> bool:
    """Whether a backward is to be scheduled."""
    return _pays(how.sequences(q) * k.shape[1], readers.shape[2], readers.shape[2], LEAST_BACKWARD, q.device)


def counter_of_forward(counts: Tensor, n_key: int, is_causal: bool, counter: Tensor | None) -> Tensor:
    """What a forward's programs take query blocks by: a schedule where it pays, else the counter, made if need be."""
    batch, heads, n_query = counts.shape
    if _pays(batch * heads, n_query, n_key, LEAST_FORWARD, counts.device):
        return schedule(Lists(counts, reverse=is_causal))[0]
    return recording.zero(counts.new_empty(1)) if counter is None else counter


def _pays(heads: int, items: int, n_key: int, least: int, device: torch.device) -> bool:
    return n_key >= least and heads * items <= ROUNDS * launch.multiprocessors(device)
