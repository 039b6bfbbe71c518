"""One attention call in, the error and the density of every pair of a grid out, for each head.

The rule keeps a prefix of the blocks in one order, so attention is accumulated in that order, as flash attention does,
and looked at after each of a ladder of prefix lengths. Cost: dense attention of the sampled query blocks, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import rule
from ..kernels.block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from ..kernels.kept import Always
from .problem import Problem, Running

# The candidates. The smallest topk keeps one block of up to 10,000, so that topp is alone; topp = 0 leaves topk alone.
TOPK = (1e-4, *(round(0.01 * 1.17**i, 3) for i in range(29)), 0.95, 1.0)
TOPP = (0.0, 0.02, *(round(0.04 * i, 2) for i in range(1, 23)), 0.91, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)

# Up to so many blocks every prefix is looked at, beyond only some; in between, the next shorter one speaks.
EXACT = 128
STEPS = 32  # from there on, a ladder that grows by a 32nd


class Sums(NamedTuple):
    """The addends of one call to the curves of its heads, all float32.

    ``error``: Σ|O_pair − O|, and ``kept`` blocks, [H, K, P]; ``norm``: Σ|O|, and ``visible`` blocks, [H]. K and P are
    the lengths of TOPK and TOPP.
    """

    error: Tensor
    kept: Tensor
    norm: Tensor
    visible: Tensor


def ladder(n_key: int) -> list[int]:
    """Return the prefix lengths that are looked at, ascending, the whole last."""
    steps = list(range(1, min(n_key, EXACT) + 1))
    while steps[-1] < n_key:
        steps.append(min(n_key, steps[-1] + max(1, steps[-1] // STEPS)))
    return steps


def scratch(steps: Sequence[int], head_size: int) -> int:
    """Return about how many bytes a query block takes while it is looked at."""
    n_key = steps[-1]
    keys = KEY_BLOCK * max(b - a for a, b in zip([0, *steps], steps, strict=False))
    scores, operands = 3 * QUERY_BLOCK * keys, 4 * keys * head_size  # with masks; keys and values, gathered and widened
    return 4 * (scores + operands + (len(steps) + 5) * QUERY_BLOCK * head_size + (8 + len(TOPP)) * n_key)


def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    sample: Tensor,
    memory: int,
    bottom_right: bool = False,
    always: Always | None = None,
    in_eight_bits: bool = False,
) -> Sums:
    """Measure error and density of every pair of the grid over some query blocks of one attention call.

    Args:
        q: [B, H, L, D]; k: [B, Hk, S, D]; v: [B, Hk, S, Dv]; any floating dtype, computed in float32 on their device.
        attn_mask: as the ops take it (``capability.normal_mask``), [B or 1, H or 1, L or 1, S].
        sample: int64 [B, H, n], the query blocks to look at.
        memory: bytes of scratch memory that may be used, about, beside a padded copy of k and v; at least one query
            block is taken. To pool k takes two float32 copies of it, before the rest.
        bottom_right: causality is aligned to the last query and key, instead of to the first ones.
        always: what is kept beside the rule, alike in all heads: bool [1, 1, Nk] and [1, Nq, 1].
        in_eight_bits: the error is that of a forward in eight bits, beside the exact output: of no pair it is zero.

    Returns:
        Sums over the batch and the sampled query blocks, on the device.
    """
    diagonal = k.shape[2] - q.shape[2] if bottom_right else 0
    problem = Problem(q, k, v, attn_mask, is_causal, scale, diagonal, always, in_eight_bits)
    steps = ladder(ceil_div(k.shape[2], KEY_BLOCK))
    return Sums(*_summed(problem, sample, steps, memory, _curves))


def measure_prefixes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    sample: Tensor,
    memory: int,
    shares: Sequence[float],
    always: Always | None = None,
) -> tuple[Tensor, Tensor]:
    """Measure the error of some query blocks where each reads the same share of all key blocks, those that score best.

    Args: as of :func:`measure`; ``shares`` of the key blocks, in (0, 1). It takes less time: nothing else is looked at.

    Returns:
        Σ|O_share − O| [H, shares], and Σ|O| [H], float32 on the device.
    """
    problem = Problem(q, k, v, attn_mask, False, scale, 0, always)
    n_key = ceil_div(k.shape[2], KEY_BLOCK)
    lengths = [max(1, min(n_key, round(share * n_key))) for share in shares]
    steps = sorted({*lengths, n_key})

    def errors(problem: Problem, lead: Tensor, block: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
        found = _prefixes(problem, lead, block, steps)
        return found.error[:, [steps.index(length) for length in lengths]], found.norm

    error, norm = _summed(problem, sample, steps, memory, errors)
    return error, norm


def _summed(
    problem: Problem,
    sample: Tensor,
    steps: list[int],
    memory: int,
    of: Callable[[Problem, Tensor, Tensor, list[int]], tuple[Tensor, ...]],
) -> Iterator[Tensor]:
    """What a function gives of query blocks [B, H, n], a few at a time, summed over batch and blocks."""
    batch, heads, n = sample.shape
    at_once = max(1, memory // scratch(steps, max(problem.q.shape[3], problem.v.shape[-1])))
    lead = torch.arange(batch * heads, device=sample.device).view(batch, heads, 1).expand_as(sample).flatten()
    parts = [of(problem, some, blocks, steps) for some, blocks in _chunks(lead, sample.flatten(), at_once)]
    for part in zip(*parts, strict=True):
        yield torch.cat(part).view(batch, heads, n, *part[0].shape[1:]).sum((0, 2))


def _chunks(lead: Tensor, blocks: Tensor, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(lead.split(at_once), blocks.split(at_once), strict=True)


class _Prefixes(NamedTuple):
    """Of n query blocks: Σ|O_prefix − O| after each of the lengths that were looked at [n, steps], Σ|O| [n], and how
    many blocks each pair keeps [n, K, P], of so many visible ones [n]."""

    error: Tensor
    norm: Tensor
    kept: Tensor
    visible: Tensor


def _prefixes(problem: Problem, lead: Tensor, block: Tensor, steps: list[int]) -> _Prefixes:
    """Attention of n query blocks, accumulated in the order of the rule and looked at after some lengths."""
    batch, head, key_head = problem.place(lead)
    rows = block.unsqueeze(1) * QUERY_BLOCK + torch.arange(QUERY_BLOCK, device=block.device)  # [n, 128]
    exist = (rows < problem.length).unsqueeze(2)
    rows = rows.clamp(max=problem.length - 1)
    here = batch.unsqueeze(1), head.unsqueeze(1), rows
    query = problem.q[here].float() * exist  # [n, 128, D]
    counted = exist if problem.queries is None else exist & problem.queries[here].unsqueeze(2)
    order, kept, visible = _order(problem, query, counted, (batch, head, block))
    exact = (query * problem.scale, problem.k, problem.v)
    given = exact
    if problem.rounded is not None:
        q, k, v = problem.rounded
        given = q[here].float() * exist * problem.scale, k, v

    def segment(first: int, last: int, operands: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Masked scores [n, 128, s] and values [n, s, Dv] of the blocks at some places of the order."""
        rows_of, *blocks_of = operands
        blocks = order[:, first:last]
        keys, values = (x[batch.unsqueeze(1), key_head.unsqueeze(1), blocks].float().flatten(1, 2) for x in blocks_of)
        columns = (blocks.unsqueeze(2) * KEY_BLOCK + torch.arange(KEY_BLOCK, device=block.device)).flatten(1)
        seen, added = problem.allowed(batch, head, rows, columns)
        scores = rows_of @ keys.mT
        if added is not None:
            scores += added
        return scores.masked_fill_(~seen, -math.inf), values

    running = Running(query, problem.v.shape[-1], problem.rounded is not None)
    whole = running if problem.rounded is None else Running(query, problem.v.shape[-1])
    outs = query.new_empty(len(steps), *running.values.shape)  # after each prefix
    for step, (first, last) in enumerate(zip([0, *steps], steps, strict=False)):
        running.add(*segment(first, last, given))
        outs[step] = running.out()
        if whole is not running:
            whole.add(*segment(first, last, exact))
    true = outs[-1].clone() if whole is running else whole.out()
    error = outs.sub_(true).abs_().mul_(exist).sum((2, 3)).T  # [n, len(steps)]
    out = true * exist

    # A query block without a visible key is no one's error; its output is zeros under any thresholds.
    return _Prefixes(error, out.abs().sum((1, 2)), kept, visible)


