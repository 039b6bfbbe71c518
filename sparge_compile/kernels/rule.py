"""The rule in torch: block means, their order, and how many leading blocks Top-k and Top-p keep.

In: queries, keys, masks and thresholds, whole or in parts. Out: block scores, ranks, and which blocks are kept. The CPU
kernels and calibration call these functions, the Triton kernels spell them out anew; reference.py, which tests and
benchmarks compare all of them with, shares none of them. Shapes: B batch, H query heads, Hk key/value heads, L queries,
S keys, D head size, Nq = ceil(L / 128) query blocks, Nk = ceil(S / 64) key blocks.

Source: SpargeAttention2 (arXiv 2602.13515), Eq. 9 and Alg. 1; causal, masks and GQA are this project's extension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from .kept import Always

CEIL_SLACK = 0.001  # so that a float32 0.05 of 20 blocks is one block


def default_scale(head_size: int, scale: float | None) -> float:
    """The factor of the scores: 1 / sqrt(D) where none is given, as in SDPA."""
    return 1.0 / math.sqrt(head_size) if scale is None else scale


class Counted(NamedTuple):
    """Which rows count in block means, because a pair with them is let through; None where all do."""

    keys: Tensor | None  # bool [B or 1, H or 1, S]: some query sees the key
    queries: Tensor | None  # bool [B or 1, H or 1, L]: the query sees some key


def counted_rows(
    attn_mask: Tensor | None, length: int, keys: int, is_causal: bool, device: torch.device, diagonal: int = 0
) -> Counted:
    """The rows of L queries and S keys that count under a mask [B or 1, H or 1, L or 1, S] and causality."""
    if attn_mask is None:
        beyond = is_causal and keys > length + diagonal  # no query reaches the last keys
        blind = is_causal and diagonal < 0  # the first queries see no key
        return Counted(
            (torch.arange(keys, device=device) < length + diagonal).view(1, 1, -1) if beyond else None,
            (torch.arange(length, device=device) >= -diagonal).view(1, 1, -1) if blind else None,
        )
    opened = open_pairs(attn_mask, length, is_causal, diagonal=diagonal)
    seen = opened.any(-2)
    if attn_mask.shape[2] > 1:
        return Counted(seen, opened.any(-1))
    reach = queries_that_reach(seen, length, diagonal) if is_causal else None  # else all queries see the same
    return Counted(seen, reach)


def queries_that_reach(seen: Tensor, length: int, diagonal: int = 0) -> Tensor:
    """bool [..., L]: the queries that see one of some keys, bool [..., S], under causality: from the first key on."""
    before, after = max(-diagonal, 0), max(diagonal, 0)
    missing = max(0, length + after - before - seen.shape[-1])
    return F.pad(seen, (before, missing)).cummax(-1).values[..., after : after + length]


def without_copies(attn_mask: Tensor) -> Tensor:
    """A mask of which batch and heads are 1 where memory holds one entry for all of them."""
    return attn_mask[tuple(slice(1 if attn_mask.stride(dim) == 0 else None) for dim in (0, 1))]


def open_pairs(attn_mask: Tensor, length: int, is_causal: bool, first_row: int = 0, diagonal: int = 0) -> Tensor:
    """bool [Bm, Hm, R, S]: the pairs that R rows of a mask, from ``first_row`` on, and causality let through.

    A mask of one row speaks for all queries. Of causality it knows what no query sees: the keys after the last one.
    """
    opened = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
    if not is_causal:
        return opened
    rows, keys = (torch.arange(n, device=attn_mask.device) for n in attn_mask.shape[-2:])
    return opened & (keys <= (rows + diagonal + (first_row if len(rows) > 1 else length - 1)).unsqueeze(-1))


def pool(x: Tensor, block: int, counted: Tensor | None = None) -> Tensor:
    """Means of the rows that count in each block: [B, H, N, D] from [B, H, L, D], accumulated in float32 at least.

    ``counted`` is bool [B or 1, H or 1, L]: what is in other rows, NaN included, has no part. The mean of no row is 0.
    """
    length = x.shape[-2]
    n_blocks = ceil_div(length, block)

    def block_sum(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, n_blocks * block - length)).unflatten(-2, (n_blocks, block)).sum(-2)

    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if counted is None:
        counted = torch.ones(length, dtype=torch.bool, device=x.device)
    else:
        wide = torch.where(counted.unsqueeze(-1), wide, 0.0)
    return block_sum(wide) / block_sum(counted.unsqueeze(-1).to(wide.dtype)).clamp(min=1)


def pool_keys(k: Tensor, heads: int, counted: Tensor | None) -> Tensor:
    """Means of key blocks for each query head, [B, H, Nk, D] from [B, Hk, S, D].

    Query heads that share a key head share its means, unless the mask of each shows it other keys.
    """
    group = heads // max(k.shape[1], 1)
    if counted is None or counted.shape[1] == 1:
        return pool(k, KEY_BLOCK, counted).repeat_interleave(group, dim=1)
    return torch.stack([pool(k, KEY_BLOCK, counted[:, g::group]) for g in range(group)], 2).flatten(1, 2)


def pool_mask(
    attn_mask: Tensor, length: int, is_causal: bool, blocks: slice | None = None, diagonal: int = 0
) -> tuple[Tensor, Tensor]:
    """(bias, cut) of a mask [Bm, Hm, L or 1, S], bool or float: each [Bm, Hm, Nq or 1, Nk].

    ``bias``, in float32 at least, is added to block scores: the mean of the mask over the pairs that are let through (0
    for a boolean mask), -inf where there are none. ``cut``, bool, marks the blocks of which some rows see a key and
    others, that see keys elsewhere, none. ``blocks`` are the query blocks that are wanted, all by default.
    """
    first_row = 0
    if blocks is not None and attn_mask.shape[2] > 1:
        first_row = blocks.start * QUERY_BLOCK
        attn_mask = attn_mask[:, :, first_row : blocks.stop * QUERY_BLOCK]
    opened = open_pairs(attn_mask, length, is_causal, first_row, diagonal)
    rows, keys = opened.shape[-2:]
    row_block = QUERY_BLOCK if rows > 1 else 1  # a mask of one row stays one row
    n_query, n_key = ceil_div(rows, row_block), ceil_div(keys, KEY_BLOCK)

    def block_sum(x: Tensor) -> Tensor:
        x = F.pad(x, (0, n_key * KEY_BLOCK - keys, 0, n_query * row_block - rows))
        return x.unflatten(-1, (n_key, KEY_BLOCK)).sum(-1).unflatten(-2, (n_query, row_block)).sum(-2)

    wide = torch.promote_types(attn_mask.dtype, torch.float32)
    pairs = block_sum(opened.to(wide))
    added = torch.zeros_like(pairs)
    if attn_mask.dtype != torch.bool:
        added = block_sum(torch.where(opened, attn_mask.to(wide), 0.0)) / pairs.clamp(min=1)
    bias = added.masked_fill(pairs == 0, -math.inf)

    sees = F.pad(opened, (0, n_key * KEY_BLOCK - keys)).unflatten(-1, (n_key, KEY_BLOCK)).any(-1)
    sees = sees | ~opened.any(-1, keepdim=True)  # rows that see no key at all miss nothing
    sees = F.pad(sees, (0, 0, 0, n_query * row_block - rows), value=True)  # nor do rows that do not exist
    cut = (pairs > 0) & ~sees.unflatten(-2, (n_query, row_block)).all(-2)
    return bias, cut


def ranking(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Each block's place in its query block's order, and the P-bar mass of the leading blocks, both [B, H, Nq, Nk].

    Descending by score, the lower index first on a tie; invisible blocks come last and have no mass.
    """
    score = scores.masked_fill(~visible, -math.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(score, -1).nan_to_num(0.0).gather(-1, order).cumsum(-1)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places), mass


