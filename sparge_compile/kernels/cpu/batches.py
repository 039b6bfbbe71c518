"""How the CPU walks a block map: which heads and query blocks are worked on together, and what hides single keys.

In: a block map, a mask, shapes. Out: head parts small enough to copy, and within each the batches of query blocks that
gather their keys for one kernel call. The arithmetic is in attention.py. Letters and shapes: see rule.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div, visible_blocks
from ..how import How

PART_BYTES = 32 << 20  # queries, keys, values and outputs of the heads that are worked on together
GATHER_BYTES = 8 << 20  # keys, values and mask gathered for one kernel call; much more of it leaves the cache

Heads = tuple[slice, slice]  # an index into batch and heads


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def head_parts(q: Tensor, k: Tensor, v: Tensor | None = None) -> Iterator[tuple[Heads, Heads]]:
    """Indices into q and into k that together cover all heads, each of about PART_BYTES or of one key head."""
    (batch, heads, length, head_size), (key_heads, keys) = q.shape, k.shape[1:3]
    group = heads // max(key_heads, 1)
    head_size = head_size if v is None else max(head_size, v.shape[3])
    head_bytes = 2 * (group * length + keys) * head_size * wide_dtype(q).itemsize
    at_once = max(1, PART_BYTES // max(head_bytes, 1))
    head_step, batch_step = min(at_once, key_heads), max(1, at_once // key_heads)
    for b in range(0, batch, batch_step):
        for h in range(0, key_heads, head_step):
            some, end = slice(b, min(b + batch_step, batch)), min(h + head_step, key_heads)
            yield (some, slice(h * group, end * group)), (some, slice(h, end))


def over_heads(x: Tensor, q: Tensor) -> Tensor:
    """A view of x [B or 1, H or 1, ...] for all batches and heads of q."""
    return x.expand(*q.shape[:2], *x.shape[2:])


class Part(NamedTuple):
    """The lists and the mask of some heads. A row is one (batch, head, query block); there are N of them."""

    counts: Tensor  # int32 [N]
    indices: Tensor  # int32 [N, up to Nk]
    attn_mask: Tensor | None  # bool or float [b, h, L or 1, S]
    is_causal: bool
    heads: tuple[int, int]  # b, h
    group: int  # query heads to a key head
    length: int
    keys: int
    n_key: int  # Nk
    diagonal: int  # of causality: how many keys after its own number a query sees

    @staticmethod
    def of(lists: BlockMap, attn_mask: Tensor | None, how: How, q: Tensor, k: Tensor) -> Part:
        """The lists of some heads [b, h, ...] of q [b, h, L, D] over k [b, Hk, S, D], under their part of the mask."""
        n_key = lists.indices.shape[-1]
        flat = lists.counts.reshape(-1), lists.indices.reshape(-1, n_key)
        heads = (q.shape[0], q.shape[1])
        length, keys = q.shape[2], k.shape[2]
        sizes = (q.shape[1] // k.shape[1], length, keys, n_key)
        return Part(*flat, attn_mask, how.is_causal, heads, *sizes, how.diagonal(length, keys))

    @property
    def n_query(self) -> int:
        """Query blocks of one head."""
        return ceil_div(self.length, QUERY_BLOCK)

    @property
    def query_rows(self) -> int:
        """Rows in a query block: fewer than 128 only where one block is all there is."""
        return min(QUERY_BLOCK, self.length)

    @property
    def key_rows(self) -> int:
        """Rows in a key block: fewer than 64 only where one block is all there is."""
        return min(KEY_BLOCK, self.keys)

    def pieces(self) -> list[Part]:
        """Parts that together list the same blocks; under a plain causal mask, only the one on the diagonal is causal.

        A mask costs about as much as the products, and below the diagonal none is needed.
        """
        if not self.is_causal or self.attn_mask is not None:
            return [self]
        width = QUERY_BLOCK // KEY_BLOCK + (self.diagonal % KEY_BLOCK > 0)
        row = torch.arange(len(self.counts)).unsqueeze(-1) % self.n_query * QUERY_BLOCK  # [N, 1], the first one
        first = (row + self.diagonal).clamp(min=0) // KEY_BLOCK  # on the diagonal
        live = torch.arange(self.n_key) < self.counts.unsqueeze(-1)
        below = (live & (self.indices < first)).sum(-1, dtype=torch.int32)  # lists ascend, so these come first
        place = (below.unsqueeze(-1) + torch.arange(width)).clamp(max=self.n_key - 1)
        on_counts = (self.counts - below).clamp(max=width)
        on_diagonal = self._replace(counts=on_counts, indices=self.indices.gather(-1, place))
        return [self._replace(counts=below, is_causal=False), on_diagonal]

    def keeps_all(self) -> bool:
        """Whether this is plain dense attention. Under a mask never: which blocks are visible is not known here."""
        if self.attn_mask is not None or (self.is_causal and self.diagonal):  # dense attention knows the top left
            return False
        visible = visible_blocks(self.n_query, self.n_key, self.length, self.is_causal, self.counts.device).sum(-1)
        counts = self.counts.view(-1, self.n_query)
        if not bool((counts == visible).all()):
            return False
        # A caller's own map may list as many blocks and still others than the visible ones, which are the first.
        last = self.indices.view(-1, self.n_query, self.n_key).gather(-1, (visible - 1).expand_as(counts).unsqueeze(-1))
        return bool((last.squeeze(-1) == visible - 1).all())


def to_blocks(x: Tensor, rows: int) -> Tensor:
    """[b * h * Nx, rows, D] from [b, h, length, D]; the tail is filled up with zeros."""
    missing = -x.shape[2] % rows
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).reshape(-1, rows, x.shape[-1])


def from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """[b, h, length, D] from [b * h * Nx, rows, D]: to_blocks undone, in the shape of ``like``."""
    return blocks.view(*like.shape[:2], -1, like.shape[3])[:, :, : like.shape[2]]


def gather(blocks: Tensor, block: Tensor) -> Tensor:
    """[c, 1, n * rows, D] from [b * h * Nx, rows, D] and block numbers [c, n]."""
    return blocks.index_select(0, block.flatten()).view(block.shape[0], 1, -1, blocks.shape[-1])


def batches(part: Part, queries: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows of near equal counts, as many as fill GATHER_BYTES; rows that keep nothing are left out.

    Yields the rows [c], the key blocks of each [c, n] as numbers over (b, Hk, Nk), and what hides single keys: None or
    an additive mask [c, 1, 1 or rows, n * key rows]. Shorter lists are filled up with their own first block, hidden, so
    that a NaN reaches no row that does not keep its block.
    """
    ordered, rows = part.counts.sort(descending=True, stable=True)
    counts: list[int] = ordered[ordered > 0].tolist()
    masked = part.is_causal or part.attn_mask is not None
    block_bytes = part.key_rows * queries.itemsize * (2 * queries.shape[-1] + (part.query_rows if masked else 1))
    start = 0
    while start < len(counts):
        most = counts[start]
        row = rows[start : min(start + max(1, GATHER_BYTES // (most * block_bytes)), len(counts))]
        listed = part.indices[row, :most].long()
        live = torch.arange(most) < part.counts[row].unsqueeze(-1)
        listed = torch.where(live, listed, listed[:, :1])  # [c, n]
        first_block = row // (part.n_query * part.group) * part.n_key  # of the key head that a row reads
        yield row, listed + first_block.unsqueeze(-1), additive_mask(part, row, listed, live, queries.dtype)
        start += len(row)


def additive_mask(part: Part, row: Tensor, listed: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[c, 1, 1 or rows, n * key rows]: 0 or the user's value where a query may see a gathered key, -inf elsewhere."""
    key = (listed.unsqueeze(-1) * KEY_BLOCK + torch.arange(part.key_rows)).flatten(-2).unsqueeze(1)
    hidden = (key >= part.keys) | ~live.repeat_interleave(part.key_rows, -1).unsqueeze(1)  # [c, 1, n * key rows]
    value = torch.zeros((), dtype=dtype)
    if part.attn_mask is None and not part.is_causal and not hidden.any():
        return None

    first_query = (row % part.n_query * QUERY_BLOCK).view(-1, 1, 1)
    query = first_query + torch.arange(part.query_rows).unsqueeze(-1)  # [c, rows, 1]
    if part.is_causal:
        hidden = hidden | (key > query + part.diagonal)
    if part.attn_mask is not None:
        head = (row // part.n_query).view(-1, 1, 1)
        query = query.clamp(max=part.length - 1) if part.attn_mask.shape[2] == part.length else torch.zeros_like(head)
        key = key.clamp(max=part.keys - 1)
        given = part.attn_mask[head // part.heads[1], head % part.heads[1], query, key]  # [c, 1 or rows, n * key rows]
        hidden, value = (hidden | ~given, value) if given.dtype == torch.bool else (hidden, given.to(dtype))
    return value.masked_fill(hidden, -math.inf).unsqueeze(1)
