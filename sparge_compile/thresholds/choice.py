"""Choose a point of each head's measured front for an aim. In: an origin with fronts. Out: points, and thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..pair import Pair
from .fronts import Point, Unit, sparsest, spread
from .measured import Origin

Key = tuple[str, int, int]  # a site, the number of a phase, a head


def choose(origin: Origin, influence: Mapping[str, Sequence[float]] | None = None) -> dict[Key, Point]:
    """Return the point of each head for the aim of an origin, from its fronts.

    Args:
        influence: what a head's squared error counts, by site and head; None: as many as it has blocks.

    Raises:
        ValueError: a sparsity that cannot be reached.
    """
    units = {
        (name, i, head): Unit(front, phase.cost, None if influence is None else influence[name][head])
        for name, curves in origin.curves.items()
        for i, phase in enumerate(curves.phases)
        for head, front in enumerate(phase.heads)
    }
    if origin.target_error is not None:
        bound = origin.target_error * origin.margin
        return {key: sparsest(unit.front, bound, origin.by) for key, unit in units.items()}
    assert origin.target_sparsity is not None
    return dict(zip(units, spread(list(units.values()), origin.target_sparsity, origin.by), strict=True))


def thresholds_of(origin: Origin, points: Mapping[Key, Point], phase: int) -> dict[str, tuple[Pair, ...]]:
    """Return the thresholds of the chosen points in a phase, by site."""
    return {
        name: tuple(points[name, phase, head][:2] for head in range(len(curves.phases[phase].heads)))
        for name, curves in origin.curves.items()
    }
