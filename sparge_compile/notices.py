"""Tell a user what to know while a graph is compiled: warnings, each once, and errors about calibrations and sites."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from .errors import value_error
from .options import Options
from .passes.decide import least_keys
from .passes.order import NO_GRID, SiteOrder
from .passes.work import Step
from .report import Failure, Reason, Report, Site
from .running.frames import Left

_warned: set[str] = set()
_silent: ContextVar[bool] = ContextVar("sparge_silent", default=False)


_PLEASE_REPORT = (
    "Please open an issue in the repository of sparge_compile with this text, what `sparge doctor` prints, and what "
    'TORCH_LOGS="+sparge_compile" prints.'
)


def warn_of_failures(failures: Iterable[Failure]) -> None:
    """Warn once of each analysis that failed inside, and where to report it."""
    for failure in dict.fromkeys(failures):
        warn(str(failure), f"sparge: a graph stays as it is, dense, because {failure}. This is a bug. {_PLEASE_REPORT}")


def warn_of_unsupported(report: Report, settings: Options) -> None:
    """Warn once for each reason, or raise, where attention that a user may have meant to replace stays dense.

    A graph that could not be looked into is such a reason, and warned of even if the others are not.

    Raises:
        ValueError: there is such attention, and the option ``on_unsupported`` is ``"error"``.
    """
    if settings.on_unsupported == "error" and report.failures:
        raise value_error(
            "a graph that could not be looked into",
            given=report.failures[0],
            allowed="graphs of which every attention is known, because on_unsupported is 'error'",
            todo=f"With 'warn' or 'dense' the graph is compiled as it is. {_PLEASE_REPORT}",
        )
    warn_of_failures(report.failures)
    unsupported = [row for row in report.dense if row.reason.unsupported and not _is_short(row.site, settings)]
    if settings.on_unsupported == "error" and unsupported:
        names = ", ".join(f"{row.name} ({row.reason.value})" for row in unsupported)
        raise value_error(
            "attention that cannot be replaced",
            given=names,
            allowed="replaceable sites only, because on_unsupported is 'error'",
            todo="sparge_compile.explain(model)(...) shows them; 'warn' or 'dense' lets them be.",
        )
    if settings.on_unsupported == "warn":
        for reason in dict.fromkeys(row.reason for row in unsupported):
            first = next(row for row in unsupported if row.reason is reason)
            where = f"{first.name}, {first.site.code}" if first.site.code is not None else first.name
            _warn_once(reason.value, where, first.detail)


def _is_short(site: Site, settings: Options) -> bool:
    """Whether a site has too few keys whatever else it is, as attention to a text under a mask."""
    return isinstance(site.keys, int) and site.keys < least_keys(settings)


def warn_of_nothing(report: Report, settings: Options, model: str) -> None:
    """Warn once that a model has no attention, so that nothing will be replaced."""
    nothing = not report.failures and all(row.reason is Reason.NOT_ATTENTION for row in report)
    if nothing and settings.on_unsupported != "dense":
        warn(
            "no attention",
            f"sparge: no attention was found in {model}, so nothing is replaced, and nothing gets faster. "
            "sparge_compile.explain(model)(...) shows what was looked at, and what runs outside of graphs; "
            "options={'on_unsupported': 'dense'} silences this.",
        )


def warn_of_text(steps: Iterable[Step], settings: Options) -> None:
    """Warn once where a site was to keep its text, and the graph does not say which tokens that are."""
    for match, decision in steps:
        lost = settings.kept_of(match.site.name).of_graph and isinstance(match.parts, str)
        if lost and decision.status == "sparse" and settings.on_unsupported != "dense":
            warn(
                "no text",
                f"sparge: no text is kept at {match.site.name}: {match.parts}. Its key blocks are dropped as all "
                "others are, which may lose what a prompt says. Give keep_keys as a number of tokens "
                "(512: the first, -512: the last); sparge_compile.explain(model)(...) says what each site keeps.",
            )
            return


def warn_of_orders(orders: Mapping[str, SiteOrder], settings: Options) -> None:
    """Warn once where a sparse site was to have its tokens in tiles, and they stay in raster order. By site name."""
    if settings.on_unsupported == "dense":
        return
    lacking = [name for name, order in orders.items() if order.lacks_grid]
    missed = [name for name, order in orders.items() if order.misses]
    todo = (
        "Give it as the option 'grid' or with attach(..., grid=), as (frames, height, width) in tokens, or as (prefix, "
        "frames, height, width, suffix) where tokens stand before or behind it; "
        if lacking
        else ""
    ) + "sparge_compile.explain(model)(...) says the order of each site."
    if missed and settings.token_order is None:
        name = missed[0]
        warn(
            "missed order",
            f"sparge: the thresholds of {name} were measured in tiles, but its tokens are in raster order "
            f"({orders[name].why}), where they leave more error. {todo}",
        )
    elif lacking:
        why = orders[lacking[0]].why
        warn(
            "no grid",
            f"sparge: the tokens of {lacking[0]} stay in raster order, where the same sparsity leaves more error, "
            f"since {'no grid of theirs is known' if why == NO_GRID else why}. {todo}",
        )


_left: list[Left] = []  # frames of models that asked for an error


def tell_of_left(left: Left) -> None:
    """Warn that Dynamo leaves a function with attention to Python; where an error is asked for, note it as well.

    Dynamo is at work on the function, so the error is raised by :func:`raise_left` when the next graph is compiled.
    """
    given = left.options
    wanted = given.on_unsupported if isinstance(given, Options) else given.get("on_unsupported", "warn")
    if wanted == "error":
        _left.append(left)
    if wanted != "dense":
        with suppress(UserWarning):  # of a filter that makes errors of warnings: Dynamo could not bear one here
            warn(
                f"outside {left}",
                f"sparge: attention stays dense, because Dynamo leaves {left} to Python: "
                f'{left.why}. TORCH_LOGS="graph_breaks" tells more; sparge_compile.explain(model)(...) lists what runs '
                "outside of graphs, and sparge_compile.replace_attention(model) needs no graph.",
            )


def raise_left(settings: Options) -> None:
    """Raise for frames that Dynamo left to Python since the last graph.

    Raises:
        ValueError: attention runs outside of graphs, and the option ``on_unsupported`` is ``"error"``.
    """
    left, _left[:] = _left[:], []
    if left and settings.on_unsupported == "error":
        raise value_error(
            "attention that cannot be replaced",
            given=", ".join(f"{each} outside of graphs: {each.why}" for each in left),
            allowed="attention in graphs, because on_unsupported is 'error'",
            todo="Mend the graph break that TORCH_LOGS=\"graph_breaks\" names; 'warn' or 'dense' lets it be.",
        )


def _warn_once(reason: str, where: str, detail: str) -> None:
    because = f"{reason}: {detail}" if detail else reason
    warn(
        reason,
        f"sparge: attention stays dense ({because}), first at {where}: it computes what it did, and gets no faster. "
        "sparge_compile.explain(model)(...) lists every site; the README's 'What stays dense, and why' says for each "
        "reason what to do; options={'on_unsupported': 'dense'} silences this.",
    )


@contextmanager
def unsaid() -> Iterator[None]:
    """Warn of nothing meanwhile: whoever runs a model on trial says himself what a user should know."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def warn(about: str, text: str) -> None:
    """Warn once of something that has this name, until warnings are forgotten."""
    if about not in _warned and not _silent.get():
        _warned.add(about)
        warnings.warn(text, stacklevel=2)


def forget_warnings() -> None:
    """Warn again of what was warned of before."""
    _warned.clear()
    _left.clear()
