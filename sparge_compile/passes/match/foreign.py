"""Attention in calls that are not replaced: custom ops that attend. They are sites of the report.

A custom op is known by its name and by the names of its arguments, never by where it comes from: flash-attn, xformers,
SageAttention, NATTEN, vLLM and what is still to be written all speak of attention and take a query, a key and a value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node

from ...report import Reason
from ..read.fx_utils import value_of
from ..read.signatures import read_signature
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
    return Foreign("op", Refusal(Reason.CUSTOM_OP, name), known_of(node))


def known_of(node: Node) -> dict[str, Any]:
    """What the report says of a call that is not replaced: the dtype and the device of its first tensor."""
    query = next((x for x in map(value_of, node.all_input_nodes) if isinstance(x, Tensor)), None)
    return {} if query is None else {"dtype": str(query.dtype).removeprefix("torch."), "device": query.device.type}


def attends_as(target: Any) -> str | None:
    """The full name of an op that attends; None for every other function."""
    signature = read_signature(target)
    return signature.name if signature is not None and attends(signature.name, signature.tensors) else None


def is_backward(target: Any) -> bool:
    """Whether an op or function is, by its name, the gradient of an attention."""
    signature = read_signature(target)
    name = signature.name.lower() if signature is not None else ""
    return bool(_NAME.search(name) and _GRADIENT.search(name))


def attends(name: str, arguments: Sequence[str]) -> bool:
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
