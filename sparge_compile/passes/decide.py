"""Decide about a match: sparse or dense, with a reason from the closed list. The graph is only read."""

from __future__ import annotations

from typing import Any

import torch

from ..cost import Shape, cost_model
from ..kernels import capability
from ..options import Options
from ..pair import Pair
from ..report import Decision, Reason
from .find import Match
from .match.attention import Attention
from .read.fx_utils import size_hint, value_of

# Of fewer key blocks than 16 there is little to choose, and what is so short is mostly a text that a video attends to:
# little time, much meaning. min_seq_len overrides it.
MIN_KEYS = 1024

# The cost model is off by about a tenth; to be safe, a site must be predicted to gain so much.
MARGIN = 1.1

_HOW_TO_GET_SHAPES = "give example_inputs to sparge_compile.rewrite, or export the model"


def decide(match: Match, options: Options) -> Decision:
    """Whether a site becomes sparse under these options. An error in the thresholds is raised, not decided."""
    refused = refusal(match, options)
    if refused is not None:
        return refused
    attention = match.attention
    assert attention is not None
    pairs = thresholds_for(match, options)
    shape = shape_of(attention)
    if shape is None:
        return Decision(Reason.NO_SHAPES, "a size depends on data")
    least = least_keys(options)
    # Where the length is dynamic, this comparison becomes a guard: lengths on its other side are compiled anew.
    if attention.keys < least:
        return Decision(Reason.TOO_SHORT, f"{shape.keys} of at least {least}")
    if options.min_seq_len is not None:
        return Decision(Reason.LONG_ENOUGH, f"{shape.keys} keys")
    costs = options.costs or cost_model(attention.device)
    # So does this one: the closed forms over symbolic sizes say on which side of the break-even a length lies.
    reason = Reason.PAYS if pays(attention, pairs, options, guard=True) else Reason.SLOWER
    return Decision(reason, "", costs.predict(shape, expected_density(pairs)))


def thresholds_for(match: Match, options: Options) -> tuple[Pair, ...]:
    """One (topk, topp) for each query head of a site."""
    assert match.attention is not None
    return options.thresholds_of(match.site.name, int(match.attention.heads), int(match.attention.head_size))


def pays(attention: Attention, pairs: tuple[Pair, ...], options: Options, *, guard: bool = False) -> bool:
    """Whether the cost model predicts a gain; where a size depends on data, nothing is known against it.

    ``guard``: asked of the symbolic sizes, so that a dynamic length is guarded to lie on this side of the break-even;
    else of the sizes that were traced with.
    """
    shape = Shape(*sizes_of(attention), is_causal=attention.is_causal) if guard else shape_of(attention)
    if shape is None:
        return True
    costs = options.costs or cost_model(attention.device)
    return bool(costs.dense(shape) >= MARGIN * costs.sparse(shape, expected_density(pairs)))


def expected_density(pairs: tuple[Pair, ...]) -> float:
    """An upper bound of the density.

    The m leading blocks of n hold at least m/n of the mass, so Top-p never keeps more than a share of topp.
    """
    return sum(max(pair) for pair in pairs) / max(len(pairs), 1)


def refusal(match: Match, options: Options) -> Decision | None:
    """Why this site cannot be sparse at all, or None."""
    attention = match.attention
    if match.refusal is not None:
        hint = _HOW_TO_GET_SHAPES if match.refusal.reason is Reason.NO_SHAPES else ""
        return Decision(match.refusal.reason, match.refusal.detail or hint)
    assert attention is not None
    dropout = value_of(attention.dropout)
    if dropout != 0:
        return Decision(Reason.DROPOUT, f"p = {dropout}")
    if attention.head_size != attention.value_head_size:
        return Decision(Reason.VALUE_HEAD_SIZE, f"{attention.value_head_size} after {attention.head_size}")
    if isinstance(attention.heads, torch.SymInt):
        return Decision(Reason.HEADS, "their number is dynamic, and thresholds belong to heads")
    if isinstance(attention.head_size, torch.SymInt):
        return Decision(Reason.HEAD_SIZE, "dynamic")
    unsupported = capability.refusal(attention.device, attention.dtype, attention.head_size)
    if unsupported is not None:
        return Decision(*unsupported)
    if attention.learned_mask:
        return Decision(Reason.LEARNED_BIAS)
    if attention.mask_kind == "additive" and not options.additive_masks:
        return Decision(Reason.ADDITIVE_MASK)
    return None


def least_keys(options: Options) -> int:
    """Sites with fewer keys stay dense."""
    return MIN_KEYS if options.min_seq_len is None else options.min_seq_len


def shape_of(attention: Attention) -> Shape | None:
    """The sizes that the cost model needs, as they were traced with; None where one depends on data."""
    hints = [size_hint(x) for x in sizes_of(attention)]
    return None if None in hints else Shape(*hints, is_causal=attention.is_causal)


def sizes_of(attention: Attention) -> tuple[Any, ...]:
    """The sizes of :class:`Shape`, in order; symbolic where they are dynamic."""
    return attention.batch, attention.heads, attention.kv_heads, attention.length, attention.keys, attention.head_size
