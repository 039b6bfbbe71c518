"""Several calibrations as one: other layers, other inputs of one model, or the parts of a pipeline.

In: calibrations. Out: one, or a ``ValueError`` that says why they cannot be one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import value_error
from ..pair import Pair
from ..schedule import Schedule
from ..thresholds.about import ABOUT, LONGEST
from ..thresholds.calibration import Calibration
from ..thresholds.measured import Origin
from ..thresholds.targets import is_exact
from .parts import in_part

# What must be the same where measurements are put together: thresholds by another aim or rule are no choice of one run.
_ALIKE = ("target_error", "target_sparsity", "by", "mode", "query_block", "key_block", "query_blocks", "seed")


def merge_calibrations(
    calibrations: Iterable[Calibration] | Mapping[str, Calibration],
) -> Calibration:
    """Put several calibrations together.

    *Other sites* (layers that were calibrated apart) stand beside each other. *The same sites* (other resolutions,
    prompts or schedulers) get, head by head, the larger ``topk`` and the larger ``topp``: the rule keeps a prefix of
    the ranked blocks, the longer of two, so whatever the input, each head keeps at least the blocks that it keeps with
    each of the files. Phases that begin elsewhere are cut where any begins.

    Measurements are kept where no site is in several files and all were found alike (:func:`lost_measurements`);
    influence and what the model's output said are left out, since they are of one run.

    Args:
        calibrations: two or more; or by name, the parts of one pipeline, as ``{"transformer": high, "transformer_2":
            low}``: their sites are named ``transformer.…``, and ``calibration_part`` takes one out again.

    Raises:
        ValueError: fewer than two, one of an interrupted run, another model, number of heads or head size, other tiles
            or kept tokens at the same site, other plans, or patterns that may mean the same site.
    """
    given = _given(calibrations)
    _check_whole(given, are_parts=isinstance(calibrations, Mapping))
    names = list(dict.fromkeys(name for each in given for name in each.sites))
    for name in names:
        _check_site(name, [each for each in given if each.key_of(name) is not None])
    starts = sorted({start for each in given for start in each.all_phases()})
    first, *later = ({name: _largest(given, name, start) for name in names} for start in starts)
    return Calibration(
        first,
        dict(zip(starts[1:], later, strict=True)),
        None if lost_measurements(given) else _joined_origin(given),
        kept={name: _of(given, name).kept_of(name) for name in names},
        tiles={name: tile for name in names if (tile := _of(given, name).tile_of(name)) is not None},
        schedule=_joined_schedule(given, names),
        about=_joined_about(given),
    )


def lost_measurements(calibrations: Iterable[Calibration] | Mapping[str, Calibration]) -> str:
    """Why a merged calibration has no measurements, in words; empty where it has them."""
    given = _given(calibrations)
    if any(each.origin is None for each in given):
        return "a file has none"
    seen: set[str] = set()
    for each in given:
        if common := seen & set(each.sites):
            return f"nobody measured the larger thresholds of {len(common)} sites that are in several files"
        seen |= set(each.sites)
    if len({tuple(each.phases) for each in given}) > 1:
        return "their phases begin elsewhere"
    origins = [each.origin for each in given if each.origin is not None]
    if any(origin.target_output_error is not None for origin in origins):
        return "an error of the output is that of one run"
    unlike = [name for name in _ALIKE if len({getattr(origin, name) for origin in origins}) > 1]
    return f"they were found by other settings: {', '.join(unlike)}" if unlike else ""


def _given(calibrations: Iterable[Calibration] | Mapping[str, Calibration]) -> list[Calibration]:
    if isinstance(calibrations, Mapping):
        given = [in_part(each, part) for part, each in calibrations.items()]
    else:
        given = list(calibrations)
    if len(given) < 2:
        raise value_error(
            "nothing to merge", given=len(given), allowed="two calibrations or more", todo="Give another."
        )
    return given


def _check_whole(given: Sequence[Calibration], are_parts: bool) -> None:
    if any(each.origin is not None and not each.origin.complete for each in given):
        raise _refuse(
            "a calibration of an interrupted run",
            "complete ones",
            "The same `sparge calibrate` goes on where it stopped.",
        )
    patterns = {tuple(name for name in each.sites if not is_exact(name)) for each in given} - {()}
    if len(patterns) > 1 and not are_parts:
        raise _refuse(
            f"patterns that may mean the same sites: {' and '.join(', '.join(each) for each in sorted(patterns))}",
            "the same patterns in the same order, or names",
            "Name the sites of one of them.",
        )


def _check_site(name: str, given: Sequence[Calibration]) -> None:
    """Raise unless the calibrations that cover a site speak of the same attention."""
    for what, values, todo in (
        (
            "models",
            [each.about.get("model_id") for each in given],
            "Thresholds of another model say nothing of this one.",
        ),
        ("models", [each.origin and each.origin.model for each in given], "Give parts their names: transformer=FILE."),
        ("numbers of heads", [len(_pairs(each, name, 0.0)) for each in given], "Merge files of one model."),
        ("head sizes", [_head_size(each, name) for each in given], "Merge files of one model."),
    ):
        known = {value for value in values if value is not None and (what != "numbers of heads" or value != 1)}
        if len(known) > 1:
            raise _refuse(f"site {name!r} of other {what}: {_listed(known)}", "one", todo)
    for what, own in (
        ("tiles", [each.tile_of(name) for each in given]),
        ("kept tokens", [each.kept_of(name) for each in given]),
    ):
        if len(set(own)) > 1:
            raise _refuse(
                f"site {name!r} with other {what}",
                "the same ones",
                "Thresholds hold for what they were measured with: calibrate with one of them.",
            )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))


def _head_size(calibration: Calibration, name: str) -> int | None:
    curves = {} if calibration.origin is None else calibration.origin.curves
    measured = curves.get(calibration.key_of(name) or "")
    return None if measured is None else measured.head_size


def _of(given: Sequence[Calibration], name: str) -> Calibration:
    """The first calibration that covers a site."""
    return next(each for each in given if each.key_of(name) is not None)


def _pairs(calibration: Calibration, name: str, start: float) -> tuple[Pair, ...]:
    phases = calibration.all_phases()
    key = calibration.key_of(name)
    assert key is not None
    return phases[max(each for each in phases if each <= start)][key]


def _largest(given: Sequence[Calibration], name: str, start: float) -> tuple[Pair, ...]:
    rows = [_pairs(each, name, start) for each in given if each.key_of(name) is not None]
    heads = max(map(len, rows))
    by_head = zip(*(row * heads if len(row) == 1 else row for row in rows), strict=True)
    return tuple((max(topk for topk, _ in pairs), max(topp for _, topp in pairs)) for pairs in by_head)


def _joined_schedule(given: Sequence[Calibration], names: Sequence[str]) -> Schedule:
    steps = {each.schedule.dense_steps for each in given}
    layers = {each.schedule.dense_layers for each in given} - {()}
    numbers = [each for each in layers if isinstance(each, int)]
    joined: tuple[str, ...] | int = ()
    if layers:
        named = (entry for each in layers if not isinstance(each, int) for entry in each)
        joined = numbers[0] if numbers else tuple(dict.fromkeys(sorted(named)))
    schedule = Schedule(steps.pop(), joined)
    own = [(name, each.schedule.is_dense_layer(name)) for name in names for each in given if each.key_of(name)]
    if steps or any(schedule.is_dense_layer(name) != dense for name, dense in own):
        raise _refuse(
            f"other plans: {_listed({str(each.schedule) for each in given})}",
            "one plan of what is dense",
            "Give all the same: sparge show FILE --dense-steps … --dense-layers … --out FILE.",
        )
    return schedule


def _joined_about(given: Sequence[Calibration]) -> dict[str, str]:
    said = {name: dict.fromkeys(each.about[name] for each in given if name in each.about) for name in ABOUT}
    return {name: " + ".join(texts)[:LONGEST] for name, texts in said.items() if texts}


def _joined_origin(given: Sequence[Calibration]) -> Origin:
    origins = [each.origin for each in given if each.origin is not None]
    changed: dict[str, Any] = {
        name: " + ".join(dict.fromkeys(getattr(origin, name) for origin in origins))
        for name in ("model", "created_with", "device")
    }
    for name in ("curves", "gains"):
        changed[name] = {key: value for origin in origins for key, value in getattr(origin, name).items()}
    for name in ("batches", "margin"):
        changed[name] = min(getattr(origin, name) for origin in origins)
    return replace(origins[0], **changed, modes={}, held_out={}, output=None)


def _refuse(given: str, allowed: str, todo: str) -> ValueError:
    return value_error("these calibrations cannot be one", given=given, allowed=allowed, todo=todo)
