"""Attention written out: from a softmax forwards to the product with V, and backwards to that of Q and K.

One walk understands every spelling, because each node is read as the ATen calls that it makes, with the axes of the
problem carried along. What does not fit is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...report import Reason
from ..read.axes import (
    Dim,
    Layout,
    after,
    axes_of,
    before,
    broadcast,
    is_layout,
    new_dim,
    new_layout,
    settle,
    settle_dim,
)
from ..read.calls import Call, Value
from ..read.formulas import number
from ..read.fx_utils import value_of
from ..read.reader import Reader
from .attention import Attention, Refusal
from .compose import Part, compose
from .masks import HIDDEN, Term

_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
_PRODUCTS = {"bmm", "mm"}
_ADDED_PRODUCTS = {"baddbmm", "addmm"}
MAX_STEPS = 64  # calls between a softmax and either product; real code has a dozen
OTHER_AXIS = "the product with values sums over another axis"
MAX_LOOK = 12  # graph nodes that are searched for a product where the way to it is not understood


def is_softmax(node: Node, reader: Reader) -> bool:
    """Whether a node is a softmax, by its name."""
    target: Any = node.target
    if node.op == "call_module":
        return isinstance(reader.owner.get_submodule(str(target)), torch.nn.Softmax)
    if node.op == "call_method":
        return target == "softmax"
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    name = getattr(target, "__name__", "")
    return node.op == "call_function" and name.removeprefix("special_") in _SOFTMAX


def match_softmax(node: Node, reader: Reader) -> Attention | Refusal:
    """The attention around a softmax, or why it is none or cannot be replaced."""
    value = reader.value(node)
    while value is not None and value.call is not None and value.call.name not in _SOFTMAX and is_layout(value.call):
        value = value.call.args[0]
    if value is None or value.call is None or value.call.name not in _SOFTMAX:
        return Refusal(Reason.NO_SHAPES)
    scores = value.call.args[0]
    dim = int(value.call.argument(1, "dim")) % max(len(scores.shape), 1)
    if len(scores.shape) < 2:
        return Refusal(Reason.NOT_ATTENTION, "over a vector")
    layout = new_layout(scores.shape)
    if not layout[dim]:
        return Refusal(Reason.NOT_ATTENTION, "over one entry")
    return _Walk(reader, node, layout, layout[dim]).run(scores)


@dataclass
class _Product:
    """A product with the weights on one side: where it is, what it returns, and the other side."""

    node: Node
    layout: Layout
    other: Part


@dataclass
class _Scores:
    """Scores traced back to the product of queries and keys."""

    node: Node  # which holds the product
    query: Part
    key: Part
    scale: float = 1.0
    factors: list[tuple[Any, Node, Layout, bool]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    fixed: bool = False  # something that a scale of unknown sign must not cross was met


class _Walk:
    def __init__(self, reader: Reader, softmax: Node, layout: Layout, keys: Dim) -> None:
        self.reader = reader
        self.softmax = softmax
        self.layout = layout  # of the weights
        self.keys = keys
        self.steps = 0

    def run(self, scores: Value) -> Attention | Refusal:
        product = self._forward(self.softmax, self.layout)
        found = self._scores(scores, self.softmax, self.layout)
        if isinstance(found, Refusal) or isinstance(product, Refusal):
            return self._why(found, product)
        return self._assemble(found, product)

    # Forwards, from the weights to their product with V.

    def _forward(self, node: Node, layout: Layout) -> _Product | Refusal:
        for _ in range(MAX_STEPS):
            readers = [user for user in node.users if user.op == "output" or _may_hold_tensor(user, self.reader)]
            if not readers:
                return Refusal(Reason.NOT_ATTENTION, "its result is not read")
            if len(readers) > 1 or readers[0].op == "output":
                return Refusal(Reason.WEIGHTS_USED, ", ".join(user.name for user in readers))
            (user,) = readers
            value = self.reader.value(user)
            if value is None:
                return Refusal(Reason.SCORES_CHANGED, f"weights are read by {user.name}")
            step = self._weights(value, user, node, layout)
            if isinstance(step, (_Product, Refusal)):
                return step
            if step is None:
                return Refusal(Reason.SCORES_CHANGED, f"weights are read by {user.name}")
            node, layout = user, step
        return Refusal(Reason.NOT_ATTENTION, "no product with values is near")

    def _weights(self, value: Value, user: Node, weights: Node, layout: Layout) -> Layout | _Product | Refusal | None:
        """What a value inside ``user`` is to the weights: them in a layout, their product, or (None) independent."""
        if value.node is weights:
            return layout
        if value.call is None:
            return None
        call = value.call
        if is_layout(call):
            made = self._weights(call.args[0], user, weights, layout)
            if isinstance(made, _Product):
                moved = after(call, made.layout, value.shape)
                return replace(made, layout=moved) if moved is not None else Refusal(Reason.LAYOUT, f"at {user.name}")
            if made is None or isinstance(made, Refusal):
                return made
            moved = after(call, made, value.shape)
            return moved if moved is not None else Refusal(Reason.LAYOUT, f"at {user.name}")
        parts = [(x, self._weights(x, user, weights, layout)) for x in call.inputs]
        ours = [(x, part) for x, part in parts if part is not None]
        if not ours:
            return None
        (given, part) = ours[0]
        if isinstance(part, Refusal):
            return part
        if call.random or any(_is_random(x) for x in call.inputs):
            return Refusal(Reason.DROPOUT, f"at {user.name}")
        if len(ours) > 1 or isinstance(part, _Product) or call.name not in _PRODUCTS:
            return Refusal(Reason.SCORES_CHANGED, f"weights, by {call.name}")
        return self._value_product(call, user, given, part)

    def _value_product(self, call: Call, user: Node, given: Value, layout: Layout) -> _Product | Refusal:
        layout = settle(layout)
        first = call.args[0] is given
        other = call.args[1] if first else call.args[0]
        *batch, rows, columns = layout
        summed, kept = (columns, rows) if first else (rows, columns)
        if summed != settle_dim(self.keys):
            return Refusal(Reason.NOT_ATTENTION, OTHER_AXIS)
        new = new_dim(other.shape[-1] if first else other.shape[-2])
        if first:
            return _Product(user, (*batch, kept, new), Part(other, user, (*batch, summed, new)))
        return _Product(user, (*batch, new, kept), Part(other, user, (*batch, new, summed)))

    # Backwards, from the scores to the product of Q and K.

    def _scores(self, value: Value, at: Node, layout: Layout) -> _Scores | Refusal:
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
            return self._scores(call.args[0], node, earlier)
        if call.name in _PRODUCTS:
            return self._score_product(call.args[0], call.args[1], node, layout)
        if call.name in _ADDED_PRODUCTS:
            return self._added_product(call, node, layout)
        if call.name in ("mul", "div"):
            return self._scaled(call, node, layout)
        if call.name == "neg":
            inner = self._scores(call.args[0], node, layout)
            return inner if isinstance(inner, Refusal) else self._times(inner, -1.0)
        if call.name in ("add", "sub", "rsub"):
            return self._added(call, node, layout)
        if call.name == "masked_fill":
            return self._filled(call.args[0], call.args[1], call.args[2], node, layout, "drop")
        if call.name == "where":
            condition, yes, no = call.args
            kept = self._filled(yes, condition, no, node, layout, "keep")
            return kept if isinstance(kept, _Scores) else self._filled(no, condition, yes, node, layout, "drop")
        return Refusal(Reason.SCORES_CHANGED, f"by {call.name}")

    def _score_product(self, a: Value, b: Value, node: Node, layout: Layout) -> _Scores | Refusal:
        *batch, rows, columns = layout
        keys = settle_dim(self.keys)
        summed = new_dim(a.shape[-1])
        left, right = Part(a, node, (*batch, rows, summed)), Part(b, node, (*batch, summed, columns))
        if columns == keys:
            return _Scores(node, left, right)
        if rows == keys:
            return _Scores(node, right, left)
        return Refusal(Reason.SCORES_CHANGED, "a product mixes axes of the scores")

    def _added_product(self, call: Call, node: Node, layout: Layout) -> _Scores | Refusal:
        found = self._score_product(call.args[1], call.args[2], node, layout)
        if isinstance(found, Refusal):
            return found
        beta, alpha = call.argument(3, "beta", 1), call.argument(4, "alpha", 1)
        found.scale = float(alpha)
        if beta != 0:
            self._term(found, call.args[0], node, layout, float(beta))
        return found

    def _scaled(self, call: Call, node: Node, layout: Layout) -> _Scores | Refusal:
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

    def _times(self, inner: _Scores, factor: float) -> _Scores | Refusal:
        if inner.fixed and factor <= 0:
            return Refusal(Reason.SCORES_CHANGED, "hidden scores change sign")
        inner.scale *= factor
        inner.terms = [replace(term, factor=term.factor * factor) for term in inner.terms]
        return inner

    def _added(self, call: Call, node: Node, layout: Layout) -> _Scores | Refusal:
        a, b = call.args[:2]
        alpha = call.argument(2, "alpha", 1)
        signs = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0)}[call.name]
        if alpha != 1:
            return Refusal(Reason.SCORES_CHANGED, "by add with alpha")
        if not isinstance(b, Value):  # a number more on every score changes no weight
            inner = self._scores(a, node, layout)
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

    def _term(self, inner: _Scores, other: Value, node: Node, layout: Layout, factor: float) -> None:
        """A tensor that is added. One that is the same for all keys changes no weight, and is left out."""
        spread = broadcast(layout, other.shape)
        if set(axes_of(spread)) & set(settle_dim(self.keys)):
            inner.terms.append(Term(other, node, spread, "number", factor))
            inner.fixed = True

    def _filled(self, scores: Any, mask: Any, fill: Any, node: Node, layout: Layout, kind: str) -> _Scores | Refusal:
        if not isinstance(scores, Value) or not isinstance(mask, Value):
            return Refusal(Reason.SCORES_CHANGED, "by where")
        inner = self._scores(scores, node, broadcast(layout, scores.shape))
        if isinstance(inner, Refusal):
            return inner
        hidden = number(self.reader, fill, node)
        if hidden is None or not hidden <= HIDDEN:
            return Refusal(Reason.SCORES_CHANGED, f"filled with {hidden}, which does not hide")
        inner.terms.append(Term(mask, node, broadcast(layout, mask.shape), kind, fill=hidden))
        inner.fixed = True
        return inner

    def _one_of(self, a: Value, b: Any, node: Node, layout: Layout) -> tuple[_Scores | Refusal, Value | None]:
        """Which of two operands is the scores; the other one beside it. Both being so is refused."""
        first = self._operand(a, node, layout)
        second = self._operand(b, node, layout) if isinstance(b, Value) else None
        if isinstance(first, _Scores) and isinstance(second, _Scores):
            return Refusal(Reason.SCORES_CHANGED, "two products make them"), None
        if isinstance(first, _Scores):
            return first, b if isinstance(b, Value) else None
        if isinstance(second, _Scores):
            return second, a
        best = second if second is not None and second.reason is Reason.SCORES_CHANGED else first
        return best, None

    def _operand(self, x: Value, node: Node, layout: Layout) -> _Scores | Refusal:
        spread = broadcast(layout, x.shape)
        if not set(settle_dim(self.keys)) <= set(axes_of(spread)):
            return Refusal(Reason.NOT_ATTENTION, "no product of queries and keys")
        return self._scores(x, node, spread)

    # Both ends found.

    def _assemble(self, scores: _Scores, product: _Product) -> Attention | Refusal:
        region = self._region(scores, product)
        if isinstance(region, Refusal):
            return region
        factors = [
            (Part(f, node, layout) if isinstance(f, Value) else f, inverse)
            for f, node, layout, inverse in scores.factors
        ]
        return compose(
            self.reader,
            query=scores.query,
            key=scores.key,
            value=product.other,
            weights=settle(self.layout),
            keys=settle_dim(self.keys),
            output=product.node,
            output_layout=settle(product.layout),
            terms=scores.terms,
            scale=scores.scale,
            factors=factors,
            region=region,
            scores_dtype=value_of(scores.node).dtype,
        )

    def _region(self, scores: _Scores, product: _Product) -> tuple[Node, ...] | Refusal:
        """The nodes from the first product to the second; nobody else may read them."""
        order, written = self.reader.position, self.reader.written
        start, end = order(scores.node), order(product.node)
        nodes = list(self.reader.owner.graph.nodes)[start : end + 1]
        inside = {scores.node}
        for node in nodes:
            if any(given in inside for given in (*node.all_input_nodes, *written(node))):
                inside.add(node)
        region = {product.node}
        for node in reversed(nodes):
            if node in inside and (any(user in region for user in node.users) or set(written(node)) & inside):
                region.add(node)
        for node in nodes:
            if _changes_context(node):
                return Refusal(Reason.CONTEXT, f"{node.name}")
            if node in region and any(w not in region for w in written(node)):
                return Refusal(Reason.IN_PLACE, f"by {node.name}")
            if node in region and node is not product.node:
                others = [
                    u for u in node.users if u not in region and (u.op == "output" or _may_hold_tensor(u, self.reader))
                ]
                if others:
                    weights = order(node) >= order(self.softmax)
                    return Refusal(
                        Reason.WEIGHTS_USED if weights else Reason.SCORES_USED, ", ".join(u.name for u in others)
                    )
        return tuple(node for node in nodes if node in region)

    # Nothing found: attention of another kind, or none at all?

    def _why(self, scores: _Scores | Refusal, product: _Product | Refusal) -> Refusal:
        makes = isinstance(scores, _Scores) or _near_product(self.softmax, attrgetter("all_input_nodes"), self.reader)
        reads = isinstance(product, _Product) or _near_product(self.softmax, attrgetter("users"), self.reader)
        refusals = [x for x in (scores, product) if isinstance(x, Refusal)]
        if makes and reads:
            other_axis = [x for x in refusals if x.detail == OTHER_AXIS]
            named = [x for x in refusals if x.reason is not Reason.NOT_ATTENTION]
            node = next((x.node for x in (scores, product) if not isinstance(x, Refusal)), None)
            return replace((other_axis or named or refusals)[0], node=node)
        if not makes:
            return Refusal(Reason.NOT_ATTENTION, "no product of queries and keys")
        return Refusal(Reason.NOT_ATTENTION, "no product with values")


def _near_product(start: Node, onwards: Callable[[Node], Iterable[Node]], reader: Reader) -> bool:
    """Whether a product of two computed tensors (not a projection by weights) is a few nodes away."""
    seen: set[Node] = set()
    edge = list(onwards(start))
    while edge and len(seen) < MAX_LOOK:
        node = edge.pop(0)
        if node in seen or node.op in ("placeholder", "output", "get_attr"):
            continue
        seen.add(node)
        value = reader.value(node)
        if value is not None and _has_product(value):
            return True
        edge += list(onwards(node))
    return False


def _has_product(value: Value) -> bool:
    call = value.call
    if call is None:
        return False
    if call.name in _PRODUCTS | _ADDED_PRODUCTS:
        return "bmm" in call.name
    return any(_has_product(x) for x in call.inputs)


def _is_random(value: Value) -> bool:
    call = value.call
    return call is not None and (call.random or any(map(_is_random, call.inputs)))


def _may_hold_tensor(node: Node, reader: Reader) -> bool:
    """Whether a reader of a tensor reads more than its sizes."""
    value = reader.fake(node)
    return (
        value is None
        or isinstance(value, Tensor)
        or (isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value))
    )


def _changes_context(node: Node) -> bool:
    """Whether a node switches autocast, gradients or a functorch level."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and (
        name in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled") or name.endswith("crement_nesting")
    )


def _number_node(node: Node, number: Any) -> Node | None:
    """The input of a node that is this run-time number."""
    found = [n for n in node.all_input_nodes if value_of(n) is number]
    return found[0] if len(found) == 1 else None
