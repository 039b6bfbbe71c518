"""Put the sparse op in the place of an attention call. Only nodes that the rewrite itself orphans are removed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import ops  # noqa: F401  importing it registers the op
from .find import Match, attention_arguments
from .fused_kernels import FUSED_KERNELS, replace_kernel
from .fx_utils import add_input
from .open_up import put_inside

OP = torch.ops.sparge.attention.default


def substitute(match: Match, root: GraphModule, thresholds: Any) -> Node:
    """Rewrite one match; ``thresholds`` is the (fake) value of the new last input of ``root`` that will carry them.

    Returns the new node. The caller lints and recompiles.
    """
    node = match.node
    if match.inside is not None:
        node = put_inside(match.graph_module, node, match.inside)[match.attention_node]
    arguments = attention_arguments(node)
    given = _pass_down(match, root, thresholds)
    graph = match.graph_module.graph
    with graph.inserting_before(node):
        new = graph.call_function(
            OP,
            (arguments["query"], arguments["key"], arguments["value"], given),
            {name: arguments[name] for name in ("attn_mask", "is_causal", "scale")},
        )
    new.meta = dict(node.meta)
    if node.target in FUSED_KERNELS:
        replace_kernel(node, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _pass_down(match: Match, root: GraphModule, thresholds: Any) -> Node:
    """A new input of the root graph, handed on by every caller down to the graph of the match."""
    name = "sparge_thresholds"
    given = add_input(root, name, thresholds)
    for depth, caller in enumerate(match.callers):
        inner = match.callers[depth + 1].graph_module if depth + 1 < len(match.callers) else match.graph_module
        caller.node.args = (*caller.node.args, given)
        given = add_input(inner, name, thresholds)
    return given
