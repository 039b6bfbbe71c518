"""Error by sparsity, as a calibration measured it. In: a calibration. Out: points of lines."""

from __future__ import annotations

from collections.abc import Sequence

from ..thresholds.calibration import Calibration
from ..thresholds.fronts import Unit, error_of, pareto, spread

POINTS = 40

Line = list[tuple[float, float]]  # (sparsity, mean error of heads)


def curves(calibration: Calibration) -> tuple[Line, dict[str, Line]]:
    """Return the line of the whole model, where blocks are dropped where it hurts least, and that of each site."""
    origin = calibration.origin
    assert origin is not None
    by_site = {
        name: [Unit(front, phase.cost) for phase in measured.phases for front in phase.heads]
        for name, measured in origin.curves.items()
    }
    everything = [unit for units in by_site.values() for unit in units]
    return _line(everything, origin.by), {name: _line(units, origin.by) for name, units in by_site.items()}


def _line(units: Sequence[Unit], by: str) -> Line:
    """The mean error of heads by their common sparsity."""
    most = 1 - sum(u.cost * min(p.density for p in pareto(u.front, by)) for u in units) / sum(u.cost for u in units)
    shares = [most * 0.9999 * i / POINTS for i in range(1, POINTS + 1)]
    return [(share, sum(error_of(p, by) for p in spread(units, share, by)) / len(units)) for share in shares]
