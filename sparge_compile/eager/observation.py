"""Observers (:mod:`sparge_compile.running.observe`) hear of attention in eager code too: each call is a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..running.observe import Observer, Watched
from .calls import Call, unseen
from .door import close_door, open_call, open_door
from .sites import Scope, Where


@contextmanager
def eager_calls_of(observer: Observer) -> Iterator[None]:
    """Have an observer hear of the calls that the modules of its model make meanwhile outside of graphs."""
    door = _Watching(observer)
    open_door(door)
    try:
        yield
    finally:
        close_door(door)


class _Watching:
    def __init__(self, observer: Observer) -> None:
        assert observer.names is not None
        self.scope = Scope(observer.names.root)
        self._observer = observer

    def again(self, form: Any, where: Where) -> None:
        """Every call is looked at."""

    def call(self, call: Call, where: Where, original: Callable[[], Any], form: Any) -> Any:
        """Have the observer run the call."""
        if call.refusal is not None:
            return original()
        with unseen():
            graph = Watched(open_call(call, where))
        return self._observer.ran(graph, [slot.locator.first for slot in graph.slots], call.tensors)
