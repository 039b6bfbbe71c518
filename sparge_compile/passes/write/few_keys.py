"""Dense attention of many queries to few keys, as a video attends to its text, in parts of its queries for a backward.

Torch's backwards have a program for each 128 keys of a head: for 512 keys and 12 heads 48, where an H200 runs 132 at
a time. Queries do not see one another, so parts of them may be sequences of a batch that have the same keys; autograd
adds up what these are given.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from ...kernels.block_map import ceil_div
from ...kernels.launch import multiprocessors
from ...sharding import is_sharded
from ..find import Match
from ..match.sdpa import arguments_of, is_sdpa
from ..match.sdpa_kernels import gives_several
from ..read.fx_utils import value_of
from .emit import call, values_like

aten = torch.ops.aten

MOST_KEYS = 1024
LEAST_QUERIES = 2048  # of a part
_KEYS_OF_A_PROGRAM = 128
_PROGRAMS = 2  # for each multiprocessor, so that the last ones leave few of them idle


def parts_of(length: int, keys: int, heads: int, at_a_time: int) -> int:
    """Into how many equal parts queries are taken: the least that fill a GPU which runs so many programs at a time.

    Args:
        length: the number of queries.
        keys: the number of keys.
        heads: the number of heads, of all sequences of the batch.
        at_a_time: how many programs the GPU runs at a time.
    """
    if keys > MOST_KEYS:
        return 1
    programs = heads * ceil_div(keys, _KEYS_OF_A_PROGRAM)
    fitting = (n for n in range(1, length // LEAST_QUERIES + 1) if length % n == 0)
    return next((n for n in fitting if n * programs >= _PROGRAMS * at_a_time), 1)


def take_in_parts(matches: Iterable[Match]) -> int:
    """Have the queries of those attentions come in parts that gain by it. Returns how many they are."""
    changed = 0
    for match in matches:
        parts = _parts(match)
        if parts > 1:
            _write(match.node, parts)
            changed += 1
    return changed


def _parts(match: Match) -> int:
    """Into how many parts the queries of a site are taken; 1: it stays as it is."""
    attention, node = match.attention, match.node
    if attention is None or not attention.trains or attention.device.type != "cuda":
        return 1
    if not is_sdpa(node) or gives_several(node) or attention.masks or attention.is_causal or attention.dropout:
        return 1
    query, key, value = (value_of(x) for x in _operands(node))
    given = (query, key, value)
    if any(map(is_sharded, given)) or not all(type(n) is int for x in given for n in (*x.shape, *x.stride())):
        return 1
    # Where rows lie behind one another, with all of their heads, parts of them are views.
    if query.dim() != 4 or not query.transpose(1, 2).is_contiguous():
        return 1
    if key.shape[:-2] != query.shape[:-2] or value.shape[:-1] != key.shape[:-1]:
        return 1
    batch, heads, length, _ = query.shape
    return parts_of(length, key.shape[2], batch * heads, multiprocessors(query.device))


def _operands(node: Node) -> list[Node]:
    given = arguments_of(node)
    return [given[name] for name in ("query", "key", "value")]


def _write(node: Node, parts: int) -> None:
    graph, (query, key, value) = node.graph, _operands(node)
    batch, heads, length, _ = value_of(query).shape

    def repeated(x: Node) -> Node:
        """The same keys or values for each part."""
        shape = value_of(x).shape
        x = call(graph, aten.expand.default, call(graph, aten.unsqueeze.default, x, 1), [-1, parts, -1, -1, -1])
        return call(graph, aten.reshape.default, x, [batch * parts, *shape[1:]])

    def in_rows(x: Node, sequences: int, rows: int) -> Node:
        """[.., H, .., D] as so many sequences of so many rows; a view."""
        x = call(graph, aten.transpose.int, x, 1, 2)
        x = call(graph, aten.reshape.default, x, [sequences, rows, heads, -1])
        return call(graph, aten.transpose.int, x, 1, 2)

    with graph.inserting_before(node):
        operands = (in_rows(query, batch * parts, length // parts), repeated(key), repeated(value))
        made = graph.call_function(node.target, operands, {"scale": arguments_of(node)["scale"]})  # type: ignore[arg-type]
        made.meta = {**node.meta, **values_like(operands[0])}
        result = in_rows(made, batch, length)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
