"""Put the sparse op in the place of an attention call. Only nodes that the rewrite itself orphans are removed."""

from __future__ import annotations

import torch
from torch.fx import Node

from .. import ops  # noqa: F401  importing it registers the op
from .find import Match, attention_arguments
from .open_up import put_inside

OP = torch.ops.sparge.attention.default


def substitute(match: Match, thresholds: Node) -> Node:
    """Rewrite one match; ``thresholds`` is the node of its graph that carries them, float32 [H, 2].

    Returns the new node. The caller lints and recompiles.
    """
    node = match.node
    if match.inside is not None:
        node = put_inside(match.graph_module, node, match.inside)[match.attention_node]
    arguments = attention_arguments(node)
    graph = match.graph_module.graph
    with graph.inserting_before(node):
        new = graph.call_function(
            OP,
            (arguments["query"], arguments["key"], arguments["value"], thresholds),
            {name: arguments[name] for name in ("attn_mask", "is_causal", "scale")},
        )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
