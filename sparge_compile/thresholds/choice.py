"""Choose a point of each head's measured front for an aim. In: an origin with fronts. Out: points, and thresholds."""

from __future__ import annotations

from collections.abc import Mapping

from ..pair import Pair
from .fronts import Point, Unit, sparsest, spread, within
from .measured import Origin

Key = tuple[str, int, int]  # a site, the number of a phase, a head


def choose(origin: Origin) -> dict[Key, Point]:
    """Return the point of each head for the aim of an origin, from its fronts.

    Where the influence of heads is known and their mean errors count, a squared error counts as much as it has
    influence; of a site's phases each as much as it has blocks.

    Raises:
        ValueError: a sparsity that cannot be reached.
    """
    influence = origin.output.influence if origin.output is not None and origin.by == "mean" else None
    units = {}
    for name, curves in origin.curves.items():
        total = sum(phase.cost for phase in curves.phases)
        for i, phase in enumerate(curves.phases):
            share = phase.cost / total if total else 1.0
            for head, front in enumerate(phase.heads):
                weight = share * influence[name][head] if influence else None
                units[name, i, head] = Unit(front, phase.cost, weight)
    if origin.target_error is not None:
        bound = origin.target_error * origin.margin
        return {key: sparsest(unit.front, bound, origin.by) for key, unit in units.items()}
    if origin.target_output_error is not None:
        found = within(list(units.values()), origin.target_output_error * origin.margin, origin.by)
    else:
        assert origin.target_sparsity is not None
        found = spread(list(units.values()), origin.target_sparsity, origin.by)
    return dict(zip(units, found, strict=True))


def thresholds_of(origin: Origin, points: Mapping[Key, Point], phase: int) -> dict[str, tuple[Pair, ...]]:
    """Return the thresholds of the chosen points in a phase, by site."""
    return {
        name: tuple(points[name, phase, head][:2] for head in range(len(curves.phases[phase].heads)))
        for name, curves in origin.curves.items()
    }
