"""Attention in calls that are not replaced: custom ops that attend. They are sites of the report.

A custom op is known by its name and by the names of its arguments, never by where it comes from: flash-attn, xformers,
SageAttention, NATTEN, vLLM and what is still to be written all speak of attention and take a query, a key and a value.
"""

from __future__ import annotations

import inspect
import re
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ...report import Reason
from ..read.fx_utils import value_of
from .attention import Refusal

_NAME = re.compile(r"attn|attention|fmha|mha|sdpa|flash|sage|na[123]d")
_GRADIENT = re.compile(r"backward|bwd|grad")
_QUERY, _KEY, _VALUE = (re.compile(rf"({word})(_.*|s|ies)?") for word in ("q|query|quer", "k|key", "v|value"))
_PACKED = re.compile(r"qkv(_.*)?"), re.compile(r"kv(_.*)?")


class Foreign(NamedTuple):
    """A call that attends and is not replaced: its kind, why it stays, and what is known of it for the report."""

    kind: str
    refusal: Refusal
    known: dict[str, Any]


def match_foreign(node: Node) -> Foreign | None:
    """What a call is that attends by other means than those that are replaced; None for everything else."""
    if node.op != "call_function":
        return None
    name = attends_as(node.target)
    if name is None:
        return None
    query = next((x for x in map(value_of, node.all_input_nodes) if isinstance(x, Tensor)), None)
    return Foreign("op", Refusal(Reason.CUSTOM_OP, name), {} if query is None else _of_tensor(query))


def attends_as(target: Any) -> str | None:
    """The full name of an op that attends; None for every other function."""
    name, arguments = _signature(target)
    return name if attends(name, arguments) else None


def attends(name: str, arguments: list[str]) -> bool:
    """Whether an op of this name, with these names of its tensors, computes attention (and not its gradient)."""
    if not _NAME.search(name.lower()) or _GRADIENT.search(name.lower()):
        return False
    names = [argument.lower().strip("_") for argument in arguments]
    if any(_PACKED[0].fullmatch(each) for each in names[:1]):
        return True
    if any(_QUERY.fullmatch(q) and _PACKED[1].fullmatch(kv) for q, kv in pairwise(names)):
        return True
    triples = zip(names, names[1:], names[2:], strict=False)
    return any(_QUERY.fullmatch(q) and _KEY.fullmatch(k) and _VALUE.fullmatch(v) for q, k, v in triples)


def _signature(target: Any) -> tuple[str, list[str]]:
    """The name of an op, and those of its arguments that are tensors (of a Python function: of all of them)."""
    target = getattr(target, "_opoverload", target)  # of torch.library.custom_op
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace == "sparge":  # ours: what was rewritten before
            return "", []
        return target._schema.name, [x.name for x in target._schema.arguments if "Tensor" in str(x.type)]
    module = str(getattr(target, "__module__", ""))
    if not inspect.isfunction(target) or module.split(".")[0] == "torch":
        return "", []
    return f"{module}.{target.__name__}", list(inspect.signature(target).parameters)


def _of_tensor(x: Tensor) -> dict[str, Any]:
    return {"dtype": str(x.dtype).removeprefix("torch."), "device": x.device.type}
