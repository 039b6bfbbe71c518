"""Thresholds for each site, phase and head: look up, validate, aim anew; the file that holds them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from ..errors import explain_error
from ..pair import Pair, check_pair, check_progress
from ..version import __version__
from . import json_file
from .fronts import (
    DENSE,
    Point,
    Unit,
    error_of,
    sparsest,
    spread,
)
from .measured import Origin, SiteCurves, Summary
from .table import table

FORMAT = "sparge-calibration"
FORMAT_VERSION = 2
_PLAIN_VERSION = 1  # a table of sites and nothing else; may be written by hand
_DOCUMENT_KEYS = {
    1: {"format", "format_version", "created_by", "sites"},
    2: {"format", "format_version", "created_by", "phases", "origin", "sites", json_file.CHECKSUM},
}

Sites = Mapping[str, tuple[Pair, ...]]


@dataclass(frozen=True)
class Calibration:
    """Thresholds by site, and how they were found.

    ``sites`` maps a site's name, or a pattern with ``*`` and ``?``, to one (topk, topp) pair for each head. An exact
    name wins over a pattern, an earlier pattern over a later one. A single pair holds for any number of heads.

    ``phases`` has thresholds that take over later on in a denoising run, by the progress in (0, 1) from which they
    hold: ``Calibration({"*": [(1, 0)]}, phases={0.2: {"*": [(0.1, 0.3)]}})`` is dense for the first fifth. They name
    the same sites. ``attach`` is what switches between phases.

    ``origin`` is what ``sparge_compile.calibrate`` measured; with it, :meth:`at` chooses thresholds anew.
    """

    sites: Sites = field(default_factory=dict)
    phases: Mapping[float, Sites] = field(default_factory=dict)
    origin: Origin | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", _check_sites("sites", self.sites))
        if not isinstance(self.phases, Mapping):
            raise _bad_phases(type(self.phases).__name__)
        later = {_check_start(start): _check_sites("phases", sites) for start, sites in self.phases.items()}
        for sites in later.values():
            if set(sites) != set(self.sites) or any(1 != len(p) != len(self.sites[n]) != 1 for n, p in sites.items()):
                raise _bad_phases("phases that differ in their sites or numbers of heads")
        object.__setattr__(self, "phases", dict(sorted(later.items())))
        if self.origin is not None:
            self.origin.check((self.sites, *self.phases.values()))

    def key_of(self, name: str) -> str | None:
        """The entry that holds for a site: its name, else the first pattern that matches it, else None."""
        return name if name in self.sites else next((p for p in self.sites if fnmatchcase(name, p)), None)

    def lookup(self, name: str, heads: int, head_size: int | None = None) -> tuple[Pair, ...] | None:
        """The pairs of a site with so many heads, or None where neither a name nor a pattern covers it.

        Raises:
            ValueError: the site has another number of heads or another head size than the one that was calibrated, or
                there are several phases, between which only ``attach`` can switch.
        """
        key = self.key_of(name)
        if key is None:
            return None
        if self.phases:
            raise ValueError(
                explain_error(
                    f"a calibration with phases was given for site {name!r}, and nothing says which of them holds",
                    given=f"thresholds from {', '.join(f'{start:g}' for start in (0.0, *self.phases))} of the run on",
                    allowed="one phase",
                    todo="Use attach(model, calibration) and its set_progress, or calibration.at_progress(fraction).",
                )
            )
        pairs = self.sites[key]
        measured = self.origin.curves.get(key) if self.origin is not None else None
        if measured is not None and head_size not in (None, measured.head_size):
            raise _does_not_fit(
                name, f"thresholds for heads of size {measured.head_size}", f"heads of size {head_size}"
            )
        if len(pairs) == 1 and (measured is None or heads == 1):
            return pairs * heads
        if len(pairs) != heads:
            allowed = f"{heads} pairs, one for each query head" + (", or a single pair" if measured is None else "")
            raise _does_not_fit(name, f"thresholds for {len(pairs)} heads", allowed)
        return pairs

    def at_progress(self, fraction: float) -> Calibration:
        """The thresholds that hold at this share of a denoising run, in [0, 1], as a calibration of one phase."""
        check_progress(fraction)
        sites = [self.sites, *(sites for start, sites in self.phases.items() if start <= fraction)][-1]
        return Calibration(sites)

    def at(
        self,
        *,
        target_error: float | None = None,
        target_sparsity: float | None = None,
        by: str | None = None,
        influence: Mapping[str, Sequence[float]] | None = None,
    ) -> Calibration:
        """The same measurements with thresholds for another aim; the model does not run.

        Args:
            target_error: each head keeps as few key blocks as leave its relative L1 error within this bound.
            target_sparsity: the whole model keeps this share fewer blocks, where it hurts least.
            by: ``"worst"``: the error is the largest of the samples; ``"mean"``: their mean. Default: as before.
            influence: with a sparsity, what the squared mean error of each head counts, by site, as
                ``sparge_compile.head_influence`` measures it. The file does not keep it. Default: as many as the head
                has blocks.

        Raises:
            ValueError: no measurements, not exactly one aim, one out of range, or one that cannot be reached; an
                influence without a sparsity as aim, with phases, for other sites or heads, or of a negative number.
        """
        if self.origin is None:
            raise ValueError(
                explain_error(
                    "this calibration cannot be aimed anew",
                    given="thresholds without measurements",
                    allowed="what sparge_compile.calibrate or `sparge calibrate` made",
                    todo="Calibrate the model.",
                )
            )
        if influence is not None:
            _check_influence(influence, self, target_sparsity, by)
            by = "mean"
        origin = self.origin.aimed(check_aim(target_error, target_sparsity, by or self.origin.by, self.origin.mode))
        return from_points(origin, list(self.phases), choose(origin, influence))

    def points(self) -> Iterator[tuple[str, int, list[Point], SiteCurves]]:
        """For each calibrated site and phase: its name, the phase's number, the measured point of each head."""
        if self.origin is None:
            return
        for name, curves in self.origin.curves.items():
            for phase, sites in enumerate((self.sites, *self.phases.values())):
                heads = zip(curves.phases[phase].heads, sites[name], strict=True)
                yield name, phase, [_point(front, pair) for front, pair in heads], curves

    def summary(self) -> Summary | None:
        """Sparsity and error over the whole model, as measured; None without measurements."""
        if self.origin is None:
            return None
        rows = [(p, c.phases[phase].cost) for _, phase, points, c in self.points() for p in points]
        total = sum(cost for _, cost in rows)
        kept = sum(p.density * cost for p, cost in rows)
        errors = [error_of(p, self.origin.by) for p, _ in rows]
        return Summary(
            sparsity=1 - kept / total if total else 0.0,
            mean_error=sum(errors) / max(1, len(errors)),
            worst_error=max(errors, default=0.0),
            heads=len(rows),
            dense_heads=sum(p.density == 1 for p, _ in rows),
        )

    def table(self) -> str:
        """What is known of it, and a row for each site and phase, with its sparsest and densest heads; for people."""
        return table(self)

    def __repr__(self) -> str:
        known = [f"{len(self.sites)} sites"]
        if self.phases:
            known.append(f"{1 + len(self.phases)} phases")
        if (total := self.summary()) is not None:
            known.append(f"sparsity {total.sparsity:.1%}")
            known.append(f"errors of heads {total.mean_error:.4f} on average, {total.worst_error:.4f} at most")
        if self.origin is not None and not self.origin.complete:
            known.append("not complete")
        return f"<Calibration: {', '.join(known)}>"

    def to_dict(self) -> dict[str, Any]:
        every = (self.sites, *self.phases.values())
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created_by": f"sparge_compile {__version__}",
            "phases": [0.0, *self.phases],
            "origin": None if self.origin is None else self.origin.to_dict(),
            "sites": {
                name: {
                    "thresholds": [[list(pair) for pair in sites[name]] for sites in every],
                    **({} if self.origin is None else self.origin.curves[name].to_dict()),
                }
                for name in self.sites
            },
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader sees the old one or the new one, never a part."""
        json_file.write_atomically(path, json_file.to_text(self.to_dict(), "sites").encode())

    @staticmethod
    def parse(given: Calibration | str | os.PathLike[str]) -> Calibration:
        """A calibration, or the one in a file. Anything else is a ``TypeError``."""
        if isinstance(given, Calibration):
            return given
        if isinstance(given, (str, os.PathLike)):
            return Calibration.load(given)
        raise TypeError(
            explain_error(
                "no calibration", given=repr(given)[:80], allowed="a path or a Calibration", todo="Pass thresholds."
            )
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read a file that :meth:`save` wrote; a stranger is refused with a ``ValueError``."""
        document = json_file.read(path, FORMAT, (_PLAIN_VERSION, FORMAT_VERSION), (FORMAT_VERSION,))
        version = document["format_version"]
        wrong = set(document) ^ _DOCUMENT_KEYS[version]
        if version == _PLAIN_VERSION:
            wrong -= {"created_by"}
        if wrong:
            raise _bad_file(path, f"unknown or missing fields {sorted(wrong)}")
        sites = document["sites"]
        if not isinstance(sites, dict):
            raise _bad_file(path, "no table of sites")
        try:
            if version == _PLAIN_VERSION:
                return Calibration({name: _only(entry, "thresholds") for name, entry in sites.items()})
            return _parse(document, sites)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise _bad_file(path, str(error) or type(error).__name__) from error


