"""Questions about sizes that may be symbols of a trace, answered without a guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

UNKNOWN = 1 << 12  # stands for a size that depends on data, where two sizes must be put in order


def surely(condition: Any) -> bool:
    """Whether a condition on sizes holds whatever the symbols stand for."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # its import is slow

    return bool(statically_known_true(condition))


def differ(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are different whatever the symbols stand for."""
    return len(a) != len(b) or any(surely(x != y) for x, y in zip(a, b, strict=True))


def hint(size: Any) -> int:
    """The size that was traced with; a guess for one that depends on data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known = size.node.hint
    if known is not None:
        return int(known)
    expression, environment = size.node.expr, size.node.shape_env
    name = "backed_var_to_val" if hasattr(environment, "backed_var_to_val") else "var_to_val"  # up to torch 2.11
    values = getattr(environment, name)
    return int(expression.xreplace({s: values.get(s, UNKNOWN) for s in expression.free_symbols}))