def topk_length(topk: Tensor, n: Tensor) -> Tensor:
    """How many leading blocks of n visible ones Top-k keeps, as floats; the arguments broadcast."""
    return torch.ceil(topk * n - CEIL_SLACK).clamp(min=1)


def topp_length(topp: Tensor, n: Tensor, mass: Tensor) -> Tensor:
    """How many leading blocks of n visible ones Top-p keeps, by the mass [..., Nk] of the leading ones."""
    length = (mass < topp.unsqueeze(-1)).sum(-1) + 1
    return torch.where(topp <= 0, 0, torch.where(topp >= 1, n, length))


def select(
    scores: Tensor,
    visible: Tensor,
    thresholds: Tensor,
    forced: Tensor | None = None,
    anchor: bool = False,
    always: Always | None = None,
) -> Tensor:
    """Which key blocks each query block keeps.

    Args:
        scores: [B, H, Nq, Nk], the logits of P-bar.
        visible: bool, broadcastable to scores; invisible blocks are never kept.
        thresholds: float32 [H, 2 or 6], ``topk`` and ``topp`` of each head first.
        forced: bool, broadcastable to scores; visible blocks that are always kept (the causal diagonal, and what a mask
            cuts).
        anchor: keep as well the best block that is not forced, so that a row for which the prefix has no key sees one.
        always: what is kept beside the rule, which is then over the other visible blocks.

    Returns:
        bool [B, H, Nq, Nk]: the longer of the Top-k and the Top-p prefix, in descending order of score with the lower
        index first on a tie. A row with a non-finite score keeps every visible block, as dense attention would.
    """
    visible = visible.expand_as(scores)
    whole = (visible & ~torch.isfinite(scores)).any(-1, keepdim=True)  # query blocks that keep all
    ranked = visible
    if always is not None:
        ranked, whole = visible & ~always.keys, whole | always.queries
    n = ranked.sum(-1)  # blocks of each query block that the thresholds speak of
    topk, topp = thresholds[:, :2].to(torch.float32).view(1, -1, 1, 2).unbind(-1)  # [1, H, 1] each
    rank, mass = ranking(scores, ranked)
    kept = rank < torch.maximum(topk_length(topk, n), topp_length(topp, n, mass)).unsqueeze(-1)
    if forced is not None:
        kept = kept | forced
    if anchor:
        uncut = rank.masked_fill(~ranked if forced is None else ~ranked | forced, scores.shape[-1])
        kept = kept | (uncut == uncut.amin(-1, keepdim=True))
    return ((kept & ranked) | (visible & ~ranked) | whole) & visible


def apply_pooled_mask(
    scores: Tensor, visible: Tensor, forced: Tensor, bias: Tensor, cut: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, visible, forced), each [B, H, Nq, Nk], under the two tensors that :func:`pool_mask` gave."""
    hidden = bias == -math.inf
    return scores + bias.masked_fill(hidden, 0.0), visible & ~hidden, forced | cut


def needs_anchor(attn_mask: Tensor | None, is_causal: bool) -> bool:
    """Whether rows of one query block may see different keys in a way that the causal diagonal alone does not mend."""
    return attn_mask is not None and (is_causal or attn_mask.shape[2] > 1)
