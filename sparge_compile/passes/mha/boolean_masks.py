"""Boolean masks behind additive ones: ``nn.MultiheadAttention`` and its kin turn every mask that they are given into 0
and -inf of a float dtype before they call on. Followed back through the graph, such a mask is boolean again.

Only the spelling of torch.nn is known: ``zeros_like(m).masked_fill_(m, -inf)``, views of it, and the sum of two.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..read.fx_utils import value_of
from ..read.reader import Reader

_aten = torch.ops.aten
_ZEROS = {torch.zeros_like, _aten.zeros_like.default}
_FILL = {"masked_fill", "masked_fill_", torch.masked_fill, _aten.masked_fill.Scalar, _aten.masked_fill_.Scalar}
_ADD = {operator.add, torch.add, _aten.add.Tensor}
_EXPAND = {"expand", _aten.expand.default}  # dropped: masks broadcast, and a mask of ones and -1 strides is not built
_VIEW: dict[Any, Callable[..., Tensor]] = {
    "view": Tensor.reshape,
    "reshape": Tensor.reshape,
    "unsqueeze": Tensor.unsqueeze,
    _aten.view.default: Tensor.reshape,
    _aten.reshape.default: Tensor.reshape,
    _aten.unsqueeze.default: Tensor.unsqueeze,
}


def boolean_sources(mask: Node, reader: Reader) -> list[Node] | None:
    """The boolean masks (True hides) that say all a mask says; None where it says more, or nobody can tell."""
    if getattr(value_of(mask), "dtype", None) == torch.bool:
        return None if _written_to(mask, reader) else [mask]
    operands = _operands(mask)
    found = [boolean_sources(operand, reader) for operand in operands]
    if not found or None in found or _written_to(mask, reader):
        return None
    return [source for sources in found for source in sources or ()]


def hidden(mask: Node, values: Mapping[Node, Tensor]) -> Tensor:
    """A mask with boolean sources as a boolean one: True hides. It broadcasts to the shape of ``mask``."""
    if mask in values:
        return values[mask]
    operands = [hidden(operand, values) for operand in _operands(mask)]
    if mask.target in _ADD:
        return operands[0] | operands[1]
    if mask.target in _VIEW:
        return _VIEW[mask.target](operands[0], *(value_of(x) for x in _sizes(mask)))
    return operands[0]


def spelling(mask: Node) -> Iterator[Node]:
    """The nodes that make an additive mask of its boolean sources, users first."""
    if getattr(value_of(mask), "dtype", None) != torch.bool:
        yield mask
        for operand in (*_operands(mask), *mask.args[:1]):  # the first argument of a fill is the zeros
            if isinstance(operand, Node):
                yield from spelling(operand)


def visible(arguments: Mapping[str, Any], masks: Mapping[str, Tensor]) -> Tensor:
    """The mask that ``F.multi_head_attention_forward`` hands to SDPA, as a boolean one: True attends."""
    query, heads = arguments["query"], arguments["num_heads"]
    batch = query.shape[1] if query.dim() == 3 else 1
    parts = []
    if (mask := masks.get("attn_mask")) is not None:  # [L, S] or [B·H, L, S]
        parts.append(~(mask[None, None] if mask.dim() == 2 else mask.view(batch, heads, *mask.shape[1:])))
    if (mask := masks.get("key_padding_mask")) is not None:  # [B, S] or [S]
        parts.append(~mask.view(batch, 1, 1, mask.shape[-1]))
    seen = parts[0] if len(parts) == 1 else parts[0] & parts[1]
    extra = (arguments["bias_k"] is not None) + bool(arguments["add_zero_attn"])  # keys that all queries see
    return F.pad(seen, (0, extra), value=True) if extra else seen


def _operands(mask: Node) -> list[Node]:
    """The masks that a mask is made of; none where it is made in a way that is not known."""
    target, args = mask.target, mask.args
    if target in _FILL and not mask.kwargs and len(args) == 3:
        zeros, source, fill = args
        if isinstance(zeros, Node) and isinstance(source, Node) and fill == float("-inf"):
            made_here = zeros.target in _ZEROS and zeros.args == (source,) and list(zeros.users) == [mask]
            return [source] if made_here else []
    elif (target in _ADD and not mask.kwargs and len(args) == 2) or (target in _EXPAND or target in _VIEW):
        operands = list(args) if target in _ADD else [args[0]]
        if all(isinstance(x, Node) for x in operands):
            return operands  # type: ignore[return-value]
    return []


def _sizes(mask: Node) -> tuple[Any, ...]:
    sizes = mask.args[1:]
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _written_to(mask: Node, reader: Reader) -> bool:
    """Whether a node changes a mask in place, through whatever view: then what it holds depends on when.

    The fill of fresh zeros makes a mask and changes none.
    """
    return any(writer is not mask and not _operands(writer) for writer in reader.writers(mask))
