"""Tell a user what to know while a graph is compiled: warnings, each once, and errors about calibrations and sites."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

from torch.nn import Module

from .errors import value_error
from .naming import ROOT
from .options import Options
from .report import Failure, Reason, Report
from .running.frames import Left
from .running.places import Names, modules_on_stack
from .thresholds.calibration import Calibration
from .thresholds.targets import near_names
from .user_model import unwrapped

_warned: set[str] = set()


_PLEASE_REPORT = (
    "Please open an issue in the repository of sparge_compile with this text, the versions of torch and "
    'sparge_compile, and what TORCH_LOGS="+sparge_compile" prints.'
)


def warn_of_failures(failures: Iterable[Failure]) -> None:
    """Warn once of each analysis that failed inside, and where to report it."""
    for failure in dict.fromkeys(failures):
        _warn(str(failure), f"sparge: a graph stays dense, because {failure}. This is a bug. {_PLEASE_REPORT}")


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
    unsupported = [row for row in report.dense if row.reason.unsupported]
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


def warn_of_nothing(report: Report, settings: Options, model: str) -> None:
    """Warn once that a model has no attention, so that nothing will be replaced."""
    nothing = not report.failures and all(row.reason is Reason.NOT_ATTENTION for row in report)
    if nothing and settings.on_unsupported != "dense":
        _warn(
            "no attention",
            f"sparge: no attention was found in {model}, so nothing is replaced. sparge_compile.explain(model)(...) "
            "shows what was looked at; options={'on_unsupported': 'dense'} silences this.",
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
            _warn(
                f"outside {left}",
                f"sparge: attention stays dense, because Dynamo leaves {left} to Python: "
                f'{left.why}. TORCH_LOGS="graph_breaks" tells more; sparge_compile.explain(model)(...) lists what runs '
                "outside of graphs.",
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
    _warn(
        reason,
        f"sparge: attention stays dense ({because}), first at {where}. sparge_compile.explain(model)(...) lists every "
        "site; options={'on_unsupported': 'dense'} silences this.",
    )


def _warn(about: str, text: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(text, stacklevel=2)


def check_model(settings: Options, names: Sequence[str], root: Module | None) -> None:
    """Check that a calibration was measured on the model that runs.

    Raises:
        ValueError: no site of this graph is in the calibration, and none of its sites is in the model.
    """
    calibration = settings.calibration
    if calibration is None or calibration.origin is None or not names or root is None:
        return
    if any(map(calibration.key_of, names)):
        return
    modules = Names(root).by_name
    if not any(site.partition("#")[0] in modules for site in calibration.sites) and not any(
        site.endswith(f".{name}") for site in calibration.sites for name in names
    ):
        raise value_error(
            "the calibration was made for another model",
            given=f"one of {calibration.origin.model} with sites as {next(iter(calibration.sites), 'none')!r}",
            allowed=f"one of {type(root).__name__} with sites as {names[0]!r}",
            todo="Calibrate this model (`sparge calibrate`), or give it topk and topp.",
        )


def warn_of_names(settings: Options, names: Iterable[str]) -> None:
    """Warn where a calibration seems to mean a site by another name, where it lacks a site, and where it is incomplete.

    The name may be longer or shorter: a block was called without its model, or a model is part of another.
    """
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
            near = [entry for entry in settings.calibration.sites if _is_longer_or_shorter(entry, name)]
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


def warn_of_misfits(settings: Options, names: Sequence[str], root: Module | None) -> None:
    """Warn, once for a calibration, of entries written by hand that fit no module of the model that runs.

    Args:
        settings: the options.
        names: the attention sites of a graph, sparse or not, without those whose thresholds are attached.
        root: the model.
    """
    calibration = settings.calibration
    if calibration is None or calibration.origin is not None or root is None or not names:
        return
    whole = unwrapped([root, *modules_on_stack()][-1])
    modules = {name or ROOT for name in Names(root).by_name}
    missed = [entry for entry in calibration.sites if not _fits(entry, {*modules, *names})]
    missed = [entry for entry in missed if not any(_is_longer_or_shorter(entry, name) for name in names)]
    # A part that is compiled alone may share its options with other parts.
    if not missed or (whole is not root and any(map(calibration.key_of, names))):
        return
    text = (
        f"sparge: the calibration has entries that fit no module of {type(root).__name__}: "
        f"{', '.join(map(repr, missed[:4]))}. What they mean has topk = {settings.topk}, topp = {settings.topp} from "
        f"the options. Sites here are {', '.join(map(repr, names[:4]))}"
    )
    near = [name for name in near_names(missed, modules - set(names)) if name != ROOT]
    text += f"; names that are near: {', '.join(map(repr, near[:4]))}." if near else "."
    if whole is not root and any(_fits(entry, Names(whole).by_name) for entry in missed):
        text += (
            f" {type(whole).__name__} has such modules, but names begin at the module that torch.compile was called "
            "on: compile the model itself, or call attach(model, calibration)."
        )
    _warn(f"calibration fits nothing {missed}", text)


def _is_longer_or_shorter(entry: str, name: str) -> bool:
    return entry.endswith(f".{name}") or name.endswith(f".{entry}")


def _fits(entry: str, names: Iterable[str]) -> bool:
    module = entry.partition("#")[0]
    return any(name in (entry, module) or fnmatchcase(name, module) or fnmatchcase(name, entry) for name in names)


def warn_of_stale_file(calibration: Calibration | None) -> None:
    """Warn once where the file of a calibration is another one than when it was read."""
    if calibration is not None and calibration.source is not None and calibration.source.has_changed():
        _warn(
            f"calibration changed {calibration.source.path}",
            f"sparge: the calibration file {calibration.source.path!r} was changed after it was read, and is not read "
            "again: compiled code keeps its thresholds, and for torch.compile equal options mean the same code. Call "
            "torch.compiler.reset() before torch.compile, give options=sparge_compile.Options(calibration=path), or "
            "use attach(model, path), which reads the file each time.",
        )


def forget_warnings() -> None:
    """Warn again of what was warned of before."""
    _warned.clear()
    _left.clear()
