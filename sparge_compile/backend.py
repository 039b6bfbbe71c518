"""The torch.compile entry: options → passes on Dynamo's graph → whoever compiles the rest; ``explain``, its dry run."""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.nn import Module

from . import (
    __version__,
    ops,  # noqa: F401  importing it registers the ops
)
from .config import Options
from .errors import explain_error
from .observe import Observer, Watched, calls_through, user_model, watching
from .passes import pipeline
from .passes.find import Match, find
from .passes.fx_utils import clone
from .passes.outputs import Outlet, outputs_wanted
from .passes.pipeline import Plan
from .passes.places import Frame, Names, Place, find_root
from .passes.runtime import RunTime, Slot, input_for, slots_of
from .passes.thresholds_in import markers_of
from .report import Report

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
        options: see :class:`sparge_compile.config.Options`.
        mode: Inductor's mode, as torch.compile forwards it; the same as ``options["inductor_mode"]``.

    Raises:
        ValueError, TypeError: an option that is unknown or ill-typed, a calibration that does not fit the model, or,
            with ``on_unsupported="error"``, a site that cannot be replaced. Out of a compiled model, Dynamo raises them
            wrapped as ``torch._dynamo.exc.BackendCompilerFailed``.
    """
    settings = Options.parse(options)
    frame, root = Frame(graph_module), find_root()
    graph_module = clone(graph_module)
    found = find(graph_module)
    slots = slots_of(found, frame, None if root is None else Names(root))
    markers = markers_of(graph_module, found)
    held = {node for node, slot in slots.items() if node in markers or slot.attached(slot.locator.first) is not None}
    plan = _plan(found, slots, settings, held)
    report = Report()
    plan.add_to(report)
    logger.info("%s", report)
    speak_up(report, settings)
    free = [match.site.name for match, decision in plan.steps if decision.status == "sparse" and match.node not in held]
    _refuse_a_stranger(settings, free, root)
    _check_names(settings, free)
    replaced = [match for match, decision in plan.steps if decision.status == "sparse" and match.node not in markers]
    needed = [input_for(match, slots[match.node], settings) for match in replaced]
    with_outputs = outputs_wanted()
    thresholds = pipeline.apply(graph_module, plan, settings, _faker(example_inputs), with_outputs)
    logger.debug("rewritten graph:\n%s", graph_module.graph)
    inputs = [*example_inputs, *map(_faker(example_inputs), thresholds)]
    settings = replace(settings, inductor_mode=settings.inductor_mode or mode)
    sparse = [slots[match.node] for match, decision in plan.steps if decision.status == "sparse"]
    compiled = with_outlet(compile_graph(graph_module, inputs, settings), Outlet(settings, sparse, with_outputs))
    if not thresholds:
        return compiled
    return _with_thresholds(compiled, RunTime(needed, thresholds, settings, partial(_new_place, settings)))


def _with_thresholds(compiled: Callable[..., Any], thresholds: RunTime) -> Callable[..., Any]:
    """A compiled graph that gets the thresholds of whichever block calls it as its last inputs."""

    def run(*args: Any) -> Any:
        return compiled(*args, *thresholds(args))

    return run


def with_outlet(compiled: Callable[..., Any], outlet: Outlet) -> Callable[..., Any]:
    """A compiled graph that tells listeners of each call, and keeps additional outputs from its caller."""

    def run(*args: Any) -> Any:
        return outlet(args, compiled(*args))

    return run


def _plan(matches: Iterable[Match], slots: Mapping[Node, Slot], settings: Options, attached: Container[Node]) -> Plan:
    """Decide about the sites of a graph as its first place runs it, with the other places in mind."""

    def alike(match: Match) -> Iterator[tuple[Match, bool]]:
        slot = slots[match.node]
        return ((slot.at(place, match), slot.attached(place) is not None) for place in slot.others())

    named = [slots[match.node].at(slots[match.node].locator.first, match) for match in matches]
    return pipeline.plan(named, settings, attached, alike)


def _new_place(settings: Options, names: list[str]) -> None:
    logger.info("sparge: a graph is shared, with their own thresholds, by %s", ", ".join(names))
    _check_names(settings, names)


def _refuse_a_stranger(settings: Options, names: Sequence[str], root: Module | None) -> None:
    """Raise where a calibration was measured on another model: no site of this graph is in it, and none of its sites is
    in the model that is running."""
    found = settings.calibration
    if found is None or found.origin is None or not names or root is None or any(map(found.key_of, names)):
        return
    modules = Names(root).by_name
    if not any(site.partition("#")[0] in modules for site in found.sites) and not any(
        site.endswith(f".{name}") for site in found.sites for name in names
    ):
        raise ValueError(
            explain_error(
                "the calibration was made for another model",
                given=f"one of {found.origin.model} with sites as {next(iter(found.sites), 'none')!r}",
                allowed=f"one of {type(root).__name__} with sites as {names[0]!r}",
                todo="Calibrate this model (`sparge calibrate`), or give it topk and topp.",
            )
        )


def _check_names(settings: Options, names: Iterable[str]) -> None:
    """Warn where a calibration seems to mean a site that goes by a shorter or a longer name: a block called without its
    model, or a model that is part of another; and where one that was measured lacks a site."""
    if settings.calibration is None:
        return
    origin = settings.calibration.origin
    if origin is not None and not origin.complete:
        _warn(
            "calibration incomplete",
            f"sparge: the calibration was interrupted after {origin.batches} batches; its thresholds are those of a "
            "part of the inputs. Run `sparge calibrate` again with the same settings: it goes on where it stopped.",
        )
    for name in names:
        if settings.calibration.key_of(name) is None:
            near = [k for k in settings.calibration.sites if k.endswith(f".{name}") or name.endswith(f".{k}")]
            if near:
                _warn(
                    "calibration",
                    f"sparge: the calibration names {near[0]!r}, but here the site is {name!r} and gets topk = "
                    f"{settings.topk}, topp = {settings.topp} from the options. Names begin at the module that "
                    "torch.compile was called on or, block by block, at the outermost module that is called.",
                )
            elif origin is not None:
                _warn(
                    "calibration lacks a site",
                    f"sparge: the calibration of {origin.model} has no thresholds for site {name!r}, which gets topk = "
                    f"{settings.topk}, topp = {settings.topp} from the options.",
                )


def explain(model: Callable[..., Any], options: Mapping[str, Any] | None = None) -> Callable[..., Report]:
    """Dry run, in the manner of ``torch._dynamo.explain``: ``explain(model, options)(*args, **kwargs)`` is a Report.

    The model runs once on the arguments, dense and uncompiled; what ``torch.compile(model, backend="sparge")`` would
    replace, and why the rest stays, is in the report. All graphs of the model are in one report.
    """
    settings = Options.parse(options)
    target = user_model(model)

    def run(*args: Any, **kwargs: Any) -> Report:
        seen = _Seen(target)
        watching(target, seen)(*args, **kwargs)
        return seen.report(settings)

    return run


def explain_calls(model: Module, options: Mapping[str, Any] | None, run: Callable[[], Any]) -> Report:
    """:func:`explain` for a model that something else calls, as a pipeline does: ``run`` does so."""
    seen = _Seen(user_model(model))
    with calls_through(model, watching(user_model(model), seen)):
        run()
    return seen.report(Options.parse(options))


class _Seen(Observer):
    """What a running ``explain`` has seen: the matches and the attached sites of each graph in each place, in the order
    in which they ran."""

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__(model)
        self.graphs: dict[tuple[Any, ...], tuple[list[Match], set[Node]]] = {}

    def ran(self, graph: Watched, places: list[Place], args: Sequence[Any]) -> Any:
        key = (id(graph), *(place.prefix for place in places))
        if key not in self.graphs:
            seen = list(zip(graph.slots, graph.matches, places, strict=True))
            attached = {match.node for slot, match, place in seen if slot.attached(place) is not None}
            self.graphs[key] = [slot.at(place, match) for slot, match, place in seen], graph.marked | attached
        return graph.run(args)

    def report(self, settings: Options) -> Report:
        report = Report()
        for matches, attached in self.graphs.values():
            pipeline.plan(matches, settings, attached).add_to(report)
        report.graphs = len({graph for graph, *_ in self.graphs})
        return report


def compile_graph(graph_module: GraphModule, inputs: Sequence[Any], settings: Options) -> Callable[..., Any]:
    """Compile a graph with whoever the options name as ``inner``."""
    if settings.inner != "inductor":
        backend: Any = torch._dynamo.lookup_backend(settings.inner)
        return backend(graph_module, inputs)
    # Not torch.compile again: nested, it would silently run eager.
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**list_mode_options(settings.inductor_mode or "default"), **settings.inductor}
    # Inductor's caches know our ops by name alone; what they do enters the key here, and the options with it. Not the
    # thresholds: they are run-time inputs, and another pair may use what was compiled for this one.
    fixed = replace(settings, calibration=None, topk=1.0, topp=0.0)
    patches["unsafe_marked_cacheable_functions"] = {
        **patches.get("unsafe_marked_cacheable_functions", config.unsafe_marked_cacheable_functions),
        "sparge_compile": f"{source_digest()}-{fixed.digest()}",
    }
    compiled: Any = compile_fx(graph_module, inputs, config_patches=patches)
    return compiled


@functools.cache
def source_digest() -> str:
    """A hash of the package's version and of every source file of it."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _faker(example_inputs: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """What turns a real tensor into an example input like the others: fake where they are fake."""
    mode = detect_fake_mode(example_inputs)
    return mode.from_tensor if mode is not None else lambda tensor: tensor


