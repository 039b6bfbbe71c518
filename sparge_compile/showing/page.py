"""``write_report``: a calibration and a survey as one HTML file. What stands in it is put together here; how it looks
is in ``page.html``."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import value_error
from ..kernels.order import tile_text
from ..report import Reason
from ..thresholds.calibration import Calibration
from ..thresholds.json_file import write_atomically
from ..version import __version__
from .clips import gif
from .drawn import chart, colour, data_uri, picture
from .names import short_names
from .needed import needed
from .site_survey import SiteSurvey
from .survey import Survey

HIGHEST = 240  # pixels of a clip
SHOWN = 12  # sites whose times and maps are open
HEADS_SHOWN = 4  # of each map, from the sparsest to the densest


class Strip(NamedTuple):
    """A table of shares, drawn as cells: ``rows`` are (label, full name, values, mean)."""

    heading: str
    shared: str
    what: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[float], float]]


def write_report(
    path: str | os.PathLike[str],
    calibration: Calibration | None = None,
    survey: Survey | None = None,
    *,
    clips: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Path:
    """Write a page about a calibration, about what it does to a model, or both: one file, for any browser, phones too.

    Args:
        path: the HTML file.
        calibration: what is known of thresholds: sparsity by head and phase, error by sparsity.
        survey: what ``survey`` saw: times, block maps, sparsity by call, errors.
        clips: to be shown beside each other, as ``side_by_side`` takes them; default: those of the survey, where its
            outputs are a diffusers pipeline's with frames or images.
        title: of the page; default: the model's name.

    Raises:
        ValueError: neither a calibration nor a survey; clips that are none.
        ImportError: jinja2, or pillow, is not installed.
    """
    if calibration is None and survey is None:
        todo = "Give a calibration, what survey(model, batch, …) gave, or both."
        raise value_error("nothing to report", given="neither", allowed="a calibration or a survey", todo=todo)
    if clips is None and survey is not None:
        clips = survey.clips
    jinja = needed("jinja2", "a report")
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    environment = jinja.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja.StrictUndefined
    )
    environment.filters |= {"share": "{:.1%}".format, "error": "{:.4f}".format, "colour": colour, "ms": _milliseconds}
    page = environment.from_string(template).render(
        title=title or _title(calibration, survey),
        about=_about(calibration, survey),
        cards=_cards(calibration, survey),
        strips=[*_strips_of_calibration(calibration), *_strips_of_survey(survey)],
        chart=None if calibration is None or calibration.origin is None else chart(calibration),
        bars=_bars(survey),
        shown=SHOWN,
        maps=_maps(survey),
        clips=data_uri("gif", gif(clips, highest=HIGHEST)) if clips else None,
        names=list(clips or ()),
        sites=[] if survey is None else survey.report.sites,
        report=None if survey is None else survey.report,
        not_attention=Reason.NOT_ATTENTION,
        table=None if calibration is None else calibration.table(),
        ends=(colour(0), colour(1)),
        version=__version__,
        torch=torch.__version__,
    )
    target = Path(path)
    write_atomically(target, page.encode())
    return target


def _title(calibration: Calibration | None, survey: Survey | None) -> str:
    about = {} if calibration is None else calibration.about
    of_origin = None if calibration is None or calibration.origin is None else calibration.origin.model
    return about.get("model_id") or (survey.model if survey is not None else of_origin or "A calibration")


def _about(calibration: Calibration | None, survey: Survey | None) -> list[tuple[str, str]]:
    rows = [] if calibration is None else [(name.replace("_", " "), text) for name, text in calibration.about.items()]
    if calibration is not None and (origin := calibration.origin) is not None:
        rows.append(("found with", f"{origin.created_with} on {origin.device}, {origin.batches_text}"))
        if not origin.complete:
            rows.append(("not complete", "the run was interrupted"))
    if calibration is not None:
        rows += [(name, text) for name, _, text in (words.partition(": ") for words in calibration.words())]
    if survey is not None:
        calls = f"{_several(survey.calls, 'call')} of {survey.model} in {_several(survey.steps, 'step')}"
        rows.append(("looked at", f"{calls}, on {survey.device}"))
    return rows


def _cards(calibration: Calibration | None, survey: Survey | None) -> list[tuple[str, str]]:
    """The numbers to begin with: (number, what it is)."""
    cards = []
    total = None if calibration is None else calibration.summary()
    if survey is not None:
        cards.append((f"{survey.sparsity:.1%}", "of the key blocks skipped, on this batch"))
        dense, sparse = survey.seconds
        if sparse:
            cards.append(
                (f"{dense / sparse:.2f}×", f"attention: {_milliseconds(dense)} dense, {_milliseconds(sparse)} sparse")
            )
        if survey.call_error is not None:
            cards.append((f"{survey.call_error:.4f}", "relative error ‖u − v‖ ÷ ‖v‖ of the model's first call"))
        if survey.output_error is not None and survey.calls > 1:
            cards.append((f"{survey.output_error:.4f}", "the same of what the whole run gives"))
        attention = [row for row in survey.report if row.reason is not Reason.NOT_ATTENTION]
        cards.append((f"{len(survey.report.sparse)} of {len(attention)}", "attention sites would be sparse"))
    if total is not None:
        errors = (
            f"the {total.heads} heads' errors are {total.mean_error:.4f} on average, {total.worst_error:.4f} at most"
        )
        cards.append((f"{total.sparsity:.1%}", f"of the key blocks skipped, as calibrated; {errors}"))
    return cards or [(str(len(calibration.sites)) if calibration else "0", "sites, without measurements")]


def _strips_of_calibration(calibration: Calibration | None) -> list[Strip]:
    if calibration is None or calibration.origin is None:
        return []
    strips = []
    starts = list(calibration.all_phases())
    by_phase: dict[str, list[float]] = {}
    for phase, start in enumerate(starts):
        rows = [row for row in calibration.points() if row.phase == phase]
        values = {row.name: [1 - point.density for point in row.points] for row in rows}
        when = "" if len(starts) == 1 else f", from {start:.0%} of the run on"
        strips.append(_strip(f"Sparsity by head, as calibrated{when}", "head", values))
        for name, each in values.items():
            by_phase.setdefault(name, []).append(statistics.fmean(each))
    if len(starts) > 1:
        columns = [f"from {start:.0%} on" for start in starts]
        strips.append(_strip("Sparsity by phase, as calibrated", "phase", by_phase, columns))
    return strips


def _strips_of_survey(survey: Survey | None) -> list[Strip]:
    if survey is None:
        return []
    strips = [_strip("Sparsity by head, on this batch", "head", {site.name: site.by_head() for site in survey.sites})]
    if len(calls := survey.sites[0].calls) > 1:
        values = {site.name: site.by_call() for site in survey.sites if site.calls == calls}
        strips.append(_strip("Sparsity by call of the model", "call", values, [str(call) for call in calls]))
    return strips


def _strip(heading: str, what: str, values: Mapping[str, Sequence[float]], columns: Sequence[str] = ()) -> Strip:
    labels, shared = short_names(list(values))
    rows = [
        (label, name, each, statistics.fmean(each)) for label, (name, each) in zip(labels, values.items(), strict=True)
    ]
    return Strip(heading, shared, what, columns or [str(i) for i in range(max(map(len, values.values())))], rows)


def _bars(survey: Survey | None) -> dict[str, Any] | None:
    """Times by site, and the longest."""
    timed = [] if survey is None else [site for site in survey.sites if site.seconds is not None]
    if not timed:
        return None
    labels, shared = short_names([site.name for site in timed])
    rows: list[dict[str, Any]] = [
        {"label": label, "name": site.name, "dense": dense, "sparse": sparse}
        for label, site in zip(labels, timed, strict=True)
        for dense, sparse in (site.seconds or (0.0, 0.0),)
    ]
    return {"shared": shared, "rows": rows, "longest": max(max(row["dense"], row["sparse"]) for row in rows)}


def _maps(survey: Survey | None) -> list[dict[str, Any]]:
    """Pictures of block maps: of each site the share of heads that read a block, and some of its heads."""
    maps = []
    sites = [] if survey is None else [site for site in survey.sites if site.block_map is not None]
    for label, site in zip(short_names([site.name for site in sites])[0], sites, strict=True):
        assert site.block_map is not None
        kept = site.block_map.float()  # [H, Nq, Nk]
        order = kept.mean((1, 2)).argsort().tolist()  # the sparsest first
        count = min(HEADS_SHOWN, len(order))
        shown = [order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)]
        heads = [(head, 1 - kept[head].mean().item(), picture(kept[head])) for head in shown]
        maps.append(
            {"label": label, "site": site, "mean": picture(kept.mean(0)), "heads": heads, "order": _order(site)}
        )
    return maps


def _order(site: SiteSurvey) -> str:
    return "raster order" if site.tile is None else f"tiles of {tile_text(site.tile)}"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
