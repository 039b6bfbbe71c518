"""A calibration as text for people: what is known of it, and a row for each site and phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

from tabulate import tabulate

from ..errors import value_error
from ..keeping import Kept
from ..pair import Pair, Sites
from .fronts import Point, error_of
from .measured import WITHIN, Origin
from .site_curves import SitePoints, Summary

NAMED = 3  # heads that are named in a row, sparsest and densest
_HEADERS = (
    "site",
    "from",
    "samples",
    "heads",
    "dense",
    "sparsity",
    "mean error",
    "worst error",
    "sparsest",
    "densest",
)


def in_short(phases: Mapping[float, Sites], origin: Origin | None, summary: Summary | None) -> list[str]:
    """Return a few words for each thing that is known."""
    known = [f"{len(phases[0.0])} sites"]
    if len(phases) > 1:
        known.append(f"{len(phases)} phases")
    if summary is not None:
        known.append(f"sparsity {summary.sparsity:.1%}")
        known.append(f"errors of heads {summary.mean_error:.4f} on average, {summary.worst_error:.4f} at most")
    if origin is not None and not origin.complete:
        known.append("not complete")
    return known


def sites_table(
    phases: Mapping[float, Sites],
    kept: Mapping[str, Kept],
    origin: Origin | None,
    summary: Summary | None,
    points: Sequence[SitePoints],
) -> str:
    """Return a row for each site and phase, and what is kept; ``points`` are those of each, where it was measured."""
    if origin is None or summary is None:
        return _thresholds_table(phases) + _kept_lines(kept)
    return _measured_table(origin, summary, list(phases), points) + _kept_lines(kept, origin.gains)


def _thresholds_table(phases: Mapping[float, Sites]) -> str:
    """Return the table of thresholds without measurements, by the progress from which they hold."""
    rows = [
        (name, f"{start:g}", len(pairs), *_spans(pairs))
        for start, sites in phases.items()
        for name, pairs in sites.items()
    ]
    return "without measurements\n" + tabulate(rows, headers=("site", "from", "heads", "topk", "topp"))


def _kept_lines(kept: Mapping[str, Kept], gains: Mapping[str, tuple[float, float]] = MappingProxyType({})) -> str:
    """Return lines that say what is kept, and what that was measured to gain; nothing where nothing is kept."""
    lines = []
    for name, what in kept.items():
        own = gains.get(name)
        gain = f"; error {own[0]:.4f}, at equal sparsity without them {own[1]:.4f}" if own else ""
        lines.append(f"\n{name} keeps {what}{gain}")
    return "".join(lines)


def about_lines(about: Mapping[str, str]) -> list[str]:
    """Return what a calibration is for, a line for each name."""
    return [f"{name.replace('_', ' ')}: {text}" for name, text in about.items()]


def heads_table(phases: Mapping[float, Sites], points: Sequence[SitePoints], site: str) -> str:
    """Return a row for each head of the entries that have this name or fit this pattern, phase by phase.

    Args:
        points: the chosen points of each site and phase; none without measurements.

    Raises:
        ValueError: there are no such entries.
    """
    first = phases[0.0]
    names = [name for name in first if name == site or fnmatchcase(name, site)]
    if not names:
        raise value_error(
            "no such site",
            given=repr(site),
            allowed=f"a name or pattern of {', '.join(list(first)[:6])}{', …' if len(first) > 6 else ''}",
            todo="Calibration.table() and `sparge show` list all of them.",
        )
    measured = {(each.name, each.phase): each.points for each in points}
    rows = []
    for name in names:
        for phase, (start, sites) in enumerate(phases.items()):
            known = measured.get((name, phase), [None] * len(sites[name]))
            for head, (pair, point) in enumerate(zip(sites[name], known, strict=True)):
                found = () if point is None else (f"{1 - point.density:.1%}", f"{point.mean:.4f}", f"{point.worst:.4f}")
                rows.append((name, f"{start:g}", head, *(f"{x:.4g}" for x in pair), *found))
    headers = ("site", "from", "head", "topk", "topp", "sparsity", "mean error", "worst error")
    return tabulate(rows, headers=headers if measured else headers[:5], disable_numparse=True)


def _measured_table(origin: Origin, summary: Summary, starts: Sequence[float], sites: Iterable[SitePoints]) -> str:
    """Return what is known of measured thresholds, and a row for each site and phase.

    Args:
        starts: the progress from which each phase holds.
        sites: the chosen points of each site and phase.
    """
    rows = [
        (site.name, f"{starts[site.phase]:g}", site.curves.samples, *_row(site.points, origin.by)) for site in sites
    ]
    return "\n".join(_about(origin, summary)) + "\n\n" + tabulate(rows, headers=_HEADERS, disable_numparse=True)


def _about(origin: Origin, summary: Summary) -> list[str]:
    """The lines above the rows."""
    names = {"target_error": "error", "target_sparsity": "sparsity", "target_output_error": "error of the output"}
    aim = next(f"{text} {value:g}" for name, text in names.items() if (value := getattr(origin, name)) is not None)
    lines = [
        f"{origin.model}, {origin.created_with}, {origin.device}; fingerprint {origin.fingerprint}",
        f"aim: {aim}, by the {origin.by} sample, mode {origin.mode}; {origin.batches_text}, "
        f"{origin.query_blocks} query blocks, seed {origin.seed}",
        f"sparsity {summary.sparsity:.1%}; error of heads: mean {summary.mean_error:.4f}, "
        f"worst {summary.worst_error:.4f}; {summary.dense_heads} of {summary.heads} heads stay dense",
    ]
    if not origin.complete:
        lines.insert(0, "NOT COMPLETE: the run was interrupted; the same command goes on where it stopped")
    if origin.modes:
        lines.append("sparsity by mode: " + ", ".join(f"{mode} {value:.1%}" for mode, value in origin.modes.items()))
    check = origin.held_out
    if check:
        within = ""
        if WITHIN in check:
            within = f"; {check[WITHIN]:.1%} keep the bound, which is searched for with {origin.margin:g} of it"
        lines.append(
            f"on samples that the thresholds were not chosen by: sparsity {check['sparsity']:.1%}, error mean "
            f"{check['mean_error']:.4f} (expected {check['expected_mean_error']:.4f}), worst "
            f"{check['worst_error']:.4f} (expected {check['expected_worst_error']:.4f}){within}"
        )
    elif origin.modes:
        lines.append("not checked on held-out samples: that takes four of each site")
    return lines + _about_output(origin)


def _about_output(origin: Origin) -> list[str]:
    """What is known of the model's output; nothing where it was not asked."""
    output = origin.output
    if output is None:
        return []
    tried = "" if output.density is None else f", tried at {1 - output.density:.0%} sparsity"
    lines = [f"influence of heads on the output: known{tried}"]
    reached = output.reached
    if not reached:
        return [*lines, "the error of the output was not measured with these thresholds"]
    error = f"error of the output: {reached['error']:.4f} over {reached['runs']:.0f} runs"
    if held := reached["held_out_runs"]:
        error += (
            f", {reached['held_out_error']:.4f} over {held:.0f} held-out ones, worst {reached['held_out_worst']:.4f}"
        )
    elif origin.target_output_error is not None:
        error += "; not checked on held-out ones: that takes four"
    return [*lines, error]


def _row(points: Sequence[Point], by: str) -> tuple[object, ...]:
    errors = [error_of(p, by) for p in points]
    order = sorted(range(len(points)), key=lambda h: points[h].density)

    def name(heads: Sequence[int]) -> str:
        return " ".join(f"{h}:{1 - points[h].density:.0%}" for h in heads)

    return (
        len(points),
        sum(p.density == 1 for p in points),
        f"{1 - sum(p.density for p in points) / len(points):.1%}",
        f"{sum(errors) / len(errors):.4f}",
        f"{max(errors):.4f}",
        name(order[:NAMED]),
        name(order[-NAMED:][::-1]),
    )


def _spans(pairs: Sequence[Pair]) -> list[str]:
    """The least and the largest value of each threshold."""
    return [f"{min(x):g}" if min(x) == max(x) else f"{min(x):g}–{max(x):g}" for x in zip(*pairs, strict=True)]
