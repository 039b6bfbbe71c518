"""One attention call as calibration looks at it: pooled keys, which pairs may attend, and attention that accumulates.

In: operands, causality, a mask, what is kept. Out: parts of the scores, and outputs of rows over the keys so far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import eight_bits, rule
from ..kernels.block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div, diagonal_blocks, visible_blocks
from ..kernels.how import How
from ..kernels.kept import Always


class Problem:
    """One attention call, and the pooled keys that all of its query blocks share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        diagonal: int,
        always: Always | None,
        in_eight_bits: bool = False,
    ) -> None:
        self.q, self.attn_mask, self.is_causal, self.scale = q, attn_mask, is_causal, scale
        self.diagonal = diagonal
        self.heads, self.length, self.keys = q.shape[1], q.shape[2], k.shape[2]
        self.n_key = ceil_div(self.keys, KEY_BLOCK)
        self.group = self.heads // k.shape[1]
        counted = rule.counted_rows(attn_mask, self.length, self.keys, is_causal, q.device, diagonal)
        self.k_mean = rule.pool_keys(k, self.heads, counted.keys)  # [B, H, Nk, D]
        self.queries = None if counted.queries is None else counted.queries.expand(*q.shape[:3])
        self.k, self.v = self._in_blocks(k, v)
        self.rounded: tuple[Tensor, ...] | None = None  # what eight bits leave of q, k and v
        if in_eight_bits:
            q, k, v = eight_bits.rounded(q, k, v, How(None, is_causal, scale, diagonal != 0))
            self.rounded = (q, *self._in_blocks(k, v))
        n_query = ceil_div(self.length, QUERY_BLOCK)
        self.visible = visible_blocks(n_query, self.n_key, self.length, is_causal, q.device, diagonal)
        self.forced = diagonal_blocks(n_query, self.n_key, q.device, diagonal) if is_causal else None
        self.always = always
        self.anchor = rule.needs_anchor(attn_mask, is_causal)
        self.pooled = (
            None if attn_mask is None else rule.pool_mask(attn_mask, self.length, is_causal, diagonal=diagonal)
        )

    def _in_blocks(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[B, Hk, Nk, 64, D] of keys or values [B, Hk, S, D], filled up with zeros."""
        padding = (0, 0, 0, self.n_key * KEY_BLOCK - self.keys)
        return tuple(torch.nn.functional.pad(x, padding).unflatten(2, (-1, KEY_BLOCK)) for x in tensors)

    def place(self, lead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """batch, query head and key head of flattened (batch, head) numbers."""
        head = lead % self.heads
        return lead // self.heads, head, head // self.group

    def pooled_mask(self, which: Tensor, batch: Tensor, head: Tensor, block: Tensor) -> Tensor:
        """Rows [n, Nk] of a pooled mask [B or 1, H or 1, Nq or 1, Nk]."""
        at = (index if size > 1 else index * 0 for index, size in zip((batch, head, block), which.shape, strict=False))
        return which[tuple(at)]

    def allowed(self, batch: Tensor, head: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """For rows [n, 128] and keys [n, s]: the pairs that exist and may attend, and what is added to their scores."""
        seen = (keys < self.keys).unsqueeze(1)
        if self.is_causal:
            seen = seen & (keys.unsqueeze(1) <= rows.unsqueeze(2) + self.diagonal)
        if self.attn_mask is None:
            return seen, None
        sizes = self.attn_mask.shape
        at = [x.view(-1, 1, 1) if size > 1 else 0 for x, size in zip((batch, head), sizes, strict=False)]
        row = rows.unsqueeze(2) if sizes[2] > 1 else rows.new_zeros(1, 1, 1)
        entry = self.attn_mask[at[0], at[1], row, keys.clamp(max=self.keys - 1).unsqueeze(1)]  # [n, 128 or 1, s]
        if entry.dtype == torch.bool:
            return seen & entry, None
        return seen & (entry != -math.inf), entry.float()


class Running:
    """Softmax attention of rows over the keys so far: running maximum, normaliser and weighted values, in float32.

    ``rounds``: the weights are rounded as a forward in eight bits does.
    """

    def __init__(self, query: Tensor, value_size: int, rounds: bool = False) -> None:
        self.rounds = rounds
        # A finite lowest score: of rows that see no key, the exponentials are 0 and not NaN.
        self.top = query.new_full((*query.shape[:2], 1), -1e30)
        self.normaliser = torch.zeros_like(self.top)
        self.values = query.new_zeros((*query.shape[:2], value_size))

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Take more keys in: scores [n, 128, s], which are used up, and values [n, s, Dv]."""
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        if self.rounds:
            top = eight_bits.rounded_top(top)
        shrink, weights = torch.exp(self.top - top), scores.sub_(top).exp_()
        if self.rounds:
            weights = eight_bits.rounded_weights(weights)
        self.normaliser.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        self.values.mul_(shrink).baddbmm_(weights, values)
        self.top = top

    def out(self) -> Tensor:
        """Attention over the keys so far, [n, 128, Dv]."""
        return self.values / self.normaliser.masked_fill(self.normaliser == 0, 1.0)
