"""What differs between two calibrations. In: two of them. Out: a value that prints as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from tabulate import tabulate

from ..kernels.order import tile_text
from ..pair import Pair
from ..thresholds.about import ABOUT
from ..thresholds.calibration import Calibration
from ..thresholds.checks import AIMS

_OF_ORIGIN = ("model", "created_with", "device", *AIMS, "by", "mode", "batches", "query_blocks", "seed", "complete")


@dataclass(frozen=True)
class SiteDifference:
    """A site whose thresholds, kept tokens or tiles differ from a progress on. Each pair is of the first and second.

    ``topk``, ``topp``: means over heads. ``sparsity``, ``error``: of the site as it was measured, None without.
    """

    name: str
    start: float
    heads: int
    changed: int  # heads with other thresholds
    topk: tuple[float, float]
    topp: tuple[float, float]
    sparsity: tuple[float | None, float | None]
    error: tuple[float | None, float | None]
    beside: str = ""  # other tiles or kept tokens, in words


@dataclass(frozen=True)
class CalibrationDifference:
    """Two calibrations beside each other. Printed, it is a text for people.

    ``about`` has what the files say of themselves and how they were found, where it differs: (name, first, second).
    ``only`` has the sites that one of them lacks. ``common`` counts the sites of both.
    """

    about: tuple[tuple[str, str, str], ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    sites: tuple[SiteDifference, ...]
    common: int
    plans: tuple[str, str]  # what is dense by plan

    @property
    def same(self) -> bool:
        """Whether a model would run with both in the same way."""
        return not any(self.only) and not self.sites and self.plans[0] == self.plans[1]

    def __str__(self) -> str:
        lines = [f"{name}: {first} → {second}" for name, first, second in self.about]
        if self.plans[0] != self.plans[1]:
            lines.append("dense by plan: {} → {}".format(*self.plans))
        for which, names in zip(("first", "second"), self.only, strict=True):
            if names:
                lines.append(f"only in the {which}: {', '.join(names)}")
        if self.sites:
            headers = ("site", "from", "heads that differ", "topk", "topp", "sparsity", "mean error", "beside")
            rows = [_row(site) for site in self.sites]
            width = len(headers) if any(row[-1] for row in rows) else len(headers) - 1
            lines.append(tabulate([row[:width] for row in rows], headers=headers[:width], disable_numparse=True))
        alike = self.common - len({site.name for site in self.sites})
        if self.same:
            lines.append(f"the same thresholds at all {self.common} sites")
        elif alike:
            lines.append(f"the same at {alike} site{'s' * (alike > 1)} more")
        return "\n".join(lines)


def compare_calibrations(first: Calibration, second: Calibration) -> CalibrationDifference:
    """Return what differs between two calibrations: sites, thresholds, what was measured, where they come from.

    Thresholds are compared head by head, from each progress on at which a phase of either begins; one pair for all
    heads is the same as that pair for each.
    """
    common = [name for name in first.sites if name in second.sites]
    return CalibrationDifference(
        about=tuple(_about(first, second)),
        only=(
            tuple(name for name in first.sites if name not in second.sites),
            tuple(name for name in second.sites if name not in first.sites),
        ),
        sites=tuple(_sites(first, second, common)),
        common=len(common),
        plans=(str(first.schedule), str(second.schedule)),
    )


def _about(first: Calibration, second: Calibration) -> Iterator[tuple[str, str, str]]:
    for name in ABOUT:
        values = [each.about.get(name, "–") for each in (first, second)]
        if values[0] != values[1]:
            yield name.replace("_", " "), values[0], values[1]
    for name in _OF_ORIGIN:
        values = [_word(None if each.origin is None else getattr(each.origin, name)) for each in (first, second)]
        if values[0] != values[1]:
            yield name.replace("_", " "), values[0], values[1]
    totals = [each.summary() for each in (first, second)]
    for name in ("sparsity", "mean_error", "worst_error"):
        known = [None if total is None else getattr(total, name) for total in totals]
        texts = ["–" if x is None else f"{x:.1%}" if name == "sparsity" else f"{x:.4f}" for x in known]
        if known[0] != known[1]:
            yield f"{name.replace('_', ' ')} of the whole", texts[0], texts[1]


def _word(value: object) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _sites(first: Calibration, second: Calibration, names: Sequence[str]) -> Iterator[SiteDifference]:
    both = [_Lookup(first), _Lookup(second)]
    starts = sorted({*first.all_phases(), *second.all_phases()})
    for name in names:
        beside = _beside(first, second, name)
        before = None
        for start in starts:
            pairs = [each.pairs(name, start) for each in both]
            heads = max(map(len, pairs))
            rows = [each * heads if len(each) == 1 else each for each in pairs]
            unlike = len(rows[0]) != len(rows[1])
            changed = heads if unlike else sum(a != b for a, b in zip(*rows, strict=True))
            if (not changed and not beside) or pairs == before:
                continue
            before = pairs
            means = [tuple(fmean(pair[i] for pair in each) for i in (0, 1)) for each in rows]  # of topk and of topp
            (first_sparsity, first_error), (second_sparsity, second_error) = (x.measured(name, start) for x in both)
            if unlike:
                beside = "; ".join(filter(None, (beside, f"{len(rows[0])} → {len(rows[1])} heads")))
            yield SiteDifference(
                name,
                start,
                heads,
                changed,
                topk=(means[0][0], means[1][0]),
                topp=(means[0][1], means[1][1]),
                sparsity=(first_sparsity, second_sparsity),
                error=(first_error, second_error),
                beside=beside,
            )


def _beside(first: Calibration, second: Calibration, name: str) -> str:
    said = []
    ordered = [each.tile_of(name) for each in (first, second)]
    tiles = ["raster" if tile is None else tile_text(tile) for tile in ordered]
    if tiles[0] != tiles[1]:
        said.append(f"{tiles[0]} → {tiles[1]}")
    kept = [each.kept_of(name) for each in (first, second)]
    if kept[0] != kept[1]:
        said.append(f"keeps {kept[0]} → {kept[1]}")
    return "; ".join(said)


class _Lookup:
    """What a calibration says of a site from a progress on."""

    def __init__(self, calibration: Calibration) -> None:
        self._phases = calibration.all_phases()
        self._starts = list(self._phases)
        self._points = {(each.name, each.phase): each.points for each in calibration.points()}

    def _phase(self, start: float) -> int:
        return max(i for i, each in enumerate(self._starts) if each <= start)

    def pairs(self, name: str, start: float) -> tuple[Pair, ...]:
        return self._phases[self._starts[self._phase(start)]][name]

    def measured(self, name: str, start: float) -> tuple[float | None, float | None]:
        """Sparsity, and mean error over heads."""
        points = self._points.get((name, self._phase(start)))
        if points is None:
            return None, None
        return 1 - fmean(point.density for point in points), fmean(point.mean for point in points)


def _row(site: SiteDifference) -> tuple[str, ...]:
    def both(values: tuple[float | None, float | None], form: str) -> str:
        texts = ["–" if value is None else format(value, form) for value in values]
        return texts[0] if texts[0] == texts[1] else f"{texts[0]} → {texts[1]}"

    return (
        site.name,
        f"{site.start:g}",
        f"{site.changed} of {site.heads}",
        both(site.topk, ".3g"),
        both(site.topp, ".3g"),
        both(site.sparsity, ".1%"),
        both(site.error, ".4f"),
        site.beside,
    )
