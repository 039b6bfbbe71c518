"""The pictures of docs/fidelity.md: rules over sparsity, and ways to rank key blocks. In: rows. Out: PNG files."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from case import ALL, RATES
from tabular import RULES, Row, by_seed, grouped, numbers, where

FAR = ("random", "pooled before RoPE")  # ways that would fill a picture


def compared(quality: list[Row]) -> list[Row]:
    """Rules that differ in nothing else: one pair for all heads; of the large model in tiles, after the short
    training."""
    if rows := where(quality, part="rules", thresholds="one pair"):
        return rows
    rows = where(quality, part="arms", thresholds="one pair", order="tiles", anneal="0", outputs="0")
    rates = {"0", f"{RATES[ALL]:g}"}
    steps = min((int(row["steps"]) for row in rows if row["steps"] != "0"), default=0)
    return [row for row in rows if row["rate"] in rates and int(row["steps"]) in (0, steps) and row["loss"] != "flow"]


def plot_rules(quality: list[Row], path: Path, chance: float) -> None:
    """Velocity error and digits read over the sparsity reached, a line for each rule."""
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.2), layout="constrained")
    rows = compared(quality)
    for axis, measure in zip(axes, ("velocity error", "digits read"), strict=True):
        for color, (rule, name) in zip(("tab:blue", "tab:orange", "tab:green"), RULES.items(), strict=True):
            for loss, style, trained in (("none", "--", "not trained"), ("distillation", "-", "distilled")):
                of = where(rows, rule=rule, loss=loss)
                points = [
                    (by_seed(each, "sparsity"), by_seed(each, measure)) for each in grouped(of, "target").values()
                ]
                if not points:
                    continue
                points.sort(key=lambda point: statistics.mean(point[0]))
                x, y = ([statistics.mean(point[i]) for point in points] for i in (0, 1))
                low, high = ([each(point[1]) for point in points] for each in (min, max))
                axis.plot([100 * v for v in x], y, style, marker="o", color=color, label=f"{name}, {trained}")
                axis.fill_between([100 * v for v in x], low, high, color=color, alpha=0.15, linewidth=0)
        dense = by_seed(where(quality, part="floor", rule="dense"), measure)
        if measure == "digits read" and dense:
            axis.axhline(statistics.mean(dense), color="grey", linewidth=1, label="dense")
            axis.axhline(chance, color="grey", linewidth=1, linestyle=":", label="by chance")
        axis.set_xlabel("sparsity, %")
        axis.set_ylabel("‖u − v‖² ÷ ‖v‖²" if measure == "velocity error" else "share of digits read")
        axis.set_title(f"{measure[0].upper()}{measure[1:]}, one pair for the model")
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_orders(quality: list[Row], path: Path) -> None:
    """Velocity error and digits read over the sparsity reached, a line for each order of tokens, without training."""
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.2), layout="constrained")
    rows = where(quality, part="orders", steps="0")
    orders = {"raster": "tab:blue", "tiles": "tab:orange", "chosen": "tab:green"}
    for axis, measure in zip(axes, ("velocity error", "digits read"), strict=True):
        for kind, style in (("one pair", "--"), ("by influence", "-")):
            for order, color in orders.items():
                groups = grouped(where(rows, thresholds=kind, order=order), "target").values()
                points = [[statistics.mean(by_seed(each, of)) for of in ("sparsity", measure)] for each in groups]
                if points:
                    x, y = zip(*sorted(points), strict=True)
                    axis.plot([100 * v for v in x], y, style, marker=".", color=color, label=f"{order}, {kind}")
        dense = by_seed(where(quality, part="floor", rule="dense"), measure)
        if measure == "digits read" and dense:
            axis.axhline(statistics.mean(dense), color="grey", linewidth=1, label="dense")
        axis.set_xlabel("sparsity, %")
        axis.set_ylabel("‖u − v‖² ÷ ‖v‖²" if measure == "velocity error" else "share of digits read")
        axis.set_title(f"{measure[0].upper()}{measure[1:]}, not trained")
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_ranking(rows: list[Row], path: Path) -> None:
    """The error over the oracle's by the share of blocks kept, and by layer at a tenth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_way = {
        way: {density: statistics.mean(numbers(each, "error")) for density, each in grouped(of, "density").items()}
        for way, of in grouped(rows, "way").items()
    }
    for way, errors in by_way.items():
        if way not in FAR:
            ratios = [error / by_way["oracle"][density] for density, error in errors.items()]
            left.plot([100 * float(density) for density in errors], ratios, marker=".", label=way)
    kept = [float(density) for density in by_way["oracle"]]
    left.set_xscale("log")
    left.set_xticks([100 * density for density in kept], [f"{100 * density:g}" for density in kept])
    left.minorticks_off()
    left.set(xlabel="key blocks kept, %", ylabel="error ÷ error of the oracle", title="Ways to rank, mean over heads")
    left.legend(fontsize=7)
    tenth = where(rows, density="0.1")
    ways = ("pooled", "oracle", "tiles 2x4x8", "random")
    for i, way in enumerate(ways):
        layers = grouped(where(tenth, way=way), "site").values()
        bars = [statistics.mean(numbers(each, "error")) for each in layers]
        right.bar([layer + 0.2 * (i - 1.5) for layer in range(len(bars))], bars, 0.2, label=way)
    right.set(xlabel="layer", ylabel="relative L1 error", title="By layer, a tenth of the blocks kept")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
