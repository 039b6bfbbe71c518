"""Put the sparse op in the place of an attention. Only nodes that the rewrite itself orphans are removed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from .. import ops  # noqa: F401  importing it registers the op
from ..limit import Limit
from .find import Match
from .match.joint import Parts
from .match.ranks import RING
from .match.sdpa_kernels import gives_several, replace_kernel
from .mha.open import put_inside
from .write.emit import Emitter, values_like

OP = torch.ops.sparge.attention.default
OP_AS_GIVEN = torch.ops.sparge.attention.as_given


def substitute_match(
    match: Match,
    thresholds: Node,
    replaced: dict[Node, Node],
    limit: Limit | None = None,
    parts: Parts = (),
    order: Mapping[str, Node] = MappingProxyType({}),
    eight_bits: bool = False,
) -> Node:
    """Rewrite one match; ``thresholds`` is the node of its graph that carries them, float32 [H, 2 or 6].

    ``limit`` is what the op asks at each call, ``parts`` are those of the sequence, where text is kept, ``order`` what
    the op takes of the order of tokens; ``eight_bits`` says in what it attends. ``replaced`` says what became of the
    results of earlier sites, and is added to.
    Returns the op's node. The caller lints and recompiles.
    """
    attention = match.attention
    assert attention is not None
    copies = put_inside(match.graph_module, match.node, match.inside, match.reader) if match.inside is not None else {}

    def translate(node: Node) -> Node:
        node = copies.get(node, node)
        while node in replaced:
            node = replaced[node]
        return node

    output = translate(attention.output)
    graph = match.graph_module.graph
    emitter = Emitter(graph, attention, translate)
    with graph.inserting_before(output):
        query, key, value = emitter.operands()
        thresholds = emitter.of_rank(thresholds)
        options: dict[str, Any] = {
            "attn_mask": emitter.mask(),
            "is_causal": attention.is_causal,
            "scale": attention.scale,
        }
        if attention.bottom_right:
            options["bottom_right"] = True
        options |= emitter.packing()
        if limit is not None:
            options |= {"least_keys": limit.least_keys, "gain": list(limit.gain)}
        if parts:
            options["parts"] = [emitter.size(part) for part in parts]
        if eight_bits:
            options["eight_bits"] = True
        options |= order
        if attention.ring is None:
            op = OP if attention.autocast else OP_AS_GIVEN
            new = graph.call_function(op, (query, key, value, thresholds), options)
        else:
            ring = (attention.scale, attention.ring.rank, attention.ring.ranks, attention.ring.group)
            new = graph.call_function(RING, (query, key, value, thresholds, *ring))
        new.meta = {**output.meta, **values_like(query)}
        result = emitter.result(new)
    result.meta = dict(output.meta)
    if gives_several(output):
        replaced.update(dict.fromkeys(output.users, result))
        replace_kernel(output, result)
    output.replace_all_uses_with(result)
    replaced[output] = result
    _erase(match, [copies.get(node, node) for node in reversed(attention.region)])
    return new


def _erase(match: Match, region: list[Node]) -> None:
    """Remove what the rewrite left without readers: the region, and what only it had read."""
    graph = match.graph_module.graph
    orphans: list[Node] = []
    for node in region:
        if not node.users:
            orphans += node.all_input_nodes
            graph.erase_node(node)
    while orphans:
        node = orphans.pop()
        if not node.users and not node._erased and match.reader.is_pure(node):
            orphans += node.all_input_nodes
            graph.erase_node(node)
