"""The training forwards of a student, seen before torch sees them, so that compiled code stays as it is.

In: a module, compiled or not, and functions to call. Out: each training forward with its output and arguments, and
what the backend's graphs gave meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..options import Options
from ..running.listeners import heard_by
from ..user_model import is_compiled, unwrapped

_DEVICE_TYPES = ("cpu", "cuda")


class GraphCalls:
    """A listener that keeps what the graphs of one forward gave.

    Attributes:
        options: those that the last graph was compiled with; None: no graph of the backend ran.
        autocast: the dtype by device type that the last graph ran in; a wrapper such as accelerate's may have entered
            it.
        names: the sparse sites, in the order in which they ran first.
        outputs: what each site gave, [B, H, L, Dv] for each of its calls, where the graphs return it.
    """

    def __init__(self) -> None:
        self.options: Options | None = None
        self.autocast: dict[str, torch.dtype] = {}
        self.names: list[str] = []
        self.outputs: dict[str, list[Tensor]] = {}

    def ran(self, options: Options, names: list[str], outputs: Sequence[Tensor]) -> None:
        """Keep what one call of a graph gave; see ``running.listeners.Listener``."""
        self.options = options
        self.autocast = {
            kind: torch.get_autocast_dtype(kind) for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)
        }
        self.names += [name for name in names if name not in self.names]
        for name, output in zip(names, outputs, strict=False):  # a graph gives all of its outputs, or none
            self.outputs.setdefault(name, []).append(output)


# Called after a training forward with its output, its graph calls, its arguments and its keyword arguments.
AfterForward = Callable[[Any, GraphCalls, tuple[Any, ...], dict[str, Any]], None]


class TrainingForwards:
    """The training forwards of one student: in training mode, with gradients enabled, and not recomputed."""

    def __init__(self, student: Module) -> None:
        self._clients: list[AfterForward] = []
        self._student = weakref.ref(student)
        compiled = is_compiled(student)
        self._name = "forward" if compiled else "_compiled_call_impl"
        self._before = student.forward if compiled else student._compiled_call_impl
        call = self._before or student._call_impl

        def run(*args: Any, **kwargs: Any) -> Any:
            is_training = unwrapped(student).training and torch.is_grad_enabled()
            if not is_training or torch._C._current_graph_task_id() != -1:  # in a backward, a checkpoint recomputes
                return call(*args, **kwargs)
            graphs = GraphCalls()
            with heard_by(graphs):
                output = call(*args, **kwargs)
            for client in list(self._clients):
                client(output, graphs, args, kwargs)
            return output

        setattr(student, self._name, run)

    @staticmethod
    def of(student: Module) -> TrainingForwards:
        """Return the one that sees this student; a new one replaces the student's call."""
        if student not in _by_student:
            _by_student[student] = TrainingForwards(student)
        return _by_student[student]

    def add(self, client: AfterForward) -> None:
        """Call a function after each training forward, after those that were added before."""
        self._clients.append(client)

    def remove(self, client: AfterForward) -> None:
        """Call a function no more. Without any the student is what it was before."""
        self._clients.remove(client)
        student = self._student()
        if not self._clients and student is not None:
            setattr(student, self._name, self._before)
            _by_student.pop(student, None)


_by_student: weakref.WeakKeyDictionary[Module, TrainingForwards] = weakref.WeakKeyDictionary()
