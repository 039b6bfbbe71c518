"""Inductor's code calls our kernels themselves: past torch's dispatcher, which takes as long as three launches.

Where Inductor writes Python, the call of an op's overload ``default`` becomes the call of its ``direct`` (ops.py), with
the same arguments. In C++ wrappers and stored programs the op stays what it is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

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
        for made in graph.operations[before:]:
            if getattr(made, "op_overload", None) is op:
                made.python_kernel_name = f"torch.ops.{op.namespace}.{op._opname}.direct"
        return result

    return lowered
