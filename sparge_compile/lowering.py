"""Inductor's code calls our kernels themselves: past torch's dispatcher, which takes as long as three launches.

Where Inductor writes Python, the call of an op's overload ``default`` becomes the call of its ``direct`` (ops.py), with
the same arguments; of ``at`` a line of its own where all sizes are numbers, so that their look-up is left out as well.
In C++ wrappers and stored programs the op stays what it is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from . import ops

logger = logging.getLogger("sparge_compile")


@functools.cache
def call_directly() -> None:
    """Tell Inductor, once. Where its insides are not those that we know, the ops stay: right, and a little slower."""
    try:
        from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
        from torch._library.utils import get_layout_constraint_tag

        for op in ops.DIRECT:
            layout = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
            make_fallback(op, layout_constraint=layout, warn=False)  # as Inductor does when it meets the op
            lowerings[op] = _named(op, lowerings[op])
    except (ImportError, AttributeError, TypeError) as error:
        logger.info("Inductor calls our ops through the dispatcher: %s", error)


def _named(op: torch._ops.OpOverload, lower: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor.virtualized import V

    @functools.wraps(lower)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        graph: Any = V.graph
        if graph.cpp_wrapper or graph.aot_mode:
            return lower(*args, **kwargs)
        before = len(graph.operations)
        left = op._schema.arguments[len(args) :]
        result = lower(*args, *(kwargs.get(x.name, x.default_value) for x in left))  # by position it takes less time
        made = graph.operations[before:]
        for call in made:
            if getattr(call, "op_overload", None) is op:
                way = _way(call, made, graph.current_node)
                call.python_kernel_name = f"torch.ops.{op.namespace}.{op._opname}.{way}"
        return result

    return lowered


def _way(call: Any, made: Sequence[Any], node: Node) -> str:
    """How the kernel of a call is reached: by its line, where all sizes are numbers, which are looked at once then.

    ``made`` are the operations of a node, its results among them, whose layouts Inductor would check at each call. From
    torch 2.15 on a single result is the call itself.
    """
    if not _is_of_numbers(node):
        return "direct"
    results = [x for x in made if type(x).__name__ == "MultiOutput"] or [call]
    layouts = tuple((tuple(map(int, x.get_size())), tuple(map(int, x.get_stride()))) for x in results)
    for x in results:
        x.skip_size_stride_alignment_checks = True
    return f"at({uuid4().hex!r}, {layouts!r})"


def _is_of_numbers(node: Node) -> bool:
    """Whether no argument of a node is a symbol, nor has one among its sizes and strides."""
    given = tree_leaves((node.args, node.kwargs))
    values = tree_leaves([x.meta.get("val") if isinstance(x, Node) else x for x in given])
    sizes = [size for x in values if isinstance(x, torch.Tensor) for size in (*x.shape, *x.stride())]
    return not any(isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) for x in (*values, *sizes))
