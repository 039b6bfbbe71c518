"""The tables and pictures of docs/fidelity.md out of the results of ``reproduce.py``.

In: the CSV files of a folder. Out: PNG files there, and each table between ``<!-- name -->`` and ``<!-- /name -->`` of
the page that has the folder's name. Numbers are means over seeds, ± their standard deviation.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

RULES = {"topk": "Top-k", "topp": "Top-p", "hybrid": "hybrid"}
TARGETS = ("0.8", "0.85", "0.9", "0.95", "0.97")
MEASURES = ("velocity error", "flow loss", "PSNR", "SSIM", "digits read", "flicker")
DIGITS = {"PSNR": 1, "SSIM": 3, "digits read": 3, "flicker": 3, "sparsity": 3}  # after the point; others have 4
SAME = 100.0  # dB
PAPER = {  # Table 6 of arXiv 2602.13515, Wan2.1-1.3B: image quality and VQA
    ("hybrid", "distillation"): (67.68, 86.73),
    ("topk", "distillation"): (65.84, 86.90),
    ("topp", "distillation"): (60.56, 62.57),
    ("hybrid", "none"): (53.18, 20.40),
    ("hybrid", "flow"): (67.23, 85.05),
}
FAR = ("random", "pooled before RoPE")  # ways that would fill a picture
LAYER = re.compile(r"\d+")

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows: Iterable[Row], column: str) -> list[float]:
    return [value for value in (float(row[column]) for row in rows) if not math.isnan(value)]


def by_seed(rows: Iterable[Row], column: str) -> list[float]:
    """The mean of each seed."""
    seeds: dict[str, list[Row]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], []).append(row)
    return [statistics.mean(found) for each in seeds.values() if (found := numbers(each, column))]


def shown(rows: Iterable[Row], column: str) -> str:
    """Mean ± standard deviation over seeds; an en dash where there is none."""
    values = by_seed(rows, column)
    if not values:
        return "–"
    mean, places = statistics.mean(values), DIGITS.get(column, 4)
    if column == "PSNR" and mean > SAME:
        return "same"
    if not any(values):
        return "0"
    form = ".1e" if abs(mean) < 5 * 10.0**-places else f".{places}f"
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean:{form}}{spread}"


def where(rows: Iterable[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    aligned = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=aligned)


# ---- tables


def floor_table(quality: list[Row]) -> str:
    rows = where(quality, part="floor")
    kinds = list(dict.fromkeys(row["attention"] for row in rows))
    return markdown(
        ("", *MEASURES), ([kind, *(shown(where(rows, attention=kind), m) for m in MEASURES)] for kind in kinds)
    )


def rules_table(quality: list[Row], measure: str) -> str:
    rows = where(quality, part="rules")
    lines = []
    for loss, trained in (("none", "not trained"), ("distillation", "distilled")):
        for kind in ("one pair", "each head"):
            for rule, name in RULES.items():
                of = where(rows, loss=loss, thresholds=kind, rule=rule)
                lines.append([f"{trained}, {kind}, {name}", *(shown(where(of, target=t), measure) for t in TARGETS)])
    return markdown(("", *(f"{float(t):.0%}" for t in TARGETS)), lines)


def paper_table(quality: list[Row]) -> str:
    rows = where(quality, target="0.95", thresholds="one pair")
    names = {"distillation": "distilled", "none": "not trained", "flow": "plain loss"}
    lines = []
    for (rule, loss), (image_quality, vqa) in PAPER.items():
        part = "losses" if loss == "flow" else "rules"
        of = where(rows, part=part, rule=rule, loss=loss, attention="sparse")
        of = where(of, data="matched") if loss == "flow" else of
        ours = [shown(of, m) for m in ("velocity error", "PSNR", "digits read", "flicker")]
        lines.append([f"{RULES[rule]}, {names[loss]}", f"{image_quality:.2f}", f"{vqa:.2f}", *ours])
    of = where(quality, part="floor", attention="dense")
    lines.append(["full attention", "63.67", "–", *(shown(of, m) for m in ("velocity error",)), "–"])
    lines[-1] += [shown(of, m) for m in ("digits read", "flicker")]
    return markdown(("", "paper: IQ", "paper: VQA", "velocity error", "PSNR", "digits read", "flicker"), lines)


def losses_table(quality: list[Row]) -> str:
    rows, lines = where(quality, part="losses"), []
    for attention in ("sparse", "full"):
        for loss, name in (("distillation", "distillation"), ("flow", "plain loss")):
            for data in ("matched", "shifted"):
                if of := where(rows, attention=attention, loss=loss, data=data):
                    lines.append([f"{attention}, {name}, {data} data", *(shown(of, m) for m in MEASURES)])
    return markdown(("attention, loss, data", *MEASURES), lines)


def students_table(quality: list[Row]) -> str:
    rows, lines = where(quality, part="students"), []
    for target in sorted({row["target"] for row in rows}):
        for loss, trained in (
            ("none", "sparse"),
            ("distillation", "attention layers"),
            ("distillation", "all weights"),
        ):
            if of := where(rows, target=target, loss=loss, attention=trained):
                name = "not trained" if loss == "none" else f"{trained} trained"
                lines.append([f"{float(target):.0%}, {name}", *(shown(of, m) for m in ("sparsity", *MEASURES))])
    of = where(quality, part="floor", attention="dense")
    lines.append(["dense", *(shown(of, m) for m in ("sparsity", *MEASURES))])
    return markdown(("", "sparsity", *MEASURES), lines)


def defaults_table(quality: list[Row]) -> str:
    rows = where(quality, part="defaults")
    pairs = list(dict.fromkeys(row["target"] for row in rows))
    columns = ("sparsity", "velocity error", "PSNR", "SSIM", "digits read")
    return markdown(("topk, topp", *columns), ([p, *(shown(where(rows, target=p), m) for m in columns)] for p in pairs))


def structures_table(rows: list[Row]) -> str:
    kinds = list(dict.fromkeys(row["structure"] for row in rows))
    pairs = list(dict.fromkeys((row["topk"], row["topp"]) for row in rows))
    lines = []
    for topk, topp in pairs:
        of = where(rows, topk=topk, topp=topp)
        cells = [where(of, structure=kind) for kind in kinds]
        lines.append(
            [
                f"{topk}, {topp}",
                *(f"{_mean(each, 'error', 3)} at {_mean(each, 'sparsity', 2)}" for each in cells),
            ]
        )
    return markdown(("topk, topp", *kinds), lines)


def _mean(rows: Iterable[Row], column: str, places: int) -> str:
    return f"{statistics.mean(numbers(rows, column)):.{places}f}"


def split_table(rows: list[Row]) -> str:
    columns = {
        "error": "error",
        "dropped": "dropped term",
        "renormalised": "renormalising term",
        "cosine": "cosine of the two",
        "lost_mass": "mass dropped",
    }
    lines = []
    for density in dict.fromkeys(row["density"] for row in rows):
        of = where(rows, density=density)
        lines.append([f"{float(density):.0%}", *(shown(of, column) for column in columns)])
    return markdown(("blocks kept", *columns.values()), lines)


def ranking_table(rows: list[Row]) -> str:
    """Mean over layers and heads, and of the worst layer."""
    densities = list(dict.fromkeys(row["density"] for row in rows))
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for density in densities:
            of = where(rows, way=way, density=density)
            worst = max(statistics.mean(numbers(each, "error")) for each in _by(of, "site").values())
            cells.append(f"{statistics.mean(numbers(of, 'error')):.3f} / {worst:.3f}")
        lines.append([way, *cells])
    return markdown(("ranked by", *(f"{float(d):.0%} kept" for d in densities)), lines)


def layers_table(rows: list[Row], density: str = "0.1") -> str:
    """The error by layer, and the range of its heads under the pooled scores."""
    rows, lines = where(rows, density=density), []
    sites = list(dict.fromkeys(row["site"] for row in rows))
    for way in ("pooled", "oracle", "second look", "pooled before RoPE", "tiles 2x4x8", "random"):
        of = where(rows, way=way)
        lines.append([way, *(_mean(where(of, site=site), "error", 3) for site in sites)])
    ranges = []
    for site in sites:
        heads = _by(where(rows, way="pooled", site=site), "head")
        means = [statistics.mean(numbers(each, "error")) for each in heads.values()]
        ranges.append(f"{min(means):.2f}–{max(means):.2f}")
    lines.insert(1, ["pooled: its heads", *ranges])
    return markdown(("layer", *(LAYER.findall(site)[0] for site in sites)), lines)


def _by(rows: Iterable[Row], column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


# ---- pictures


def plot_rules(quality: list[Row], path: Path) -> None:
    """Velocity error and digits read over the sparsity reached, a line for each rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = where(quality, part="rules", thresholds="one pair")
    for axis, measure in zip(axes, ("velocity error", "digits read"), strict=True):
        for color, (rule, name) in zip(("tab:blue", "tab:orange", "tab:green"), RULES.items(), strict=True):
            for loss, style, trained in (("none", "--", "not trained"), ("distillation", "-", "distilled")):
                of = where(rows, rule=rule, loss=loss)
                points = [(by_seed(each, "sparsity"), by_seed(each, measure)) for each in _by(of, "target").values()]
                if not points:
                    continue
                points.sort(key=lambda point: statistics.mean(point[0]))
                x, y = ([statistics.mean(point[i]) for point in points] for i in (0, 1))
                low, high = ([each(point[1]) for point in points] for each in (min, max))
                axis.plot([100 * v for v in x], y, style, marker="o", color=color, label=f"{name}, {trained}")
                axis.fill_between([100 * v for v in x], low, high, color=color, alpha=0.15, linewidth=0)
        dense = by_seed(where(quality, part="floor", attention="dense"), measure)
        if measure == "digits read" and dense:
            axis.axhline(statistics.mean(dense), color="grey", linewidth=1, label="dense")
        axis.set_xlabel("sparsity, %")
        axis.set_ylabel("‖u − v‖² ÷ ‖v‖²" if measure == "velocity error" else "share of digits read")
        axis.set_title(f"{measure[0].upper()}{measure[1:]}, one pair for the model")
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_ranking(rows: list[Row], path: Path) -> None:
    """The error over the oracle's by the share of blocks kept, and by layer at a tenth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_way = {
        way: {density: statistics.mean(numbers(each, "error")) for density, each in _by(of, "density").items()}
        for way, of in _by(rows, "way").items()
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
        layers = _by(where(tenth, way=way), "site").values()
        bars = [statistics.mean(numbers(each, "error")) for each in layers]
        right.bar([layer + 0.2 * (i - 1.5) for layer in range(len(bars))], bars, 0.2, label=way)
    right.set(xlabel="layer", ylabel="relative L1 error", title="By layer, a tenth of the blocks kept")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- the page


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put each table between its marks; a page without the marks of one is a mistake."""
    text = page.read_text()
    for name, table in tables.items():
        marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        text, found = marks.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"{page} has {found} places for the table {name!r}: it needs one, between two marks")
    page.write_text(text)


