"""From attention weights forwards to their product with V.

Each node on the way is read as the ATen calls that it makes, with the axes of the problem carried along. What does not
fit is refused with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from ...report import Reason
from ..read.axes import Dim, Layout, after, is_layout, new_dim, settle, settle_dim
from ..read.calls import Call, Value
from ..read.reader import Reader
from .attention import Refusal
from .compose import Part

PRODUCTS = {"bmm", "mm"}
MAX_STEPS = 64  # calls between a softmax and either product; real code has a dozen
OTHER_AXIS = "the product with values sums over another axis"


@dataclass
class Product:
    """A product with the weights on one side: where it is, what it returns, and the other side."""

    node: Node
    layout: Layout
    other: Part


def product_of(reader: Reader, softmax: Node, layout: Layout, keys: Dim) -> Product | Refusal:
    """The product of the weights that a softmax gives with V; ``keys`` are the axes that the softmax runs over."""
    return _WeightsWalk(reader, keys).run(softmax, layout)


class _WeightsWalk:
    def __init__(self, reader: Reader, keys: Dim) -> None:
        self.reader = reader
        self.keys = keys

    def run(self, node: Node, layout: Layout) -> Product | Refusal:
        for _ in range(MAX_STEPS):
            readers = [user for user in node.users if user.op == "output" or may_hold_tensor(user, self.reader)]
            if not readers:
                return Refusal(Reason.NOT_ATTENTION, "its result is not read")
            if len(readers) > 1 or readers[0].op == "output":
                return Refusal(Reason.WEIGHTS_USED, ", ".join(user.name for user in readers))
            (user,) = readers
            value = self.reader.value(user)
            if value is None:
                return Refusal(Reason.SCORES_CHANGED, f"weights are read by {user.name}")
            step = self._weights(value, user, node, layout)
            if isinstance(step, (Product, Refusal)):
                return step
            if step is None:
                return Refusal(Reason.SCORES_CHANGED, f"weights are read by {user.name}")
            node, layout = user, step
        return Refusal(Reason.NOT_ATTENTION, "no product with values is near")

    def _weights(self, value: Value, user: Node, weights: Node, layout: Layout) -> Layout | Product | Refusal | None:
        """A value inside ``user`` as the weights in a layout or as their product; None where it is independent."""
        if value.node is weights:
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
            return Product(user, (*batch, kept, new), Part(other, user, (*batch, summed, new)))
        return Product(user, (*batch, new, kept), Part(other, user, (*batch, new, summed)))


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
