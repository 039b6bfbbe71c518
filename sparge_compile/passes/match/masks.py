"""Masks: each says nothing, causality, a condition on keys, one on pairs, or numbers added to scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
from sympy.core.relational import Relational
from torch.fx import Node

from ...report import Reason
from ..read.axes import Axis, Dim, Layout, settle, settle_dim
from ..read.calls import Value
from ..read.formulas import as_cases, as_condition, formula, symbol_of
from ..read.reader import Held, Reader
from .attention import Axes, Mask, Operand, Refusal

# A score this low has no weight beside any other, in every dtype; many models hide keys with -1e4, -1e9 or finfo.min.
HIDDEN = -1e4
MAX_CONDITIONS = 64  # comparisons in one mask; sympy's normal forms grow fast


@dataclass(frozen=True)
class Term:
    """A tensor that takes part in the scores, as ``user`` reads it: ``kind`` as in :class:`Mask`, or ``number``."""

    value: Value
    user: Node
    layout: Layout
    kind: str
    factor: float = 1.0  # that scales it, or ``fill``
    fill: float = float("-inf")  # what was put in the place of scores


@dataclass(frozen=True)
class Meaning:
    """The masks that remain to be read, and whether attention is causal."""

    masks: tuple[Mask, ...]
    is_causal: bool


def understand(reader: Reader, terms: list[Term], axes: Axes) -> Meaning | Refusal:
    """Join what the mask terms of one attention say."""
    masks: list[Mask] = []
    causal = False
    for term in terms:
        found = _understand(reader, term, axes)
        if isinstance(found, Refusal):
            return found
        masks += found.masks
        causal |= found.is_causal
    return Meaning(tuple(masks), causal)


def _understand(reader: Reader, term: Term, axes: Axes) -> Meaning | Refusal:
    held = reader.holders(term.value, term.user, term.layout)
    if not held:
        return Refusal(Reason.SCORES_CHANGED, "by a mask that no tensor of the graph holds")
    if term.kind != "number" and not term.fill * term.factor <= HIDDEN:
        return Refusal(Reason.SCORES_CHANGED, "what hides is scaled until it does not")
    symbols: dict[Axis, Any] = {}
    index = [coordinate(dim, symbols) for dim in settle(term.layout)]
    said = formula(reader, term.value, term.user, index)
    kind = term.kind
    if kind == "number":
        if any(v.is_number and v.is_extended_real and v * term.factor >= -HIDDEN / 2 for _, v in as_cases(said)):
            return Refusal(Reason.SCORES_CHANGED, "scores are raised as far as hidden ones are lowered")
        visible = visible_of(said, term.factor)
        kind = "add" if visible is None else "hide"
    else:
        visible = as_condition(said)
        visible = sympy.Not(visible) if kind == "drop" else visible
    mask = Mask(_operand(held, axes), kind, factor=term.factor)
    if visible is None:
        return Meaning((mask,), False)
    if len(visible.atoms(Relational)) > MAX_CONDITIONS or any(len(x.args) > 4 for x in visible.atoms(sympy.Xor)):
        return Meaning((mask,), False)
    return _classify(sympy.to_nnf(visible, simplify=False), symbols, axes, mask)


def _classify(visible: Any, symbols: dict[Axis, Any], axes: Axes, mask: Mask) -> Meaning:
    bounds = {symbol: symbol_of(axis.size) - 1 for axis, symbol in symbols.items()}
    rows = {symbols[a] for a in settle_dim(axes.rows) if a in symbols}
    keys = [symbols[a] for a in settle_dim(axes.keys) if a in symbols]
    causal, rest = False, []
    for condition in sympy.And.make_args(_bounded(visible, bounds)):
        if condition == sympy.true:
            continue
        if len(rows) == 1 and len(keys) == 1 and _is_causal(condition, next(iter(rows)), keys[0]):
            causal = True
        else:
            rest.append(condition)
    if not rest:
        return Meaning((), causal)
    if not any(condition.free_symbols & rows for condition in rest):
        # The last row sees all that causality lets any row see.
        return Meaning((replace(mask, row="last" if causal else "first"),), causal)
    return Meaning((mask,), False)


def coordinate(dim: Dim, symbols: dict[Axis, Any]) -> Any:
    """The index of a dimension in terms of one symbol for each of its axes."""
    index: Any = sympy.S.Zero
    for axis in dim:
        symbol = symbols.setdefault(axis, sympy.Symbol(f"i{len(symbols)}", integer=True, nonnegative=True))
        index = index * symbol_of(axis.size) + symbol
    return index


def visible_of(said: Any, factor: float) -> Any:
    """Where numbers added to scores are 0, if elsewhere they all hide; None where they change scores."""
    visible = []
    for condition, value in as_cases(said):
        if not value.is_number or not value.is_extended_real or factor <= 0:
            return None
        if value == 0:
            visible.append(condition)
        elif not value * factor <= HIDDEN:
            return None
    return sympy.Or(*visible)


def _bounded(condition: Any, bounds: dict[Any, Any]) -> Any:
    """A condition without the comparisons that hold, or fail, for every index."""
    decided = {}
    for relation in condition.atoms(Relational):
        gap = _gap(relation)
        if gap is None or not gap.free_symbols & bounds.keys() or not gap.is_polynomial(*bounds):
            continue
        poly = sympy.Poly(gap, *bounds)
        if poly.total_degree() > 1:
            continue
        low = high = poly.coeff_monomial(1)
        for symbol, top in bounds.items():
            slope = poly.coeff_monomial(symbol)
            ends = (0, slope * top)
            if not slope.is_number:
                break
            low, high = low + (ends[1] if slope < 0 else 0), high + (ends[1] if slope > 0 else 0)
        else:
            if sympy.expand(low).is_nonnegative:
                decided[relation] = sympy.true
            elif sympy.expand(high).is_negative:
                decided[relation] = sympy.false
    return condition.xreplace(decided)


def _gap(relation: Any) -> Any:
    """The integer that is 0 or more where a comparison of integers holds, or None."""
    if isinstance(relation, (sympy.Ge, sympy.Gt)):
        gap = relation.lhs - relation.rhs
    elif isinstance(relation, (sympy.Le, sympy.Lt)):
        gap = relation.rhs - relation.lhs
    else:
        return None
    if not gap.is_integer:
        return None
    return sympy.expand(gap - 1 if isinstance(relation, (sympy.Gt, sympy.Lt)) else gap)


def _is_causal(condition: Any, row: Any, key: Any) -> bool:
    """Whether a condition reads key <= row."""
    return isinstance(condition, Relational) and (gap := _gap(condition)) is not None and gap == row - key


def _operand(held: list[Held], axes: Axes) -> Operand:
    """The tensor to read: from before it was broadcast, so that it stays small."""
    chosen = held[-1]
    wanted = (axes.batch, (*axes.heads, *axes.group), axes.rows, axes.keys)
    return Operand(chosen.node, chosen.user, settle(chosen.layout), settle(wanted), expand=False)
