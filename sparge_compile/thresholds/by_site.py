"""Thresholds by site and phase, and what belongs to them: kept tokens, tiles, a plan, what they are for.

In: a site's name. Out: what holds there. It is what a ``Calibration`` is without how it was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeVar

from ..errors import type_error, value_error
from ..keeping import NOTHING, Kept
from ..kernels.order import Tile, tile_text
from ..pair import Pair, Sites, Table
from ..schedule import ALWAYS_SPARSE, Schedule
from .about import check_about
from .checks import check_kept, check_phases, check_sites, check_tiles
from .fronts import DENSE

Own = TypeVar("Own", bound="SiteThresholds")


@dataclass(frozen=True)
class SiteThresholds:
    """The fields of a ``Calibration`` that say what holds at a site; see there."""

    sites: Sites = field(default_factory=dict)
    phases: Mapping[float, Sites] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict, kw_only=True)
    tiles: Mapping[str, Tile] = field(default_factory=dict, kw_only=True)
    schedule: Schedule = field(default=ALWAYS_SPARSE, kw_only=True)
    about: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", Table(check_sites("sites", self.sites)))
        later = check_phases(self.phases, self.sites)
        object.__setattr__(self, "phases", Table({start: Table(sites) for start, sites in later.items()}))
        object.__setattr__(self, "kept", Table(check_kept(self.kept, self.sites)))
        object.__setattr__(self, "tiles", Table(check_tiles(self.tiles, self.sites)))
        object.__setattr__(self, "about", Table(check_about(self.about)))
        if not isinstance(self.schedule, Schedule):
            raise type_error(
                "Calibration: bad schedule",
                given=repr(self.schedule)[:80],
                allowed="a Schedule",
                todo="Use calibration.scheduled(dense_steps=…, dense_layers=…).",
            )

    def all_phases(self) -> dict[float, Sites]:
        """Return the thresholds by the progress from which they hold, those of the start at 0."""
        return {0.0: self.sites, **self.phases}

    def key_of(self, name: str) -> str | None:
        """Return the entry that holds for a site: its name, else the first pattern that matches it, else None."""
        return name if name in self.sites else next((p for p in self.sites if fnmatchcase(name, p)), None)

    def pairs_of(self, name: str, heads: int) -> tuple[Pair, ...] | None:
        """Return the pairs of a site as they are given, one for all heads or one for each; None where it has none.

        Raises:
            ValueError: there are several phases, between which only ``attach`` can switch.
        """
        key = self.key_of(name)
        if key is None:
            return None
        if self.phases or self.schedule.dense_steps is not None:
            raise value_error(
                f"a calibration with phases was given for site {name!r}, and nothing says which of them holds",
                given=f"thresholds from {', '.join(f'{start:g}' for start in self.all_phases())} of the run on"
                + (f", dense steps {self.schedule.dense_steps}" if self.schedule.dense_steps else ""),
                allowed="one phase",
                todo="Use attach(model, calibration) and its set_progress, or calibration.at_progress(fraction).",
            )
        return (DENSE[:2],) * heads if self.schedule.is_dense_layer(name) else self.sites[key]

    def kept_of(self, name: str) -> Kept:
        """Return what is kept of a site's tokens."""
        return self.kept.get(self.key_of(name) or "", NOTHING)

    def tile_of(self, name: str) -> Tile | None:
        """Return the tile whose tokens form a block of a site: (frames, rows, columns); None: raster order."""
        return self.tiles.get(self.key_of(name) or "")

    def described(self: Own, **about: str | None) -> Own:
        """Return the same with more that it says of itself; None takes a name away.

        Args:
            about: ``model_id``, ``part``, ``resolution``, ``scheduler``, ``steps``, ``inputs``, ``licence``, ``note``.

        Raises:
            ValueError: another name, or a text of several lines.
        """
        said = {**self.about, **about}
        return replace(self, about={name: text for name, text in said.items() if text is not None})

    def words(self) -> Iterator[str]:
        """Yield what belongs to the thresholds, a line for each entry or plan."""
        for tile in dict.fromkeys(self.tiles.values()):
            names = [name for name, own in self.tiles.items() if own == tile]
            most = len(names) > 4
            named = f"{len(names)} sites" if most else ", ".join(names)
            yield f"tiles {tile_text(tile)}: {named}"
        if self.schedule != ALWAYS_SPARSE:
            yield f"dense by plan: {self.schedule}"
