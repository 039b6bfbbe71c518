"""Who hears of a call of attention in eager code, and the call as an open graph under the name of its site.

A door is for some modules; no two doors are for the same. While one is open, every thread's calls come here, and those
that no door is for go on to where they were going.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..errors import value_error
from ..passes.pipeline import find
from ..passes.work import analyse, sheltered
from ..running.graph import OpenGraph, Slot
from ..running.places import Fixed, Place
from ..running.rehearsals import is_rehearsal
from . import functions
from .calls import Call, form_of
from .functions import Function, replace_functions, restore_functions
from .sites import Scope, Where, caller_of, line_of_caller


class Door(Protocol):
    """Protocol of those who take calls."""

    scope: Scope

    def again(self, form: Any, where: Where) -> Callable[..., Any] | None:
        """Return what computes calls of this form there from their arguments; None where none was prepared."""

    def call(self, call: Call, where: Where, original: Callable[[], Any], form: Any) -> Any:
        """Return the result of a call; ``original`` computes what it did before. Calls of one ``form`` are alike."""


_doors: list[Door] = []
_lock = threading.Lock()
_inside = threading.local()  # .on: this thread is in a call that was taken; what that calls is not looked at


def open_door(door: Door) -> None:
    """Have a door take the calls of its modules.

    Raises:
        ValueError: another one is open for some of them.
    """
    with _lock:
        if any(door.scope.overlaps(other.scope) for other in _doors):
            raise value_error(
                "replace_attention: attention is replaced, or calibrated, already",
                given="modules that another replace_attention or calibrate is at work on",
                allowed="one at a time for a module",
                todo="Leave or remove() the other one first; for several models, give each its own model.",
            )
        _doors.append(door)
        replace_functions(_serve)


def close_door(door: Door) -> None:
    """Have a door take no more calls; a door that is closed may be closed again."""
    with _lock:
        _doors[:] = [other for other in _doors if other is not door]
        if not _doors:
            restore_functions()


def _serve(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    caller = None
    if not getattr(_inside, "on", False) and get_proxy_mode() is None:
        caller = caller_of(sys._getframe(1), _OURS)
    if caller is None:
        return function.original(*args, **kwargs)
    for door in list(_doors):
        where = door.scope.where(caller)
        if where is not None:
            break
    else:
        return function.original(*args, **kwargs)
    replace_functions(_serve)  # those of modules that were imported meanwhile
    form = form_of(function, args, kwargs)
    again = None if form is None else door.again(form, where)
    _inside.on = True
    try:
        return _first(door, where, function, args, kwargs, form) if again is None else again(function, args, kwargs)
    finally:
        _inside.on = False


def _first(
    door: Door, where: Where, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], form: Any
) -> Any:
    """A call that is to be looked at."""
    original = partial(function.original, *args, **kwargs)
    try:
        call = Call.of(function, args, kwargs)
    except (TypeError, AttributeError, RuntimeError):  # no call that the function takes: it says so itself
        return original()
    if not call.tensors or is_rehearsal(call.tensors):
        return original()
    return door.call(call, where, original, form)


_OURS = {__file__, functions.__file__}


def open_call(call: Call, where: Where) -> OpenGraph:
    """A call as a graph with its match, named as the site where it stands.

    A call that cannot be made, or a fault of ours, gives a graph without matches and the failure.
    """
    graph = OpenGraph(GraphModule({}, Graph()))
    with sheltered(graph.failures, "call"):
        graph.graph_module = call.graph()
    analyse(graph, find, partial(_name, where=where))
    return graph


def _name(work: OpenGraph, where: Where) -> None:
    place = Place(where.root, where.prefix)
    for i, match in enumerate(work.matches):
        slot = work.slots[match.node] = Slot(Fixed(place), match.path, where.number)
        named = slot.at(place, match)
        work.matches[i] = replace(named, site=replace(named.site, code=line_of_caller()))
