"""Results on the disk: the tables there are, and the row of a model."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

BUFFER = 1 << 20  # bytes: what is added to a table is written at once, also beside another process
ALL, ATTENTION = "all weights", "attention layers"  # what trains
LATE = "more blocks late in sampling"  # what thresholds "by step" keep, in words
RATES = {ALL: 2e-3, ATTENTION: 4e-3}  # docs/fidelity.md, "Learning rates"


@dataclass(frozen=True)
class Case:
    """A model of the study: its thresholds, and how it was fine-tuned. Known by all of it, and a seed."""

    part: str
    rule: str = "hybrid"
    thresholds: str = ""  # one pair for all heads, each head's by errors of attention, or these by influence
    target: float | str = ""  # sparsity that is asked for
    order: str = "raster"
    loss: str = "none"  # distillation, guided (of pairs with and without classes), flow, or none: not trained
    data: str = ""  # matched or shifted
    trained: str = ""
    steps: int = 0
    rate: float = 0.0
    anneal: float = 0.0  # share of the steps in which thresholds go from gentle ones to the target
    outputs: float = 0.0  # weight of the errors of attention outputs in the loss

    def tuned(
        self, steps: int, trained: str = ALL, loss: str = "distillation", data: str = "matched", rate: float = 0.0
    ) -> Case:
        """The same after some steps of fine-tuning, from the dense weights."""
        rate = rate or RATES[trained]
        return replace(self, loss=loss, data=data, trained=trained, steps=steps, rate=rate)

    @property
    def name(self) -> str:
        """In words, of which patterns pick some."""
        parts = [self.rule, self.thresholds, self.order, str(self.target)]
        if self.steps:
            parts += [self.loss, self.data, self.trained, f"{self.steps} steps", f"rate {self.rate:g}"]
            parts += [f"anneal {self.anneal:g}"] * bool(self.anneal) + [f"outputs {self.outputs:g}"] * bool(
                self.outputs
            )
        else:
            parts.append("not trained")
        return ", ".join(part for part in parts if part)


KEY = ("part", "seed", *(field.name for field in fields(Case) if field.name != "part"))


QUALITY = ("sparsity", "velocity error", "flow loss", "PSNR", "SSIM", "digits read", "flicker")
TABLES = {  # by the file's name: the columns that a row is known by, and what was found
    "quality": (KEY, ("pair", *QUALITY)),
    "rates": (("seed", "trained", "rate"), ("velocity error", "flow loss")),
    "structures": (("seed", "structure", "topk", "topp"), ("sparsity", "error", "worst head")),
    "error_split": (
        ("seed", "site", "head", "density"),
        ("error", "dropped", "renormalised", "lost_mass", "cosine"),
    ),
    "ranking": (("seed", "site", "head", "density", "way"), ("blocks", "mass", "error")),
    "apart": (("seed", "student", "what", "which"), ("value",)),
    "timing": (("device", "what", "order", "target"), ("sparsity", "dense ms", "sparse ms")),
}


def key_of(case: Case, seed: int) -> tuple[object, ...]:
    values = asdict(case) | {"seed": seed}
    return tuple(values[name] for name in KEY)


class Table:
    """A CSV file of a folder; a row is known by the columns of its key. Several processes may add to one file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.key, self.values = TABLES[name]
        self.path, self.columns = folder / f"{name}.csv", (*self.key, *self.values)
        path, key = self.path, self.key
        self.done: set[tuple[str, ...]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(self.columns)
        except FileExistsError:
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != self.columns:
                    raise SystemExit(f"{path} has other columns than {', '.join(self.columns)}: move it away") from None
                self.done = {tuple(row[name] for name in key) for row in reader}

    def has(self, *key: object) -> bool:
        return tuple(map(_text, key)) in self.done

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows; those that are there already stay as they are."""
        with self.path.open("a", newline="", buffering=BUFFER) as file:
            writer = csv.writer(file, lineterminator="\n")
            for row in rows:
                key = tuple(_text(row[name]) for name in self.key)
                if key not in self.done:
                    writer.writerow([_text(row[name]) for name in self.columns])
                    self.done.add(key)


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
