"""The torch.compile entry: options → passes on Dynamo's graph → whoever compiles the rest; ``explain``, its dry run."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule

from . import (
    __version__,
    ops,  # noqa: F401  importing it registers the ops
)
from .config import Options
from .errors import explain_error
from .passes import pipeline
from .passes.find import Match, find
from .passes.fx_utils import clone
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
    graph_module = clone(graph_module)
    plan = pipeline.plan(find(graph_module), settings)
    report = Report()
    plan.add_to(report)
    logger.info("%s", report)
    speak_up(report, settings)
    thresholds = pipeline.apply(graph_module, plan, settings, _faker(example_inputs))
    logger.debug("rewritten graph:\n%s", graph_module.graph)
    inputs = [*example_inputs, *map(_faker(example_inputs), thresholds)]
    compiled = _compile(graph_module, inputs, settings, mode)
    if not thresholds:
        return compiled

    def run(*args: Any) -> Any:
        return compiled(*args, *thresholds)

    return run


def explain(model: Callable[..., Any], options: Mapping[str, Any] | None = None) -> Callable[..., Report]:
    """Dry run, in the manner of ``torch._dynamo.explain``: ``explain(model, options)(*args, **kwargs)`` is a Report.

    The model runs once on the arguments, dense and uncompiled; what ``torch.compile(model, backend="sparge")`` would
    replace, and why the rest stays, is in the report. All graphs of the model are in one report.
    """
    settings = Options.parse(options)
    target = getattr(model, "_orig_mod", model)  # of a model that is compiled already, the model

    def run(*args: Any, **kwargs: Any) -> Report:
        def call(*args: Any, **kwargs: Any) -> Any:
            return target(*args, **kwargs)

        # Dynamo keeps compiled code with the code object, and by its name which sizes have changed between calls; a
        # fresh one sees no earlier call and disturbs none.
        call.__code__ = call.__code__.replace(co_name=f"explain_{next(_calls)}")
        seen: dict[int, list[Match]] = {}
        token = _seen.set(seen)
        try:
            torch.compile(call, backend=_look)(*args, **kwargs)
        finally:
            _seen.reset(token)
        report = Report()
        for matches in seen.values():
            pipeline.plan(matches, settings).add_to(report)
        return report

    return run


_calls = itertools.count()

# What the running ``explain`` has seen: the matches of each graph, in the order in which the graphs ran.
_seen: ContextVar[dict[int, list[Match]]] = ContextVar("sparge_explain")


def _look(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Dynamo backend of ``explain``: note what a graph holds whenever it runs, and run it as it is.

    One function for all calls, and noting at run time: where a graph breaks, the frames of the model itself are
    compiled, and a backend for each call would use up the limit of compilations that Dynamo grants them.
    """
    matches = find(graph_module)

    def run(*args: Any) -> Any:
        if (seen := _seen.get(None)) is not None:
            seen[id(matches)] = matches
        return graph_module.forward(*args)

    return run


def _compile(graph_module: GraphModule, inputs: list[Any], settings: Options, mode: str | None) -> Callable[..., Any]:
    if settings.inner != "inductor":
        backend: Any = torch._dynamo.lookup_backend(settings.inner)
        return backend(graph_module, inputs)
    # Not torch.compile again: nested, it would silently run eager.
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**list_mode_options(settings.inductor_mode or mode or "default"), **settings.inductor}
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
    if reason in _warned:
        return
    _warned.add(reason)
    because = f"{reason}: {detail}" if detail else reason
    warnings.warn(
        f"sparge: attention stays dense ({because}), first at {name}. sparge_compile.explain(model)(...) lists every "
        "site; options={'on_unsupported': 'dense'} silences this.",
        stacklevel=2,
    )


_warned: set[str] = set()


def _reset() -> None:
    """What torch calls as ``backend.reset`` when a compiled model is reset: forget which reasons were spoken of."""
    _warned.clear()


sparge.reset = _reset  # type: ignore[attr-defined]