def _parse(document: dict[str, Any], sites: dict[str, Any]) -> Calibration:
    """A document of the present version; an error of any of the types that ``load`` knows, where it is none."""
    starts = document["phases"]
    if not isinstance(starts, list) or not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError("phases that do not ascend from 0")
    origin, curves = document["origin"], {}
    for name, entry in sites.items():
        if origin is not None:
            curves[name] = SiteCurves.from_dict({k: v for k, v in entry.items() if k != "thresholds"}, name)
        rows = entry["thresholds"] if origin is not None else _only(entry, "thresholds")
        if not isinstance(rows, list) or len(rows) != len(starts):
            raise ValueError(f"site {name!r} without thresholds for each of {len(starts)} phases")
    first, *later = ({name: entry["thresholds"][i] for name, entry in sites.items()} for i in range(len(starts)))
    found = None if origin is None else Origin.from_dict(origin, curves)
    return Calibration(first, dict(zip(starts[1:], later, strict=True)), found)


def check_aim(target_error: float | None, target_sparsity: float | None, by: str, mode: str) -> dict[str, Any]:
    """An aim as a calibration file has it, or an error that says what is wrong with it."""
    given = {"target_error": target_error, "target_sparsity": target_sparsity}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise ValueError(
            explain_error(
                "a calibration needs one aim",
                given=", ".join(named) or "none",
                allowed="target_error or target_sparsity",
                todo="Give one of the two.",
            )
        )
    name, value = next(iter(named.items()))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(
            explain_error(f"{name} is out of range", given=value, allowed="a share in [0, 1)", todo="Change it.")
        )
    return {name: float(value), "by": by, "mode": mode}


