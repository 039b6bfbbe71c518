"""How Inductor adds up beside attention: what is left of a training step's time once attention is sparse.

Rows are added up in one piece (rows.py). Sums over many rows, as gradients of biases, are taken in parts where columns
are many as well: Inductor has a program for some columns then, which reads all rows one after the other, with whatever
made them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .kernels.launch import multiprocessors

logger = logging.getLogger("sparge_compile")

aten = torch.ops.aten

# From so many columns for each multiprocessor on Inductor splits no sum over rows.
COLUMNS_UNSPLIT = 64
LEAST_ROWS, PARTS = 4096, 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def in_pieces(compile_inner: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's compilation of a graph, forward or backward, with these sums."""

    @functools.wraps(compile_inner)
    def compiled(graph_module: Any, *args: Any, **kwargs: Any) -> Any:
        if split_columns(graph_module.graph):
            graph_module.recompile()
        with whole_rows():
            return compile_inner(graph_module, *args, **kwargs)

    return compiled


def whole_rows() -> contextlib.AbstractContextManager[Any]:
    """Inductor adds up rows in one piece, where its choices are its own and neither a user's nor unknown to us."""
    try:
        from torch._inductor.choices import InductorChoices
        from torch._inductor.virtualized import V

        from .rows import WholeRows

        own = type(V.choices) is InductorChoices
        return V.set_choices_handler(WholeRows()) if own else contextlib.nullcontext()
    except (ImportError, AttributeError) as error:
        logger.info("Inductor adds up rows as ever: %s", error)
        return contextlib.nullcontext()


def split_columns(graph: Graph) -> int:
    """Take sums of a graph after autograd over the first of two dimensions in parts, where both are long.

    Partial sums are float32. Returns how many sums these are.
    """
    changed = 0
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        x, parts = node.args[0], _parts_of(node)
        if parts > 1:
            _write(graph, node, x, parts)
            changed += 1
    return changed


def _parts_of(node: Node) -> int:
    """In how many parts a sum is taken; 1: it stays as it is."""
    x = node.args[0]
    given = x.meta.get("val") if isinstance(x, Node) else None
    if not isinstance(given, Tensor) or "val" not in node.meta or node.kwargs:
        return 1
    if list(node.args[1] or ()) != [0] or given.dim() != 2 or given.device.type != "cuda" or given.dtype not in DTYPES:  # type: ignore[arg-type]
        return 1
    rows, columns = given.shape
    if not all(type(n) is int for n in (*given.shape, *given.stride())) or given.stride() != (columns, 1):
        return 1
    if rows < LEAST_ROWS or columns < COLUMNS_UNSPLIT * multiprocessors(given.device):
        return 1
    near = (n for n in range(PARTS // 2, 2 * PARTS + 1) if rows % n == 0)
    return min(near, key=lambda n: abs(n - PARTS), default=1)


def _write(graph: Graph, node: Node, x: Any, parts: int) -> None:
    given, keeps = x.meta["val"], len(node.args) > 2 and bool(node.args[2])
    rows, columns = given.shape
    with graph.inserting_before(node):
        split = graph.call_function(aten.reshape.default, (x, [parts, rows // parts, columns]))
        some = graph.call_function(aten.sum.dim_IntList, (split, [1]), {"dtype": torch.float32})
        whole = graph.call_function(aten.sum.dim_IntList, (some, [0], keeps))
        made = graph.call_function(torch.ops.prims.convert_element_type.default, (whole, given.dtype))
    split.meta["val"] = given.new_empty(parts, rows // parts, columns)
    some.meta["val"] = given.new_empty(parts, columns, dtype=torch.float32)
    whole.meta["val"] = node.meta["val"].float()
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
