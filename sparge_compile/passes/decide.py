"""Decide about a match: sparse or dense, with a reason from the closed list. The graph is only read."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from math import prod
from typing import Any

import torch

from ..cost import CostModel, Shape, cost_model
from ..keeping import NOTHING, Kept, beside_longest
from ..kernels import capability
from ..kernels.sizes import surely
from ..limit import Limit
from ..options import Options
from ..pair import Pair
from ..report import Decision, Reason
from .find import Match
from .match.attention import Attention
from .match.joint import hints
from .read.fx_utils import size_hint, size_text, value_of

# Of fewer key blocks than 16 there is little to choose, and what is so short is mostly a text that a video attends to:
# little time, much meaning. min_seq_len overrides it.
MIN_KEYS = 1024

# The cost model is off by about a tenth; to be safe, a site must be predicted to gain so much.
MARGIN = 1.1

# The largest size that is looked at to tell from which one on a site is sparse.
LARGEST = 1 << 24

# A mask_mod that is more than causality or a condition on keys becomes a boolean tensor; one of more bytes than these
# (16k queries and keys) would take memory that flex_attention does not need.
LARGEST_MASK = 1 << 28

_HOW_TO_GET_SHAPES = "give example_inputs to sparge_compile.rewrite, or export the model"


def decide(match: Match, options: Options) -> Decision:
    """Whether a site becomes sparse under these options. An error in the thresholds is raised, not decided."""
    refused = refusal(match, options)
    if refused is not None:
        return refused
    if match.by_plan or options.is_dense_layer(match.site.name):
        return Decision(Reason.BY_PLAN)
    assert match.attention is not None
    kept = options.kept_of(match.site.name)
    density = expected_density(thresholds_for(match, options), kept, match)
    decision = verdict(match.attention, density, options)
    if decision.status == "dense" or kept == NOTHING:
        return decision
    return replace(decision, detail="; ".join(filter(None, (decision.detail, kept_text(kept, match)))))


def kept_text(kept: Kept, match: Match) -> str:
    """What a site keeps, in words."""
    if not kept.of_graph:
        assert match.attention is not None
        keys = match.attention.keys
        is_empty = isinstance(keys, int) and kept.tokens(keys) == (0, 0)
        return f"keeps nothing: {kept} of {keys}" if is_empty else f"keeps {kept}"
    if isinstance(match.parts, str):
        return f"keeps no text: {match.parts}"
    start, stop = beside_longest(hints(match.parts))
    sizes = " + ".join(str(size_text(part.size)) for part in match.parts)
    return f"keeps {kept}, here tokens {start}:{stop} of {sizes}"


def verdict(attention: Attention, density: float, options: Options) -> Decision:
    """What the sizes of an attention say, of whose blocks at most this share is kept.

    Symbolic sizes are not guarded: where their range leaves the answer open, the decision has a limit for the op to
    ask at each call.
    """
    limit = limit_of(attention, density, options)
    sizes = sizes_of(attention)
    long = _known(attention.keys >= limit.least_keys)
    if long is False:
        return Decision(Reason.TOO_SHORT, f"{size_text(attention.keys)} of at least {limit.least_keys}")
    shape, prediction = shape_of(attention), None
    if options.min_seq_len is None and shape is not None:
        prediction = costs_of(attention, options).predict(shape, density, attention.trains)
    gained = [_known(seconds >= 0) for seconds in limit.gained(*sizes)]
    pays = False if False in gained else all(gained) or None
    least = None if long and pays else least_size(attention, limit)
    if pays is False or (least is None and not (long and pays)):
        return Decision(Reason.SLOWER, "", prediction)
    if least is not None:
        return Decision(Reason.AT_EACH_CALL, f"sparse from {least} on", prediction, limit)
    if options.min_seq_len is not None:
        return Decision(Reason.LONG_ENOUGH, f"{size_text(attention.keys)} keys")
    return Decision(Reason.PAYS, "", prediction)


def least_keys(options: Options) -> int:
    """Sites with fewer keys stay dense."""
    return MIN_KEYS if options.min_seq_len is None else options.min_seq_len


def limit_of(attention: Attention, density: float, options: Options) -> Limit:
    """From which sizes on an attention is sparse."""
    if options.min_seq_len is not None:
        return Limit(least_keys(options))
    costs = costs_of(attention, options).of(attention.trains)
    return costs.limit(least_keys(options), density, MARGIN, attention.is_causal)


def costs_of(attention: Attention, options: Options) -> CostModel:
    """The coefficients for an attention, as the options give them or as they were measured."""
    if options.costs is not None:
        return options.costs
    x, shape = attention, shape_of(attention)
    # Where ranks wait for one another all decide alike: the host's time, which each measures, has no part in it.
    launched = options.launched if x.ring is None else "graph"
    costs = cost_model(x.device, x.dtype, x.head_size, x.value_head_size, launched, bool(x.masks))
    if shape is not None:
        costs = costs.with_idle(x.device, shape)
    if x.gathers:
        costs = costs.with_gathers(x.device, x.dtype, x.head_size, x.value_head_size)
    return costs


def least_size(attention: Attention, limit: Limit) -> str | None:
    """The least length (or batch, if lengths are fixed) that a limit lets through, in words; None if it lets none.

    Other sizes are taken as they were traced with; a batch that depends on data as 1.
    """
    names = ("batch", "heads", "kv_heads", "length", "keys", "head_size", "value_head_size")
    sizes = dict(zip(names, sizes_of(attention), strict=True))
    open_sizes = [name for name in ("length", "keys") if isinstance(sizes[name], torch.SymInt)] or ["batch"]
    fixed = {name: size_hint(size) or 1 for name, size in sizes.items()}

    def lets_through(n: int) -> bool:
        return limit.holds(**{**fixed, **dict.fromkeys(open_sizes, n)})

    if not lets_through(LARGEST):
        return None
    least = 1 + bisect_left(range(1, LARGEST), True, key=lets_through)
    what = {"keys": "keys", "length": "queries", "batch": "sequences"}[open_sizes[-1]]
    return f"{least} {what}"


def _known(condition: Any) -> bool | None:
    """Whether a condition on sizes holds; None where that depends on what symbols stand for."""
    if surely(condition):
        return True
    return False if surely(torch.sym_not(condition)) else None


def thresholds_for(match: Match, options: Options) -> tuple[Pair, ...]:
    """One (topk, topp) for each query head of a site."""
    assert match.attention is not None
    return options.thresholds_of(match.site.name, int(match.attention.all_heads), int(match.attention.head_size))


def expected_density(pairs: tuple[Pair, ...], kept: Kept = NOTHING, match: Match | None = None) -> float:
    """An upper bound of the density.

    The m leading blocks of n hold at least m/n of the mass, so Top-p never keeps more than a share of topp; of the
    blocks that are not kept anyway.
    """
    chosen = sum(max(pair) for pair in pairs) / max(len(pairs), 1)
    share = 0.0 if match is None else kept_share(kept, match)
    rows = share if kept.dense_queries else 0.0
    return rows + (1 - rows) * (share + (1 - share) * chosen)


def kept_share(kept: Kept, match: Match) -> float:
    """The share of a site's keys that is kept, as its sizes were traced."""
    attention = match.attention
    keys = size_hint(attention.keys) if attention is not None and kept != NOTHING else None
    if not keys:
        return 0.0
    start, stop = kept.tokens(keys, [] if not kept.of_graph or isinstance(match.parts, str) else hints(match.parts))
    return (stop - start) / keys


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
    if isinstance(attention.heads, torch.SymInt):
        return Decision(Reason.HEADS, "their number is dynamic, and thresholds belong to heads")
    head_sizes = attention.head_size, attention.value_head_size
    if any(isinstance(size, torch.SymInt) for size in head_sizes):
        return Decision(Reason.HEAD_SIZE, "dynamic")
    unsupported = capability.refusal(attention.device, attention.dtype, *head_sizes)
    if unsupported is not None:
        return Decision(*unsupported)
    if attention.ring is not None and (match.keeps or options.kept_of(match.site.name) != NOTHING):
        return Decision(Reason.ARGUMENT, "kept tokens in a ring")
    if attention.splits_rows and (attention.is_causal or attention.masks):
        what = "causality" if attention.is_causal else "a mask"
        return Decision(Reason.ARGUMENT, f"{what} over a sequence that DTensor shards: its parts may be in any order")
    if attention.packing is not None and attention.masks:
        return Decision(Reason.MASK_SHAPE, "a mask beside packed sequences")
    if attention.learned_mask:
        return Decision(Reason.LEARNED_BIAS)
    if attention.mask_kind == "additive" and not options.additive_masks:
        return Decision(Reason.ADDITIVE_MASK)
    if match.site.kind == "flex" and (size := _largest_mask(attention)) > LARGEST_MASK:
        return Decision(Reason.LARGE_MASK, f"{size} elements of at most {LARGEST_MASK}")
    return None


def _largest_mask(attention: Attention) -> int:
    """How many elements the largest mask of an attention has; of dynamic sizes, those that were traced with."""
    sizes = [value_of(mask.operand.node).shape for mask in attention.masks if mask.row is None]
    return max((prod(size_hint(n) or 1 for n in shape) for shape in sizes), default=0)


def shape_of(attention: Attention) -> Shape | None:
    """The sizes that the cost model needs, as they were traced with; None where one depends on data."""
    hints = [size_hint(x) for x in sizes_of(attention)]
    return None if None in hints else Shape(*hints, is_causal=attention.is_causal)


def sizes_of(attention: Attention) -> tuple[Any, ...]:
    """The sizes of :class:`Shape`, in order; symbolic where they are dynamic."""
    x = attention
    return x.batch, x.heads, x.kv_heads, x.length, x.keys, x.head_size, x.value_head_size
