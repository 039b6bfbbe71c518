"""One shape for every message to a user: what was wrong, what was given, what is allowed, what to do next."""

from __future__ import annotations


def explain_error(what: str, *, given: object, allowed: str, todo: str) -> str:
    """The text of a ``ValueError`` or ``TypeError``, as four short parts in one order."""
    return f"{what}: got {given}; allowed: {allowed}. {todo}"
