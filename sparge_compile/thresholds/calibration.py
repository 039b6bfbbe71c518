"""``Calibration``: thresholds for each site, phase and head. Looked up, aimed anew, summed up, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import no_file_error, type_error, value_error
from ..pair import Pair, check_progress
from ..schedule import ALWAYS_SPARSE, parse_schedule
from . import calibration_file, json_file
from .aiming import aimed_anew
from .by_site import SiteThresholds
from .checks import fitting
from .choice import Key, choose, thresholds_of
from .fronts import DENSE, Point
from .measured import Origin
from .site_curves import SitePoints, Summary, summarise
from .table import about_lines, heads_table, in_short, sites_table


@dataclass(frozen=True)
class Calibration(SiteThresholds):
    """Thresholds by site, and how they were found. It does not change: what was compiled with it would not notice.

    ``sites`` maps a site's name, or a pattern with ``*`` and ``?``, to one (topk, topp) pair for each head. An exact
    name wins over a pattern, an earlier pattern over a later one. A single pair holds for any number of heads.

    ``phases`` has thresholds that take over later on in a denoising run, by the progress in (0, 1) from which they
    hold: ``Calibration({"*": [(1, 0)]}, phases={0.2: {"*": [(0.1, 0.3)]}})`` is dense for the first fifth. They name
    the same sites. ``attach`` is what switches between phases.

    ``origin`` is what ``sparge_compile.calibrate`` measured; with it, :meth:`at` chooses thresholds anew. ``source`` is
    the file that they were read from, if they were.

    ``kept`` says of entries of ``sites`` which tokens are kept whatever the thresholds, as the options ``keep_keys``
    and ``dense_queries`` do: ``kept={"*": {"keep_keys": "text", "dense_queries": True}}``.

    ``tiles`` says of entries of ``sites`` which tokens form a block, where the grid of a site's tokens is known:
    ``tiles={"*": (2, 4, 8)}``, in frames, rows and columns. Others are in raster order.

    ``about`` says what it is for, in short texts by name; :meth:`described` adds to it.

    ``schedule`` says which steps and layers are dense whatever the thresholds; :meth:`scheduled` makes it.

    Raises:
        TypeError, ValueError: thresholds out of range or of the wrong type, phases of other sites or heads than at the
            start, measurements of others; an assignment to an entry.
    """

    origin: Origin | None = None
    source: json_file.Source | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.origin is not None:
            self.origin.check(list(self.all_phases().values()))

    def lookup(self, name: str, heads: int, head_size: int | None = None) -> tuple[Pair, ...] | None:
        """Return the pairs of a site with so many heads, or None where neither a name nor a pattern covers it.

        Raises:
            ValueError: the site has another number of heads or another head size than the one that was calibrated, or
                there are several phases, between which only ``attach`` can switch.
        """
        pairs = self.pairs_of(name, heads)
        if pairs is None or self.schedule.is_dense_layer(name):
            return pairs
        key = self.key_of(name) or ""
        measured = self.origin.curves.get(key) if self.origin is not None else None
        size = None if measured is None else measured.head_size
        return fitting(name, pairs, heads, size, head_size)

    def at_progress(self, fraction: float) -> Calibration:
        """Return the thresholds that hold at this share of a denoising run, in [0, 1], as one phase.

        Of its schedule the layers are kept: which steps are dense does not hang on a share.

        Raises:
            ValueError: a progress out of range.
        """
        check_progress(fraction)
        sites = [sites for start, sites in self.all_phases().items() if start <= fraction][-1]
        schedule = self.schedule._replace(dense_steps=None)
        return replace(self, sites=sites, phases={}, origin=None, source=None, schedule=schedule)

    def scheduled(
        self,
        *,
        dense_steps: int | Sequence[int | None] | None = None,
        dense_layers: int | str | Sequence[str] | None = None,
        sparsities: Sequence[float] = (),
    ) -> Calibration:
        """Return these thresholds with a plan of what is dense, and how sparse each part of a denoising run is.

        What is dense runs the attention of the dense model itself. Steps are told by ``diffusers_callback``, or
        ``set_step`` of what ``attach`` returned.

        Args:
            dense_steps: dense in the first n steps of a run; -n: in the last n; (start, stop): in these, negative ones
                from its end.
            dense_layers: dense in every step: n: blocks 0 to n - 1, by the first number in a site's name; or names and
                patterns of sites or modules, as ``"blocks.5"`` and ``"*.attn2"``.
            sparsities: for each step of a run a ``target_sparsity`` to aim at anew, from these measurements; of a run
                with another number of steps, each holds for an equal share of them. It takes the place of phases.

        Raises:
            TypeError, ValueError: what cannot be read, holds no step, or is out of reach; layers that mean no site of
                a calibration that was measured.
        """
        plan = {"dense_steps": dense_steps, "dense_layers": dense_layers, "sparsities": sparsities}
        return planned(self, "Calibration.scheduled", **plan)

    def at(
        self,
        *,
        target_error: float | None = None,
        target_sparsity: float | None = None,
        target_output_error: float | None = None,
        by: str | None = None,
        influence: Mapping[str, Sequence[float]] | Literal[False] | None = None,
    ) -> Calibration:
        """Choose thresholds for another aim from the same measurements; the model does not run.

        Args:
            target_error: each head keeps as few key blocks as leave its relative L1 error within this bound.
            target_sparsity: the whole model keeps this share fewer blocks, where it hurts least.
            target_output_error: the model's output has at most this relative L2 error, as far as what was tried when
                it was calibrated tells; with as few blocks as it allows.
            by: ``"worst"``: the error is the largest of the samples; ``"mean"``: their mean. Default: as before, or the
                mean where influence counts.
            influence: what the squared mean error of each head counts for a sparsity or the output's error, by site, as
                ``sparge_compile.head_influence`` measures it; False: as many as it has blocks. Default: what was
                measured when it was calibrated, if it was, and by is ``"mean"``.

        Raises:
            ValueError: no measurements, not exactly one aim, one out of range, or one that cannot be reached; an
                influence with an error of heads as aim, for other sites or heads, or of a negative number; an output's
                error without influence.
        """
        aims = {
            "target_error": target_error,
            "target_sparsity": target_sparsity,
            "target_output_error": target_output_error,
        }
        origin = aimed_anew(self.origin, self.sites, aims, by, influence)
        beside = {"kept": self.kept, "tiles": self.tiles, "schedule": self.schedule, "about": self.about}
        return from_points(origin, list(self.phases), choose(origin), **beside)

    def points(self) -> Iterator[SitePoints]:
        """Yield the measured point of each head, for each calibrated site and phase; nothing without measurements."""
        if self.origin is None:
            return
        for name, curves in self.origin.curves.items():
            for phase, sites in enumerate(self.all_phases().values()):
                heads = zip(curves.phases[phase].heads, sites[name], strict=True)
                yield SitePoints(name, phase, [_point(front, pair) for front, pair in heads], curves)

    def densities(self, name: str, heads: int) -> list[float] | None:
        """Return the share of key blocks that each head of a site keeps: as measured, else at most; None: not known.

        Of several phases it is the mean.
        """
        key = self.key_of(name)
        if key is None:
            return None
        measured = [[point.density for point in site.points] for site in self.points() if site.name == key]
        if not measured:
            chosen = [sites[key] for sites in self.all_phases().values()]
            measured = [[max(pair) for pair in pairs] * (heads if len(pairs) == 1 else 1) for pairs in chosen]
        return [sum(each) / len(each) for each in zip(*measured, strict=True)]

    def summary(self) -> Summary | None:
        """Return sparsity and error over the whole model, as measured; None without measurements."""
        return None if self.origin is None else summarise(self.points(), self.origin.by)

    def table(self, site: str | None = None) -> str:
        """Return a text for people: what is known, and a row for each site and phase with its extreme heads.

        Args:
            site: a name or pattern: instead, a row for each head of these sites.

        Raises:
            ValueError: no entry has that name or fits the pattern.
        """
        phases, points = self.all_phases(), list(self.points())
        if site is not None:
            return heads_table(phases, points, site)
        text = sites_table(phases, self.kept, self.origin, self.summary(), points)
        return "\n".join((*about_lines(self.about), text, *self.words()))

    def __repr__(self) -> str:
        planned = [f"dense: {self.schedule}"] if self.schedule != ALWAYS_SPARSE else []
        return f"<Calibration: {', '.join([*in_short(self.all_phases(), self.origin, self.summary()), *planned])}>"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON types, as :meth:`save` writes it."""
        beside = (self.kept, self.tiles, self.schedule, self.about)
        return calibration_file.to_document(self.all_phases(), self.origin, *beside)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader sees the old one or the new one, never a part."""
        calibration_file.write(path, self.to_dict())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read a file that :meth:`save` wrote, or a plain table of sites (format version 1).

        Raises:
            OSError: there is no such file.
            ValueError: another file, a damaged one, or one of another version.
        """
        try:
            source = json_file.Source(path)
        except FileNotFoundError:
            raise no_file_error(
                "no calibration file",
                given=f"{os.fspath(path)!r} in {os.getcwd()}",
                allowed="a file of `sparge calibrate`, sparge_compile.calibrate(…, out=…) or Calibration.save",
                todo="Mend the path, or make the file: sparge calibrate --model … --inputs … --out FILE.",
            ) from None
        contents = calibration_file.read(path)
        with calibration_file.refusing(path):
            return Calibration(
                contents.sites,
                contents.phases,
                contents.origin,
                source,
                kept=contents.kept,
                tiles=contents.tiles,
                schedule=parse_schedule(**contents.schedule),
                about=contents.about,
            )

    @staticmethod
    def parse(value: Calibration | str | os.PathLike[str]) -> Calibration:
        """Return a calibration as it is, or load the one in a file. Anything else is a ``TypeError``."""
        if isinstance(value, Calibration):
            return value
        if isinstance(value, (str, os.PathLike)):
            return Calibration.load(value)
        raise type_error(
            "no calibration",
            given=repr(value)[:80],
            allowed="a path or a Calibration",
            todo="Give the path of a file of `sparge calibrate`, or Calibration({'*': [(topk, topp)]}).",
        )


