"""A head's two thresholds, (topk, topp), and the checks of what a user gives for them and for a progress."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import type_error, value_error

Pair = tuple[float, float]  # (topk, topp)
Sites = Mapping[str, tuple[Pair, ...]]  # a pair for each head, or one for all, by the name of a site or a pattern


def check_pair(topk: float, topp: float, where: str = "thresholds") -> Pair:
    """Return one head's thresholds as floats.

    Raises:
        TypeError: one of them is no number.
        ValueError: one of them is out of range. Both messages begin with ``where``.
    """
    for name, value in (("topk", topk), ("topp", topp)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise type_error(
                f"{where}: {name} has the wrong type",
                given=repr(value),
                allowed="a number",
                todo=f"Pass {name} as a float.",
            )
    if not 0 < topk <= 1:
        raise value_error(
            f"{where}: topk is out of range",
            given=topk,
            allowed="a share of the visible key blocks in (0, 1]",
            todo="Use 1 to keep all of them; at least one block is always kept.",
        )
    if not 0 <= topp <= 1:
        raise value_error(
            f"{where}: topp is out of range",
            given=topp,
            allowed="a probability mass in [0, 1]",
            todo="Use 0 to select by topk alone.",
        )
    return float(topk), float(topp)


def check_progress(fraction: float) -> None:
    """Raise a ``ValueError`` unless this is a share of a run, in [0, 1]."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise value_error(
            "a progress is out of range",
            given=repr(fraction),
            allowed="the share of a run that is done, in [0, 1]",
            todo="Give steps done ÷ steps in all.",
        )