def _curves(problem: Problem, lead: Tensor, block: Tensor, steps: list[int]) -> Sums:
    """The sums of n query blocks, each by itself: [n, K, P] and [n]."""
    error, norm, kept, visible = _prefixes(problem, lead, block, steps)
    # Of a length that was not looked at, the next shorter one speaks: the error is not smaller than the true one.
    looked = _on(block.device, steps)
    at = torch.searchsorted(looked, kept.flatten(1), right=True).sub_(1).clamp_(min=0)
    chosen = error.gather(1, at).view_as(kept)
    if problem.rounded is None:
        chosen = torch.where(kept >= visible.view(-1, 1, 1), 0.0, chosen)
    return Sums(chosen, kept.float(), norm, visible.float())


def _order(
    problem: Problem, query: Tensor, counted: Tensor, place: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which a query block takes key blocks, and how many it takes for each pair.

    Returns:
        order [n, Nk]: what is kept whatever the thresholds, then by rank, then what is invisible;
        kept [n, K, P]: how many are kept for each pair; visible [n].
    """
    batch, head, block = place
    q_mean = torch.where(counted, query, 0.0).sum(1) / counted.sum(1).clamp(min=1)
    scores = torch.einsum("nd,nkd->nk", q_mean * problem.scale, problem.k_mean[batch, head])
    visible = problem.visible[block]
    forced = torch.zeros_like(visible) if problem.forced is None else problem.forced[block]
    if problem.pooled is not None:
        bias, cut = (problem.pooled_mask(x, batch, head, block) for x in problem.pooled)
        scores, visible, forced = rule.apply_pooled_mask(scores, visible, forced, bias, cut)
    ranked = visible
    if problem.always is not None:
        ranked = visible & ~problem.always.keys[0]
    forced = forced & ranked
    rank, mass = rule.ranking(scores, ranked)
    n = ranked.sum(-1)
    if problem.anchor:
        uncut = rank.masked_fill(~ranked | forced, rank.shape[-1])
        forced = forced | ((uncut == uncut.amin(-1, keepdim=True)) & ranked)
    if problem.always is not None:
        forced = forced | (visible & ~ranked) | (visible & problem.always.queries[0, block])
    # What a score that is no number does to the rule: everything visible is kept.
    forced = forced | ((visible & ~torch.isfinite(scores)).any(-1, keepdim=True) & visible)
    always = forced.sum(-1)
    order = torch.where(forced, rank - rank.shape[-1], rank).argsort(-1)

    topk, topp = (_on(rank.device, values) for values in (TOPK, TOPP))
    by_k = rule.topk_length(topk, n.unsqueeze(1))  # [n, K]
    by_p = rule.topp_length(topp, n.unsqueeze(1), mass.unsqueeze(1))  # [n, P]
    prefix = torch.maximum(by_k.unsqueeze(2), by_p.unsqueeze(1)).long().clamp_(max=rank.shape[-1])  # [n, K, P]
    # Of a prefix by rank, what is kept anyway counts once.
    by_rank = torch.zeros_like(forced, dtype=torch.int64).scatter_(1, rank, (visible & ~forced).long())
    fresh = torch.nn.functional.pad(by_rank.cumsum(1), (1, 0))
    kept = always.view(-1, 1, 1) + fresh.gather(1, prefix.flatten(1)).view_as(prefix)
    return order, kept, visible.sum(-1)


def _on(device: torch.device, values: Sequence[float]) -> Tensor:
    """Numbers on a device, without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)
