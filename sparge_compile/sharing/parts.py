"""The parts of a pipeline in one calibration: its sites under a part's name, and a part taken out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from ..errors import value_error
from ..schedule import Schedule
from ..thresholds.calibration import Calibration

T = TypeVar("T")


def in_part(calibration: Calibration, part: str) -> Calibration:
    """Return a calibration whose sites are named as below a module: ``blocks.0`` is then ``transformer_2.blocks.0``.

    Raises:
        ValueError: a name that no attribute has.
    """
    if not part.isidentifier():
        raise value_error(
            "the name of a part",
            given=repr(part),
            allowed="the name of an attribute of the pipeline, as transformer_2",
            todo="Name the parts as the pipeline does.",
        )
    layers = calibration.schedule.dense_layers
    named = layers if isinstance(layers, int) else tuple(f"{part}.{entry}" for entry in layers)
    return _renamed(calibration, lambda name: f"{part}.{name}", named).described(part=part)


def calibration_part(calibration: Calibration, part: str) -> Calibration:
    """Return what a calibration of several parts says of one, with the names that its sites have in it.

    Args:
        calibration: what ``merge_calibrations({"transformer": …, "transformer_2": …})`` gave.
        part: the name of one of them.

    Raises:
        ValueError: there is no such part.
    """
    start = f"{part}."
    if not any(name.startswith(start) for name in calibration.sites):
        parts = dict.fromkeys(name.partition(".")[0] for name in calibration.sites)
        raise value_error(
            "no such part", given=repr(part), allowed=", ".join(parts) or "none", todo="Name one of the parts."
        )
    layers = calibration.schedule.dense_layers
    own = layers if isinstance(layers, int) else tuple(x.removeprefix(start) for x in layers if x.startswith(start))
    return _renamed(
        calibration, lambda name: name.removeprefix(start) if name.startswith(start) else None, own
    ).described(part=part)


def _renamed(
    calibration: Calibration, rename: Callable[[str], str | None], dense_layers: tuple[str, ...] | int
) -> Calibration:
    """The same with other names; sites that have none are left out, and so is what concerns all of them."""
    names = {name: new for name in calibration.sites if (new := rename(name)) is not None}

    def of(table: Mapping[str, T]) -> dict[str, T]:
        return {names[name]: value for name, value in table.items() if name in names}

    origin = calibration.origin
    if origin is not None:
        output = origin.output and replace(origin.output, influence=of(origin.output.influence), trials=(), reached={})
        curves, gains = of(origin.curves), of(origin.gains)
        origin = replace(origin, curves=curves, gains=gains, modes={}, held_out={}, output=output)
    return replace(
        calibration,
        sites=of(calibration.sites),
        phases={start: of(sites) for start, sites in calibration.phases.items()},
        origin=origin,
        source=None,
        kept=of(calibration.kept),
        tiles=of(calibration.tiles),
        schedule=Schedule(calibration.schedule.dense_steps, dense_layers),
    )
