"""The tables of docs/fidelity.md out of the results of ``reproduce.py``.

In: the CSV files of a folder. Out: tables, which ``fill`` puts between ``<!-- name -->`` and ``<!-- /name -->``.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from setups import DOCS, SETUPS
from tables_of_arms import apart_table, arms_table, timing_table
from tabular import MEASURES, RULES, Row, grouped, markdown, numbers, read, shown, where

PAGE = DOCS / "fidelity.md"
TARGETS = ("0.8", "0.85", "0.9", "0.95", "0.97")
PAPER = {  # Table 6 of arXiv 2602.13515, Wan2.1-1.3B: image quality and VQA
    ("hybrid", "distillation"): (67.68, 86.73),
    ("topk", "distillation"): (65.84, 86.90),
    ("topp", "distillation"): (60.56, 62.57),
    ("hybrid", "none"): (53.18, 20.40),
    ("hybrid", "flow"): (67.23, 85.05),
}
LAYER = re.compile(r"\d+")

# ---- tables


def floor_table(quality: list[Row]) -> str:
    rows = where(quality, part="floor")
    return markdown(
        ("", *MEASURES), ([kind, *(shown(of, m) for m in MEASURES)] for kind, of in grouped(rows, "rule").items())
    )


def rules_table(quality: list[Row], measure: str) -> str:
    rows, lines = where(quality, part="rules"), []
    for loss, trained in (("none", "not trained"), ("distillation", "distilled")):
        for kind in ("one pair", "each head", "by influence"):
            for rule, name in RULES.items():
                if not (of := where(rows, loss=loss, thresholds=kind, rule=rule)):
                    continue
                lines.append([f"{trained}, {kind}, {name}", *(shown(where(of, target=t), measure) for t in TARGETS)])
    return markdown(("", *(f"{float(t):.0%}" for t in TARGETS)), lines)


def paper_table(quality: list[Row]) -> str:
    rows = where(quality, target="0.95", thresholds="one pair")
    names = {"distillation": "distilled", "none": "not trained", "flow": "plain loss, matched data"}
    columns, lines = ("sparsity", "velocity error", "PSNR", "digits read", "flicker"), []
    for (rule, loss), figures in PAPER.items():
        of = where(rows, part="losses" if loss == "flow" else "rules", rule=rule, loss=loss)
        of = where(of, data="matched") if loss == "flow" else of
        name = f"{RULES[rule]}, {names[loss]}"
        lines.append([name, *(f"{x:.2f}" for x in figures), *(shown(of, column) for column in columns)])
    dense = where(quality, part="floor", rule="dense")
    lines.append(["dense", "–", "–", *(shown(dense, column) for column in columns)])
    return markdown(("", "paper: IQ", "paper: VQA", *columns), lines)


def losses_table(quality: list[Row]) -> str:
    rules = where(quality, part="rules", rule="hybrid", thresholds="one pair", target="0.95")
    rows = where(quality, part="losses")
    cases = {
        "sparse, not trained": where(rules, loss="none"),
        "sparse, distillation, matched data": where(rules, loss="distillation"),
        "sparse, distillation, shifted data": where(rows, rule="hybrid", loss="distillation"),
        "sparse, plain loss, matched data": where(rows, rule="hybrid", loss="flow", data="matched"),
        "sparse, plain loss, shifted data": where(rows, rule="hybrid", loss="flow", data="shifted"),
        "full, plain loss, matched data": where(rows, rule="full attention", data="matched"),
        "full, plain loss, shifted data": where(rows, rule="full attention", data="shifted"),
    }
    return markdown(
        ("attention, loss, data", "sparsity", *MEASURES),
        ([name, *(shown(of, m) for m in ("sparsity", *MEASURES))] for name, of in cases.items()),
    )


def students_table(quality: list[Row]) -> str:
    rules = where(quality, part="rules", rule="hybrid", thresholds="one pair")
    students, lines = where(quality, part="students"), []
    for target in ("0.9", "0.95", "0.97"):
        cases = {
            "not trained": where(rules, loss="none", target=target),
            "distilled": where(rules, loss="distillation", target=target),
            "distilled for long, attention layers": where(students, target=target, trained="attention layers"),
            "distilled for long": where(students, target=target, trained="all weights"),
        }
        for name, of in cases.items():
            if of:
                lines.append([f"{float(target):.0%}, {name}", *(shown(of, m) for m in ("sparsity", *MEASURES))])
    others = {
        "in the repository, 4,000 steps": where(quality, part="shipped"),
        "dense": where(quality, part="floor", rule="dense"),
    }
    lines += [[name, *(shown(of, m) for m in ("sparsity", *MEASURES))] for name, of in others.items() if of]
    return markdown(("", "sparsity", *MEASURES), lines)


def rates_table(rows: list[Row]) -> str:
    rates = sorted({row["rate"] for row in rows}, key=float)
    lines = [
        [trained, *(shown(where(of, rate=rate), "velocity error") for rate in rates)]
        for trained, of in grouped(rows, "trained").items()
    ]
    return markdown(("learning rate", *(f"{float(rate):g}" for rate in rates)), lines)


def defaults_table(quality: list[Row]) -> str:
    columns = ("sparsity", "velocity error", "PSNR", "SSIM", "digits read")
    cases = grouped(where(quality, part="defaults"), "target").items()
    return markdown(("topk, topp", *columns), ([name, *(shown(of, m) for m in columns)] for name, of in cases))


def orders_table(quality: list[Row], measure: str) -> str:
    """Raster order beside tiles, and what calibration chooses, without training."""
    rows = where(quality, part="orders", steps="0")
    targets = sorted({row["target"] for row in rows}, key=float)
    lines = []
    for kind, some in grouped(rows, "thresholds").items():
        for (rule, of), order in itertools.product(grouped(some, "rule").items(), ("raster", "tiles", "chosen")):
            cells = [where(of, order=order, target=target) for target in targets]
            if any(cells):
                name = f"not trained, {kind}, {RULES[rule]}, {order}"
                lines.append([name, *(shown(c, measure) if c else "–" for c in cells)])
    return markdown(("", *(f"{float(t):.0%}" for t in targets)), lines)


def distilled_orders_text(quality: list[Row]) -> str:
    """The same after distillation: a table, and in words what tiles do to the error. Nothing, where nothing was run."""
    rows = [row for row in where(quality, part="orders") if row["steps"] != "0"]
    if not rows:
        return ""
    columns = ("sparsity", "velocity error", "PSNR", "digits read")
    lines, words = [], []
    for target, of in sorted(grouped(rows, "target").items(), key=lambda each: float(each[0])):
        for order, some in grouped(of, "order").items():
            lines.append([f"{float(target):.0%}, {order}", *(shown(some, column) for column in columns)])
        found = {(row["seed"], row["order"]): row for row in of}
        both = [seed for seed, order in found if order == "tiles" and (seed, "raster") in found]
        if pairs := [(found[seed, "tiles"], found[seed, "raster"]) for seed in both]:
            ratios = [float(tiles["velocity error"]) / float(raster["velocity error"]) for tiles, raster in pairs]
            change, seeds = statistics.mean(ratios) - 1, sum(ratio < 1 for ratio in ratios)
            at, beside = (statistics.mean(float(pair[i]["sparsity"]) for pair in pairs) for i in (0, 1))
            words.append(
                f"{abs(change):.0%} {'less' if change < 0 else 'more'} at {at:.1%} sparsity beside {beside:.1%} "
                f"(less in {seeds} of {len(pairs)} seeds)"
            )
    steps = " and ".join(f"{int(n):,}" for n in grouped(rows, "steps"))
    table = markdown(("", *columns), lines)
    said = f"\n\nIn tiles the velocity error is, beside raster order, {'; '.join(words)}." if words else ""
    return f"Distilled for {steps} steps of all weights, one pair for all heads:\n\n{table}{said}\n"


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
            worst = max(statistics.mean(numbers(each, "error")) for each in grouped(of, "site").values())
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
        heads = grouped(where(rows, way="pooled", site=site), "head")
        means = [statistics.mean(numbers(each, "error")) for each in heads.values()]
        ranges.append(f"{min(means):.2f}–{max(means):.2f}")
    lines.insert(1, ["pooled: its heads", *ranges])
    return markdown(("layer", *(LAYER.findall(site)[0] for site in sites)), lines)


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


# by its name in the page: the file, the part that it is of (any), and what makes it
TABLES: dict[str, tuple[str, str, Callable[[list[Row]], str]]] = {
    "floor": ("quality", "floor", floor_table),
    "sparsity": ("quality", "rules", lambda rows: rules_table(rows, "sparsity")),
    "rules": ("quality", "rules", lambda rows: rules_table(rows, "velocity error")),
    "digits": ("quality", "rules", lambda rows: rules_table(rows, "digits read")),
    "paper": ("quality", "losses", paper_table),
    "losses": ("quality", "losses", losses_table),
    "students": ("quality", "students", students_table),
    "orders": ("quality", "orders", lambda rows: orders_table(rows, "velocity error")),
    "orders sparsity": ("quality", "orders", lambda rows: orders_table(rows, "sparsity")),
    "orders PSNR": ("quality", "orders", lambda rows: orders_table(rows, "PSNR")),
    "orders digits": ("quality", "orders", lambda rows: orders_table(rows, "digits read")),
    "orders distilled": ("quality", "orders", distilled_orders_text),
    "defaults": ("quality", "defaults", defaults_table),
    "arms": ("quality", "arms", arms_table),
    "apart": ("apart", "", apart_table),
    "timing": ("timing", "", timing_table),
    "rates": ("rates", "", rates_table),
    "structures": ("structures", "", structures_table),
    "split": ("error_split", "", split_table),
    "ranking": ("ranking", "", ranking_table),
    "layers": ("ranking", "", layers_table),
}


def tables(out: Path) -> dict[str, str]:
    """Each table of which there are results, by its name in the page; those of the large model have its name first."""
    first = f"{out.name} " if out.name in SETUPS else ""
    found = {}
    for name, (file, part, table) in TABLES.items():
        rows = read(out / f"{file}.csv")
        if where(rows, part=part) if part else rows:
            found[first + name] = table(rows)
    if found:
        found[f"{first}settings"] = (out / "settings.txt").read_text().strip() + "."
    return found
