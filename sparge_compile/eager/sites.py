"""Where a call of attention stands: the module of the user's model that makes it, and its number there.

Who calls is looked up once; after that it takes the walk to the innermost module alone.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakSet

from torch.nn import Module

from ..naming import PACKAGE, TORCH
from ..running.places import Names
from ..running.stack import called_module, is_user_code, module_calls, outward
from ..user_model import bare

# An entry among the locals of the frame that calls a module: how many attentions that call has made. It goes with the
# frame, whatever ends it, so that each forward counts from the start.
_COUNT = "sparge_sites"


class Where(NamedTuple):
    """The module that calls, its name in the model (None for no module), and the number of the call."""

    root: Module | None
    prefix: str | None
    number: int
    module: Module | None


class Caller(NamedTuple):
    """The innermost module that is being called, and the frame of its call; None for no module."""

    module: Module | None
    frame: FrameType | None


def caller_of(frame: FrameType, ours: Collection[str]) -> Caller | None:
    """Who makes a call; None for code of ours, or of a graph: whoever made that has looked at it.

    Frames of the files ``ours`` take part in every call.
    """
    for each in outward(frame):
        module = called_module(each)
        if module is not None:
            return Caller(module, each)
        name = each.f_code.co_filename
        if name.startswith((PACKAGE, "<eval_with_key>")) and name not in ours:
            return None
    return Caller(None, None)


class Scope:
    """The modules whose attention is meant: those of a model, or of whichever model runs."""

    def __init__(self, model: Module | None) -> None:
        self._names = None if model is None else Names(model)
        self._met: dict[int, Names] = {}  # of models that ran; their names hold them
        self._strangers: WeakSet[Module] = WeakSet()
        self._callers: dict[Module, tuple[Module, str]] = {}  # modules of one model that called: it, and their names

    @property
    def names(self) -> list[Names]:
        """The names of the models that are meant, as far as they are known."""
        return list(self._met.values()) if self._names is None else [self._names]

    def overlaps(self, other: Scope) -> bool:
        """Whether a call may belong to both."""
        if self._names is None or other._names is None:
            return True
        return not self._names.modules.keys().isdisjoint(other._names.modules)

    def where(self, caller: Caller) -> Where | None:
        """Where the call of a caller stands; None where it is none of these modules'."""
        if caller.module is None or caller.frame is None:
            return Where(None, None, 0, None) if self._names is None else None
        known = self._callers.get(caller.module)
        if known is not None:
            return Where(*known, _count(caller.frame), caller.module)
        calls = list(module_calls(caller.frame))
        names = self._names_of(module for module, _ in calls)
        for module, called in calls:
            name = _name(names, module)
            if name is not None:
                if self._names is not None and module is caller.module:
                    self._callers[module] = names.root, name
                return Where(names.root, name, _count(called), module)
        return None

    def _names_of(self, modules: Iterable[Module]) -> Names:
        """The names of the model, made anew where it has got modules since."""
        called = list(modules)
        if self._names is None:
            root = bare(called[-1])
            names = self._met.setdefault(id(root), Names(root)) if id(root) not in self._met else self._met[id(root)]
        else:
            root, names = self._names.root, self._names
        new = [m for m in called if _name(names, m) is None and m not in self._strangers]
        if new and any(_name(names, m) is not None for m in called):
            names = Names(root)
            self._strangers.update(m for m in new if _name(names, m) is None)
            if self._names is None:
                self._met[id(root)] = names
            else:
                self._names = names
                self._callers.clear()
        return names


def _name(names: Names, module: Module) -> str | None:
    name = names.modules.get(id(module))
    return names.modules.get(id(bare(module))) if name is None else name


def _count(frame: FrameType) -> int:
    """How many attentions a call of a module has made before; one more from now on."""
    known: Any = frame.f_locals
    number = int(known.get(_COUNT, 0))
    known[_COUNT] = number + 1
    return number


def line_of_caller() -> str | None:
    """The line of the user's code, or of the library that it called, which is outside of torch and of this package."""
    for each in outward(sys._getframe(1)):
        if is_user_code(each) and not each.f_code.co_filename.startswith(TORCH):
            return f"{each.f_code.co_filename}:{each.f_lineno}"
    return None