def planned(
    calibration: Calibration, where: str, *, dense_steps: Any = None, dense_layers: Any = None, sparsities: Any = ()
) -> Calibration:
    """What :meth:`Calibration.scheduled` returns, with errors that begin with ``where``."""
    schedule, sites = parse_schedule(dense_steps, dense_layers, where), list(calibration.sites)
    if calibration.origin is not None and schedule.dense_layers and not any(map(schedule.is_dense_layer, sites)):
        raise value_error(
            f"{where}: dense_layers mean no site",
            given=repr(dense_layers),
            allowed=f"sites and modules around them, as {', '.join(sites[:6])}",
            todo="Name sites as Calibration.table() does.",
        )
    if not sparsities:
        return replace(calibration, schedule=schedule)
    starts = [i / len(sparsities) for i in range(len(sparsities))]
    phases = {
        start: calibration.at(target_sparsity=sparsity).at_progress(start).sites
        for i, (start, sparsity) in enumerate(zip(starts, sparsities, strict=True))
        if not i or sparsity != sparsities[i - 1]
    }
    first = phases.pop(0.0)
    return replace(calibration, sites=first, phases=phases, origin=None, source=None, schedule=schedule)


def from_points(origin: Origin, starts: Sequence[float], points: Mapping[Key, Point], **beside: Any) -> Calibration:
    """Return a calibration with the thresholds of chosen points; ``starts`` are those of the later phases, ``beside``
    its other fields."""
    first, *later = (thresholds_of(origin, points, phase) for phase in range(len(starts) + 1))
    return Calibration(first, dict(zip(starts, later, strict=True)), origin, **beside)


def _point(front: Sequence[Point], pair: Pair) -> Point:
    return DENSE if pair == DENSE[:2] else next(p for p in front if p[:2] == pair)
