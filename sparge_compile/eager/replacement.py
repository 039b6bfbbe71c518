"""``replace_attention``: sparse attention in eager code, for models of which Dynamo makes no graph with attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

from torch.nn import Module

from ..errors import type_error, value_error
from ..misfits import check_model, warn_of_misfits, warn_of_names, warn_of_unused_without_forward
from ..naming import ROOT, numbered
from ..notices import warn, warn_of_orders, warn_of_unsupported
from ..options import Options
from ..report import Decision, Report, Site, SiteReport
from ..running.graph import OpenGraph
from ..thresholds.steps import step_of
from ..user_model import is_compiled, user_model
from .calls import Call, unseen
from .door import close_door, open_door
from .functions import Function
from .plan import Plan
from .sites import Scope, Where, line_of_caller

# Of a call that is another one each time, not more is kept than this.
_MOST_PLANS = 1024
_OF_COMPILERS = ("inner", "inductor", "inductor_mode")


def replace_attention(
    model: Module | None = None, options: Mapping[str, Any] | Options | None = None, **named: Any
) -> Replacement:
    """Make attention sparse in eager code: what ``torch.compile(model, backend="sparge")`` does, without a graph.

    For models whose attention is in no graph of Dynamo's, since they break it first or switch compilation off. From
    here on, and until the result is removed, calls of these functions are looked at one by one: torch's SDPA,
    flash-attn's and FlashAttention 3's functions (packed sequences, qkv and kv in one tensor), SageAttention's, and
    xformers' ``memory_efficient_attention``, by whatever name a model holds them. Sites have the same names, thresholds
    and reasons as in compiled code, a ``Calibration`` and attached thresholds hold, and gradients flow. What stays
    dense is called as it was::

        with sparge_compile.replace_attention(model, topk=0.1, topp=0.2) as replaced:
            model(x)
        print(replaced.report)

    Args:
        model: the model whose calls are meant, compiled or not; None: every call in this process. Names begin at the
            model; where none is given, at the outermost module that is being called.
        options: the backend's, as a dict or ``Options``, without those about compilers.
        named: the same by name: ``replace_attention(model, calibration="model.json")``.

    Returns:
        A :class:`Replacement`, at work already: end it with ``remove``, or as a context manager.

    Raises:
        TypeError: no module; an option of the wrong type.
        ValueError: an option that is unknown, given twice, has a bad value or speaks of compilers; modules of which
            attention is replaced already.
    """
    if model is not None and not isinstance(model, Module):
        raise type_error(
            "replace_attention: bad model",
            given=type(model).__name__,
            allowed="an nn.Module, or None for every call",
            todo="Pass the model; options are given by name.",
        )
    return Replacement(model, _options(options, named))


def _options(options: Mapping[str, Any] | Options | None, named: Mapping[str, Any]) -> Options:
    default = Options()
    if isinstance(options, Options):
        changed = [each.name for each in fields(Options) if getattr(options, each.name) != getattr(default, each.name)]
        options = {name: getattr(options, name) for name in changed}
    twice = [name for name in named if isinstance(options, Mapping) and name in options]
    if twice:
        raise value_error(
            "replace_attention: options that are given twice",
            given=", ".join(twice),
            allowed="each one in options or by name",
            todo="Drop one of the two.",
        )
    settings = Options.parse({**(options or {}), **named})
    given = [name for name in _OF_COMPILERS if getattr(settings, name) != getattr(default, name)]
    if given:
        raise value_error(
            "replace_attention: an option that says how to compile",
            given=", ".join(given),
            allowed="the options that say what becomes sparse: calibration, topk, topp, min_seq_len, …",
            todo="Leave it out: nothing is compiled here.",
        )
    return replace(settings, inner="eager")


class Replacement:
    """Attention that :func:`replace_attention` makes sparse. A context manager: leaving it is ``remove``."""

    def __init__(self, model: Module | None, settings: Options) -> None:
        self._model = None if model is None else user_model(model)
        self._settings = settings
        self.scope = Scope(self._model)  # type: ignore[arg-type]
        self._plans: dict[Any, Plan] = {}
        self._ready: dict[Any, tuple[Plan, list[int]]] = {}  # by a quicker look; and the places of the tensors
        self._rows: dict[Any, SiteReport] = {}
        self._seen = Report(calls=0)
        self._notes: list[str] = []  # once it is removed
        self._is_open = True
        open_door(self)

    @property
    def report(self) -> Report:
        """The sites that were met so far, each with what was decided, in the order of their first calls."""
        notes = self._not_covered() if self._is_open else self._notes
        return replace(self._seen, sites=list(self._rows.values()), notes=notes)

    def again(self, form: Any, where: Where) -> Callable[..., Any] | None:
        """Return what computes calls of this form there from their arguments; None where none was prepared."""
        ready = self._ready.get((form, where))
        if ready is None:
            return None
        plan, places = ready
        held = plan.attached()
        if bool(held) != plan.is_attached:
            return None

        def compute(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            assert self._seen.calls is not None
            self._seen.calls += 1
            if plan.compute is None or plan.is_dense(held) or self._is_dense_step(where):
                return function.original(*args, **kwargs)
            given = (*args, *kwargs.values())
            return plan([given[n] for n in places], held)

        return compute

    def call(self, call: Call, where: Where, original: Callable[[], Any], form: Any) -> Any:
        """Return the result of a call: sparse, or as it was."""
        assert self._seen.calls is not None
        self._seen.calls += 1
        if call.refusal is not None:
            self._refuse(call, where, Decision(*call.refusal))
            return original()
        key = (call.key, where)
        plan = self._plans.get(key)
        held = {} if plan is None else plan.attached()
        if plan is None or bool(held) != plan.is_attached:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
                self._ready.clear()
            with unseen():
                plan = self._plans[key] = Plan.make(call, where, self._settings)
            result = original() if plan.graph.failures else None  # which may be the user's: then it raises
            self._tell(plan.graph, where)
            if plan.graph.failures:
                return result
            held = plan.attached()
        if form is not None and call.places is not None:
            self._ready[form, where] = plan, call.places
        if plan.compute is None or plan.is_dense(held) or self._is_dense_step(where):
            return original()
        return plan(call.tensors, held)

    def _is_dense_step(self, where: Where) -> bool:
        schedule = self._settings.schedule
        return schedule.dense_steps is not None and schedule.is_dense_step(*step_of(where.root))

    def _refuse(self, call: Call, where: Where, decision: Decision) -> None:
        name = numbered(where.prefix or ROOT, where.number)
        kind = "sdpa" if call.function.dialect is None else call.function.dialect.kind
        row = SiteReport(Site(name, kind, code=line_of_caller()), decision)
        if self._note(row):
            warn_of_unsupported(Report([row]), self._settings)

    def _tell(self, graph: OpenGraph, where: Where) -> None:
        """Note a site in the report, and say what the user should know of it."""
        found = graph.add_to(Report())
        for row in found:
            self._note(row)
        self._seen.failures += [each for each in found.failures if each not in self._seen.failures]
        self._seen.kernels |= found.kernels
        warn_of_unsupported(found, self._settings)
        warn_of_orders(graph.orders_by_name, self._settings)
        names = next((names for names in self.scope.names if names.root is where.root), None)
        free = [match.site.name for match in graph.matches if match.is_attention and match.node not in graph.attached]
        sparse = [match.site.name for match in graph.sparse if match.site.name in free]
        check_model(self._settings, sparse, names)
        warn_of_names(self._settings, sparse)
        warn_of_misfits(self._settings, free, names)

    def _note(self, row: SiteReport) -> bool:
        """Keep the first row of a site for each reason; whether this is it."""
        key = (row.name, row.kind, row.reason)
        return self._rows.setdefault(key, row) is row

    def _not_covered(self) -> list[str]:
        model = self._model
        compiled = [
            name or type(module).__name__
            for name, module in (model.named_modules() if isinstance(model, Module) else ())
            if is_compiled(module) or module._compiled_call_impl is not None
        ]
        outer = [name for name in compiled if not any(name.startswith(f"{other}.") for other in compiled)]
        if not outer:
            return []
        return [f"not looked at: compiled code of {', '.join(outer)}, in which its own backend decides"]

    def remove(self) -> None:
        """Have attention be what it was, and let go of the model; the report stays. Again is no error."""
        close_door(self)
        self._notes, self._is_open = self.report.notes, False
        self._plans.clear()
        self._ready.clear()
        self._model, self.scope = None, Scope(Module())

    def __enter__(self) -> Replacement:
        if not self._is_open:
            raise value_error(
                "replace_attention: this one was removed",
                given="a Replacement after remove(), or after its with-block",
                allowed="one that is at work",
                todo="Call replace_attention again.",
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        model = self._model
        self.remove()
        if kind is not None:
            return
        if self._rows and isinstance(model, Module):
            seen = {row.name for row in self._rows.values()}
            warn_of_unused_without_forward(self._settings, seen, f"in eager code of {type(model).__name__}")
        if not self._rows and self._settings.on_unsupported != "dense":
            whose = "this process" if model is None else type(model).__name__
            warn(
                f"no attention in eager code of {whose}",
                f"sparge: replace_attention met no attention in {whose}, so nothing was replaced. It sees calls of "
                "SDPA, flash-attn, SageAttention and xformers whose functions were imported before, not attention that "
                "is written out, nor code that is compiled: sparge_compile.explain(model)(...) shows what there is.",
            )

    def __repr__(self) -> str:
        return f"Replacement of attention: {len(self.report.sparse)} sparse sites"
