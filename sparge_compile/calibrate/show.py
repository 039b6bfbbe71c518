"""A calibration for people: a table by site, and pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from ..errors import explain_error
from ..fronts import Point, Unit, error_of, pareto, spread
from ..thresholds import Calibration

WORST = 3  # heads that are named in a row


def text(calibration: Calibration) -> str:
    """What is known of a calibration, and a row for each site and phase."""
    origin, total = calibration.origin, calibration.summary()
    starts = [0.0, *calibration.phases]
    if origin is None or total is None:
        every = zip(starts, (calibration.sites, *calibration.phases.values()), strict=True)
        rows = [
            (name, f"{start:g}", len(pairs), *_spans(pairs)) for start, sites in every for name, pairs in sites.items()
        ]
        return "without measurements\n" + tabulate(rows, headers=("site", "from", "heads", "topk", "topp"))
    aim = (
        f"error {origin.target_error:g}" if origin.target_error is not None else f"sparsity {origin.target_sparsity:g}"
    )
    held = origin.held_out
    lines = [
        f"{origin.model}, {origin.created_with}, {origin.device}; fingerprint {origin.fingerprint}",
        f"aim: {aim}, by the {origin.by} sample, mode {origin.mode}; {origin.batches} batches, "
        f"{origin.query_blocks} query blocks, seed {origin.seed}",
        f"sparsity {total.sparsity:.1%}; error of heads: mean {total.mean_error:.4f}, worst {total.worst_error:.4f}; "
        f"{total.dense_heads} of {total.heads} heads stay dense",
    ]
    if not origin.complete:
        lines.insert(0, "NOT COMPLETE: the run was interrupted; the same command goes on where it stopped")
    if origin.modes:
        lines.append("sparsity by mode: " + ", ".join(f"{mode} {value:.1%}" for mode, value in origin.modes.items()))
    if held:
        within = f"; {held['within']:.1%} keep the bound, which is searched for with {origin.margin:g} of it"
        within = within if "within" in held else ""
        lines.append(
            f"on samples that the thresholds were not chosen by: sparsity {held['sparsity']:.1%}, error mean "
            f"{held['mean_error']:.4f} (expected {held['expected_mean_error']:.4f}), worst {held['worst_error']:.4f} "
            f"(expected {held['expected_worst_error']:.4f}){within}"
        )
    elif origin.modes:
        lines.append("not checked on held-out samples: that takes four of each site")
    rows = [
        (name, f"{starts[phase]:g}", curves.samples, *_row(points, origin.by))
        for name, phase, points, curves in calibration.points()
    ]
    headers = (
        "site",
        "from",
        "samples",
        "heads",
        "dense",
        "sparsity",
        "mean error",
        "worst error",
        "sparsest",
        "densest",
    )
    return "\n".join(lines) + "\n\n" + tabulate(rows, headers=headers, disable_numparse=True)


def _row(points: Sequence[Point], by: str) -> tuple[object, ...]:
    errors = [error_of(p, by) for p in points]
    order = sorted(range(len(points)), key=lambda h: points[h].density)

    def name(heads: Sequence[int]) -> str:
        return " ".join(f"{h}:{1 - points[h].density:.0%}" for h in heads)

    return (
        len(points),
        sum(p.density == 1 for p in points),
        f"{1 - sum(p.density for p in points) / len(points):.1%}",
        f"{sum(errors) / len(errors):.4f}",
        f"{max(errors):.4f}",
        name(order[:WORST]),
        name(order[-WORST:][::-1]),
    )


def _spans(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """The least and the largest value of each threshold."""
    return [f"{min(x):g}" if min(x) == max(x) else f"{min(x):g}–{max(x):g}" for x in zip(*pairs, strict=True)]


def plot(calibration: Calibration, out: str | os.PathLike[str]) -> list[Path]:
    """Write two PNGs, ``<out>-heads.png`` (sparsity of each site and head) and ``<out>-curves.png`` (error of each site
    by sparsity, and of the whole model where blocks are dropped where it hurts least). Needs matplotlib."""
    if calibration.origin is None:
        raise ValueError(
            explain_error(
                "nothing to draw",
                given="thresholds without measurements",
                allowed="what `sparge calibrate` made",
                todo="Calibrate the model.",
            )
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
    for name, curves in origin.curves.items():
        units = [Unit(front, phase.cost) for phase in curves.phases for front in phase.heads]
        everything += units
        _line(units, origin.by, axes, label=name if len(origin.curves) <= 12 else None, linewidth=0.8)
    _line(everything, origin.by, axes, label="whole model", color="black", linewidth=2)
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
