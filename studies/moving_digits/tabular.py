"""Results as rows of text: read, picked, and put into tables. Numbers are means over seeds, ± their standard
deviation."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

RULES = {"topk": "Top-k", "topp": "Top-p", "hybrid": "hybrid"}
MEASURES = ("velocity error", "flow loss", "PSNR", "SSIM", "digits read", "flicker")
DIGITS = {"PSNR": 1, "SSIM": 3, "digits read": 3, "flicker": 3, "sparsity": 3}  # after the point; others have 4
SAME = 100.0  # dB

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


def grouped(rows: Iterable[Row], column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    aligned = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=aligned)