def tables(out: Path) -> dict[str, str]:
    """Each table of which there are results, by its name in the page."""
    quality = read(out / "quality.csv")
    found: dict[str, str] = {}
    if quality:
        found = {
            "versions": (out / "versions.txt").read_text().strip() + ".",
            "floor": floor_table(quality),
            "rules": rules_table(quality, "velocity error"),
            "digits": rules_table(quality, "digits read"),
            "paper": paper_table(quality),
            "losses": losses_table(quality),
            "students": students_table(quality),
            "defaults": defaults_table(quality),
        }
    others: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
        "structures": ("structures.csv", structures_table),
        "split": ("error_split.csv", split_table),
        "ranking": ("ranking.csv", ranking_table),
        "layers": ("ranking.csv", layers_table),
    }
    for name, (file, table) in others.items():
        if rows := read(out / file):
            found[name] = table(rows)
    return found


def report(out: Path) -> None:
    """Write the pictures into ``out`` and its tables into the page of its name beside it; without one, print them."""
    if quality := read(out / "quality.csv"):
        plot_rules(quality, out / "rules.png")
    if ranking := read(out / "ranking.csv"):
        plot_ranking(ranking, out / "ranking.png")
    page, made = out.with_suffix(".md"), tables(out)
    if page.exists():
        fill(page, made)
        print(f"wrote {len(made)} tables into {page}")
    else:
        for name, table in made.items():
            print(f"\n{name}\n{table}")
