"""One shape for every message to a user: what was wrong, what was given, what is allowed, what to do next."""

from __future__ import annotations


def explain_error(what: str, *, given: object, allowed: str, todo: str) -> str:
    """Return the text of a message, as four short parts in one order."""
    return f"{what}: got {given}; allowed: {allowed}. {todo}"


def value_error(what: str, *, given: object, allowed: str, todo: str) -> ValueError:
    """Return a ``ValueError`` of four parts, to be raised where a user's value is wrong."""
    return ValueError(explain_error(what, given=given, allowed=allowed, todo=todo))


def type_error(what: str, *, given: object, allowed: str, todo: str) -> TypeError:
    """Return a ``TypeError`` of four parts, to be raised where a user's value has the wrong type."""
    return TypeError(explain_error(what, given=given, allowed=allowed, todo=todo))
