"""Decide about a match: sparse or dense, with a reason from the closed list. The graph is only read."""

from __future__ import annotations

import torch

from ..config import Options
from ..cost import Shape, cost_model
from ..kernels import capability
from ..report import Decision, Reason
from ..thresholds import Pair
from .find import Match
from .fx_utils import size_hint, value_of
from .open_up import OPENABLE, returns_weights

# Of fewer key blocks than 16 there is little to choose, and what is so short is mostly a text that a video attends to:
# little time, much meaning. min_seq_len overrides it.
MIN_KEYS = 1024

# The cost model is off by about a tenth; a site must be predicted to gain so much, lest it lose.
MARGIN = 1.1


def decide(match: Match, options: Options) -> Decision:
    """Whether a site becomes sparse under these options. An error in the thresholds is raised, not decided."""
    refused = _refusal(match)
    if refused is not None:
        return refused
    pairs = thresholds_for(match, options)
    keys, shape = value_of(match.arguments["key"]).shape[2], shape_of(match)
    if shape is None:
        return Decision(Reason.NO_SHAPES, "a size depends on data")
    least = MIN_KEYS if options.min_seq_len is None else options.min_seq_len
    # Where the length is dynamic, this comparison becomes a guard: lengths on its other side are compiled anew.
    if keys < least:
        return Decision(Reason.TOO_SHORT, f"{shape.keys} of at least {least}")
    if options.min_seq_len is not None:
        return Decision(Reason.LONG_ENOUGH, f"{shape.keys} keys")
    costs = options.costs or cost_model(match.output.device)
    prediction = costs.predict(shape, expected_density(pairs))
    return Decision(Reason.PAYS if prediction.speedup >= MARGIN else Reason.SLOWER, "", prediction)


def thresholds_for(match: Match, options: Options) -> tuple[Pair, ...]:
    """One (topk, topp) for each query head: from the calibration, else from the options."""
    heads = int(value_of(match.arguments["query"]).shape[1])
    found = options.calibration.lookup(match.site.name, heads) if options.calibration else None
    return found or ((options.topk, options.topp),) * heads


def expected_density(pairs: tuple[Pair, ...]) -> float:
    """An upper bound of the density.

    The m leading blocks of n hold at least m/n of the mass, so Top-p never keeps more than a share of topp.
    """
    return sum(max(pair) for pair in pairs) / max(len(pairs), 1)


def _refusal(match: Match) -> Decision | None:
    """Why this site cannot be sparse at all, or None."""
    arguments = match.arguments
    if not arguments:
        target = match.node.target
        if target not in OPENABLE:
            return Decision(Reason.OPAQUE, str(getattr(target, "__name__", target)))
        return Decision(Reason.WEIGHTS_USED if returns_weights(match.node) else Reason.NO_SHAPES)
    query, key, value = (value_of(arguments[name]) for name in ("query", "key", "value"))
    if not all(isinstance(x, torch.Tensor) for x in (query, key, value, match.output)):
        return Decision(Reason.NO_SHAPES)
    if not query.dim() == key.dim() == value.dim() == 4:
        return Decision(Reason.LAYOUT, f"query has {query.dim()} dimensions")
    if match.obstacle is not None:
        return Decision(match.obstacle)
    dropout = value_of(arguments["dropout_p"])
    if dropout != 0:
        return Decision(Reason.DROPOUT, f"p = {dropout}")
    if key.shape[3] != value.shape[3]:
        return Decision(Reason.VALUE_HEAD_SIZE, f"{value.shape[3]} after {key.shape[3]}")
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3]:
        return Decision(Reason.LAYOUT, f"query {_text(query)}, key {_text(key)}, value {_text(value)}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if isinstance(heads, torch.SymInt) or isinstance(kv_heads, torch.SymInt):
        return Decision(Reason.HEADS, "their number is dynamic, and thresholds belong to heads")
    if heads != kv_heads and (heads % kv_heads != 0 or not (arguments["enable_gqa"] or kv_heads == 1)):
        return Decision(Reason.HEADS, f"{heads} and {kv_heads}")
    # Under autocast the inputs' dtypes may differ; the output has the dtype that attention is computed in.
    unsupported = capability.refusal(query.device, match.output.dtype, query.shape[3])
    if unsupported is not None:
        return Decision(*unsupported)
    return _mask_refusal(match, (*query.shape[:3], key.shape[2]))


def _mask_refusal(match: Match, target: tuple[int, ...]) -> Decision | None:
    mask = value_of(match.arguments["attn_mask"])
    if mask is None:
        return None
    if match.arguments["is_causal"]:
        return Decision(Reason.CAUSAL_AND_MASK)
    if mask.dtype != torch.bool:
        detail = "nn.MultiheadAttention makes every mask additive" if match.inside is not None else ""
        return Decision(Reason.ADDITIVE_MASK, "learned" if mask.requires_grad else detail)
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(have != want and have != 1 for have, want in zip(padded, target, strict=True)):
        return Decision(Reason.MASK_SHAPE, f"{_text(mask)} for {target}")
    return None


def shape_of(match: Match) -> Shape | None:
    """The sizes that the cost model needs, as they were traced with; None where one depends on data."""
    query, key = value_of(match.arguments["query"]), value_of(match.arguments["key"])
    batch, heads, length, head_size = query.shape
    hints = [size_hint(x) for x in (batch, heads, key.shape[1], length, key.shape[2], head_size)]
    return None if None in hints else Shape(*hints, is_causal=bool(match.arguments["is_causal"]))


def _text(x: torch.Tensor) -> str:
    return str(tuple(x.shape))
