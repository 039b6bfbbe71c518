"""What a model's output said of a calibration: how much each head counts in it, and errors that were tried.

In: what a run measured, or plain JSON types of a file. Out: checked values, and the error to choose by for a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..pair import Table
from .entries import check_keys, is_number, wrong_entry

# What the model said of the chosen thresholds (calibrate/output.py): over how many runs, the mean of their errors, and
# the same of runs that had no part in the choice, with the largest of one.
REACHED = ("runs", "error", "held_out_runs", "held_out_error", "held_out_worst")
IN_PROPORTION = math.log(2)  # errors that grow as predicted, by a factor of two: what is known before trials


@dataclass(frozen=True)
class ModelOutput:
    """How a model's output depends on its heads, and what came of it.

    Attributes:
        influence: for each site and head, what its squared error counts in the relative squared error of the output.
        density: at which heads were tried for it; None: it was given.
        trials: (predicted, measured) relative L2 errors of the output, by the predicted one.
        safety: the share of a bound that is aimed at, so that other inputs keep the bound.
        reached: ``REACHED``, or nothing where the model did not run with the chosen thresholds.

    Raises:
        ValueError: a value that no run could have.
    """

    influence: Mapping[str, tuple[float, ...]]
    density: float | None = None
    trials: tuple[tuple[float, float], ...] = ()
    safety: float = 1.0
    reached: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.influence, Mapping) or not all(
            isinstance(name, str) and isinstance(each, (list, tuple)) and all(is_number(x) and x >= 0 for x in each)
            for name, each in self.influence.items()
        ):
            raise wrong_entry("influence", self.influence, "a list of numbers from 0 on for each site")
        if self.density is not None and not (is_number(self.density) and 0 <= self.density <= 1):
            raise wrong_entry("density", self.density, "a share in [0, 1]")
        if not is_number(self.safety) or not 0 < self.safety <= 1:
            raise wrong_entry("safety", self.safety, "a share in (0, 1]")
        trials = self.trials if isinstance(self.trials, (list, tuple)) else [()]
        if not all(len(pair) == 2 and all(is_number(x) and x > 0 for x in pair) for pair in trials):
            raise wrong_entry("trials", self.trials, "pairs of errors above 0")
        if not isinstance(self.reached, Mapping) or not set(self.reached) <= set(REACHED):
            raise wrong_entry("reached", self.reached, f"nothing, or {REACHED}")
        if not all(map(is_number, self.reached.values())):
            raise wrong_entry("reached", self.reached, "numbers")
        influence = Table({name: tuple(each) for name, each in self.influence.items()})
        object.__setattr__(self, "influence", influence)
        object.__setattr__(self, "trials", tuple(sorted((float(a), float(b)) for a, b in trials)))
        object.__setattr__(self, "reached", Table(self.reached))

    def predicted_at(self, error: float) -> float:
        """The predicted error of thresholds whose measured one is about this: by what was tried, else itself.

        On logarithms it goes straight from trial to trial. Beyond them the slope is that of the last two and of
        ``IN_PROPORTION`` together, since two that are near to each other tell little; of a single one it is 1.
        """
        by_measured = sorted((math.log(measured), math.log(predicted)) for predicted, measured in self.trials)
        if not by_measured:
            return error
        at = math.log(error)
        above = sum(measured <= at for measured, _ in by_measured)
        first = min(max(0, above - 1), max(0, len(by_measured) - 2))
        (low, start), (high, end) = by_measured[first], by_measured[min(first + 1, len(by_measured) - 1)]
        if low < high and low <= at <= high:
            return math.exp(start + (end - start) / (high - low) * (at - low))
        near, value = (low, start) if at < low else (high, end)
        slope = (end - start + IN_PROPORTION) / (high - low + IN_PROPORTION)
        return math.exp(value + min(max(slope, 1 / 3), 3.0) * (at - near))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {
            "influence": {name: list(each) for name, each in self.influence.items()},
            "density": self.density,
            "trials": [list(pair) for pair in self.trials],
            "safety": self.safety,
            "reached": dict(self.reached),
        }

    @staticmethod
    def from_dict(entry: Any) -> ModelOutput:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: anything else.
        """
        check_keys(entry, {"influence", "density", "trials", "safety", "reached"}, "output")
        return ModelOutput(**entry)
