"""Who is told of each call of a compiled graph, and with it what its sites gave.

The additional outputs of a graph (:mod:`sparge_compile.passes.write.outputs`) are taken off here, before its caller
sees a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import value_error
from ..options import Options
from .graph import Slot
from .places import Names, Place
from .rehearsals import is_rehearsal


class Listener(Protocol):
    """Protocol of those who are told when a graph runs."""

    def ran(self, options: Options, names: list[str], outputs: Sequence[Tensor]) -> None:
        """A graph ran that was compiled with these options; ``names`` are its sparse sites, or those that were asked
        for, and ``outputs`` their results [B, H, L, D], if the graph returns them."""


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("sparge_listeners", default=())
_wanted = 0  # how many ask for graphs that return what their sparse sites give


@contextmanager
def heard_by(*listeners: Listener) -> Iterator[None]:
    """Have these, and nobody else, hear of the graphs that run meanwhile."""
    token = _listeners.set(listeners)
    try:
        yield
    finally:
        _listeners.reset(token)


def current_listeners() -> tuple[Listener, ...]:
    """Return those who hear of the graphs that run now."""
    return _listeners.get()


def want_outputs(more: int) -> None:
    """Ask so many times more, or less, for the outputs of sites; what is compiled from now on for training has them.

    Whatever model it is for: equal models share what Dynamo compiled for the first of them.
    """
    global _wanted
    _wanted += more
    if more > 0:
        torch._dynamo.reset()  # what is there does not return them


def outputs_wanted() -> bool:
    """Whether what is being compiled now shall return the outputs of its sites. They serve training alone."""
    return torch.is_grad_enabled() and _wanted > 0


def refuse_outputs(wanted: bool) -> None:
    """Refuse to store a graph that returns what its sites give: nobody would take that off what runs elsewhere.

    Raises:
        ValueError: it is wanted.
    """
    if wanted:
        raise value_error(
            "sparge: a graph for a distillation by layers cannot be stored",
            given="a DistillationHook with layers, and aot_compile or torch._dynamo.config.caching_precompile",
            allowed="one of the two",
            todo="Fine-tune without storing, and compile anew without the hook to store.",
        )


class Outlet:
    """Tells listeners of each call of a graph, and takes the additional outputs off its results.

    Sites that are dense by plan in every step where the graph runs are not told of, though equal blocks have them
    sparse. ``names`` are those of the model that runs it; without them it is looked for on the stack.
    """

    def __init__(self, options: Options, slots: Sequence[Slot], has_outputs: bool, names: Names | None = None) -> None:
        self._options = options
        self._names = names
        self._slots = slots
        self._count = len(slots) if has_outputs else 0

    def __call__(self, args: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
        end = len(results) - self._count
        for listener in () if is_rehearsal(args) else _listeners.get():
            places = [(slot, self._place(slot, args)) for slot in self._slots]
            told = [not slot.is_dense_layer(place, self._options) for slot, place in places]
            names = compress((slot.name(place) for slot, place in places), told)
            listener.ran(self._options, list(names), list(compress(results[end:], told)))
        return results[:end] if self._count else results

    def _place(self, slot: Slot, args: Sequence[Any]) -> Place:
        return slot.locator.place(args) if self._names is None else slot.locator.where(args, self._names)


def with_outlet(compiled: Callable[..., Any], outlet: Outlet) -> Callable[..., Any]:
    """A compiled graph that tells listeners of each call, and keeps additional outputs from its caller."""

    def run(*args: Any) -> Any:
        return outlet(args, compiled(*args))

    if hasattr(compiled, "serialize"):  # what torch stores in the place of this function (aot_compile)
        run.serialize = compiled.serialize  # type: ignore[attr-defined]
    return run
