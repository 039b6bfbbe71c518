"""The oracle of tests and benchmarks: the rule block by block in plain Python, and dense attention under a block map.

Slow, readable, good in float64; attention is differentiable by autograd. Of the package only :mod:`check` imports this
file, and of the package it takes only the forms of a map, so that no code is compared with itself.

Letters: B batch, H query heads, Hk key/value heads, L queries, S keys, D head size, Dv that of the values,
Nq = ceil(L / 128) query blocks, Nk = ceil(S / 64) key blocks, i a query block, j a key block.

Source: SpargeAttention2 (arXiv 2602.13515), Eq. 9 and Alg. 1; causal, masks and GQA are this project's extension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap

CEIL_SLACK = 0.001  # topk * n is rounded up, but a float32 0.05 of 20 blocks is one block


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def starts(length: int, block: int) -> range:
    """The first row of each block."""
    return range(0, length, block)


def pool(x: Tensor, block: int, counted: Tensor | None = None) -> Tensor:
    """Means of the rows that count in each block: [B, H, N, D] from [B, H, L, D], in float32 at least.

    ``counted`` is bool, broadcastable to [B, H, L]; every row counts if it is None. The mean of no row is 0.
    """
    counted = torch.ones(x.shape[-2], dtype=torch.bool, device=x.device) if counted is None else counted
    means = []
    for first in starts(x.shape[-2], block):
        rows, count = wide(x[..., first : first + block, :]), counted[..., first : first + block].unsqueeze(-1)
        means.append(torch.where(count, rows, 0.0).sum(-2) / count.sum(-2).clamp(min=1))
    return torch.stack(means, -2) if means else wide(x)


class Scores(NamedTuple):
    """The blocks that the rule chooses from: tensors [B, H, Nq, Nk], and whether there is an anchor."""

    scores: Tensor  # the logits of P-bar
    visible: Tensor  # bool: some pair is let through
    forced: Tensor  # bool: kept whatever it scores, if it is visible
    anchor: bool  # whether the best block that is not forced is kept as well


def block_scores(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    bottom_right: bool = False,
) -> Scores:
    """Scores of q [B, H, L, D] over k [B, Hk, S, D] under a mask [B or 1, H or 1, L or 1, S], bool or float.

    Causality is aligned to the top left, or to the bottom right.
    It forces the blocks that its diagonal crosses; a mask forces the blocks of
    which some rows see a key and others, that see keys elsewhere, none. Where rows of a query block see different keys
    by a mask, the kept prefix might hold no key of some row: then the best block that is not forced is an anchor.

    What is hidden has no part in it: keys that no query sees and queries that see no key do not count in the means, nor
    do numbers of the mask where causality hides (of a mask of one row: from every query).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // max(k.shape[1], 1)
    length, keys = q.shape[2], k.shape[2]
    diagonal = keys - length if bottom_right else 0
    pairs = open_pairs(length, keys, attn_mask, is_causal, q.device, bottom_right)
    seen_keys, seeing_queries = pairs.any(2), pairs.any(3)
    key_means = pool(k.repeat_interleave(group, dim=1), KEY_BLOCK, seen_keys)
    scores = (pool(q, QUERY_BLOCK, seeing_queries) * scale) @ key_means.mT
    visible, forced = torch.ones_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    if attn_mask is not None and attn_mask.shape[2] == 1:
        pairs = seen_keys.unsqueeze(2)
    for i, first_row in enumerate(starts(length, QUERY_BLOCK)):
        end_row = min(first_row + QUERY_BLOCK, length)
        if is_causal:
            first_keys = torch.arange(0, keys, KEY_BLOCK, device=q.device)
            visible[:, :, i] &= first_keys < end_row + diagonal
            last_seen = torch.arange(first_row, first_row + QUERY_BLOCK, device=q.device) + diagonal  # of each row
            forced[:, :, i] = (first_keys == (last_seen - last_seen % KEY_BLOCK).unsqueeze(-1)).any(0)
        if attn_mask is not None:
            rows = slice(None) if attn_mask.shape[2] == 1 else slice(first_row, end_row)
            for j, first_key in enumerate(starts(keys, KEY_BLOCK)):
                at = ..., rows, slice(first_key, first_key + KEY_BLOCK)
                mean, some, cut = mask_of_block(attn_mask[at], pairs[at], pairs[..., rows, :].any(-1))
                scores[:, :, i, j] += mean
                visible[:, :, i, j] &= some
                forced[:, :, i, j] |= cut
    return Scores(scores, visible, forced, attn_mask is not None and (is_causal or attn_mask.shape[2] > 1))