Key = tuple[str, int, int]  # a site, the number of a phase, a head


def choose(origin: Origin, influence: Mapping[str, Sequence[float]] | None = None) -> dict[Key, Point]:
    """The point of each head for the aim of an origin, from its fronts."""
    units = {
        (name, i, head): Unit(front, phase.cost, None if influence is None else influence[name][head])
        for name, curves in origin.curves.items()
        for i, phase in enumerate(curves.phases)
        for head, front in enumerate(phase.heads)
    }
    if origin.target_error is not None:
        bound = origin.target_error * origin.margin
        return {key: sparsest(unit.front, bound, origin.by) for key, unit in units.items()}
    assert origin.target_sparsity is not None
    return dict(zip(units, spread(list(units.values()), origin.target_sparsity, origin.by), strict=True))


def from_points(origin: Origin, starts: Sequence[float], points: Mapping[Key, Point]) -> Calibration:
    """A calibration with the thresholds of the chosen points; ``starts`` are those of the later phases."""
    phases: list[dict[str, tuple[Pair, ...]]] = [
        {
            name: tuple(points[name, i, head][:2] for head in range(len(curves.phases[i].heads)))
            for name, curves in origin.curves.items()
        }
        for i in range(len(starts) + 1)
    ]
    return Calibration(phases[0], dict(zip(starts, phases[1:], strict=True)), origin)


