"""From two products and a softmax between them to one :class:`Attention`.

Told here: which axes are batch, heads, rows and keys, and from which nodes of the graph the operands are read (before
keys were repeated, transposed, copied or upcast).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...report import Reason
from ..read.axes import (
    Axis,
    Dim,
    Layout,
    axes_of,
    settle,
    settle_dim,
)
from ..read.calls import Value
from ..read.reader import Held, Reader
from .attention import Attention, Axes, Factor, Operand, Refusal
from .masks import Term, understand


@dataclass(frozen=True)
class Part:
    """One side of a product: a value, the node that reads it, and the axes of its dimensions."""

    value: Value
    user: Node
    layout: Layout


def compose(
    reader: Reader,
    *,
    query: Part,
    key: Part,
    value: Part,
    weights: Layout,
    keys: Dim,
    output: Node,
    output_layout: Layout,
    terms: Sequence[Term] = (),
    scale: float | None = None,
    factors: Sequence[tuple[Any, bool]] = (),
    region: tuple[Node, ...] = (),
    scores_dtype: torch.dtype | None = None,
    batch: Dim | None = None,
    is_causal: bool = False,
    dropout: Any = 0.0,
) -> Attention | Refusal:
    """The attention that these parts make.

    ``weights`` are the axes of the softmax's dimensions, ``keys`` those that it runs over. ``batch`` says which of the
    others are batch where that is known; else it is told from how heads were split. ``scores_dtype`` is what the
    product of queries and keys was computed in.
    """
    result = reader.fake(output)
    out_dtype = (result[0] if isinstance(result, (tuple, list)) else result).dtype
    dtypes = (scores_dtype or out_dtype, scores_dtype or out_dtype, out_dtype)
    seen = [_exact(reader, part, dtype) for part, dtype in zip((query, key, value), dtypes, strict=True)]
    if not all(seen):
        return Refusal(Reason.LAYOUT, "an operand is no tensor of the graph")
    axes = _axes(settle(weights), settle_dim(keys), query, key, value, seen, batch)
    if isinstance(axes, Refusal):
        return axes
    if _strangers(settle(output_layout), (*axes.batch, *axes.heads, *axes.group, *axes.rows, *axes.value_feature)):
        return Refusal(Reason.LAYOUT, "the result has axes of its own")
    all_heads = (*axes.heads, *axes.group)
    q = _choose(seen[0], (axes.batch, all_heads, axes.rows, axes.feature))
    k = _choose(seen[1], (axes.batch, axes.heads, axes.keys, axes.feature))
    v = _choose(seen[2], (axes.batch, axes.heads, axes.keys, axes.value_feature))
    meaning = understand(reader, list(terms), axes)
    if isinstance(meaning, Refusal):
        return meaning
    scaled = _factors(reader, factors, (axes.batch, all_heads, axes.rows, ()))
    if isinstance(scaled, Refusal):
        return scaled
    found = Attention(
        axes=axes,
        query=q[0],
        key=k[0],
        value=v[0],
        output=output,
        output_layout=settle(output_layout),
        dtype=torch.promote_types(torch.promote_types(q[1], k[1]), torch.promote_types(v[1], out_dtype)),
        masks=meaning.masks,
        is_causal=is_causal or meaning.is_causal,
        scale=scale,
        factors=scaled,
        dropout=dropout,
        region=region,
        rewritten=reader.changed(output, output, None),
    )
    return _unmade(reader, found) or found


def _exact(reader: Reader, part: Part, dtype: torch.dtype) -> list[tuple[Held, torch.dtype]]:
    """The nodes that hold an operand without loss, each with the dtype that its numbers fit in.

    An upcast on the way is seen through; behind a downcast is another tensor. ``dtype`` is that of the product: under
    autocast the nearest node may be wider, and is cast.
    """
    found: list[tuple[Held, torch.dtype]] = []
    narrow = dtype
    for i, one in enumerate(reader.holders(part.value, part.user, part.layout)):
        own = reader.fake(one.node).dtype
        if min(own.itemsize, narrow.itemsize) < 2 and own != narrow:
            return found  # float8, which promotes to nothing
        if own != narrow:
            if torch.promote_types(own, narrow) != narrow:
                return [*found, (one, narrow)] if i == 0 else found
            narrow = own
        found.append((one, narrow))
    return found


def _axes(
    weights: Layout,
    keys: Dim,
    query: Part,
    key: Part,
    value: Part,
    seen: list[list[tuple[Held, torch.dtype]]],
    batch: Dim | None,
) -> Axes | Refusal:
    """Which axes are what. Heads are split from the features, or stand before the rows."""
    q, k, v = (axes_of(part.layout) for part in (query, key, value))
    all_axes = axes_of(weights)
    feature = tuple(a for a in k if a in q and a not in all_axes)
    value_feature = tuple(a for a in v if a not in all_axes)
    own = [a for a in all_axes if a not in k and a not in v and a not in keys]
    rows: Dim = ()
    if own:
        rows = next(tuple(a for a in dim if a in own) for dim in weights if own[-1] in dim)
    lead = tuple(a for a in all_axes if a not in rows and a not in keys)
    if _strangers((q,), (*lead, *rows, *feature)) or _strangers((k,), (*lead, *keys, *feature)):
        return Refusal(Reason.LAYOUT, "query and key have axes of their own")
    if batch is None and any(a in v and a not in k for a in all_axes):
        return Refusal(Reason.NOT_ATTENTION, "values differ from query to query")
    if set(keys) - set(k) or set(keys) - set(v) or _strangers((v,), (*lead, *keys, *value_feature)):
        return Refusal(Reason.LAYOUT, "key and value have other axes than the weights")
    first = (
        len(settle_dim(batch)) if batch is not None else _first_head(weights, lead, rows, feature, value_feature, seen)
    )
    heads = lead[first:]
    shared = [set(axes_of(held[-1][0].layout)) for held in seen[1:]]
    group: Dim = ()
    while len(group) < len(heads) and not any(heads[-1 - len(group)] in s for s in shared):
        group = (heads[-1 - len(group)], *group)
    return Axes(lead[:first], heads[: len(heads) - len(group)], group, rows, keys, feature, value_feature)


def _first_head(
    weights: Layout,
    lead: Dim,
    rows: Dim,
    feature: Dim,
    value_feature: Dim,
    seen: list[list[tuple[Held, torch.dtype]]],
) -> int:
    """Where in the leading axes the heads begin."""
    for held, features in ((seen[2], value_feature), (seen[1], feature), (seen[0], feature)):
        for one, _ in reversed(held):
            split = [a for dim in settle(one.layout) if features and features[-1] in dim for a in dim if a in lead]
            if split:
                return min(lead.index(a) for a in split)
    if len(weights) >= 4:
        leading = [dim for dim in weights if not dim or dim[0] in lead]
        heads = leading[-1] if leading else ()
        first = lead.index(heads[0]) if heads and heads[0] in lead else len(lead)
        shared = set().union(*(axes_of(held[-1][0].layout) for held in seen[1:]))
        if len(weights) >= 5 and first > 0 and not set(lead[first:]) & shared:
            first -= 1  # the axis before rows counts the query heads of a key head
        return first
    if len(lead) > 1:
        return len(lead) - 1
    for held in seen:
        for one, _ in held:
            if len(one.layout) == 4 and lead and lead[0] in axes_of(settle(one.layout)[1:]):
                return 0
    return len(lead)


def _strangers(layout: Layout, known: Dim) -> bool:
    return bool(set(axes_of(layout)) - set(known))


def _choose(seen: list[tuple[Held, torch.dtype]], wanted: Layout) -> tuple[Operand, torch.dtype]:
    """The node to read: the earliest that has the wanted axes as it is, else the nearest without foreign axes."""
    wanted = settle(wanted)
    fitting = [(held, dtype) for held, dtype in seen if not _strangers(held.layout, axes_of(wanted))]
    assert fitting, "a group of heads is told by the earliest node, which lacks it"
    as_is = [x for x in fitting if settle(x[0].layout) == wanted]
    held, dtype = as_is[-1] if as_is else fitting[0]
    return Operand(held.node, held.user, settle(held.layout), wanted), dtype


def _factors(reader: Reader, factors: Sequence[tuple[Any, bool]], wanted: Layout) -> tuple[Factor, ...] | Refusal:
    found = []
    for factor, inverse in factors:
        if isinstance(factor, Node):
            found.append(Factor(factor, inverse))
            continue
        held = reader.holders(factor.value, factor.user, factor.layout)
        if not held:
            return Refusal(Reason.SCORES_CHANGED, "scaled by no tensor of the graph")
        found.append(Factor(Operand(held[0].node, held[0].user, settle(held[0].layout), wanted, expand=False), inverse))
    return tuple(found)


def _unmade(reader: Reader, found: Attention) -> Refusal | None:
    """Refuse operands that cannot be built at the place of the result."""
    operands = [found.query, found.key, found.value, *(mask.operand for mask in found.masks)]
    operands += [f.operand for f in found.factors if isinstance(f.operand, Operand)]
    for operand in operands:
        if reader.changed(operand.node, operand.user, found.output, found.region):
            return Refusal(Reason.IN_PLACE, f"{operand.node.name} is changed before the result is computed")
        lacking = [a for dim in operand.wanted for a in dim if a not in axes_of(operand.layout)]
        dims = (*settle(operand.layout), *operand.wanted)
        if any(sum(map(_symbolic, dim)) > 1 for dim in dims):
            return Refusal(Reason.LAYOUT, "two dynamic sizes are folded into one dimension")
        for dim in operand.wanted:
            some = [a for a in dim if a in lacking]
            if operand.expand and some and len(some) < len(dim) and any(map(_symbolic, some)):
                return Refusal(Reason.LAYOUT, "a dynamic size is broadcast inside a dimension")
            if operand.expand and any(map(_symbolic, some)) and not any(each.has(dim) for each in operands[:3]):
                return Refusal(Reason.LAYOUT, "a dynamic size is broadcast")
    if any(sum(map(_symbolic, dim)) > 1 for dim in found.output_layout):
        return Refusal(Reason.LAYOUT, "two dynamic sizes are folded into one dimension")
    return None


def _symbolic(axis: Axis) -> bool:
    return not isinstance(axis.size, int)