def open_pairs(
    length: int,
    keys: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    device: torch.device,
    bottom_right: bool = False,
) -> Tensor:
    """bool [B or 1, H or 1, L, S]: the (query, key) pairs that a mask and causality let through."""
    pairs = torch.ones(1, 1, length, keys, dtype=torch.bool, device=device)
    if is_causal:
        pairs = pairs.tril(keys - length if bottom_right else 0)
    if attn_mask is not None:
        pairs = pairs & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf)
    return pairs


def mask_of_block(tile: Tensor, opened: Tensor, seeing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a mask's tile [Bm, Hm, rows, keys] and the pairs in it that are let through: the mean of the mask over these,
    whether there are any, and whether only some of the rows that see any key, [Bm, Hm, rows], have one here. Each
    [Bm, Hm]."""
    added = torch.zeros((), device=tile.device) if tile.dtype == torch.bool else wide(tile)
    mean = torch.where(opened, added, 0.0).sum((-2, -1)) / opened.sum((-2, -1)).clamp(min=1)
    sees = opened.any(-1)
    return mean, sees.any(-1), sees.any(-1) & (seeing & ~sees).any(-1)


def tokens_of(numbers: Sequence[float], length: int, parts: Sequence[int] = ()) -> set[int]:
    """The tokens of a sequence that two numbers (start, stop) of thresholds [H, 6] name.

    Negative ones count from the end. A start of 2^25 names all tokens beside the longest of the parts that the sequence
    is put together of, unless two are the longest, or tokens stand on both sides of it.
    """
    if numbers[0] != 2**25:
        start, stop = (int(x) + length if x < 0 else int(x) for x in numbers)
        return set(range(max(start, 0), min(stop, length)))
    ends = list(itertools.accumulate(parts))
    longest = [end for end, size in zip(ends, parts, strict=True) if size == max(parts)]
    if len(longest) != 1:
        return set()
    first, last = longest[0] - max(parts), longest[0]
    return set(range(first)) if last == ends[-1] else set(range(last, ends[-1])) if first == 0 else set()


def rows_of(numbers: Sequence[float], length: int, parts: Sequence[int], slots: Tensor | None = None) -> set[int]:
    """The rows of :func:`tokens_of`: the tokens, or where they stand in another order."""
    tokens = tokens_of(numbers, length, parts)
    return tokens if slots is None else {row for row, token in enumerate(slots.tolist()) if token in tokens}


def holds(tokens: set[int], first: int, block: int) -> bool:
    """Whether a block that begins at a row holds one of these tokens."""
    return any(row in tokens for row in range(first, first + block))


def kept_blocks(
    scores: Sequence[float],
    visible: Sequence[bool],
    forced: Sequence[bool],
    topk: float,
    topp: float,
    anchor: bool,
    always: Collection[int] = (),
) -> list[int]:
    """The key blocks that one query block keeps, by the rule (docs/design.md, The rule).

    ``always`` are the key blocks that hold a kept token: the rule is over the others.
    """
    seen = [j for j in range(len(scores)) if visible[j]]
    if not all(math.isfinite(scores[j]) for j in seen):
        return seen  # as dense attention would: a NaN shows
    apart, seen = [j for j in seen if j in always], [j for j in seen if j not in always]
    if not seen:
        return apart
    order = sorted(seen, key=lambda j: (-scores[j], j))  # the lower index first on a tie
    by_topk = max(1, math.ceil(topk * len(seen) - CEIL_SLACK))
    by_topp = 0 if topp <= 0 else len(seen)
    if 0 < topp < 1:
        weights = [math.exp(scores[j] - scores[order[0]]) for j in order]
        total = math.fsum(weights)
        mass = itertools.accumulate(weight / total for weight in weights)
        by_topp = next((n for n, leading in enumerate(mass, 1) if leading >= topp), len(seen))
    kept = set(order[: max(by_topk, by_topp)]) | {j for j in seen if forced[j]}
    if anchor:
        kept |= set([j for j in order if not forced[j]][:1])
    return sorted(kept | set(apart))


def select(
    scores: Tensor, visible: Tensor, thresholds: Tensor, forced: Tensor | None = None, anchor: bool = False
) -> Tensor:
    """bool [B, H, Nq, Nk]: :func:`kept_blocks` of each query block.

    ``visible`` and ``forced`` broadcast to ``scores`` [B, H, Nq, Nk]; ``thresholds`` are float32 [H, 2], (topk, topp).
    """
    forced = torch.zeros_like(visible) if forced is None else forced
    rows = zip(
        *(x.expand_as(scores).flatten(0, -2).tolist() for x in (scores, visible, forced)),
        thresholds.view(1, -1, 1, 2).expand(*scores.shape[:-1], 2).flatten(0, -2).tolist(),
        strict=True,
    )
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for row, (score, seen, always, (topk, topp)) in zip(kept.flatten(0, -2), rows, strict=True):
        row[kept_blocks(score, seen, always, topk, topp, anchor)] = True
    return kept.to(scores.device)


def block_map(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    parts: Sequence[int] = (),
    bottom_right: bool = False,
    slots_q: Tensor | None = None,
    slots_k: Tensor | None = None,
) -> BlockMap:
    """The block map of q [B, H, L, D] over k [B, Hk, S, D] for thresholds float32 [H, 2 or 6].

    ``attn_mask`` is bool or float [B or 1, H or 1, L or 1, S], and may be combined with ``is_causal``. ``parts`` are
    the sizes of the parts of the sequence: see :func:`tokens_of`. ``slots_q`` [L] and ``slots_k`` [S] say which token
    a row is, where rows are in another order; of one sequence in two orders no rows are dense.
    """
    scores, visible, forced, anchor = block_scores(q, k, attn_mask, is_causal, scale, bottom_right)
    if thresholds.shape[-1] == 2:
        return BlockMap.from_dense(select(scores, visible, thresholds, forced, anchor))
    kept = torch.zeros_like(visible)
    for h, (topk, topp, *ranges) in enumerate(thresholds.tolist()):
        tokens = rows_of(ranges[:2], k.shape[2], parts, slots_k)
        dense = q.shape[2] == k.shape[2] and (slots_q is None) == (slots_k is None)
        rows = rows_of(ranges[2:], q.shape[2], parts, slots_q) if dense else set()
        always = [j for j, first in enumerate(starts(k.shape[2], KEY_BLOCK)) if holds(tokens, first, KEY_BLOCK)]
        for b, (i, first) in itertools.product(range(len(q)), enumerate(starts(q.shape[2], QUERY_BLOCK))):
            at = b, h, i
            if holds(rows, first, QUERY_BLOCK):
                kept[at] = visible[at]
                continue
            row = scores[at].tolist(), visible[at].tolist(), forced[at].tolist()
            kept[at][kept_blocks(*row, topk, topp, anchor, always)] = True
    return BlockMap.from_dense(kept)


def allowed_pairs(
    kept: Tensor,
    length: int,
    keys: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    bottom_right: bool = False,
) -> Tensor:
    """bool [B, H, L, S]: the (query, key) pairs that attention sees under a dense map, a mask and causality."""
    listed = kept.repeat_interleave(QUERY_BLOCK, 2)[:, :, :length].repeat_interleave(KEY_BLOCK, 3)[..., :keys]
    return listed & open_pairs(length, keys, attn_mask, is_causal, kept.device, bottom_right)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    bottom_right: bool = False,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention over the kept keys, of values [B, Hk, S, Dv].

    Returns out [B, H, L, Dv] in q's dtype and the log-sum-exp of the scaled scores, [B, H, L] in float32 at least
    (natural logarithm). A row that sees no key gives zeros and -inf.
    """
    group = q.shape[1] // max(k.shape[1], 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    key, value = (wide(x).repeat_interleave(group, dim=1) for x in (k, v))
    scores = (wide(q) * scale) @ key.mT  # [B, H, L, S]
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(scores.dtype)
    kept, sizes = block_map.to_dense(), (q.shape[2], k.shape[2])
    allowed = allowed_pairs(kept, *sizes, attn_mask, is_causal, bottom_right)
    scores = scores.masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(scores, -1)
    empty = lse == -math.inf
    weights = torch.exp(scores - lse.masked_fill(empty, 0.0).unsqueeze(-1))
    return (weights @ value).to(q.dtype), lse


class Rounded(NamedTuple):
    """What eight bits leave of queries, keys and values, in float64."""

    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hk, S, D]
    v: Tensor  # [B, Hk, S, Dv]
    center: Tensor  # [B, Hk, 1, D]: what was subtracted from the keys while they were rounded


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest numbers of three bits of mantissa and exponents from -6 on, ties to even; saturates at 448."""
    exponent = torch.frexp(x.abs().clamp(min=2.0**-6)).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def to_eight_bits(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, bottom_right: bool = False) -> Rounded:
    """Queries by row and keys by block of 64 in 255 steps, once 16 entries each are rotated and a constant of the keys
    is taken off; values in e4m3 times a power of two for each head. See eight_bits.py, of which this takes nothing."""
    q, k, v = (x.double() for x in (q, k, v))
    odd = torch.tensor([[(i & j).bit_count() % 2 for i in range(16)] for j in range(16)], device=q.device)
    signs = (1 - 2 * odd).double() / 4

    def turn(x: Tensor) -> Tensor:
        return torch.cat([x[..., d : d + 16] @ signs for d in range(0, x.shape[-1], 16)], -1)

    seen = min(q.shape[2], k.shape[2]) if is_causal and not bottom_right else k.shape[2]
    chosen = [n * seen // 32 for n in range(32)]
    k_some, v_some = (torch.where(x[:, :, chosen].isfinite(), x[:, :, chosen], 0.0) for x in (k, v))
    center = turn(k_some).mean(2, keepdim=True)
    turned = turn(q)
    step = turned.abs().amax(-1, keepdim=True) / 127
    q_rounded = turn((turned / step.clamp(min=1e-30)).round() * step)
    parts = []
    for first in starts(k.shape[2], KEY_BLOCK):
        rows = turn(k[:, :, first : first + KEY_BLOCK]) - center
        rows = rows * (torch.arange(first, first + rows.shape[2], device=k.device) < seen)[:, None]
        step = rows.abs().amax((2, 3), keepdim=True) / 127
        parts.append(turn((rows / step.clamp(min=1e-30)).round() * step + center))
    most = v_some.abs().amax((2, 3), keepdim=True)
    scale = torch.where(most < 1e-15, 1.0, torch.exp2(torch.floor(torch.log2(most)) - 1))
    return Rounded(q_rounded, torch.cat(parts, 2), to_e4m3(v / scale) * scale, turn(center))


def attention_in_eight_bits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    is_causal: bool = False,
    scale: float | None = None,
    bottom_right: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` of rounded operands by rounded weights, in float64: (out, lse).

    The weight of a key is 2^(score - top + 8) in e4m3, top being the largest score of the row in log2, rounded up.
    """
    group = q.shape[1] // max(k.shape[1], 1)
    scale = (q.shape[-1] ** -0.5 if scale is None else scale) / math.log(2)
    q, k, v, center = to_eight_bits(q, k, v, is_causal, bottom_right)
    k, v, center = (x.repeat_interleave(group, 1) for x in (k, v, center))
    allowed = allowed_pairs(block_map.to_dense(), q.shape[2], k.shape[2], None, is_causal, bottom_right)
    scores = (q @ (k - center).mT * scale).masked_fill(~allowed, -math.inf)
    top = scores.amax(-1, keepdim=True).ceil()
    weights = to_e4m3(torch.exp2(scores - top.masked_fill(top == -math.inf, 0.0) + 8))
    total = weights.sum(-1, keepdim=True)
    lse = (torch.log2(total) + top - 8 + q @ center.mT * scale).squeeze(-1) * math.log(2)
    return weights @ v / total.masked_fill(total == 0, 1.0), lse.masked_fill(total.squeeze(-1) == 0, -math.inf)
