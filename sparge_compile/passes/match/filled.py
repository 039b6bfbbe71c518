"""Weights that are set to a number behind the softmax: whether only where the scores hide the key anyway.

To a query that sees no key a plain softmax gives NaN, or all keys alike. Many models, and torch's own safe softmax, set
its weights to 0, which is what sparse attention gives; others set those of all hidden keys to 0, which they are anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.inference import satisfiable
from torch.fx import Node

from ..read.axes import Axis, Layout, is_layout, same, settle, size_of
from ..read.calls import Call, Value
from ..read.formulas import Unknown, as_cases, as_condition, formula, index_before, number
from ..read.reader import Held, Reader
from .masks import Term, coordinate, visible_of

MAX_COMPARISONS = 24  # of which it is asked whether they can hold together
_INVERSES = {"logical_not", "bitwise_not"}
_JOINS = {"logical_and": sympy.And, "bitwise_and": sympy.And, "logical_or": sympy.Or, "bitwise_or": sympy.Or}
_INFINITE = {"isinf", "isneginf", "isposinf"}


def fills_what_is_hidden(
    reader: Reader,
    filled: Sequence[Term],
    masks: Sequence[Term],
    scores: Sequence[Held],
    weights: Mapping[Node, Layout],
) -> bool:
    """Whether no weight of a key that its query sees is ``filled``, and no weight with anything but 0.

    ``masks`` are the terms of the scores; ``scores`` hold these as the softmax reads them, ``weights`` what it gives.
    """
    symbols: dict[Axis, Any] = {}
    hidden = sympy.Or(*(_hides(reader, term, symbols) for term in masks))
    for term in filled:
        condition = _Implied(reader, hidden, scores, weights, symbols).of(
            term.value, term.user, _index(term.layout, symbols), term.kind == "drop"
        )
        if not _impossible(sympy.And(condition, sympy.Not(hidden)) if term.fill == 0 else condition):
            return False
    return True


class _Implied:
    """What a condition implies about a pair of a query and a key, as a formula in their symbols."""

    def __init__(
        self, reader: Reader, hidden: Any, scores: Sequence[Held], weights: Mapping[Node, Layout], symbols: dict
    ) -> None:
        self.reader = reader
        self.hidden = hidden
        self.scores = {held.node: _index(held.layout, symbols) for held in scores}
        self.weights = {node: _index(layout, symbols) for node, layout in weights.items()}
        self.places = [
            (size_of(dim), coordinate(dim, symbols)) for layout in weights.values() for dim in settle(layout) if dim
        ]

    def of(self, value: Value, at: Node, index: Sequence[Any], holds: bool) -> Any:
        """What follows from the value at an index, as ``at`` reads it, being true, or false unless ``holds``."""
        found = self.reader.definition(value, at)
        call, node = (found[0].call, found[1]) if found is not None else (None, at)
        if call is None:
            return self._said(value, at, index, holds)
        if call.name in _INVERSES and (call.name == "logical_not" or value.dtype.itemsize == 1):
            return self.of(call.args[0], node, index, not holds)
        if call.name in _JOINS and all(isinstance(x, Value) and len(x.shape) == len(index) for x in call.args[:2]):
            join = _JOINS[call.name] if holds else {sympy.And: sympy.Or, sympy.Or: sympy.And}[_JOINS[call.name]]
            return join(*(self.of(x, node, _aligned(x, index), holds) for x in call.args[:2]))
        if call.name in ("all", "any"):
            return self._over_all(call, node, index) if holds is (call.name == "all") else sympy.true
        known = self._of_infinity(call, node, index, holds)
        if known is not None:
            return known
        if is_layout(call):
            try:
                return self.of(call.args[0], node, index_before(call, value.shape, tuple(index)), holds)
            except Unknown:
                return sympy.true
        return self._said(value, at, index, holds)

    def _said(self, value: Value, at: Node, index: Sequence[Any], holds: bool) -> Any:
        said = as_condition(formula(self.reader, value, at, index))
        return said if holds else sympy.Not(said)

    def _over_all(self, call: Call, node: Node, index: Sequence[Any]) -> Any:
        """What holds for all entries of a dimension holds for the one of the pair."""
        given, dim = call.args[0], call.argument(1, "dim")
        if not isinstance(dim, int):
            return sympy.true
        dim %= len(given.shape)
        rest = index[dim + 1 :] if call.argument(2, "keepdim", False) else index[dim:]
        places = {place for size, place in self.places if same(size, given.shape[dim])}
        each = [self.of(given, node, [*index[:dim], place, *rest], call.name == "all") for place in places]
        return sympy.And(*each)

    def _of_infinity(self, call: Call, node: Node, index: Sequence[Any], holds: bool) -> Any:
        """What a comparison of scores or weights with what is infinite, or is no number, says; None for others."""
        first, second = (*call.args[:2], None, None)[:2]
        holders = [self.reader.holder(x, node) if isinstance(x, Value) else None for x in (first, second)]
        holder = holders[0]
        if holder is None:
            return None
        at_pair = [known[holder] == list(index) for known in (self.scores, self.weights) if holder in known]
        if not any(at_pair):
            return None
        compared = number(self.reader, second, node) if call.name in ("eq", "ne", "gt") else None
        if holder in self.scores:
            low = compared == -sympy.oo and holds is (call.name == "eq")
            return self.hidden if low or (call.name in _INFINITE and holds) else None
        if holds and (call.name == "isnan" or (call.name == "ne" and holders[1] is holder)):
            return self.hidden
        infinite = call.name in _INFINITE or (call.name == "eq" and compared in (sympy.oo, -sympy.oo))
        return sympy.false if infinite and holds else None


def _hides(reader: Reader, term: Term, symbols: dict[Axis, Any]) -> Any:
    """Where a term of the scores hides a key for certain."""
    said = formula(reader, term.value, term.user, _index(term.layout, symbols))
    if term.kind != "number":
        return as_condition(said) if term.kind == "drop" else sympy.Not(as_condition(said))
    visible = visible_of(said, term.factor)
    if visible is not None:
        return sympy.Not(visible)
    if not term.factor > 0:
        return sympy.false
    return sympy.Or(*(sympy.And(condition, sympy.Eq(value, -sympy.oo)) for condition, value in as_cases(said)))


def _index(layout: Layout, symbols: dict[Axis, Any]) -> list[Any]:
    return [coordinate(dim, symbols) for dim in settle(layout)]


def _aligned(value: Value, index: Sequence[Any]) -> list[Any]:
    return [sympy.S.Zero if same(size, 1) else i for size, i in zip(value.shape, index, strict=True)]


def _impossible(condition: Any) -> bool:
    """Whether a condition cannot hold, whatever its comparisons are; one and its inverse do not hold together."""
    names: dict[Any, Any] = {}
    for relation in sorted(condition.atoms(Relational), key=str):
        if relation.negated in names:
            names[relation] = sympy.Not(names[relation.negated])
        else:
            names[relation] = sympy.Symbol(f"comparison{len(names)}")
    if len(names) > MAX_COMPARISONS:
        return False
    return satisfiable(condition.xreplace(names), algorithm="dpll2") is False
