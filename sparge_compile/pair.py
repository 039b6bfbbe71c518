"""A head's two thresholds, (topk, topp), tables of them, and the checks of what a user gives for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from .errors import type_error, value_error

Pair = tuple[float, float]  # (topk, topp)
Sites = Mapping[str, tuple[Pair, ...]]  # a pair for each head, or one for all, by the name of a site or a pattern

Key = TypeVar("Key")
Value = TypeVar("Value")


class Table(dict[Key, Value]):
    """A dict that nobody changes: what was compiled with its entries would not notice. ``copy`` gives a plain dict."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise type_error(
            "a Calibration cannot be changed",
            given="an assignment to one of its tables",
            allowed="new ones: compiled code keeps the thresholds that it was compiled with",
            todo="Make one, as Calibration({**calibration.sites, name: pairs}), or use attach(…).set(…).",
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)  # pickle and copy fill a dict item by item otherwise


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
