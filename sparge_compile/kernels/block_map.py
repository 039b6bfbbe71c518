"""The size of a block, and the three forms of a block map.

A map says for each (batch, head, query block) which key blocks are read:

* lists, what kernels walk: ``counts`` int32 [B, H, Nq] and ``indices`` int32 [B, H, Nq, Nk], of which the
  first ``counts`` entries are the kept key blocks in ascending order; the rest is never read;
* dense, what tests compare: bool [B, H, Nq, Nk];
* bits, what the backward keeps: int32 [B, H, Nq, ceil(Nk / 32)], key block j in bit j % 32 of word j // 32.

Which rows form a block is decided here and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUERY_BLOCK = 128  # consecutive query rows that share one list of key blocks
KEY_BLOCK = 64  # consecutive key rows that are read or skipped together
WORD_BITS = 32  # key blocks in one word of the packed form


def ceil_div(a, b):
    """Blocks of size b that cover a rows (ints or SymInts)."""
    return (a + b - 1) // b


class BlockMap(NamedTuple):
    """The lists that the kernels walk.

    ``counts`` is int32 [B, H, Nq]. ``indices`` is int32 [B, H, Nq, Nk]: the first ``counts`` entries of a row are
    the kept key blocks, ascending; what follows is never read. B or H may be 1 in a map given by a user, which then
    holds for every batch or head.
    """

    counts: Tensor
    indices: Tensor

    @staticmethod
    def from_dense(kept: Tensor) -> BlockMap:
        """Lists from bool [B, H, Nq, Nk]."""
        counts = kept.sum(-1, dtype=torch.int32)
        # A stable sort of "dropped" puts the kept columns first and leaves them ascending.
        indices = (~kept).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
        return BlockMap(counts, indices)

    def to_dense(self) -> Tensor:
        """bool [B, H, Nq, Nk]; reads nothing past the counts."""
        n_key = self.indices.shape[-1]
        column = torch.arange(n_key, device=self.indices.device)
        live = column < self.counts.unsqueeze(-1)
        target = torch.where(live, self.indices.long(), n_key)  # dead entries land in a spare column
        kept = torch.zeros(*self.indices.shape[:-1], n_key + 1, dtype=torch.bool, device=self.indices.device)
        return kept.scatter_(-1, target, live)[..., :n_key]


def pack(kept: Tensor) -> Tensor:
    """int32 [..., ceil(Nk / 32)] from bool [..., Nk]."""
    n_key = kept.shape[-1]
    words = ceil_div(n_key, WORD_BITS)
    padded = torch.nn.functional.pad(kept, (0, words * WORD_BITS - n_key)).unflatten(-1, (words, WORD_BITS))
    weight = torch.ones((), dtype=torch.int64, device=kept.device) << torch.arange(WORD_BITS, device=kept.device)
    return (padded * weight).sum(-1).to(torch.int32)  # the cast wraps bit 31 into the sign


def unpack(bits: Tensor, n_key: int) -> Tensor:
    """bool [..., Nk] from int32 [..., ceil(Nk / 32)]."""
    lane = torch.arange(WORD_BITS, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> lane) & 1).flatten(-2)[..., :n_key].bool()


def visible_blocks(
    n_query: int, n_key: int, length: int | Tensor, is_causal: bool, device: torch.device, diagonal: int | Tensor = 0
) -> Tensor:
    """bool [Nq, Nk]: key blocks of which a causal mask lets some row see some key.

    Row r of ``length`` rows sees the keys up to r + ``diagonal``: 0 is alignment to the top left. Both may be [N, 1],
    for N sequences; then the result is [N, Nq, Nk].
    """
    if not is_causal:
        return torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    last_row = (torch.arange(1, n_query + 1, device=device) * QUERY_BLOCK).clamp(max=length) - 1
    return torch.arange(n_key, device=device) * KEY_BLOCK <= (last_row + diagonal).unsqueeze(-1)


def diagonal_blocks(n_query: int, n_key: int, device: torch.device, diagonal: int = 0) -> Tensor:
    """bool [Nq, Nk]: key blocks that the causal diagonal crosses inside a query block; they are always kept.

    They hold the last key that each row sees, so that no row loses all its keys.
    """
    first_row = torch.arange(n_query, device=device).unsqueeze(-1) * QUERY_BLOCK
    first_key = torch.arange(n_key, device=device) * KEY_BLOCK
    reached = first_key <= first_row + QUERY_BLOCK - 1 + diagonal
    return reached & (first_key + KEY_BLOCK - 1 >= first_row + diagonal)