def speak_up(report: Report, settings: Options) -> None:
    """Warn once for each reason, or raise, where attention that a user may have meant to replace stays dense."""
    unsupported = [row for row in report.dense if row.reason.unsupported]
    if settings.on_unsupported == "error" and unsupported:
        names = ", ".join(f"{row.name} ({row.reason.value})" for row in unsupported)
        raise ValueError(
            explain_error(
                "attention that cannot be replaced",
                given=names,
                allowed="replaceable sites only, because on_unsupported is 'error'",
                todo="sparge_compile.explain(model)(...) shows them; 'warn' or 'dense' lets them be.",
            )
        )
    if settings.on_unsupported == "warn":
        for reason in dict.fromkeys(row.reason for row in unsupported):
            first = next(row for row in unsupported if row.reason is reason)
            _warn_once(reason.value, first.name, first.detail)


def _warn_once(reason: str, name: str, detail: str) -> None:
    because = f"{reason}: {detail}" if detail else reason
    _warn(
        reason,
        f"sparge: attention stays dense ({because}), first at {name}. sparge_compile.explain(model)(...) lists every "
        "site; options={'on_unsupported': 'dense'} silences this.",
    )


def _warn(about: str, text: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(text, stacklevel=2)


_warned: set[str] = set()


def _reset() -> None:
    """What torch calls as ``backend.reset`` when a compiled model is reset: forget which reasons were spoken of."""
    _warned.clear()


sparge.reset = _reset  # type: ignore[attr-defined]
