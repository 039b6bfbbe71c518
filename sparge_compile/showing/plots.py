"""Pictures of a calibration and of a survey, as PNGs. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import value_error
from ..kernels.order import tile_text
from ..thresholds.calibration import Calibration
from .clips import side_by_side
from .curves import curves
from .names import short_names
from .needed import needed
from .survey import Survey

NAMED = 12  # sites that a legend has room for
MOST_HEADS = 16  # whose maps fit in one picture
_DENSE, _SPARSE = "#9aa5b1", "#2563eb"


def plot_calibration(calibration: Calibration, out: str | os.PathLike[str]) -> list[Path]:
    """Draw a calibration as PNGs, and return their paths.

    ``<out>-heads.png`` has the sparsity of each site and head, ``<out>-curves.png`` the error of each site by sparsity,
    and of the whole model where blocks are dropped where it hurts least; ``<out>-steps.png``, where it has phases, the
    sparsity of each site over a run.

    Raises:
        ValueError: a calibration without measurements.
        ImportError: there is no matplotlib.
    """
    if calibration.origin is None:
        raise value_error(
            "nothing to draw",
            given="thresholds without measurements",
            allowed="what `sparge calibrate` made",
            todo="Calibrate the model, or give a model to look at: `sparge plot FILE --model … --inputs …`.",
        )
    _start()
    rows = list(calibration.points())
    starts = [0.0, *calibration.phases]
    sparsities = [[1 - point.density for point in row.points] for row in rows]
    names = [row.name if len(starts) == 1 else f"{row.name} from {starts[row.phase]:g}" for row in rows]
    paths = [
        _heat_map(sparsities, names, "head", Path(f"{os.fspath(out)}-heads.png")),
        _curves(calibration, Path(f"{os.fspath(out)}-curves.png")),
    ]
    if len(starts) > 1:
        by_site: dict[str, list[float]] = {}
        for row, each in zip(rows, sparsities, strict=True):
            by_site.setdefault(row.name, []).append(sum(each) / len(each))
        edges = [*starts, 1.0]
        paths.append(_over_run(by_site, edges, "share of the run", Path(f"{os.fspath(out)}-steps.png")))
    return paths


def plot_survey(survey: Survey, out: str | os.PathLike[str], site: str | None = None) -> list[Path]:
    """Draw what thresholds do to a model as PNGs, and a GIF of what a pipeline made; return their paths.

    ``<out>-map.png`` has the block map of each head of a site, ``<out>-times.png`` the time of each site, dense and
    sparse, where they were timed, and ``<out>-calls.png`` the sparsity of each site and call of the model, where there
    are several. ``<out>-clips.gif`` has what a diffusers pipeline made, dense and sparse side by side.

    Args:
        site: whose map to draw; default: the first that has one.

    Raises:
        ValueError: no such site, or one that is dense by plan.
        ImportError: there is no matplotlib.
    """
    _start()
    paths = []
    mapped = [each for each in survey.sites if each.block_map is not None]
    wanted = [each for each in mapped if site in (None, each.name)]
    if wanted:
        paths.append(_map(wanted[0], Path(f"{os.fspath(out)}-map.png")))
    elif site is not None:
        allowed = ", ".join(each.name for each in mapped) or "none: all are dense by plan"
        raise value_error("no map of this site", given=repr(site), allowed=allowed, todo="Name one of them.")
    if any(each.seconds for each in survey.sites):
        paths.append(_times(survey, Path(f"{os.fspath(out)}-times.png")))
    calls = survey.sites[0].calls
    if len(calls) > 1:
        by_site = {each.name: each.by_call() for each in survey.sites if each.calls == calls}
        edges = [*calls, calls[-1] + calls[1] - calls[0]]
        paths.append(_over_run(by_site, edges, "call of the model", Path(f"{os.fspath(out)}-calls.png")))
    if survey.clips:
        paths.append(side_by_side(survey.clips, f"{os.fspath(out)}-clips.gif"))
    return paths


def _start() -> None:
    needed("matplotlib", "drawing").use("Agg")


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _heat_map(rows: Sequence[Sequence[float]], names: Sequence[str], what: str, path: Path) -> Path:
    from matplotlib import pyplot

    most = max(map(len, rows))
    grid = [[*row, *[float("nan")] * (most - len(row))] for row in rows]
    figure, axes = pyplot.subplots(figsize=(3.5 + 0.3 * most, 1.5 + 0.25 * len(rows)), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xticks(range(most), [str(i) for i in range(most)], fontsize=7)
    axes.set_xlabel(what)
    figure.colorbar(image, label="sparsity")
    return _saved(figure, path)


def _over_run(by_site: dict[str, list[float]], edges: Sequence[float], what: str, path: Path) -> Path:
    from matplotlib import pyplot

    count = len(by_site)
    figure, axes = pyplot.subplots(figsize=(7, 1.5 + 0.25 * count), layout="constrained")
    grid = list(by_site.values())
    image = axes.pcolormesh(edges, [i - 0.5 for i in range(count + 1)], grid, vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(count), list(by_site), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(what)
    figure.colorbar(image, label="sparsity")
    return _saved(figure, path)


def _curves(calibration: Calibration, path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    colours = pyplot.get_cmap("viridis")
    whole, sites = curves(calibration)
    for number, (name, line) in enumerate(sites.items()):
        label = name if len(sites) <= NAMED else "a site: the first dark, the last light" if number == 0 else None
        axes.plot(*zip(*line, strict=True), label=label, color=colours(number / len(sites)), linewidth=0.8)
    axes.plot(*zip(*whole, strict=True), label="whole model", color="black", linewidth=2)
    total = calibration.summary()
    assert total is not None
    if total.mean_error > 0:
        axes.plot(total.sparsity, total.mean_error, "o", color="red", label="the thresholds of this file")
    axes.set(xlabel="sparsity", ylabel="mean error of heads (relative L1)", yscale="log", xlim=(0, 1))
    axes.legend(fontsize=7)
    return _saved(figure, path)


def _map(site: Any, path: Path) -> Path:
    from matplotlib import pyplot

    heads = min(len(site.block_map), MOST_HEADS)
    columns = min(4, heads)
    rows = -(-heads // columns)
    _, n_query, n_key = site.block_map.shape
    tall = min(2.0, max(0.4, n_query / n_key))
    size = (2.6 * columns + 0.6, 2.4 * tall * rows + 0.9)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for head, axes in enumerate(grid.flat):
        if head >= heads:
            axes.axis("off")
            continue
        kept = site.block_map[head]
        axes.imshow(kept.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(f"head {head}: {1 - kept.float().mean().item():.0%} skipped", fontsize=8)
        axes.tick_params(labelsize=6)
    order = "" if site.tile is None else f", in tiles of {tile_text(site.tile)}"
    figure.suptitle(f"{site.name}, call {site.mapped}: query blocks down, key blocks across{order}", fontsize=9)
    return _saved(figure, path)


def _times(survey: Survey, path: Path) -> Path:
    from matplotlib import pyplot

    sites = [each for each in survey.sites if each.seconds is not None]
    labels, shape = short_names([each.name for each in sites])
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.35 * len(sites)), layout="constrained")
    for number, site in enumerate(sites):
        for which, (took, colour) in enumerate(zip(site.seconds or (), (_DENSE, _SPARSE), strict=True)):
            label = ("dense", "sparse")[which] if number == 0 else None
            axes.barh(number + 0.4 * which - 0.2, 1e3 * took, 0.38, color=colour, label=label)
    axes.set_yticks(range(len(sites)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of one call", ylabel=shape, title=f"Attention on {survey.device}")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return _saved(figure, path)
