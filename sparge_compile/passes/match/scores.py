"""From scores backwards to the product of Q and K, noting scales and masks on the way.

Each node on the way is read as the ATen calls that it makes, with the axes of the problem carried along. What does not
fit is refused with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ...report import Reason
from ..read.axes import Dim, Layout, axes_of, before, broadcast, is_layout, new_dim, settle, settle_dim
from ..read.calls import Call, Value
from ..read.formulas import number
from ..read.fx_utils import value_of
from ..read.reader import Reader
from .attention import Refusal
from .compose import Part
from .masks import HIDDEN, Term
from .weights import MAX_STEPS, PRODUCTS

ADDED_PRODUCTS = {"baddbmm", "addmm"}


@dataclass
class Scores:
    """Scores traced back to the product of queries and keys."""

    node: Node  # which holds the product
    query: Part
    key: Part
    scale: float = 1.0
    factors: list[tuple[Any, Node, Layout, bool]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    fixed: bool = False  # something that a scale of unknown sign must not cross was met


def scores_of(reader: Reader, value: Value, softmax: Node, layout: Layout, keys: Dim) -> Scores | Refusal:
    """Trace the scores that a softmax reads as ``value``; ``keys`` are the axes that it runs over."""
    return _ScoresWalk(reader, keys).run(value, softmax, layout)


class _ScoresWalk:
    def __init__(self, reader: Reader, keys: Dim) -> None:
        self.reader = reader
        self.keys = keys
        self.steps = 0

    def run(self, value: Value, at: Node, layout: Layout) -> Scores | Refusal:
        self.steps += 1
        if self.steps > MAX_STEPS:
            return Refusal(Reason.NOT_ATTENTION, "no product of queries and keys is near")
        found = self.reader.definition(value, at)
        if found is None or found[0].call is None:
            return Refusal(Reason.NOT_ATTENTION, "no product of queries and keys")
        call, node = found[0].call, found[1]
        layout = settle(layout)
        if call.name == "detach":
            return Refusal(Reason.SCORES_CHANGED, "a gradient is stopped")
        if is_layout(call):
            earlier = before(call, layout)
            if earlier is None or not set(settle_dim(self.keys)) <= set(axes_of(earlier)):
                return Refusal(Reason.SCORES_CHANGED, f"at {node.name}")
            return self.run(call.args[0], node, earlier)
        if call.name in PRODUCTS:
            return self._score_product(call.args[0], call.args[1], node, layout)
        if call.name in ADDED_PRODUCTS:
            return self._added_product(call, node, layout)
        if call.name in ("mul", "div"):
            return self._scaled(call, node, layout)
        if call.name == "neg":
            inner = self.run(call.args[0], node, layout)
            return inner if isinstance(inner, Refusal) else self._times(inner, -1.0)
        if call.name in ("add", "sub", "rsub"):
            return self._added(call, node, layout)
        if call.name == "masked_fill":
            return self._filled(call.args[0], call.args[1], call.args[2], node, layout, "drop")
        if call.name == "where":
            condition, yes, no = call.args
            ways = [(yes, no, "keep"), (no, yes, "drop")]
            if not getattr(yes, "shape", ()):  # a number is what the scores are filled with
                ways.reverse()
            first, second = (self._filled(x, condition, fill, node, layout, kind) for x, fill, kind in ways)
            return second if isinstance(second, Scores) and isinstance(first, Refusal) else first
        if not any(isinstance(x, Value) for x in tree_leaves((call.args, call.kwargs))):
            return Refusal(Reason.NOT_ATTENTION, "no product of queries and keys")  # made of nothing, as masks are
        return Refusal(Reason.SCORES_CHANGED, f"by {call.name}")

    def _score_product(self, a: Value, b: Value, node: Node, layout: Layout) -> Scores | Refusal:
        *batch, rows, columns = layout
        keys = settle_dim(self.keys)
        summed = new_dim(a.shape[-1])
        left, right = Part(a, node, (*batch, rows, summed)), Part(b, node, (*batch, summed, columns))
        if columns == keys:
            return Scores(node, left, right)
        if rows == keys:
            return Scores(node, right, left)
        return Refusal(Reason.SCORES_CHANGED, "a product mixes axes of the scores")

    def _added_product(self, call: Call, node: Node, layout: Layout) -> Scores | Refusal:
        found = self._score_product(call.args[1], call.args[2], node, layout)
        if isinstance(found, Refusal):
            return found
        beta, alpha = call.argument(3, "beta", 1), call.argument(4, "alpha", 1)
        found.scale = float(alpha)
        if beta != 0:
            self._term(found, call.args[0], node, layout, float(beta))
        return found

    def _scaled(self, call: Call, node: Node, layout: Layout) -> Scores | Refusal:
        a, b = call.args[:2]
        if call.kwargs.get("rounding_mode"):
            return Refusal(Reason.SCORES_CHANGED, "by rounding")
        if not isinstance(a, Value):
            return Refusal(Reason.SCORES_CHANGED, f"by {call.name}")
        inner, other = self._one_of(a, b if call.name == "mul" else None, node, layout)
        if isinstance(inner, Refusal):
            return inner
        factor = b if other is None else other
        constant = number(self.reader, factor, node)
        if constant is not None:
            if constant == 0:
                return Refusal(Reason.SCORES_CHANGED, "scaled by 0")
            return self._times(inner, 1 / constant if call.name == "div" else constant)
        if inner.fixed or inner.terms:
            return Refusal(Reason.SCORES_CHANGED, "a mask is scaled by what is not known before it runs")
        inverse = call.name == "div"
        if not isinstance(factor, Value):
            holder = _number_node(node, factor)
            if holder is None:
                return Refusal(Reason.SCORES_CHANGED, "scaled by a number of unknown origin")
            inner.factors.append((holder, node, (), inverse))
            return inner
        spread = broadcast(layout, factor.shape)
        if set(axes_of(spread)) & set(settle_dim(self.keys)):
            return Refusal(Reason.SCORES_CHANGED, "the scale varies along the keys")
        inner.factors.append((factor, node, spread, inverse))
        return inner

    def _times(self, inner: Scores, factor: float) -> Scores | Refusal:
        if inner.fixed and factor <= 0:
            return Refusal(Reason.SCORES_CHANGED, "hidden scores change sign")
        inner.scale *= factor
        inner.terms = [replace(term, factor=term.factor * factor) for term in inner.terms]
        return inner

    def _added(self, call: Call, node: Node, layout: Layout) -> Scores | Refusal:
        a, b = call.args[:2]
        alpha = call.argument(2, "alpha", 1)
        signs = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0)}[call.name]
        if alpha != 1:
            return Refusal(Reason.SCORES_CHANGED, "by add with alpha")
        if not isinstance(b, Value):  # a number more on every score changes no weight
            inner = self.run(a, node, layout)
            return inner if isinstance(inner, Refusal) else self._times(inner, signs[0])
        inner, other = self._one_of(a, b, node, layout)
        if isinstance(inner, Refusal):
            return inner
        first = other is b
        inner_or = self._times(inner, signs[0] if first else signs[1])
        if isinstance(inner_or, Refusal):
            return inner_or
        assert other is not None
        self._term(inner_or, other, node, layout, signs[1] if first else signs[0])
        return inner_or

    def _term(self, inner: Scores, other: Value, node: Node, layout: Layout, factor: float) -> None:
        """A tensor that is added. One that is the same for all keys changes no weight, and is left out."""
        spread = broadcast(layout, other.shape)
        if set(axes_of(spread)) & set(settle_dim(self.keys)):
            inner.terms.append(Term(other, node, spread, "number", factor))
            inner.fixed = True

    def _filled(self, scores: Any, mask: Any, fill: Any, node: Node, layout: Layout, kind: str) -> Scores | Refusal:
        if not isinstance(scores, Value) or not isinstance(mask, Value):
            return Refusal(Reason.SCORES_CHANGED, "by where")
        inner = self.run(scores, node, broadcast(layout, scores.shape))
        if isinstance(inner, Refusal):
            return inner
        hidden = number(self.reader, fill, node)
        if hidden is None or not hidden <= HIDDEN:
            what = "a tensor" if hidden is None else f"{hidden}, which does not hide"
            return Refusal(Reason.SCORES_CHANGED, f"filled with {what}")
        inner.terms.append(Term(mask, node, broadcast(layout, mask.shape), kind, fill=hidden))
        inner.fixed = True
        return inner

    def _one_of(self, a: Value, b: Any, node: Node, layout: Layout) -> tuple[Scores | Refusal, Value | None]:
        """Which of two operands is the scores; the other one beside it. Both being so is refused."""
        first = self._operand(a, node, layout)
        second = self._operand(b, node, layout) if isinstance(b, Value) else None
        if isinstance(first, Scores) and isinstance(second, Scores):
            return Refusal(Reason.SCORES_CHANGED, "two products make them"), None
        if isinstance(first, Scores):
            return first, b if isinstance(b, Value) else None
        if isinstance(second, Scores):
            return second, a
        refused = [x for x in (first, second) if isinstance(x, Refusal)]  # the mask is mostly the second
        return next((x for x in refused if x.reason is Reason.SCORES_CHANGED), first), None

    def _operand(self, x: Value, node: Node, layout: Layout) -> Scores | Refusal:
        spread = broadcast(layout, x.shape)
        if not set(settle_dim(self.keys)) <= set(axes_of(spread)):
            return Refusal(Reason.NOT_ATTENTION, "no product of queries and keys")
        return self.run(x, node, spread)


def _number_node(node: Node, number: Any) -> Node | None:
    """The input of a node that is this run-time number."""
    found = [n for n in node.all_input_nodes if value_of(n) is number]
    return found[0] if len(found) == 1 else None
