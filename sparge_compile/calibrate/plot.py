"""A calibration in pictures: sparsity of heads, error by sparsity. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import explain_error, value_error
from ..thresholds.calibration import Calibration
from ..thresholds.fronts import Unit, error_of, pareto, spread

NAMED = 12  # sites that a legend has room for


def plot(calibration: Calibration, out: str | os.PathLike[str]) -> list[Path]:
    """Draw a calibration as two PNGs, and return their paths.

    ``<out>-heads.png`` has the sparsity of each site and head, ``<out>-curves.png`` the error of each site by sparsity,
    and of the whole model where blocks are dropped where it hurts least.

    Raises:
        ValueError: a calibration without measurements.
        ImportError: there is no matplotlib.
    """
    if calibration.origin is None:
        raise value_error(
            "nothing to draw",
            given="thresholds without measurements",
            allowed="what `sparge calibrate` made",
            todo="Calibrate the model.",
        )
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            explain_error(
                "drawing needs matplotlib",
                given="none",
                allowed="matplotlib",
                todo='pip install "sparge-compile[plot]"',
            )
        ) from error
    matplotlib.use("Agg")
    paths = [Path(f"{os.fspath(out)}-{what}.png") for what in ("heads", "curves")]
    _heat_map(calibration, paths[0])
    _curves(calibration, paths[1])
    return paths


def _heat_map(calibration: Calibration, path: Path) -> None:
    from matplotlib import pyplot

    rows = list(calibration.points())
    starts = [0.0, *calibration.phases]
    most = max(len(points) for _, _, points, _ in rows)
    grid = [[1 - p.density for p in points] + [float("nan")] * (most - len(points)) for _, _, points, _ in rows]
    names = [name if len(starts) == 1 else f"{name} from {starts[phase]:g}" for name, phase, _, _ in rows]
    figure, axes = pyplot.subplots(figsize=(3 + 0.3 * most, 1.5 + 0.25 * len(rows)), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xticks(range(most), [str(head) for head in range(most)], fontsize=7)
    axes.set_xlabel("head")
    figure.colorbar(image, label="sparsity")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _curves(calibration: Calibration, path: Path) -> None:
    from matplotlib import pyplot

    origin = calibration.origin
    assert origin is not None
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    everything: list[Unit] = []
    colours = pyplot.get_cmap("viridis")
    few = len(origin.curves) <= NAMED
    for number, (name, curves) in enumerate(origin.curves.items()):
        units = [Unit(front, phase.cost) for phase in curves.phases for front in phase.heads]
        everything += units
        label = name if few else "a site: the first dark, the last light" if number == 0 else None
        _line(units, origin.by, axes, label=label, color=colours(number / len(origin.curves)), linewidth=0.8)
    _line(everything, origin.by, axes, label="whole model", color="black", linewidth=2)
    total = calibration.summary()
    assert total is not None
    if total.mean_error > 0:
        axes.plot(total.sparsity, total.mean_error, "o", color="red", label="the thresholds of this file")
    axes.set(xlabel="sparsity", ylabel="mean error of heads (relative L1)", yscale="log", xlim=(0, 1))
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _line(units: Sequence[Unit], by: str, axes: object, **style: object) -> None:
    """The mean error of heads by their common sparsity."""
    most = 1 - sum(u.cost * min(p.density for p in pareto(u.front, by)) for u in units) / sum(u.cost for u in units)
    shares = [most * 0.9999 * i / 40 for i in range(1, 41)]
    errors = [sum(error_of(p, by) for p in spread(units, share, by)) / len(units) for share in shares]
    axes.plot(shares, errors, **style)  # type: ignore[attr-defined]
