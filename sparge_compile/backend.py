"""The torch.compile entry: options → passes on Dynamo's graph → whoever compiles the rest; ``explain``, its dry run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch.fx import GraphModule, Node
from torch.nn import Module

from . import ops  # noqa: F401  importing it registers the ops
from .errors import type_error
from .inner import compile_graph, faker, is_stored
from .misfits import check_model, warn_of_misfits, warn_of_names, warn_of_stale_file, warn_of_unused
from .notices import (
    forget_warnings,
    raise_left,
    tell_of_left,
    warn_of_nothing,
    warn_of_orders,
    warn_of_text,
    warn_of_unsupported,
)
from .options import Options
from .passes.find import Match
from .passes.pipeline import decide_sites as decide_with
from .passes.pipeline import foretell_orders, rewriting_passes
from .passes.read.fx_utils import value_of
from .passes.work import Work, analyse, run, sheltered
from .passes.write.threshold_inputs import make_constants
from .report import Report
from .running.fine_tuning import as_to_run
from .running.first_forward import expect_first_forward, forget_first_forwards, note_first_forward
from .running.frames import hear_of_left_frames, is_whole_call
from .running.graph import decide_sites, open_graph
from .running.listeners import Outlet, outputs_wanted, refuse_outputs, with_outlet
from .running.observe import Observer, Watched, calls_through, watching
from .running.outside import Outside
from .running.phases import DenseCalls, by_plan, dense_copy, refuse_steps
from .running.places import Place, find_names
from .running.stack import is_innermost
from .running.thresholds import RunTime
from .thresholds.buffers import has_attached
from .thresholds.json_file import Source
from .user_model import user_model

logger = logging.getLogger("sparge_compile")


def sparge(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Dynamo backend: replace attention where it pays, compile the rewritten graph with ``options["inner"]``.

    Args:
        graph_module: Dynamo's graph, before autograd and decomposition. A copy of it is rewritten.
        example_inputs: its inputs (fake tensors, ints).
        options: see :class:`sparge_compile.options.Options`.
        mode: Inductor's mode, as torch.compile forwards it; the same as ``options["inductor_mode"]``.

    Raises:
        ValueError, TypeError: an option that is unknown or ill-typed, a calibration that does not fit the model, or,
            with ``on_unsupported="error"``, a site that cannot be replaced. Out of a compiled model, Dynamo raises them
            wrapped as ``torch._dynamo.exc.BackendCompilerFailed``.
    """
    settings = Options.parse(options)
    settings = replace(settings, inductor_mode=settings.inductor_mode or mode)
    hear_of_left_frames(sparge, tell_of_left)
    raise_left(settings)
    graph = open_graph(graph_module, find_names)
    analyse(graph, partial(decide_sites, options=settings))
    report = graph.add_to(Report())
    logger.info("%s", report)
    warn_of_unsupported(report, settings)
    warn_of_text((step for step in graph.steps if step.match.node not in graph.attached), settings)
    warn_of_orders(graph.orders_by_name, settings)
    if is_whole_call(graph_module) and (graph.names is None or is_innermost(graph.names.root)):  # no block among others
        warn_of_nothing(report, settings, type(graph.names.root).__name__ if graph.names else "the compiled function")
    names = [match.site.name for match in graph.sparse if match.node not in graph.attached]
    check_model(settings, names, graph.names)
    warn_of_names(settings, names)
    free = [match.site.name for match in graph.matches if match.is_attention and match.node not in graph.attached]
    warn_of_misfits(settings, free, graph.names)
    if graph.names is not None and (settings.names_sites or has_attached(graph.names.root)):
        expect_first_forward(settings, graph.names.root, warn_of_unused)
    sites = [(graph.slots[match.node], match.node in graph.markers) for match in graph.matches if match.is_attention]
    with_outputs = outputs_wanted()
    as_input = faker(example_inputs)
    is_dense = DenseCalls([graph.slots[match.node] for match in graph.sparse], settings)
    two_graphs = is_dense.there_are_some and not is_stored(graph_module)
    dense = compile_graph(dense_copy(graph, with_outputs), example_inputs, settings) if two_graphs else None
    run(graph, *rewriting_passes(settings, as_input, with_outputs))
    logger.debug("rewritten graph:\n%s", graph.graph_module.graph)
    thresholds = RunTime(graph.threshold_inputs, graph.slots, settings, partial(_new_place, settings))
    if is_stored(graph_module):  # without what is around it here, so it must be whole
        refuse_outputs(with_outputs)
        refuse_steps(settings)
        make_constants(graph.graph_module, thresholds.constants())
        graph.threshold_inputs.clear()
    inputs = [*example_inputs, *(value_of(x.placeholder) for x in graph.threshold_inputs)]
    outlet = Outlet(settings, [graph.slots[match.node] for match in graph.sparse], with_outputs)
    compiled = compile_graph(graph.graph_module, inputs, settings)
    compiled = compiled if dense is None else by_plan(compiled, dense, is_dense, len(example_inputs))
    compiled = with_outlet(compiled, outlet)
    if is_stored(graph_module):
        return compiled
    compiled = note_first_forward(compiled, settings, sites)
    compiled = _with_thresholds(compiled, thresholds) if graph.threshold_inputs else compiled
    if settings.calibration is None or settings.calibration.source is None:
        return compiled
    return _watching_file(compiled, settings.calibration.source)


