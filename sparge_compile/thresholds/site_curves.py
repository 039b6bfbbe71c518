"""What was measured of a site: the front of each of its heads, phase by phase; and sums over chosen points."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .entries import check_keys, check_whole, checked_list, is_number, wrong_entry
from .fronts import Point, error_of


class Summary(NamedTuple):
    """A calibration as a whole: sparsity weighted by visible blocks, error over heads, dense heads among all."""

    sparsity: float
    mean_error: float
    worst_error: float
    heads: int
    dense_heads: int


@dataclass(frozen=True)
class PhaseCurves:
    """A site in one phase: the front of each head, and the visible key blocks that a head has in all."""

    cost: float
    heads: tuple[tuple[Point, ...], ...]


@dataclass(frozen=True)
class SiteCurves:
    """A site's measurements, phase by phase."""

    head_size: int
    samples: int
    phases: tuple[PhaseCurves, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        phases = [{"cost": p.cost, "heads": [[list(point) for point in h] for h in p.heads]} for p in self.phases]
        return {"head_size": self.head_size, "samples": self.samples, "curves": phases}

    @staticmethod
    def from_dict(entry: Any, name: str) -> SiteCurves:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: anything else.
        """
        where = f"site {name!r}"
        check_keys(entry, {"head_size", "samples", "curves"}, where)
        check_whole(entry["head_size"], where, 1)
        check_whole(entry["samples"], where, 0)
        return SiteCurves(
            entry["head_size"], entry["samples"], tuple(_phase(x, where) for x in checked_list(entry["curves"], where))
        )


class SitePoints(NamedTuple):
    """The chosen point of each head of a site in a phase, and the curves that they are on."""

    name: str
    phase: int
    points: list[Point]
    curves: SiteCurves


def summarise(sites: Iterable[SitePoints], by: str) -> Summary:
    """Return sparsity and error of chosen points over all sites and phases."""
    rows = [(point, site.curves.phases[site.phase].cost) for site in sites for point in site.points]
    total = sum(cost for _, cost in rows)
    kept = sum(point.density * cost for point, cost in rows)
    errors = [error_of(point, by) for point, _ in rows]
    return Summary(
        sparsity=1 - kept / total if total else 0.0,
        mean_error=sum(errors) / max(1, len(errors)),
        worst_error=max(errors, default=0.0),
        heads=len(rows),
        dense_heads=sum(point.density == 1 for point, _ in rows),
    )


def _phase(entry: Any, where: str) -> PhaseCurves:
    check_keys(entry, {"cost", "heads"}, where)
    if not is_number(entry["cost"]) or entry["cost"] < 0:
        raise wrong_entry(f"{where}: cost", entry["cost"], "0 or more blocks")
    heads = [
        tuple(_point(p, where) for p in checked_list(front, where)) for front in checked_list(entry["heads"], where)
    ]
    if not heads:
        raise wrong_entry(where, "no heads", "one or more")
    return PhaseCurves(entry["cost"], tuple(heads))


def _point(values: Any, where: str) -> Point:
    if not isinstance(values, list) or len(values) != 5 or not all(map(is_number, values)):
        raise wrong_entry(where, values, "points of five numbers")
    point = Point(*values)
    if not (0 < point.topk <= 1 and 0 <= point.topp <= 1 and 0 <= point.density <= 1 and min(point[3:]) >= 0):
        raise wrong_entry(where, values, "(topk, topp, density, worst error, mean error) in their ranges")
    return point
