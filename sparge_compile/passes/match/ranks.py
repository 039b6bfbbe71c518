"""Attention of a sequence that several processes share, as :mod:`sparge_compile.parallel` writes it into a graph."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ...dialects import Meaning
from ...parallel import exchange, ring  # noqa: F401  which define the ops
from ..read.fx_utils import value_of
from ..read.reader import Reader
from .attention import Attention, Exchange, Refusal, Ring
from .dialects import match_meaning

RING = torch.ops.sparge.ring.default
_RING = {torch.ops.sparge.ring, RING}
_TO_HEADS = {torch.ops.sparge.to_heads, torch.ops.sparge.to_heads.default}


def is_ring(node: Node) -> bool:
    """Whether a node is attention in a ring, dense so far."""
    return node.op == "call_function" and node.target in _RING and _given(node)["thresholds"] is None


def match_ring(node: Node, reader: Reader) -> Attention | Refusal:
    """The attention of a ring."""
    given = _given(node)
    meaning = Meaning(given["query"], given["key"], given["value"], "bhld", scale=given["scale"])
    found = match_meaning(node, meaning, reader)
    if isinstance(found, Refusal):
        return found
    return replace(found, ring=Ring(given["rank"], given["ranks"], given["group"]), autocast=True)


def exchanged(found: Attention, node: Node) -> Attention:
    """An attention with the exchange of heads that its operands come from, if they come from one."""
    makers = {_maker(x) for x in node.all_input_nodes if _maker(x) is not None}
    if len(makers) != 1:
        return found
    given = _given(makers.pop())
    key_heads = int(value_of(given["key"]).shape[1])
    return replace(found, exchange=Exchange(given["rank"], given["ranks"], key_heads, given["order"]))


def _maker(node: Node) -> Node | None:
    """The exchange of heads that gives a node."""
    source = node.args[0] if node.op == "call_function" and node.target is operator.getitem else None
    return source if isinstance(source, Node) and source.target in _TO_HEADS else None


def _given(node: Node | None) -> dict[str, Any]:
    assert node is not None
    target: Any = node.target
    schema = getattr(target, "default", target)._schema
    return {**dict(zip((x.name for x in schema.arguments), node.args, strict=False)), **node.kwargs}
