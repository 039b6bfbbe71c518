"""New thresholds for sites that have some attached: whether they fit. In: a calibration. Out: its phases, by site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..errors import value_error
from ..keeping import WIDTH
from ..kernels.order import Tile
from ..schedule import Schedule
from .calibration import Calibration
from .phases import Phases
from .targets import Target, is_exact, site_name


class Held(NamedTuple):
    """What is attached, by site: the buffers [H or 1, 2 or 6], the plan, the tiles that they are for."""

    buffers: Mapping[Target, Tensor]
    schedule: Schedule
    tiles: Mapping[Target, Tile | None]


def phases_to_set(calibration: Calibration, held: Held) -> tuple[dict[Target, str], Phases]:
    """Return the entry of each site that has one, and what it is in each phase.

    Raises:
        ValueError: entries for other sites, or what enters compiled code and is another there: kept tokens, dense
            layers, tiles; another number of heads.
    """
    names = {target: site_name(target) for target in held.buffers}
    entries = {target: calibration.key_of(name) for target, name in names.items()}
    missed = [entry for entry in calibration.sites if entry not in entries.values() and is_exact(entry)]
    if missed or not any(entries.values()):
        raise value_error(
            "set: thresholds for sites that have none attached",
            given=", ".join(missed or calibration.sites) or "an empty calibration",
            allowed=", ".join(list(names.values())[:8]) + (", …" if len(names) > 8 else ""),
            todo="Attach a calibration that names these sites; set only writes values.",
        )
    own = {target: entry for target, entry in entries.items() if entry is not None}
    wide = any(buffer.shape[1] == WIDTH for buffer in held.buffers.values())
    _check_compiled(calibration, held, own, wide)
    schedule = held.schedule
    if calibration.schedule.dense_steps is not None:
        schedule = schedule._replace(dense_steps=calibration.schedule.dense_steps)
    phases = Phases.of(calibration, schedule, lambda phase: own, wide)
    for target, values in ((target, values) for _, phase in phases.phases for target, values in phase.items()):
        if len(values) not in (1, len(held.buffers[target])):
            raise value_error(
                f"set: thresholds of {names[target]!r} do not fit what is attached",
                given=f"{len(values)} pairs",
                allowed=f"{len(held.buffers[target])} or one",
                todo="Attach a calibration with as many pairs as there are heads; set only writes values.",
            )
    return own, phases


def _check_compiled(calibration: Calibration, held: Held, own: Mapping[Target, str], wide: bool) -> None:
    """Raise a ``ValueError`` where what enters compiled code would be another."""
    if calibration.kept and not wide:
        raise value_error(
            "set: kept tokens for sites that were attached without any",
            given=", ".join(map(str, calibration.kept.values())),
            allowed="thresholds alone: what is kept enters the compiled code",
            todo="Attach a calibration with kept tokens to begin with.",
        )
    if calibration.schedule.dense_layers not in ((), held.schedule.dense_layers):
        raise value_error(
            "set: other dense layers than those that were attached",
            given=calibration.schedule,
            allowed="those that were attached, or none: which layers are dense enters the compiled code",
            todo="Attach it anew, with dense_layers.",
        )
    measured = calibration.tiles or calibration.origin is not None  # else nothing is said of an order
    for target, entry in own.items() if measured else ():
        tile, attached = calibration.tiles.get(entry), held.tiles[target]
        if tile != attached:
            raise value_error(
                f"set: thresholds of {site_name(target)!r} for blocks of another order",
                given="raster" if tile is None else f"tiles {tile}",
                allowed=f"{'raster' if attached is None else f'tiles {attached}'}, as attached, or thresholds without "
                "measurements: the order of tokens enters the compiled code",
                todo="Attach it anew.",
            )
