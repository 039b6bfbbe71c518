"""A calibration as text: what is known of it, and a row for each site and phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from .fronts import Point, error_of

if TYPE_CHECKING:
    from .calibration import Calibration

WORST = 3  # heads that are named in a row


def table(calibration: Calibration) -> str:
    """What is known of a calibration, and a row for each site and phase."""
    origin, total = calibration.origin, calibration.summary()
    starts = [0.0, *calibration.phases]
    if origin is None or total is None:
        every = zip(starts, (calibration.sites, *calibration.phases.values()), strict=True)
        rows = [
            (name, f"{start:g}", len(pairs), *_spans(pairs)) for start, sites in every for name, pairs in sites.items()
        ]
        return "without measurements\n" + tabulate(rows, headers=("site", "from", "heads", "topk", "topp"))
    aim = (
        f"error {origin.target_error:g}" if origin.target_error is not None else f"sparsity {origin.target_sparsity:g}"
    )
    held = origin.held_out
    lines = [
        f"{origin.model}, {origin.created_with}, {origin.device}; fingerprint {origin.fingerprint}",
        f"aim: {aim}, by the {origin.by} sample, mode {origin.mode}; {origin.batches} batches, "
        f"{origin.query_blocks} query blocks, seed {origin.seed}",
        f"sparsity {total.sparsity:.1%}; error of heads: mean {total.mean_error:.4f}, worst {total.worst_error:.4f}; "
        f"{total.dense_heads} of {total.heads} heads stay dense",
    ]
    if not origin.complete:
        lines.insert(0, "NOT COMPLETE: the run was interrupted; the same command goes on where it stopped")
    if origin.modes:
        lines.append("sparsity by mode: " + ", ".join(f"{mode} {value:.1%}" for mode, value in origin.modes.items()))
    if held:
        within = ""
        if "within" in held:
            within = f"; {held['within']:.1%} keep the bound, which is searched for with {origin.margin:g} of it"
        lines.append(
            f"on samples that the thresholds were not chosen by: sparsity {held['sparsity']:.1%}, error mean "
            f"{held['mean_error']:.4f} (expected {held['expected_mean_error']:.4f}), worst {held['worst_error']:.4f} "
            f"(expected {held['expected_worst_error']:.4f}){within}"
        )
    elif origin.modes:
        lines.append("not checked on held-out samples: that takes four of each site")
    rows = [
        (name, f"{starts[phase]:g}", curves.samples, *_row(points, origin.by))
        for name, phase, points, curves in calibration.points()
    ]
    headers = (
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
    return "\n".join(lines) + "\n\n" + tabulate(rows, headers=headers, disable_numparse=True)


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
        name(order[:WORST]),
        name(order[-WORST:][::-1]),
    )


def _spans(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """The least and the largest value of each threshold."""
    return [f"{min(x):g}" if min(x) == max(x) else f"{min(x):g}–{max(x):g}" for x in zip(*pairs, strict=True)]
