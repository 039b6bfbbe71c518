"""See the training forwards of a student before torch does, so that compiled code stays as it is.

In: a module, compiled or not, and whoever follows it. Out: each training forward with its arguments, its output, and
what the backend's graphs said meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from ..options import Options
from ..running.listeners import heard_by
from ..user_model import is_compiled, unwrapped

_KINDS = ("cpu", "cuda")


class Follower(Protocol):
    """What hears of a student's training forwards."""

    def ran(self, output: Any, heard: Heard, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The student gave this output for these arguments."""


class Heard:
    """Listens to the graphs of one forward: their options, sparse sites and what these gave, and the autocast that they
    ran in, which a wrapper such as accelerate's may have entered."""

    def __init__(self) -> None:
        self.options: Options | None = None
        self.autocast: dict[str, torch.dtype] = {}
        self.names: list[str] = []
        self.outputs: dict[str, list[Tensor]] = {}

    def ran(self, options: Options, names: list[str], outputs: Sequence[Tensor]) -> None:
        self.options = options
        self.autocast = {kind: torch.get_autocast_dtype(kind) for kind in _KINDS if torch.is_autocast_enabled(kind)}
        self.names += [name for name in names if name not in self.names]
        for name, output in zip(names, outputs, strict=False):  # a graph gives all of its outputs, or none
            self.outputs.setdefault(name, []).append(output)


class Interception:
    """Sees every call of a student before torch does, so that compiled code stays as it is."""

    def __init__(self, student: Module) -> None:
        self.hooks: list[Follower] = []
        self._student = weakref.ref(student)
        compiled = is_compiled(student)
        self._name = "forward" if compiled else "_compiled_call_impl"
        self._before = student.forward if compiled else student._compiled_call_impl
        call = self._before or student._call_impl

        def run(*args: Any, **kwargs: Any) -> Any:
            is_training = unwrapped(student).training and torch.is_grad_enabled()
            if not is_training or torch._C._current_graph_task_id() != -1:  # in a backward, a checkpoint recomputes
                return call(*args, **kwargs)
            heard = Heard()
            with heard_by(heard):
                output = call(*args, **kwargs)
            for hook in list(self.hooks):
                hook.ran(output, heard, args, kwargs)
            return output

        setattr(student, self._name, run)

    def restore(self) -> None:
        """Take it off the student, unless a hook needs it."""
        student = self._student()
        if not self.hooks and student is not None:
            setattr(student, self._name, self._before)
            _interceptions.pop(student, None)


_interceptions: weakref.WeakKeyDictionary[Module, Interception] = weakref.WeakKeyDictionary()


def intercept(student: Module) -> Interception:
    if student not in _interceptions:
        _interceptions[student] = Interception(student)
    return _interceptions[student]
