"""Softmaxes of a graph: by their names, or written out, as an ``exp`` that its sum divides or that of a log-softmax.

What is subtracted before the ``exp`` is a term of the scores: :mod:`.scores` leaves out what all keys share.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..read.axes import Layout, before, broadcast, is_layout, new_layout
from ..read.calls import Call, Value
from ..read.reader import Reader

_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
_LOG_SOFTMAX = {"log_softmax", "_log_softmax"}


class Softmax(NamedTuple):
    """A softmax over ``dim`` of what ``user`` reads as ``scores``; ``node`` holds its weights."""

    node: Node
    scores: Value
    user: Node
    dim: int


def is_softmax(node: Node, reader: Reader) -> bool:
    """Whether a node is a softmax, by its name, or the exp of one that is written out."""
    name = _name(node, reader)
    return name in _SOFTMAX or (name == "exp" and _written_out(node, reader) is not None)


def softmax_of(node: Node, reader: Reader) -> Softmax | None:
    """The softmax of a node of that name, or of the exp of one; None where nothing is known of it."""
    if _name(node, reader) == "exp":
        return _written_out(node, reader)
    value = reader.value(node)
    while value is not None and value.call is not None and value.call.name not in _SOFTMAX and is_layout(value.call):
        value = value.call.args[0]
    return None if value is None or value.call is None else _of_call(value.call, _SOFTMAX, node, node)


def _name(node: Node, reader: Reader) -> str:
    target: Any = node.target
    if node.op == "call_module":
        return "softmax" if isinstance(reader.owner.get_submodule(str(target)), torch.nn.Softmax) else ""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    name = target if node.op == "call_method" else getattr(target, "__name__", "")
    return str(name).removeprefix("special_").removesuffix("_") if node.op.startswith("call") else ""


def _of_call(call: Call, names: Collection[str], user: Node, node: Node) -> Softmax | None:
    return Softmax(node, call.args[0], user, int(call.argument(1, "dim"))) if call.name in names else None


def _written_out(exp: Node, reader: Reader) -> Softmax | None:
    """The softmax of which a node is the exp: of a log-softmax, or of scores, which its sum divides later on."""
    value = reader.value(exp)
    if value is None or value.call is None or value.call.name != "exp":
        return None
    scores = value.call.args[0]
    inner, user = reader.definition(scores, exp) or (value, exp)
    if inner.call is not None and (found := _of_call(inner.call, _LOG_SOFTMAX, user, exp)) is not None:
        return found
    dims = {user: _divided_by_sum(user, exp, reader) for user in exp.users}
    return next((Softmax(user, scores, exp, dim) for user, dim in dims.items() if dim is not None), None)


def _divided_by_sum(node: Node, exp: Node, reader: Reader) -> int | None:
    """The dimension over which ``exp`` is summed, where a node divides it by that sum; None where it does not."""
    value = reader.value(node)
    if value is None or value.call is None or value.call.name != "div" or value.call.kwargs:
        return None
    whole, total = value.call.args
    if not isinstance(whole, Value) or not isinstance(total, Value) or reader.holder(whole, node) is not exp:
        return None
    layout = new_layout(whole.shape)
    spread: Layout | None = broadcast(layout, total.shape)
    made = reader.definition(total, node)
    while made is not None and made[0].call is not None and spread is not None and is_layout(made[0].call):
        spread = before(made[0].call, spread)
        made = reader.definition(made[0].call.args[0], made[1])
    call = made[0].call if made is not None else None
    if made is None or call is None or call.name != "sum" or reader.holder(call.args[0], made[1]) is not exp:
        return None
    dims = [int(dim) % len(layout) for dim in call.argument(1, "dim") or ()]
    kept = [() if i in dims else dim for i, dim in enumerate(layout)]
    if not call.argument(2, "keepdim", False):
        kept = [dim for i, dim in enumerate(kept) if i not in dims]
    return dims[0] if len(dims) == 1 and spread == tuple(kept) else None
