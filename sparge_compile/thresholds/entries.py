"""Checks of what a file says, value by value. In: plain JSON types. Out: nothing, or an error that names the place."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import value_error


def is_number(value: Any) -> bool:
    """Finite, and an integer not too large for a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_whole(value: Any, where: str, least: int | None) -> None:
    """Raise a ``ValueError`` unless it is a whole number that is large enough."""
    if type(value) is not int or (least is not None and value < least):
        raise wrong_entry(where, value, "a whole number" + (f", at least {least}" if least is not None else ""))


def checked_list(value: Any, where: str) -> list[Any]:
    """Return a list; anything else is a ``ValueError``."""
    if not isinstance(value, list):
        raise wrong_entry(where, value, "a list")
    return value


def check_keys(entry: Any, wanted: set[str], where: str) -> None:
    """Raise a ``ValueError`` unless it is an object with these fields, no more and no less."""
    if not isinstance(entry, dict) or set(entry) != wanted:
        raise wrong_entry(where, sorted(entry) if isinstance(entry, dict) else entry, f"the fields {sorted(wanted)}")


def wrong_entry(where: str, given: object, allowed: str) -> ValueError:
    """An entry that no calibration has."""
    text = repr(given)
    return value_error(
        f"calibration: {where}",
        given=text if len(text) < 80 else text[:77] + "...",
        allowed=allowed,
        todo="Write it with Calibration.save.",
    )
