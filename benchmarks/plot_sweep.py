"""A picture of a sweep: speed-up over dense against length, one line for each sparsity, forward and backward.

    python benchmarks/plot_sweep.py sweep.csv docs/kernel_sweep.png

Goes in: the CSV of benchmarks/sweep.py. Comes out: a PNG, and the break-even lengths in print. Where a line crosses 1,
the sparse kernels begin to pay; that length is marked.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

from methods import BACKWARD, WHOLE
from tabulate import tabulate

PANELS = {WHOLE: "forward, map included", BACKWARD: "backward"}

Line = list[tuple[int, float]]  # (length, speed-up), ascending


def lines_of(rows: Sequence[dict[str, str]], shape: str, method: str) -> dict[float, Line]:
    """For each wanted sparsity the speed-up over dense by length; cases without a time are left out."""
    lines: dict[float, Line] = {}
    for row in rows:
        if row["shape"] == shape and row["method"] == method and row["x dense"]:
            lines.setdefault(float(row["wanted"]), []).append((int(row["length"]), float(row["x dense"])))
    return {sparsity: sorted(lines[sparsity]) for sparsity in sorted(lines)}


def break_even(line: Line) -> float | None:
    """From which length on the speed-up stays at 1 or more, between two lengths by a straight line over logarithms.

    The first length where all are, None where the last is not.
    """
    losing = [i for i, (_, speedup) in enumerate(line) if speedup < 1]
    if not losing:
        return line[0][0]
    if losing[-1] == len(line) - 1:
        return None
    (x0, y0), (x1, y1) = line[losing[-1]], line[losing[-1] + 1]
    share = -math.log(y0) / (math.log(y1) - math.log(y0))
    return x0 * (x1 / x0) ** share


def told(line: Line) -> str:
    found = break_even(line)
    if found is None:
        return f"beyond {line[-1][0]}"
    return f"below {line[0][0]}" if found == line[0][0] else f"{found:.0f}"


def draw(rows: Sequence[dict[str, str]], shape: str, path: str | Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 6), sharey=True, layout="constrained")
    for axis, (method, title) in zip(axes, PANELS.items(), strict=True):
        for sparsity, line in lines_of(rows, shape, method).items():
            label = f"{sparsity:.0%} sparsity, break-even {told(line)}"
            (drawn,) = axis.plot(*zip(*line, strict=True), marker="o", markersize=4, label=label)
            found = break_even(line)
            if found is not None and found != line[0][0]:
                axis.plot([found], [1], marker="D", color=drawn.get_color())
        axis.axhline(1, color="grey", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
        axis.set(title=title, xlabel="tokens")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    axes[0].set_ylabel("speed-up over dense attention")
    figure.suptitle(f"{shape}, {rows[0]['dtype']}\n{rows[0]['who']}", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", help="what benchmarks/sweep.py wrote")
    parser.add_argument("png", help="file to write")
    parser.add_argument("--shape", help="which shape of the file (the first)")
    args = parser.parse_args()
    with open(args.csv, newline="") as file:
        rows = list(csv.DictReader(file))
    shape = args.shape or rows[0]["shape"]
    draw(rows, shape, args.png)
    found = [
        (title, f"{sparsity:.0%}", told(line))
        for method, title in PANELS.items()
        for sparsity, line in lines_of(rows, shape, method).items()
    ]
    print(tabulate(found, headers=(shape, "sparsity", "break-even (tokens)"), tablefmt="github"))


if __name__ == "__main__":
    main()
