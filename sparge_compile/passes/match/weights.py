"""From attention weights forwards to their product with V.

Each node on the way is read as the ATen calls that it makes, with the axes of the problem carried along. What does not
fit is refused with the reason. Where weights are set to a number on the way is noted; :mod:`.zeroed` judges it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from ...report import Reason
from ..read.axes import Dim, Layout, after, broadcast, is_layout, new_dim, same, settle, settle_dim
from ..read.calls import Call, Value
from ..read.formulas import number
from ..read.reader import Reader
from .attention import Refusal
from .compose import Part
from .masks import Term

PRODUCTS = {"bmm", "mm"}
MAX_STEPS = 64  # calls between a softmax and either product; real code has a dozen
OTHER_AXIS = "the product with values sums over another axis"


@dataclass
class Product:
    """A product with the weights on one side: where it is, what it returns, and the other side.

    ``weights`` are the nodes from the softmax on that hold the weights, and ``filled`` says where they are set to a
    number: a condition as ``keep`` or ``drop``.
    """

    node: Node
    layout: Layout
    other: Part
    weights: Mapping[Node, Layout]
    filled: tuple[Term, ...] = ()


def product_of(reader: Reader, softmax: Node, layout: Layout, keys: Dim) -> Product | Refusal:
    """The product of the weights that a softmax gives with V; ``keys`` are the axes that the softmax runs over."""
    return _WeightsWalk(reader, keys).run(softmax, layout)


class _WeightsWalk:
    def __init__(self, reader: Reader, keys: Dim) -> None:
        self.reader = reader
        self.keys = keys
        self.passed: dict[Node, Layout] = {}
        self.filled: list[Term] = []

    def run(self, node: Node, layout: Layout) -> Product | Refusal:
        for _ in range(MAX_STEPS):
            self.passed[node] = layout
            readers = self._readers(node)
            if not readers:
                return Refusal(Reason.NOT_ATTENTION, "its result is not read")
            steps = {user: self._step(user, node, layout) for user in readers}
            onwards = {user: step for user, step in steps.items() if not isinstance(step, Refusal)}
            if len(readers) == 1 and not onwards and readers[0].op != "output":
                return next(x for x in steps.values() if isinstance(x, Refusal))
            if len(onwards) != 1 or any(user.op == "output" for user in readers):
                return Refusal(Reason.WEIGHTS_USED, ", ".join(user.name for user in readers))
            # The others may ask where to set the weights to 0; whether their answers go elsewhere, the region tells.
            ((user, step),) = onwards.items()
            if isinstance(step, Product):
                return replace(step, filled=tuple(self.filled))
            node, layout = user, step
        return Refusal(Reason.NOT_ATTENTION, "no product with values is near")

    def _readers(self, node: Node) -> list[Node]:
        """Who reads the weights as they are in ``node``, which may have changed those of an earlier node in place.

        What nobody reads in turn does not count.
        """
        seen = self.reader.version
        users = dict.fromkeys(user for held in self.passed for user in held.users if seen(held, user) is node)
        live = (user for user in users if not self.reader.is_dead(user))
        return [user for user in live if user.op == "output" or may_hold_tensor(user, self.reader)]

    def _step(self, user: Node, weights: Node, layout: Layout) -> Layout | Product | Refusal:
        value = self.reader.value(user)
        step = self._weights(value, user, weights, layout) if value is not None else None
        return Refusal(Reason.SCORES_CHANGED, f"weights are read by {user.name}") if step is None else step

    def _weights(self, value: Value, user: Node, weights: Node, layout: Layout) -> Layout | Product | Refusal | None:
        """A value inside ``user`` as the weights in a layout or as their product; None where it is independent."""
        if self.reader.holder(value, user) is weights:
            return layout
        if value.call is None:
            return None
        call = value.call
        if is_layout(call):
            made = self._weights(call.args[0], user, weights, layout)
            if isinstance(made, Product):
                moved = after(call, made.layout, value.shape)
                return replace(made, layout=moved) if moved is not None else Refusal(Reason.LAYOUT, f"at {user.name}")
            if made is None or isinstance(made, Refusal):
                return made
            moved = after(call, made, value.shape)
            return moved if moved is not None else Refusal(Reason.LAYOUT, f"at {user.name}")
        filled = self._filled(call, value, user, weights, layout)
        if filled is not None:
            return filled
        parts = [(x, self._weights(x, user, weights, layout)) for x in call.inputs]
        ours = [(x, part) for x, part in parts if part is not None]
        if not ours:
            return None
        (given, part) = ours[0]
        if isinstance(part, Refusal):
            return part
        if call.random or any(_is_random(x) for x in call.inputs):
            return Refusal(Reason.DROPOUT, f"at {user.name}")
        if len(ours) > 1 or isinstance(part, Product) or call.name not in PRODUCTS:
            return Refusal(Reason.SCORES_CHANGED, f"weights, by {call.name}")
        return self._value_product(call, user, given, part)

    def _filled(self, call: Call, value: Value, user: Node, weights: Node, layout: Layout) -> Layout | None:
        """The layout of weights of which a call sets some to a number, which is noted; None where it does not."""
        if call.name == "nan_to_num" and not call.argument(1, "nan"):
            made = self._weights(call.args[0], user, weights, layout)
            return made if isinstance(made, tuple) else None
        ways: list[tuple[Any, Any, Any, str]] = []  # what is kept, where, what is put elsewhere
        if call.name == "masked_fill":
            ways = [(call.args[0], call.args[1], call.args[2], "drop")]
        elif call.name == "where":
            condition, yes, no = call.args
            ways = [(no, condition, yes, "drop"), (yes, condition, no, "keep")]
        for kept, mask, fill, kind in ways:
            made = self._weights(kept, user, weights, layout)
            put = number(self.reader, fill, user) if isinstance(made, tuple) else None
            as_large = len(kept.shape) == len(value.shape) and all(map(same, kept.shape, value.shape))
            if isinstance(made, tuple) and put is not None and as_large:
                self.filled.append(Term(mask, user, broadcast(made, mask.shape), kind, fill=put))
                return made
        return None

    def _value_product(self, call: Call, user: Node, given: Value, layout: Layout) -> Product | Refusal:
        layout = settle(layout)
        first = call.args[0] is given
        other = call.args[1] if first else call.args[0]
        *batch, rows, columns = layout
        summed, kept = (columns, rows) if first else (rows, columns)
        if summed != settle_dim(self.keys):
            return Refusal(Reason.NOT_ATTENTION, OTHER_AXIS)
        new = new_dim(other.shape[-1] if first else other.shape[-2])
        if first:
            return Product(user, (*batch, kept, new), Part(other, user, (*batch, summed, new)), self.passed)
        return Product(user, (*batch, new, kept), Part(other, user, (*batch, new, summed)), self.passed)


def _is_random(value: Value) -> bool:
    call = value.call
    return call is not None and (call.random or any(map(_is_random, call.inputs)))


def may_hold_tensor(node: Node, reader: Reader) -> bool:
    """Whether a reader of a tensor reads more than its sizes."""
    value = reader.fake(node)
    return (
        value is None
        or isinstance(value, Tensor)
        or (isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value))
    )
