"""Tell a user what to know while a graph is compiled: warnings, each once, and errors about calibrations and sites."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch.nn import Module

from .errors import value_error
from .options import Options
from .report import Failure, Report
from .running.places import Names

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


def forget_warnings() -> None:
    """Warn again of what was warned of before."""
    _warned.clear()
