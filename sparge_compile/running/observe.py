"""Watch a user's model run: Dynamo finds the graphs, they run as they are, and an observer hears of each.

``explain`` and calibration are observers. Which module runs a graph is known when it runs (:mod:`.places`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import Module

from ..options import Options
from ..passes.find import Match, find
from ..passes.order import SiteOrder, order_sites
from ..passes.read.fx_utils import clone
from ..passes.work import sheltered
from ..passes.write.taps import put_taps
from ..user_model import is_compiled, user_model
from .frames import Left, hear_of_left_frames, stop_hearing
from .graph import OpenGraph, Slot, open_graph
from .places import Names, Place, find_names
from .rehearsals import is_rehearsal


class Watched:
    """One graph of a model: its matches in order, the slot of each, the nodes that have a marker of ``attach``, and the
    analyses that failed."""

    def __init__(self, graph: OpenGraph) -> None:
        self.graph_module = graph.graph_module
        self._tapped: dict[tuple[Any, ...], GraphModule] = {}
        self.matches: list[Match] = graph.matches
        self.slots: list[Slot] = [graph.slots[match.node] for match in graph.matches]
        self.marked = set(graph.markers)
        self.failures = graph.failures

    def run(self, args: Sequence[Any]) -> Any:
        """Run the graph as it is."""
        return self.graph_module.forward(*args)

    def run_tapped(
        self, args: Sequence[Any], wanted: Mapping[int, str], with_parts: bool = False, grids: Options | None = None
    ) -> Any:
        """Run the graph with a tap at the matches with these numbers, that are sites with these names.

        Each tells the parts of its sequence if asked, and the grids of its tokens, as far as the graph shows them or
        these options state them.
        """
        by_name = grids is not None and isinstance(grids.grid, Mapping)
        key = tuple(wanted.items()) if by_name else tuple(wanted)
        if key not in self._tapped:
            copy = clone(self.graph_module)
            found = find(copy)
            named = [(n, replace(found[n], site=replace(found[n].site, name=name))) for n, name in wanted.items()]
            orders: dict[Node, SiteOrder] = {}
            if grids is not None:
                with sheltered(self.failures, "order"):
                    orders = order_sites(copy, [match for _, match in named], replace(grids, token_order="tiles"))
            put_taps(copy, named, with_parts, orders)
            self._tapped[key] = copy
        return self._tapped[key].forward(*args)


class Observer:
    """Base of those that run the graphs of a model and look into them. ``names`` are those of the given model."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.names = Names(model) if isinstance(model, Module) else None

    def ran(self, graph: Watched, places: list[Place], args: Sequence[Any]) -> Any:
        """Run a graph on its inputs; ``places`` has the module that runs it, for each match."""
        raise NotImplementedError


# What is only looked at may be traced as often as it takes: hooks, for one, share their code among all modules.
NO_LIMITS: Any = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}

_observer: ContextVar[Observer] = ContextVar("sparge_observer")
_calls = itertools.count()


def watching(target: Callable[..., Any], observer: Observer) -> Callable[..., Any]:
    """A function that calls a model or function once, while the observer hears of its graphs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    # Dynamo keeps compiled code with the code object, and by its name which sizes have changed between calls; a fresh
    # one sees no earlier call and disturbs none.
    call.__code__ = call.__code__.replace(co_name=f"sparge_observed_{next(_calls)}")
    compiled = torch.compile(call, backend=_look)

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _observer.set(observer)
        left: list[Left] = []
        hear_of_left_frames(_look, left.append)
        try:
            with uncompiled(target), torch._dynamo.config.patch(NO_LIMITS):
                return compiled(*args, **kwargs)
        finally:
            _observer.reset(token)
            stop_hearing(_look)
            for each in left:
                each.forget()

    return run


@contextmanager
def calls_through(model: Module, call: Callable[..., Any]) -> Iterator[None]:
    """Have every call of a model, compiled or not, whoever makes it, go through ``call``; inside that it is itself."""
    target: Any = user_model(model)

    def run(*args: Any, **kwargs: Any) -> Any:
        target._compiled_call_impl = None
        try:
            return call(*args, **kwargs)
        finally:
            target._compiled_call_impl = run

    # What torch.compile(model) gave calls its own forward.
    patched = [(target, "_compiled_call_impl"), *([(model, "forward")] if model is not target else [])]
    before = [getattr(module, name) for module, name in patched]
    try:
        for module, name in patched:
            setattr(module, name, run)
        yield
    finally:
        for (module, name), value in zip(patched, before, strict=True):
            setattr(module, name, value)


def _look(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Dynamo backend of all observers: tell whoever watches when a graph runs.

    One function for all calls, and telling at run time: where a graph breaks, the frames of the model itself are
    compiled, and a backend for each call would use up the limit of compilations that Dynamo grants them. Blocks share
    such graphs, and so do models.
    """
    graph = Watched(open_graph(graph_module, _names_now))

    def run(*args: Any) -> Any:
        observer = _observer.get(None)
        if observer is None or is_rehearsal(args):
            return graph.run(args)
        places = [Place() for _ in graph.slots]
        with sheltered(graph.failures, "place"):
            names = _names_now()
            places = [slot.locator.where(args, names) for slot in graph.slots]
        return observer.ran(graph, places, args)

    return run


def _names_now() -> Names | None:
    """The names in the model that is watched, or, where a function is, in the model that runs."""
    observer = _observer.get(None)
    if observer is not None and observer.names is not None:
        return observer.names
    return find_names()


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Blocks that are compiled on their own run plain, so that an observer sees into them after a graph break too."""
    compiled: list[tuple[Any, str, Any]] = []
    for module in model.modules() if isinstance(model, Module) else ():
        if is_compiled(module):
            compiled.append((module, "forward", module._orig_mod.__call__))  # type: ignore[operator]
        elif module._compiled_call_impl is not None:
            compiled.append((module, "_compiled_call_impl", None))
    before = [(module, name, getattr(module, name)) for module, name, _ in compiled]
    try:
        for module, name, value in compiled:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
