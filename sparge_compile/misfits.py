"""Tell a user of a calibration that does not fit the model that runs: errors, and warnings, each once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from .errors import value_error
from .naming import ROOT
from .notices import warn
from .options import Options
from .running.first_forward import FirstForward
from .running.places import Names, modules_on_stack
from .thresholds.json_file import Source
from .thresholds.targets import near_names
from .user_model import unwrapped


def check_model(settings: Options, names: Sequence[str], model: Names | None) -> None:
    """Check that a calibration was measured on the model that runs.

    Raises:
        ValueError: no site of this graph is in the calibration, and none of its sites is in the model.
    """
    calibration = settings.calibration
    if calibration is None or calibration.origin is None or not names or model is None:
        return
    if any(map(calibration.key_of, names)):
        return
    if not any(site.partition("#")[0] in model.by_name for site in calibration.sites) and not any(
        site.endswith(f".{name}") for site in calibration.sites for name in names
    ):
        raise value_error(
            "the calibration was made for another model",
            given=f"one of {calibration.origin.model} with sites as {next(iter(calibration.sites), 'none')!r}",
            allowed=f"one of {type(model.root).__name__} with sites as {names[0]!r}",
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
        warn(
            "calibration incomplete",
            f"sparge: the calibration was interrupted after {origin.batches} batches; its thresholds are those of a "
            "part of the inputs. Run `sparge calibrate` again with the same settings: it goes on where it stopped.",
        )
    for name in names:
        if settings.calibration.key_of(name) is None:
            near = [entry for entry in settings.calibration.sites if _is_longer_or_shorter(entry, name)]
            if near:
                warn(
                    "calibration",
                    f"sparge: the calibration names {near[0]!r}, but here the site is {name!r} and gets topk = "
                    f"{settings.topk}, topp = {settings.topp} from the options. Names begin at the module that "
                    "torch.compile was called on or, block by block, at the outermost module that is called. Compile "
                    "the module that was calibrated, or rename the entries of the calibration.",
                )
            elif origin is not None:
                warn(
                    "calibration lacks a site",
                    f"sparge: the calibration of {origin.model} has no thresholds for site {name!r}, which gets topk = "
                    f"{settings.topk}, topp = {settings.topp} from the options, whose error was not measured. "
                    "Calibrate with inputs that reach it and the min_seq_len that you compile with, or keep it dense "
                    "by dense_layers.",
                )


def warn_of_misfits(settings: Options, names: Sequence[str], model: Names | None) -> None:
    """Warn, once for a calibration, of entries written by hand that fit no module of the model that runs.

    Args:
        settings: the options.
        names: the attention sites of a graph, sparse or not, without those whose thresholds are attached.
        model: the names of the model.
    """
    calibration = settings.calibration
    if calibration is None or calibration.origin is not None or model is None or not names:
        return
    root = model.root
    whole = unwrapped([root, *modules_on_stack()][-1])
    modules = {name or ROOT for name in model.by_name}
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
    warn(f"calibration fits nothing {missed}", text)


def warn_of_unused(first: FirstForward) -> None:
    """Warn, once, of entries of a calibration and names in other options that no site had in a first forward."""
    if first.model is None:
        return
    modules = {name or ROOT for name in Names(first.model).by_name}
    seen = {name for _, names in first.sites for name in names}
    when = f"in the first forward of {type(first.model).__name__}"
    for options, names in first.sites:
        if options.calibration is not None:
            unused = [entry for entry in options.calibration.sites if not any(_means(entry, name) for name in names)]
            # Of the others there was a word when the graphs were compiled.
            unused = [entry for entry in unused if not any(_is_longer_or_shorter(entry, name) for name in names)]
            measured = options.calibration.origin is not None
            _warn_of_unused([e for e in unused if measured or _fits(e, modules)], "the calibration", seen, when)
        _warn_of_unmet(options, names, when)
    if not first.is_blind:
        attached = dict.fromkeys(entry for held in first.attached() for entry in held.entries.values())
        # What a pattern says may be said by other entries as well, one by one.
        unused = [e for e in attached if e not in first.met and not any(_means(e, name) for name in seen)]
        _warn_of_unused(unused, "attach", seen, when)


def warn_of_unused_without_forward(settings: Options, seen: Iterable[str], when: str) -> None:
    """Warn, once, of entries and names as above that no site had where all sites are known otherwise.

    Args:
        settings: the options.
        seen: the names of the attention sites.
        when: what they are the sites of, as ``"in eager code of Model"``.
    """
    seen = set(seen)
    entries = () if settings.calibration is None else settings.calibration.sites
    unused = [e for e in entries if not any(_means(e, name) or _is_longer_or_shorter(e, name) for name in seen)]
    _warn_of_unused(unused, "the calibration", seen, when)
    _warn_of_unmet(settings, seen, when)


def _warn_of_unused(entries: Sequence[str], where: str, seen: Iterable[str], when: str) -> None:
    if entries:
        _warn_of_entries(entries, f"used the thresholds that {where} gave for", seen, when)


def _warn_of_unmet(settings: Options, seen: Iterable[str], when: str) -> None:
    """Warn of names in ``dense_layers`` and ``grid`` that mean none of the sites that ran."""
    seen = set(seen)
    grids = settings.grid if isinstance(settings.grid, Mapping) else {}
    for option, entries in {
        "dense_layers": settings.schedule.unmet_layers(seen),
        "grid": [entry for entry in grids if not any(_means(entry, name) for name in seen)],
    }.items():
        if entries:
            _warn_of_entries(entries, f"is what the option {option!r} names", seen, when)


def _warn_of_entries(entries: Sequence[str], verb: str, seen: Iterable[str], when: str) -> None:
    sites = sorted(seen)
    near = near_names(entries, sites)[:4]
    warn(
        f"unused {verb} {entries}",
        f"sparge: {when}, no attention {verb} "
        f"{', '.join(map(repr, entries[:4]))}{', …' if len(entries) > 4 else ''}. Of the {len(sites)} sites that "
        f"ran, near are {', '.join(map(repr, near)) or 'none'}. A branch that was not taken has none here, nor has "
        "attention outside of graphs; sparge_compile.explain(model)(...) lists all sites.",
    )


def _means(entry: str, name: str) -> bool:
    return entry == name or fnmatchcase(name, entry)


def _is_longer_or_shorter(entry: str, name: str) -> bool:
    return entry.endswith(f".{name}") or name.endswith(f".{entry}")


def _fits(entry: str, names: Iterable[str]) -> bool:
    module = entry.partition("#")[0]
    return any(name in (entry, module) or fnmatchcase(name, module) or fnmatchcase(name, entry) for name in names)


def warn_of_stale_file(source: Source) -> None:
    """Warn once where the file of a calibration is another one than when it was read."""
    if source.has_changed():
        warn(
            f"calibration changed {source.path}",
            f"sparge: the calibration file {source.path!r} was changed after it was read, and is not read "
            "again: compiled code keeps its thresholds, and for torch.compile equal options mean the same code. Call "
            "torch.compiler.reset() before torch.compile, give options=sparge_compile.Options(calibration=path), or "
            "use attach(model, path), which reads the file each time.",
        )