def with_origin(calibration: Calibration, **changes: Any) -> Calibration:
    """The same thresholds with other words on where they come from."""
    assert calibration.origin is not None
    return replace(calibration, origin=replace(calibration.origin, **changes))


def _check_influence(influence: Any, calibration: Calibration, target_sparsity: float | None, by: str | None) -> None:
    heads = {name: len(pairs) for name, pairs in calibration.sites.items()}
    wrong = None
    if target_sparsity is None:
        wrong = "one without target_sparsity"
    elif calibration.phases:
        wrong = "one for thresholds with phases"
    elif by == "worst":
        wrong = 'one with by="worst"; it is a factor of mean errors'
    elif not isinstance(influence, Mapping) or not all(isinstance(each, Sequence) for each in influence.values()):
        wrong = f"{type(influence).__name__} of other things than lists of numbers"
    elif {name: len(each) for name, each in influence.items()} != heads:
        wrong = "one for other sites, or for other numbers of heads"
    elif not all(type(x) in (int, float) and 0 <= x < math.inf for each in influence.values() for x in each):
        wrong = "one with a weight that is negative, not finite or no number"
    elif not any(x for each in influence.values() for x in each):
        wrong = "weights that are all 0"
    if wrong is not None:
        raise ValueError(
            explain_error(
                "the influence of heads does not fit",
                given=wrong,
                allowed="with target_sparsity, a weight >= 0 for each head of each calibrated site",
                todo="Measure it with sparge_compile.head_influence(model, calibration, batches).",
            )
        )


def _point(front: Sequence[Point], pair: Pair) -> Point:
    return DENSE if pair == DENSE[:2] else next(p for p in front if p[:2] == pair)


def _only(entry: Any, key: str) -> Any:
    if not isinstance(entry, dict) or set(entry) != {key}:
        raise ValueError(f"a site with other fields than {key!r}")
    return entry[key]


def _does_not_fit(name: str, given: str, allowed: str) -> ValueError:
    return ValueError(
        explain_error(
            f"calibration of site {name!r} does not fit the model",
            given=given,
            allowed=allowed,
            todo="Calibrate this model, or load the file that was made for it.",
        )
    )


def _check_start(start: Any) -> float:
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not 0 < start < 1:
        raise _bad_phases(f"a phase from {start!r} on")
    return float(start)


def _bad_phases(given: str) -> ValueError:
    return ValueError(
        explain_error(
            "Calibration: bad phases",
            given=given,
            allowed="for a progress in (0, 1), thresholds for the same sites and heads as at the start",
            todo="Name every site in each phase; (1, 0) is dense.",
        )
    )


def _bad_file(path: object, given: str) -> ValueError:
    return ValueError(
        explain_error(
            f"{path} is not a calibration file that this version reads",
            given=given,
            allowed=f"{FORMAT} version {_PLAIN_VERSION} or {FORMAT_VERSION}",
            todo="Write it with Calibration.save, or update sparge_compile if a newer version wrote it.",
        )
    )


def _check_sites(what: str, sites: Any) -> dict[str, tuple[Pair, ...]]:
    if not isinstance(sites, Mapping):
        raise TypeError(
            explain_error(
                f"Calibration: {what} has the wrong type",
                given=type(sites).__name__,
                allowed="a mapping from site name to (topk, topp) pairs",
                todo="Load a file with Calibration.load(path), or pass a dict.",
            )
        )
    return {name: _check_site(name, pairs) for name, pairs in sites.items()}


def _check_site(name: object, pairs: Any) -> tuple[Pair, ...]:
    where = f"calibration of site {name!r}"
    shape_ok = isinstance(pairs, (list, tuple)) and len(pairs) > 0
    if (
        not isinstance(name, str)
        or not shape_ok
        or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs)
    ):
        raise ValueError(
            explain_error(
                f"{where} cannot be read",
                given=repr(pairs)[:80],
                allowed="a list of (topk, topp) pairs, one for each query head",
                todo="Give one pair for all heads, or one for each.",
            )
        )
    return tuple(check_pair(topk, topp, where) for topk, topp in pairs)
