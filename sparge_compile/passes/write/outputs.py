"""A graph that also returns what its attention gives.

The additional outputs come last. They are outputs like all others, so they have gradients, in full graphs and out of
checkpointed code too. They are taken off the results in :mod:`sparge_compile.running.listeners`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from ..find import Match
from ..match.sdpa_kernels import gives_several
from ..mha.open import put_inside
from ..read.axes import settle
from ..read.fx_utils import value_of
from .emit import Emitter


def return_also(graph_module: GraphModule, wanted: Iterable[tuple[Match, Node]]) -> None:
    """Have a graph return these nodes, which stand in the graphs of their matches, as its last outputs, in order.

    The caller lints and recompiles.
    """
    for match, node in wanted:
        for depth in reversed(range(len(match.callers))):
            owner = match.graph_module if depth + 1 == len(match.callers) else match.callers[depth + 1].graph_module
            position, caller = _append(owner, node), match.callers[depth].node
            value = value_of(node)
            for key in ("example_value", "val"):
                if isinstance(caller.meta.get(key), (tuple, list)):
                    caller.meta[key] = (*caller.meta[key], value)
            with caller.graph.inserting_after(caller):
                node = caller.graph.call_function(operator.getitem, (caller, position))
            node.meta = {"example_value": value, "val": value}
        _append(graph_module, node)


def dense_outputs(matches: Iterable[Match]) -> list[tuple[Match, Node]]:
    """For each attention of a graph that stays as it is, a node with its result as [B, H, L, Dv]."""
    dense = []
    for match in matches:
        attention = match.attention
        assert attention is not None
        copies = {}
        if match.inside is not None:
            copies = put_inside(match.graph_module, match.node, match.inside, match.reader)
        output = copies.get(attention.output, attention.output)
        axes = attention.axes
        emitter = Emitter(match.graph_module.graph, attention, lambda node: node)
        with match.graph_module.graph.inserting_after(output):
            node = output
            if gives_several(output):
                node = emitter.call(operator.getitem, output, 0)
        with match.graph_module.graph.inserting_before(node.next):
            if attention.rewritten:  # the node is changed in place later on
                node = emitter.call(torch.ops.aten.clone.default, node)
            heads = (*axes.heads, *axes.group)
            wanted = settle((axes.batch, heads, axes.rows, axes.value_feature))
            dense.append((match, emitter.arrange(node, settle(attention.output_layout), wanted)))
    return dense


def _append(graph_module: GraphModule, node: Node) -> int:
    """Return a node of a graph as its last output as well; gives its position."""
    (end,) = graph_module.graph.find_nodes(op="output")
    (outputs,) = end.args
    end.args = ((*outputs, node),)
    return len(outputs)
