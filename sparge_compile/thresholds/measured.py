"""Where a calibration's thresholds come from: model, machine, aim, and each head's measured front.

In: what a run measured, or plain JSON types of a file. Out: checked values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..pair import Table
from .checks import AIMS
from .entries import check_keys, check_whole, is_number, wrong_entry
from .fronts import BY, DENSE, MODES
from .output import ModelOutput
from .site_curves import SiteCurves

# What the check on other samples says (calibrate/search.py), and for a bound also what share keeps it.
CHECKED = ("samples", "sparsity", "mean_error", "worst_error", "expected_mean_error", "expected_worst_error")
WITHIN = "within"

# Fields that a file has only where they say something: older versions of this package do not know them.
_OPTIONAL = {"gains", "output", "target_output_error"}


@dataclass(frozen=True)
class Origin:
    """A calibration run. ``curves`` has the sites; the rest is printed, and checked where it can be.

    Raises:
        ValueError: a field that no run could have.
    """

    model: str
    created_with: str
    device: str
    query_block: int
    key_block: int
    by: str
    mode: str
    seed: int
    query_blocks: int  # of each call, head and batch element
    batches: int
    complete: bool
    target_error: float | None = None
    target_sparsity: float | None = None
    margin: float = 1.0  # the share of a bound that thresholds are chosen by, so that other samples keep all of it
    modes: Mapping[str, float] = field(default_factory=dict)  # sparsity that each mode reaches for the aim
    held_out: Mapping[str, float] = field(default_factory=dict)  # see calibrate/search.py
    curves: Mapping[str, SiteCurves] = field(default_factory=dict)
    gains: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # errors with kept tokens, and without
    target_output_error: float | None = None
    output: ModelOutput | None = None  # what the model's output said, where it was asked

    @property
    def batches_text(self) -> str:
        """How many batches it has seen, in words."""
        return f"{self.batches} batch{'es' * (self.batches != 1)}"

    def __post_init__(self) -> None:
        for name in ("model", "created_with", "device"):
            if not isinstance(getattr(self, name), str):
                raise wrong_entry(name, getattr(self, name), "a text")
        for name, least in (("query_block", 1), ("key_block", 1), ("query_blocks", 1), ("batches", 0), ("seed", None)):
            check_whole(getattr(self, name), name, least)
        for name, known in (("by", BY), ("mode", MODES), ("complete", (True, False))):
            value = getattr(self, name)
            if not any(value is k or (isinstance(value, str) and value == k) for k in known):
                raise wrong_entry(name, value, ", ".join(map(repr, known)))
        aims = [getattr(self, name) for name in AIMS if getattr(self, name) is not None]
        if len(aims) != 1 or not is_number(aims[0]) or not 0 <= aims[0] < 1:
            raise wrong_entry("aim", aims, f"one of {', '.join(AIMS)}, a share in [0, 1)")
        # What is predicted of the output may lie on either side of what is measured.
        if not is_number(self.margin) or not 0 < self.margin <= (1 if self.target_output_error is None else math.inf):
            raise wrong_entry("margin", self.margin, "a share in (0, 1]")
        heads = {name: len(curves.phases[0].heads) for name, curves in self.curves.items()}
        weights = {} if self.output is None else {name: len(each) for name, each in self.output.influence.items()}
        if heads and weights and weights != heads:
            raise wrong_entry("influence", "weights of other sites or heads", "a number for each head with curves")
        for name in ("modes", "held_out"):
            table = getattr(self, name)
            if not isinstance(table, Mapping) or not all(isinstance(k, str) and is_number(v) for k, v in table.items()):
                raise wrong_entry(name, table, "a table of numbers")
        if not set(self.modes) <= set(MODES):
            raise wrong_entry("modes", sorted(self.modes), f"of {MODES}")
        pairs = list(self.gains.values())
        if not all(len(pair) == 2 and all(map(is_number, pair)) for pair in pairs) or set(self.gains) - set(
            self.curves
        ):
            raise wrong_entry("gains", dict(self.gains), "two errors for sites with curves")
        object.__setattr__(self, "gains", {name: tuple(pair) for name, pair in self.gains.items()})
        for name in ("modes", "held_out", "curves", "gains"):
            object.__setattr__(self, name, Table(getattr(self, name)))
        if self.held_out and set(self.held_out) - {WITHIN} != set(CHECKED):
            raise wrong_entry("held_out", sorted(self.held_out), f"nothing, or {CHECKED} and perhaps {WITHIN!r}")

    @property
    def fingerprint(self) -> str:
        """A hash of the sites: names, numbers of heads, head sizes."""
        sites = sorted((name, len(c.phases[0].heads), c.head_size) for name, c in self.curves.items())
        return hashlib.sha256(json.dumps(sites).encode()).hexdigest()[:16]

    def aimed(self, aim: Mapping[str, Any]) -> Origin:
        """Return the same measurements with another aim; what was said of the old one is left out.

        Raises:
            ValueError: an error of the output as aim, and nothing is known of it.
        """
        none = dict.fromkeys(AIMS)
        output = None if self.output is None else replace(self.output, reached={})
        fresh = replace(self, **{**none, "modes": {}, "held_out": {}, "gains": {}, "output": output, **aim})
        if fresh.target_output_error is None:
            return fresh if self.target_output_error is None else replace(fresh, margin=1.0)
        assert output is not None
        goal = fresh.target_output_error
        return replace(fresh, margin=output.predicted_at(goal * output.safety) / goal if goal else 1.0)

    def check(self, every: Sequence[Mapping[str, tuple[Any, ...]]]) -> None:
        """Raise a ``ValueError`` unless there are fronts for these thresholds, phase by phase, that hold them."""
        for number, sites in enumerate(every):
            if set(sites) != set(self.curves):
                raise wrong_entry("curves", "curves for other sites than those with thresholds", "curves for each")
            for name, pairs in sites.items():
                phases = self.curves[name].phases
                if len(phases) != len(every):
                    raise wrong_entry("curves", f"{len(phases)} phases for site {name!r}", f"{len(every)}")
                if len(phases[number].heads) != len(pairs):
                    raise wrong_entry(
                        "curves", f"another number of heads for site {name!r}", f"{len(pairs)}, as the thresholds"
                    )
                for front, pair in zip(phases[number].heads, pairs, strict=True):
                    if pair != DENSE[:2] and all(point[:2] != pair for point in front):
                        raise wrong_entry(
                            "curves", f"thresholds of site {name!r} that are on no curve", "measured thresholds"
                        )

    def to_dict(self) -> dict[str, Any]:
        """Return all but the curves as plain JSON types, with the fingerprint."""
        tables = {"curves", "modes", "held_out", *_OPTIONAL}
        flat = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tables}
        measured: dict[str, Any] = {"modes": dict(self.modes), "held_out": dict(self.held_out)}
        if self.gains:
            measured["gains"] = {name: list(pair) for name, pair in self.gains.items()}
        if self.output is not None:
            measured["output"] = self.output.to_dict()
        if self.target_output_error is not None:
            measured["target_output_error"] = self.target_output_error
        return {**flat, **measured, "fingerprint": self.fingerprint}

    @staticmethod
    def from_dict(entry: Any, curves: Mapping[str, SiteCurves]) -> Origin:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: anything else.
        """
        optional = _OPTIONAL - set(entry if isinstance(entry, dict) else ())
        check_keys(entry, {f.name for f in fields(Origin)} - {"curves"} - optional | {"fingerprint"}, "origin")
        settings = dict(entry)
        fingerprint = settings.pop("fingerprint")
        if "output" in settings:
            settings["output"] = ModelOutput.from_dict(settings["output"])
        origin = Origin(**settings, curves=curves)
        if origin.target_output_error is not None and origin.output is None:
            raise wrong_entry("output", None, "what the model said, where its output's error is the aim")
        if fingerprint != origin.fingerprint:
            raise wrong_entry("fingerprint", fingerprint, f"{origin.fingerprint}, that of the sites")
        return origin
