"""What the first complete forward of a model met: the sites that ran, and the attached thresholds that they had.

It is asked for when a graph is compiled, and once it is over nothing is left of it but a list that each graph finds
empty. A model whose graphs were all compiled for another one of its class is not asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch.nn import Module

from ..options import Options
from ..thresholds.buffers import Attached
from .graph import Slot
from .profile import Profiler
from .rehearsals import is_rehearsal
from .stack import outermost_call, outward

# How many forwards may end by an exception before nobody asks any more.
_TRIES = 3
# Packages whose modules say nothing of the model that they are in.
_OF_ALL = ("torch", __name__.partition(".")[0])


class FirstForward:
    """The first complete forward of the outermost module that is being called.

    Attributes:
        sites: the full names of the sites that ran, by the options of their graphs.
        roots: the models that the names begin at.
        met: the entries of attached calibrations that a site had.
        is_blind: whether a site had attached thresholds of which nobody knows where they are.
    """

    def __init__(self, model: Module, tell: Callable[[FirstForward], None]) -> None:
        self.sites: list[tuple[Options, set[str]]] = []
        self.roots: WeakSet[Module] = WeakSet()
        self.met: set[str] = set()
        self.is_blind = False
        self._model = ref(model)
        self._tell = tell
        self._tries = _TRIES
        self._frame: FrameType | None = None  # of the call that is heard of
        self._around: frozenset[FrameType] = frozenset()
        self._skipped: FrameType | None = None
        self._profiler = Profiler(self._see)

    @property
    def model(self) -> Module | None:
        """The outermost module, as the user has it; None when it is gone."""
        return self._model()

    def attached(self) -> list[Attached]:
        """The thresholds that are attached to the models that ran."""
        return [held for root in self.roots for held in root.modules() if isinstance(held, Attached)]

    def skip(self) -> None:
        """Leave the present forward out: graphs that were compiled for other models may have run in it unheard."""
        self._skipped = outermost_call()[1]

    def ran(self, names: set[str], sites: Sequence[tuple[Slot, bool]], args: Sequence[Any]) -> None:
        """Note the sites of a graph that has run."""
        frame = outermost_call()[1]
        if frame is None or frame is self._skipped or is_rehearsal(args):
            return
        self._skipped = None
        for slot, is_marked in sites:
            place = slot.locator.place(args)
            names.add(slot.name(place))
            held = slot.attached(place)
            if held is not None:
                self.met |= held.entries_of(slot.number_at(place))
            self.is_blind |= is_marked and held is None
        if self._frame is None:
            self._wait_for(frame)

    def _wait_for(self, frame: FrameType) -> None:
        """Hear of the end of a call, and of what is around it should that end first."""
        self._frame, self._around = frame, frozenset(outward(frame.f_back))
        if not self._profiler.start():  # somebody else's is not disturbed
            self._frame = None
            self.forget()

    def _see(self, frame: FrameType, event: str, result: Any) -> None:
        if event != "return" or (frame is not self._frame and frame not in self._around):
            return
        complete = frame is self._frame and result is not None  # an exception is a return of None
        self._profiler.stop()
        self._frame, self._around = None, frozenset()
        self._tries -= 1
        if complete or self._tries == 0:
            _pending.remove(self)
        if complete:
            self._tell(self)

    def forget(self) -> None:
        """Hear of nothing more."""
        if self._frame is not None:
            self._profiler.stop()
        self._frame, self._around = None, frozenset()
        _pending.remove(self)


_pending: list[FirstForward] = []
_asked: WeakKeyDictionary[Module, list[Options]] = WeakKeyDictionary()  # by model, pending or over
_classes: list[tuple[Options, set[type[Module]]]] = []  # of models that graphs were compiled for; others may run these


def expect_first_forward(options: Options, root: Module, tell: Callable[[FirstForward], None]) -> None:
    """Ask for the first forward of the model that is running, for use while a graph of it is compiled.

    Args:
        options: those of the graph.
        root: the model that the names of its sites begin at.
        tell: what is called after it, once for a model.
    """
    model = outermost_call()[0]
    if model is None:
        return
    first = next((each for each in _pending if each.model is model), None)
    if first is not None:
        first.roots.add(root)
    if options in _asked.setdefault(model, []):
        return
    _asked[model].append(options)
    if first is None:
        first = FirstForward(model, tell)
        first.roots.add(root)
        _pending.append(first)
    first.sites.append((options, set()))
    classes = _own_classes(model)
    known = next((known for own, known in _classes if own == options), None)
    if known is None:
        _classes.append((options, known := set()))
    if known & classes:
        first.skip()
    known |= classes


def _own_classes(model: Module) -> set[type[Module]]:
    """The classes whose code is compiled for a model: a wrapper runs graphs of the model in it. Those of torch, and of
    thresholds that are attached, are in all models."""
    own = {type(each) for each in model.modules()}
    return {each for each in own if each.__module__.partition(".")[0] not in _OF_ALL} | {type(model)}


def note_first_forward(
    compiled: Callable[..., Any], options: Options, sites: Sequence[tuple[Slot, bool]]
) -> Callable[..., Any]:
    """A compiled graph that tells of its sites in the first forward of the model that runs it.

    Args:
        compiled: the graph.
        options: those that it was compiled with.
        sites: its sites, each with whether the graph itself reads thresholds that are attached for it.
    """

    def call(*args: Any) -> Any:
        results = compiled(*args)
        if _pending:
            model = outermost_call()[0]
            for first in [each for each in _pending if each.model is model]:
                for names in [names for own, names in first.sites if own == options]:
                    first.ran(names, sites, args)
        return results

    return call


def forget_first_forwards() -> None:
    """Ask again for what was asked for before."""
    for first in list(_pending):
        first.forget()
    _asked.clear()
    _classes.clear()
