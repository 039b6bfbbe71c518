"""A head's measured trade-off between error and density, and how thresholds are chosen from it.

A front is a tuple of points, densest last, of which none is both denser and worse than another. Choosing needs no model
and no tensors, so a file that holds fronts can be aimed anew.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..errors import value_error

BY = ("worst", "mean")  # over samples
MODES = ("hybrid", "topk", "topp")


class Point(NamedTuple):
    """One pair of thresholds, and what it did to a head.

    ``density``: kept ÷ visible key blocks. ``worst``, ``mean``: over samples, the relative L1 error of the head's
    attention output, Σ|O_sparse − O_dense| ÷ Σ|O_dense|.
    """

    topk: float
    topp: float
    density: float
    worst: float
    mean: float


DENSE = Point(1.0, 0.0, 1.0, 0.0, 0.0)


class Unit(NamedTuple):
    """A head in one phase: its front, the visible key blocks that it has in all, and what its squared error counts."""

    front: Sequence[Point]
    cost: float
    weight: float | None = None  # None: as its cost


def error_of(point: Point, by: str) -> float:
    """Return the error that counts: that of the worst sample, or the mean over samples."""
    return point.worst if by == "worst" else point.mean


def pareto(points: Iterable[Point], by: str) -> list[Point]:
    """Return the points that no other beats in density and error; of equals, the one with the larger thresholds."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.density, error_of(p, by), -p.topk, -p.topp)):
        if not front or error_of(point, by) < error_of(front[-1], by):
            front.append(point)
    return front


def sparsest(front: Iterable[Point], bound: float, by: str) -> Point:
    """Return the point of the lowest density whose error keeps the bound; dense where none does."""
    fit = [point for point in front if error_of(point, by) <= bound and point.density < 1]
    return min((*fit, DENSE), key=lambda p: (p.density, error_of(p, by), -p.topk, -p.topp))


def spread(units: Sequence[Unit], sparsity: float, by: str) -> list[Point]:
    """Choose a point for each unit, so that the sparsity of all together is reached where it hurts least.

    Minimised is the sum over units of weight · error², because the errors of heads are about independent and add up so
    in what they are summed into, and squares keep single heads from ruin. All units start at their sparsest; steps
    along their convex hulls are taken in the order of what they gain for a block, which is what one Lagrange multiplier
    for all of them would choose, until nothing more fits.

    Raises:
        ValueError: the sparsity cannot be reached with the points that were measured.
    """
    total = sum(unit.cost for unit in units)
    hulls = [_hull(unit, by) for unit in units]
    budget = (1 - sparsity) * total * (1 + 1e-9) - sum(u.cost * h[0].density for u, h in zip(units, hulls, strict=True))
    if budget < 0:
        most = 1 - sum(u.cost * h[0].density for u, h in zip(units, hulls, strict=True)) / total
        raise value_error(
            "target_sparsity is out of reach",
            given=sparsity,
            allowed=f"at most {math.floor(most * 1e4) / 1e4:g}: each query block keeps one, and what a mask cuts",
            todo="Ask for less, or calibrate with longer inputs.",
        )
    climb = _Climb(units, hulls, by)
    for i, extra in climb.steps():
        if extra <= budget:
            budget -= extra
            climb.take(i)
    return climb.points()


def within(units: Sequence[Unit], bound: float, by: str) -> list[Point]:
    """Choose a point for each unit, with about the fewest blocks for which √Σ weight · error² keeps a bound.

    The steps are those of :func:`spread`, and they end where the bound is kept. Dense, where none keeps it.
    """
    hulls = [_hull(unit, by) for unit in units]
    climb = _Climb(units, hulls, by)
    left = sum((unit.weight or 0.0) * _square(hull[0], by) for unit, hull in zip(units, hulls, strict=True))
    for i, _ in climb.steps():
        if left <= bound**2:
            break
        before = hulls[i][climb.at[i]]
        climb.take(i)
        left -= (units[i].weight or 0.0) * (_square(before, by) - _square(hulls[i][climb.at[i]], by))
    return climb.points()


class _Climb:
    """Units on their way up their hulls, from the sparsest points, always by the step that gains most for a block."""

    def __init__(self, units: Sequence[Unit], hulls: Sequence[Sequence[Point]], by: str) -> None:
        self._units, self._hulls, self._by = units, hulls, by
        self.at = [0] * len(units)
        # What a step gains is counted for a block; a unit without blocks takes its steps for nothing, in any order.
        self._worth = [1.0 if unit.weight is None or not unit.cost else unit.weight / unit.cost for unit in units]

    def steps(self) -> Iterator[tuple[int, float]]:
        """Yield the number of a unit and the blocks that its next step costs. A step that is not taken ends its unit's
        way."""
        queue = [self._step(i) for i, hull in enumerate(self._hulls) if len(hull) > 1]
        heapq.heapify(queue)
        while queue:
            _, i = heapq.heappop(queue)
            hull, before = self._hulls[i], self.at[i]
            yield i, self._units[i].cost * (hull[before + 1].density - hull[before].density)
            if before < self.at[i] < len(hull) - 1:
                heapq.heappush(queue, self._step(i))

    def take(self, i: int) -> None:
        """Take the next step of a unit."""
        self.at[i] += 1

    def points(self) -> list[Point]:
        """Return where each unit is."""
        return [hull[place] for hull, place in zip(self._hulls, self.at, strict=True)]

    def _step(self, i: int) -> tuple[float, int]:
        return -self._worth[i] * _gain(self._hulls[i], self.at[i], self._by), i


def thin(points: Sequence[Point], most: int, keep: Iterable[Point], by: str) -> tuple[Point, ...]:
    """Keep at most so many points of a front, evenly spread over the logarithm of the error, and those to be kept."""
    if len(points) <= most:
        chosen = set(points)
    else:
        heights = [math.log(max(error_of(p, by), 1e-6)) for p in points]
        step = (heights[0] - heights[-1]) / (most - 1)
        wanted = [heights[0] - i * step for i in range(most)]
        chosen = {points[min(range(len(points)), key=lambda j: abs(heights[j] - height))] for height in wanted}
    return tuple(sorted({*chosen, *keep}, key=lambda p: (p.density, -p.worst, p.topk, p.topp)))


def _square(point: Point, by: str) -> float:
    return error_of(point, by) ** 2


def _gain(hull: Sequence[Point], at: int, by: str) -> float:
    """Squared error that a step along a hull takes away, for the density that it costs."""
    return (_square(hull[at], by) - _square(hull[at + 1], by)) / (hull[at + 1].density - hull[at].density)


def _hull(unit: Unit, by: str) -> list[Point]:
    """The lower convex hull of squared error over density, sparsest first."""
    hull: list[Point] = []
    for point in pareto((*(p for p in unit.front if p.density < 1), DENSE), by):
        while len(hull) > 1 and _gain([hull[-2], hull[-1]], 0, by) <= _gain([hull[-1], point], 0, by):
            hull.pop()
        hull.append(point)
    return hull
