"""Where a calibration's thresholds come from: model, machine, aim, and each head's measured front.

In: what a run measured, or plain JSON types of a file. Out: checked values, and their sums over the whole model.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from ..errors import value_error
from ..pair import Table
from .fronts import BY, DENSE, MODES, Point, error_of

# What the check on other samples says (calibrate/search.py), and for a bound also what share keeps it.
CHECKED = ("samples", "sparsity", "mean_error", "worst_error", "expected_mean_error", "expected_worst_error")
WITHIN = "within"


class Summary(NamedTuple):
    """A calibration as a whole: sparsity weighted by visible blocks, error over heads, dense heads among all."""

    sparsity: float
    mean_error: float
    worst_error: float
    heads: int
    dense_heads: int


@dataclass(frozen=True)
class PhaseCurves:
    """A site in one phase: the front of each head, and the visible key blocks that a head has in all."""

    cost: float
    heads: tuple[tuple[Point, ...], ...]


@dataclass(frozen=True)
class SiteCurves:
    """A site's measurements, phase by phase."""

    head_size: int
    samples: int
    phases: tuple[PhaseCurves, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        phases = [{"cost": p.cost, "heads": [[list(point) for point in h] for h in p.heads]} for p in self.phases]
        return {"head_size": self.head_size, "samples": self.samples, "curves": phases}

    @staticmethod
    def from_dict(entry: Any, name: str) -> SiteCurves:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: anything else.
        """
        where = f"site {name!r}"
        _keys(entry, {"head_size", "samples", "curves"}, where)
        _whole(entry["head_size"], where, 1)
        _whole(entry["samples"], where, 0)
        return SiteCurves(
            entry["head_size"], entry["samples"], tuple(_phase(x, where) for x in _list(entry["curves"], where))
        )


class SitePoints(NamedTuple):
    """The chosen point of each head of a site in a phase, and the curves that they are on."""

    name: str
    phase: int
    points: list[Point]
    curves: SiteCurves


def summarise(sites: Iterable[SitePoints], by: str) -> Summary:
    """Return sparsity and error of chosen points over all sites and phases."""
    rows = [(point, site.curves.phases[site.phase].cost) for site in sites for point in site.points]
    total = sum(cost for _, cost in rows)
    kept = sum(point.density * cost for point, cost in rows)
    errors = [error_of(point, by) for point, _ in rows]
    return Summary(
        sparsity=1 - kept / total if total else 0.0,
        mean_error=sum(errors) / max(1, len(errors)),
        worst_error=max(errors, default=0.0),
        heads=len(rows),
        dense_heads=sum(point.density == 1 for point, _ in rows),
    )


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
    margin: float = 1.0  # the share of target_error that thresholds are chosen by, so that other samples keep all of it
    modes: Mapping[str, float] = field(default_factory=dict)  # sparsity that each mode reaches for the aim
    held_out: Mapping[str, float] = field(default_factory=dict)  # see calibrate/search.py
    curves: Mapping[str, SiteCurves] = field(default_factory=dict)
    gains: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # errors with kept tokens, and without

    def __post_init__(self) -> None:
        for name in ("model", "created_with", "device"):
            if not isinstance(getattr(self, name), str):
                raise _wrong_entry(name, getattr(self, name), "a text")
        for name, least in (("query_block", 1), ("key_block", 1), ("query_blocks", 1), ("batches", 0), ("seed", None)):
            _whole(getattr(self, name), name, least)
        for name, known in (("by", BY), ("mode", MODES), ("complete", (True, False))):
            value = getattr(self, name)
            if not any(value is k or (isinstance(value, str) and value == k) for k in known):
                raise _wrong_entry(name, value, ", ".join(map(repr, known)))
        aims = [x for x in (self.target_error, self.target_sparsity) if x is not None]
        if len(aims) != 1 or not _number(aims[0]) or not 0 <= aims[0] < 1:
            raise _wrong_entry("aim", aims, "target_error or target_sparsity, a share in [0, 1)")
        if not _number(self.margin) or not 0 < self.margin <= 1:
            raise _wrong_entry("margin", self.margin, "a share in (0, 1]")
        for name in ("modes", "held_out"):
            table = getattr(self, name)
            if not isinstance(table, Mapping) or not all(isinstance(k, str) and _number(v) for k, v in table.items()):
                raise _wrong_entry(name, table, "a table of numbers")
        if not set(self.modes) <= set(MODES):
            raise _wrong_entry("modes", sorted(self.modes), f"of {MODES}")
        pairs = list(self.gains.values())
        if not all(len(pair) == 2 and all(map(_number, pair)) for pair in pairs) or set(self.gains) - set(self.curves):
            raise _wrong_entry("gains", dict(self.gains), "two errors for sites with curves")
        object.__setattr__(self, "gains", {name: tuple(pair) for name, pair in self.gains.items()})
        for name in ("modes", "held_out", "curves", "gains"):
            object.__setattr__(self, name, Table(getattr(self, name)))
        if self.held_out and set(self.held_out) - {WITHIN} != set(CHECKED):
            raise _wrong_entry("held_out", sorted(self.held_out), f"nothing, or {CHECKED} and perhaps {WITHIN!r}")

    @property
    def fingerprint(self) -> str:
        """A hash of the sites: names, numbers of heads, head sizes."""
        sites = sorted((name, len(c.phases[0].heads), c.head_size) for name, c in self.curves.items())
        return hashlib.sha256(json.dumps(sites).encode()).hexdigest()[:16]

    def aimed(self, aim: Mapping[str, Any]) -> Origin:
        """Return the same measurements with another aim; what was said of the old one is left out."""
        return replace(
            self, **{"target_error": None, "target_sparsity": None, "modes": {}, "held_out": {}, "gains": {}, **aim}
        )

    def check(self, every: Sequence[Mapping[str, tuple[Any, ...]]]) -> None:
        """Raise a ``ValueError`` unless there are fronts for these thresholds, phase by phase, that hold them."""
        for number, sites in enumerate(every):
            if set(sites) != set(self.curves):
                raise _wrong_entry("curves", "curves for other sites than those with thresholds", "curves for each")
            for name, pairs in sites.items():
                phases = self.curves[name].phases
                if len(phases) != len(every):
                    raise _wrong_entry("curves", f"{len(phases)} phases for site {name!r}", f"{len(every)}")
                if len(phases[number].heads) != len(pairs):
                    raise _wrong_entry(
                        "curves", f"another number of heads for site {name!r}", f"{len(pairs)}, as the thresholds"
                    )
                for front, pair in zip(phases[number].heads, pairs, strict=True):
                    if pair != DENSE[:2] and all(point[:2] != pair for point in front):
                        raise _wrong_entry(
                            "curves", f"thresholds of site {name!r} that are on no curve", "measured thresholds"
                        )

    def to_dict(self) -> dict[str, Any]:
        """Return all but the curves as plain JSON types, with the fingerprint."""
        tables = ("curves", "modes", "held_out", "gains")
        flat = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tables}
        gains = {"gains": {name: list(pair) for name, pair in self.gains.items()}} if self.gains else {}
        measured = {"modes": dict(self.modes), "held_out": dict(self.held_out), **gains}
        return {**flat, **measured, "fingerprint": self.fingerprint}

    @staticmethod
    def from_dict(entry: Any, curves: Mapping[str, SiteCurves]) -> Origin:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: anything else.
        """
        optional = {"gains"} - set(entry if isinstance(entry, dict) else ())
        _keys(entry, {f.name for f in fields(Origin)} - {"curves"} - optional | {"fingerprint"}, "origin")
        settings = dict(entry)
        fingerprint = settings.pop("fingerprint")
        origin = Origin(**settings, curves=curves)
        if fingerprint != origin.fingerprint:
            raise _wrong_entry("fingerprint", fingerprint, f"{origin.fingerprint}, that of the sites")
        return origin


def _phase(entry: Any, where: str) -> PhaseCurves:
    _keys(entry, {"cost", "heads"}, where)
    if not _number(entry["cost"]) or entry["cost"] < 0:
        raise _wrong_entry(f"{where}: cost", entry["cost"], "0 or more blocks")
    heads = [tuple(_point(p, where) for p in _list(front, where)) for front in _list(entry["heads"], where)]
    if not heads:
        raise _wrong_entry(where, "no heads", "one or more")
    return PhaseCurves(entry["cost"], tuple(heads))


def _point(values: Any, where: str) -> Point:
    if not isinstance(values, list) or len(values) != 5 or not all(map(_number, values)):
        raise _wrong_entry(where, values, "points of five numbers")
    point = Point(*values)
    if not (0 < point.topk <= 1 and 0 <= point.topp <= 1 and 0 <= point.density <= 1 and min(point[3:]) >= 0):
        raise _wrong_entry(where, values, "(topk, topp, density, worst error, mean error) in their ranges")
    return point


def _number(value: Any) -> bool:
    """Finite, and an integer not too large for a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(value: Any, where: str, least: int | None) -> None:
    if type(value) is not int or (least is not None and value < least):
        raise _wrong_entry(where, value, "a whole number" + (f", at least {least}" if least is not None else ""))


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong_entry(where, value, "a list")
    return value


def _keys(entry: Any, wanted: set[str], where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != wanted:
        raise _wrong_entry(where, sorted(entry) if isinstance(entry, dict) else entry, f"the fields {sorted(wanted)}")


def _wrong_entry(where: str, given: object, allowed: str) -> ValueError:
    text = repr(given)
    return value_error(
        f"calibration: {where}",
        given=text if len(text) < 80 else text[:77] + "...",
        allowed=allowed,
        todo="Write it with Calibration.save.",
    )
