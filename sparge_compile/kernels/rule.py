"""The rule in torch: block means, their order, and how many leading blocks Top-k and Top-p keep.

In: queries, keys, masks and thresholds, whole or in parts. Out: block scores, ranks, and which blocks are kept. The CPU
kernels and calibration call these functions, the Triton kernels spell them out anew; reference.py, which tests and
benchmarks compare all of them with, shares none of them. Shapes: B batch, H query heads, Hk key/value heads, L queries,
S keys, D head size, Nq = ceil(L / 128) query blocks, Nk = ceil(S / 64) key blocks.

Source: SpargeAttention2 (arXiv 2602.13515), Eq. 9 and Alg. 1; causal, masks and GQA are this project's extension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div

CEIL_SLACK = 0.001  # so that a float32 0.05 of 20 blocks is one block


def default_scale(head_size: int, scale: float | None) -> float:
    """The factor of the scores: 1 / sqrt(D) where none is given, as in SDPA."""
    return 1.0 / math.sqrt(head_size) if scale is None else scale


def pool(x: Tensor, block: int) -> Tensor:
    """Means of the rows that exist in each block: [B, H, N, D] from [B, H, L, D], accumulated in float32 at least."""
    length = x.shape[-2]
    n_blocks = ceil_div(length, block)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = F.pad(wide, (0, 0, 0, n_blocks * block - length)).unflatten(-2, (n_blocks, block)).sum(-2)
    rows = torch.full((n_blocks, 1), block, dtype=total.dtype, device=x.device)
    if n_blocks:
        rows[-1] = length - (n_blocks - 1) * block
    return total / rows


def pool_mask(attn_mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(bias, cut) of a mask [Bm, Hm, L or 1, S], bool or float: each [Bm, Hm, Nq or 1, Nk].

    ``bias``, in float32 at least, is added to block scores: the mean of the mask over the pairs that it lets through (0
    for a boolean mask), -inf where it lets none through. ``cut``, bool, marks the blocks of which some rows see a key
    and others none.
    """
    if attn_mask.dtype == torch.bool:
        open_pairs, value = attn_mask, torch.zeros((), device=attn_mask.device)
    else:
        value = attn_mask.to(torch.promote_types(attn_mask.dtype, torch.float32))
        open_pairs = value != -math.inf
    rows, keys = attn_mask.shape[-2:]
    row_block = QUERY_BLOCK if rows == length else 1  # a mask of one row stays one row
    n_query, n_key = ceil_div(rows, row_block), ceil_div(keys, KEY_BLOCK)

    def block_sum(x: Tensor) -> Tensor:
        x = F.pad(x, (0, n_key * KEY_BLOCK - keys, 0, n_query * row_block - rows))
        return x.unflatten(-1, (n_key, KEY_BLOCK)).sum(-1).unflatten(-2, (n_query, row_block)).sum(-2)

    pairs = block_sum(open_pairs.to(value.dtype))
    mean = block_sum(torch.where(open_pairs, value, 0.0)) / pairs.clamp(min=1)
    bias = torch.where(pairs > 0, mean, -math.inf)

    sees = F.pad(open_pairs, (0, n_key * KEY_BLOCK - keys)).unflatten(-1, (n_key, KEY_BLOCK)).any(-1)
    sees = F.pad(sees, (0, 0, 0, n_query * row_block - rows), value=True)  # rows that do not exist miss nothing
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
    scores: Tensor, visible: Tensor, thresholds: Tensor, forced: Tensor | None = None, anchor: bool = False
) -> Tensor:
    """Which key blocks each query block keeps.

    Args:
        scores: [B, H, Nq, Nk], the logits of P-bar.
        visible: bool, broadcastable to scores; invisible blocks are never kept.
        thresholds: float32 [H, 2], ``topk`` and ``topp`` of each head.
        forced: bool, broadcastable to scores; visible blocks that are always kept (the causal diagonal, and what a mask
            cuts).
        anchor: keep as well the best block that is not forced, so that a row for which the prefix has no key sees one.

    Returns:
        bool [B, H, Nq, Nk]: the longer of the Top-k and the Top-p prefix, in descending order of score with the lower
        index first on a tie. A row with a non-finite score keeps every visible block, as dense attention would.
    """
    visible = visible.expand_as(scores)
    n = visible.sum(-1)  # visible blocks of each query block
    topk, topp = thresholds.to(torch.float32).view(1, -1, 1, 2).unbind(-1)  # [1, H, 1] each
    rank, mass = ranking(scores, visible)
    kept = rank < torch.maximum(topk_length(topk, n), topp_length(topp, n, mass)).unsqueeze(-1)
    if forced is not None:
        kept = kept | forced
    if anchor:
        uncut = rank.masked_fill(~visible if forced is None else ~visible | forced, scores.shape[-1])
        kept = kept | (uncut == uncut.amin(-1, keepdim=True))
    broken = (visible & ~torch.isfinite(scores)).any(-1, keepdim=True)
    return (kept | broken) & visible


def apply_pooled_mask(
    scores: Tensor, visible: Tensor, forced: Tensor, bias: Tensor, cut: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, visible, forced), each [B, H, Nq, Nk], under the two tensors that :func:`pool_mask` gave."""
    hidden = bias == -math.inf
    return scores + bias.masked_fill(hidden, 0.0), visible & ~hidden, forced | cut


def needs_anchor(attn_mask: Tensor | None, is_causal: bool) -> bool:
    """Whether rows of one query block may see different keys in a way that the causal diagonal alone does not mend."""
    return attn_mask is not None and (is_causal or attn_mask.shape[2] > 1)
