"""How Inductor adds up beside attention: what is left of a training step's time once attention is sparse.

Rows of up to 2,048 numbers, as norms have them, are added up in one piece and not read twice (Inductor: 1,024). Sums
over many rows, as gradients of biases, are taken in parts where columns are many as well: Inductor has a program for
some columns then, which reads all rows one after the other, with whatever made them.
Where Inductor's insides are not those that we know, it chooses as ever: right, and a little slower.
"""

from __future__ import annotations

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

MOST_IN_ONE_PIECE = 2048
# From so many columns for each multiprocessor on Inductor splits no sum over rows.
COLUMNS_UNSPLIT = 64
LEAST_ROWS, PARTS = 4096, 16


def in_pieces(compile_inner: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's compilation of a graph, forward or backward, with these sums."""
    try:
        handler = _choices()
    except (ImportError, AttributeError) as error:
        logger.info("Inductor adds up as ever: %s", error)
        return compile_inner
    from torch._inductor import config
    from torch._inductor.virtualized import V

    @functools.wraps(compile_inner)
    def compiled(graph_module: Any, *args: Any, **kwargs: Any) -> Any:
        if split_columns(graph_module.graph):
            graph_module.recompile()
        if config.inductor_choices_class is not None:  # whose choices are the user's
            return compile_inner(graph_module, *args, **kwargs)
        with V.set_choices_handler(handler()):
            return compile_inner(graph_module, *args, **kwargs)

    return compiled


@functools.cache
def _choices() -> type[Any]:
    """Inductor's choices, but for rows."""
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    plain = InductorChoices.should_use_persistent_reduction

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            known, numel = V.graph.sizevars.statically_known_leq, features.reduction_numel
            medium = known(numel, MOST_IN_ONE_PIECE) and not known(numel, 1024) and config.triton.persistent_reductions
            return (medium and _reads_whole_rows(features)) or plain(features, cooperative_reduction)

    return Choices


def _reads_whole_rows(features: Any) -> bool:
    """Whether a kernel adds up along rows, and reads them whole: of rows in heads, as rotary positions want, not."""
    for node in features.scheduler_nodes():
        columns, reduced = node.get_ranges()
        reads = [x for x in node.read_writes.reads if getattr(x, "var_names", ())]
        if reduced and any(x.index.coeff(x.var_names[-1]) not in (0, 1) for x in reads):
            return False
        if not reduced and len(columns) > 1 and columns[-1] not in (1, features.reduction_numel):
            return False
    return True


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
    x, value = node.args[0], node.meta.get("val")
    given = x.meta.get("val") if isinstance(x, Node) else None
    if (
        not isinstance(given, Tensor)
        or given.dim() != 2
        or given.device.type != "cuda"
        or not isinstance(value, Tensor)
    ):
        return 1
    rows, columns = given.shape
    if list(node.args[1]) != [0] or node.kwargs or not (type(rows) is type(columns) is int):  # type: ignore[arg-type]
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