def _watching_file(compiled: Callable[..., Any], source: Source) -> Callable[..., Any]:
    """A compiled graph that warns where the file that its thresholds come from has changed."""

    def call(*args: Any) -> Any:
        warn_of_stale_file(source)
        return compiled(*args)

    return call


def _with_thresholds(compiled: Callable[..., Any], thresholds: RunTime) -> Callable[..., Any]:
    """A compiled graph that gets the thresholds of whichever block calls it as its last inputs."""

    def call(*args: Any) -> Any:
        return compiled(*args, *thresholds(args))

    return call


def _new_place(settings: Options, names: list[str]) -> None:
    logger.info("sparge: a graph is shared, with their own thresholds, by %s", ", ".join(names))
    warn_of_names(settings, names)


def explain(
    model: Callable[..., Any],
    options: Mapping[str, Any] | Options | None = None,
    *,
    call: Callable[..., Any] | None = None,
) -> Callable[..., Report]:
    """Dry run, in the manner of ``torch._dynamo.explain``: ``explain(model, options)(*args, **kwargs)`` is a Report.

    The model runs once on the arguments, dense and uncompiled; what ``torch.compile(model, backend="sparge")`` would
    replace, and why the rest stays, is in the report. All graphs of the model are in one report.

    Args:
        model: a module or a function, compiled or not.
        options: those of the backend.
        call: what calls the model, a module, as a pipeline does: ``explain(pipe.transformer, call=pipe)(prompt)``. It
            gets the arguments, and every call of the model that it makes is in the report.

    Raises:
        TypeError: a model that is neither a module nor a function, or that is no module where ``call`` is given.
    """
    settings = Options.parse(options)
    target: Any = user_model(model)
    if not callable(target) or (call is not None and not isinstance(target, Module)):
        raise type_error(
            "explain: bad model",
            given=type(target).__name__,
            allowed="an nn.Module or a function; an nn.Module where call is given",
            todo="Pass the model, or the module that call runs, as pipe.transformer: explain(model)(*args).",
        )

    def run(*args: Any, **kwargs: Any) -> Report:
        seen = _Seen(target)
        watched = watching(target, seen)
        with seen.outside.listening():
            if call is None:
                watched(*args, **kwargs)
            else:
                with calls_through(model, watched):  # type: ignore[arg-type]
                    call(*args, **kwargs)
        report = seen.report(settings)
        if isinstance(target, Module) and not target.training:
            report.say_that_gradients_are_recorded()
        warn_of_nothing(report, settings, type(target).__name__)
        return report

    return run


class _Seen(Observer):
    """The observer of ``explain``: keeps the matches and attached sites of each graph in each place, as they ran."""

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__(model)
        self.outside = Outside(self.names, (Watched.run.__code__,))
        self.graphs: dict[tuple[Any, ...], tuple[Watched, list[Match], set[Node]]] = {}

    def ran(self, graph: Watched, places: list[Place], args: Sequence[Any]) -> Any:
        seen = list(zip(graph.slots, graph.matches, places, strict=True))
        key = (id(graph), *(slot.name(place) for slot, _, place in seen))
        if key not in self.graphs:
            self.graphs[key] = graph, [], set()
            with sheltered(graph.failures, "decide_sites"):
                attached = {match.node for slot, match, place in seen if slot.attached(place) is not None}
                matches = [slot.planned(place, slot.at(place, match)) for slot, match, place in seen]
                self.graphs[key] = graph, matches, graph.marked | attached
        return graph.run(args)

    def report(self, settings: Options) -> Report:
        report = Report()
        works: list[Work] = []
        for graph, matches, attached in self.graphs.values():
            work = Work(graph.graph_module, as_to_run(matches, self.names))
            analyse(work, partial(decide_with, options=settings, attached=attached))
            work.failures += graph.failures
            works.append(work)
        alike: dict[GraphModule, list[Work]] = {}
        for work in works:
            alike.setdefault(work.graph_module, []).append(work)
        for same in alike.values():
            with sheltered(same[0].failures, "hoist"):
                foretell_orders(same, settings)
        for work in works:
            work.add_to(report)
        report.graphs = len({number for number, *_ in self.graphs})
        return self.outside.add_to(report)


def _reset() -> None:
    """Forget warnings and first forwards: torch calls this as ``backend.reset`` when a compiled model is reset."""
    forget_warnings()
    forget_first_forwards()


sparge.reset = _reset  # type: ignore[attr-defined]
if "torch._dynamo" in sys.modules:  # torch.compile looks the backend up before Dynamo meets the first frame
    hear_of_left_frames(sparge, tell_of_left)
