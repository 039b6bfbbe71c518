"""A GPU's kernel behind an op, as compiled code reaches it: past torch's dispatcher, and by its line.

``directly`` leaves the dispatcher out, which takes as long as three launches. ``at_a_line`` leaves out as well what the
code knows: that the tensors of one of its lines have the same form in each call (``triton/replay.py``). Where a mode, a
profiler or a gradient waits for the op, it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

LINES = 4096  # how many lines of compiled code are known for an op; the oldest goes first


class Lazily:
    """What is made when it is first called: by then Triton may be imported."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._make = make

    @cached_property
    def made(self) -> Any:
        """It, made."""
        return self._make()

    def __call__(self, *args: Any) -> Any:
        return self.made(*args)


def replayed(function: Callable[..., Any]) -> Lazily:
    """``function`` on a GPU, where calls of a form that was met before are replayed."""

    def make() -> Callable[..., Any]:
        from .triton import replay

        return replay.Replayed(function)

    return Lazily(make)


def _line(kernel: Lazily, layouts: Any) -> Callable[..., Any]:
    from .triton import replay

    return replay.Line(kernel.made, layouts)


def directly(op: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` for Inductor's code: the GPU's kernel at once, where no mode, profiler or gradient waits for the op."""

    def call(first: Tensor, *others: Any) -> Any:
        if (
            first.is_cuda
            and not torch.is_grad_enabled()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._autograd._profiler_enabled()
        ):
            return kernel(first, *others)
        return op(first, *others)

    return call


def at_a_line(op: Any, kernel: Lazily) -> Callable[[str, Any], Callable[..., Any]]:
    """The same for a line of Inductor's code, which has a name of its own, and whose tensors have one form always."""
    lines: dict[str, Callable[..., Any]] = {}

    def at(name: str, layouts: Any) -> Callable[..., Any]:
        found = lines.get(name)
        if found is None:
            found = lines[name] = directly(op, Lazily(partial(_line, kernel, layouts)))
            if len(lines) > LINES:
                lines.pop(next(iter(lines)), None)
        return found

    return at
