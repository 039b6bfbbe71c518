"""The node that carries a site's thresholds: the argument of a marker that ``attach`` left, or a new graph input.

A marker stands where its module is entered, so it belongs to the attention that follows in the same module. Nested
graphs get the node handed down by their callers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ... import ops
from ...errors import value_error
from ...keeping import WIDTH
from ...kernels.order import Tile
from ...naming import join, module_base, module_path
from ...thresholds.buffers import CHILD, buffer_name
from ..find import Match
from ..read.fx_utils import add_input, calls_of, value_of
from ..stated import is_grid
from .emit import call

MARK = torch.ops.sparge.mark
CONSTANT = torch.ops.sparge.constant.default
_NAME = "sparge_thresholds"

Thresholds = Callable[[str], "Node | None"]


class Marker(NamedTuple):
    """One marker: the graph it stands in, and which attention of its module it is for (``ops.REST``: all others)."""

    graph_module: GraphModule
    node: Node
    number: int

    @property
    def tile(self) -> Tile | None:
        """The tile whose tokens are the blocks that the thresholds are for; None: no order is said."""
        sizes: Any = self.node.args[2] if len(self.node.args) > 2 else self.node.kwargs.get("tile", ())
        return tuple(sizes) if sizes else None

    @property
    def keeps(self) -> bool:
        """Whether the thresholds have room for kept tokens."""
        return bool(value_of(self.node.args[0]).shape[1] == WIDTH)


@dataclass(frozen=True)
class ThresholdInput:
    """A new last input of a graph: the match it is for, its placeholder, and the thresholds, float32 [H, 2 or 6]."""

    match: Match
    placeholder: Node
    values: Tensor

    @property
    def heads(self) -> int:
        """H: the number of query heads."""
        return len(self.values)


def markers_of(graph_module: GraphModule, matches: Iterable[Match]) -> dict[Node, Marker]:
    """The marker of each match that has one, by the node of the match.

    The first of these that is there: a marker for the site's number in its graph, one for all further sites, and, for a
    module that is called several times, one for the site's number since the module was entered.
    """
    wanted = {match.node: match for match in matches if match.is_attention}
    current: dict[Any, dict[int, Marker]] = {}  # of each module, since it was entered
    since: Counter[Any] = Counter()
    total: Counter[Any] = Counter()
    found = {}
    for owner, node in calls_of(graph_module):
        module = module_base(node), wanted[node].path if node in wanted else module_path(node)
        if _is_mark(node):
            marker = Marker(owner, node, int(node.args[1]))  # type: ignore[arg-type]
            if since[module] or marker.number in current.get(module, {}):
                current[module], since[module] = {}, 0
            current.setdefault(module, {})[marker.number] = marker
        elif node in wanted:
            match, known = wanted[node], current.get(module, {})
            for index in (total[module], ops.REST, since[module]):
                if index in known and known[index].graph_module in match.graphs:
                    found[node] = known[index]
                    break
            total[module] += 1
            since[module] += 1
    return found


def restore_markers(markers: dict[Node, Marker], matches: Iterable[Match], thresholds: Thresholds) -> None:
    """Put in the markers that a tracer or a decomposition took off, although the thresholds are still there.

    ``thresholds`` gives the node of the root graph that carries a buffer, by its full name; None where there is none.
    """
    seen: Counter[str] = Counter()
    for match in matches:
        if not match.is_attention:
            continue
        number = seen[match.path]
        seen[match.path] += 1
        if match.node in markers:
            continue
        names = (join(match.path, f"{CHILD}.{buffer_name(index)}") for index in (number, ops.REST))
        given = next((node for node in map(thresholds, names) if node is not None), None)
        if given is not None:
            root = match.callers[0].graph_module if match.callers else match.graph_module
            with root.graph.inserting_after(given):
                node = root.graph.call_function(MARK.default, (given, number))
            markers[match.node] = Marker(root, node, number)


def attached_thresholds(match: Match, marker: Marker) -> Node:
    """The thresholds of a marker as a node [H, 2 or 6] of the match's graph, on the site's device.

    Raises:
        ValueError: the marker holds another number of pairs than the site has heads.
    """
    given = marker.node.args[0]
    assert isinstance(given, Node)
    given = hand_down(match, given, match.graphs.index(marker.graph_module))
    value = value_of(given)
    assert match.attention is not None
    heads = int(match.attention.all_heads)
    if value.shape[0] not in (1, heads):
        raise value_error(
            f"thresholds that are attached at {match.site.name!r} do not fit the model",
            given=f"thresholds for {value.shape[0]} heads",
            allowed=f"{heads} pairs, one for each query head, or a single pair",
            todo="Attach a calibration that was made for this model.",
        )
    graph = match.graph_module.graph
    with graph.inserting_before(match.node):
        if value.device != match.attention.device:  # whoever offloads the model has not brought them here
            given = call(graph, torch.ops.aten._to_copy.default, given, device=match.attention.device)
        if value.shape[0] != heads:
            given = call(graph, torch.ops.aten.expand.default, given, [heads, value.shape[1]])
    return given


def new_input(match: Match, root: GraphModule, values: Tensor, fake: Any) -> tuple[ThresholdInput, Node]:
    """A new last input of the root graph for thresholds, and the node that carries it in the match's graph.

    ``fake`` is what the input stands for while the graph is compiled.
    """
    placeholder = add_input(root, _NAME, fake)
    return ThresholdInput(match, placeholder, values), hand_down(match, placeholder, 0)


def make_constants(graph_module: GraphModule, thresholds: Iterable[tuple[ThresholdInput, Tensor]]) -> None:
    """Put constants in the place of threshold inputs: of a graph that shall run without whoever gives them."""
    graph = graph_module.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for made, values in thresholds:
        with graph.inserting_before(first):
            node = graph.call_function(CONSTANT, (values.flatten().tolist(), values.device, values.shape[1]))
        node.meta["example_value"] = value_of(made.placeholder)
        made.placeholder.replace_all_uses_with(node)
        graph.erase_node(made.placeholder)
    graph_module.recompile()


def erase_markers(graph_module: GraphModule) -> bool:
    """Remove every marker, and those that state a grid; returns whether there was one."""
    found = [(owner, node) for owner, node in calls_of(graph_module) if _is_mark(node) or is_grid(node)]
    for owner, node in found:
        owner.graph.erase_node(node)
    return bool(found)


def hand_down(match: Match, given: Node, depth: int, name: str = _NAME) -> Node:
    """A node of the graph at ``depth`` (0: the root, then one for each caller) as a node of the match's graph.

    The graphs below that one get a new last input, of this name.
    """
    for caller, inner in zip(match.callers[depth:], match.graphs[depth + 1 :], strict=True):
        value = value_of(given)
        caller.node.args = (*caller.node.args, given)
        given = add_input(inner, name, value)
    return given


def _is_mark(node: Node) -> bool:
    return node.op == "call_function" and node.target in (MARK, MARK.default)
