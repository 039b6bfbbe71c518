"""A head's two thresholds, (topk, topp), and the check of what a user gives for them."""

from __future__ import annotations

from .errors import explain_error

Pair = tuple[float, float]  # (topk, topp)


def check_pair(topk: float, topp: float, where: str = "thresholds") -> Pair:
    """One head's thresholds, or a ``ValueError`` that says which of them is out of range."""
    for name, value in (("topk", topk), ("topp", topp)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                explain_error(
                    f"{where}: {name} has the wrong type",
                    given=repr(value),
                    allowed="a number",
                    todo=f"Pass {name} as a float.",
                )
            )
    if not 0 < topk <= 1:
        raise ValueError(
            explain_error(
                f"{where}: topk is out of range",
                given=topk,
                allowed="a share of the visible key blocks in (0, 1]",
                todo="Use 1 to keep all of them; at least one block is always kept.",
            )
        )
    if not 0 <= topp <= 1:
        raise ValueError(
            explain_error(
                f"{where}: topp is out of range",
                given=topp,
                allowed="a probability mass in [0, 1]",
                todo="Use 0 to select by topk alone.",
            )
        )
    return float(topk), float(topp)


def check_progress(fraction: float) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise ValueError(
            explain_error(
                "a progress is out of range",
                given=repr(fraction),
                allowed="the share of a run that is done, in [0, 1]",
                todo="Give steps done ÷ steps in all.",
            )
        )
