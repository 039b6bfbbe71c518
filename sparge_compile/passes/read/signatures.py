"""Signatures of ops and of Python functions that stand in a graph: names, defaults, what is written to."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch.fx import Node


class Signature(NamedTuple):
    """The full name of a function and its arguments; ``tensors`` are those that are one (of a Python function: all)."""

    name: str
    arguments: tuple[str, ...]
    tensors: tuple[str, ...]
    defaults: dict[str, Any]
    written: tuple[str, ...] = ()

    @property
    def short_name(self) -> str:
        """The name without namespace, module and class."""
        return self.name.rpartition("::")[2].rpartition(".")[2]

    def bind(self, node: Node) -> dict[str, Any]:
        """All arguments of a call by name, defaults filled in."""
        return {**self.defaults, **dict(zip(self.arguments, node.args, strict=False)), **node.kwargs}


def read_signature(target: Any) -> Signature | None:
    """The signature of an op or of a user's Python function; None of anything else, and of our own ops."""
    target = getattr(target, "_opoverload", target)  # of torch.library.custom_op
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        return None if target.namespace == "sparge" else _of_schema(target._schema)
    module = str(getattr(target, "__module__", ""))
    if not inspect.isfunction(target) or module.split(".")[0] == "torch":
        return None
    parameters = inspect.signature(target).parameters
    names = tuple(name for name, x in parameters.items() if x.kind is not inspect.Parameter.VAR_KEYWORD)
    defaults = {name: x.default for name, x in parameters.items() if x.default is not inspect.Parameter.empty}
    return Signature(f"{module}.{target.__name__}", names, names, defaults)


def _of_schema(schema: Any) -> Signature:
    arguments = schema.arguments
    return Signature(
        schema.name,
        tuple(x.name for x in arguments),
        tuple(x.name for x in arguments if "Tensor" in str(x.type)),
        {x.name: x.default_value for x in arguments if x.has_default_value()},
        tuple(x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write),
    )
