"""One shape for every message to a user: what was wrong, what was given, what is allowed, what to do next."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=Exception)


def explain_error(what: str, *, given: object, allowed: str, todo: str) -> str:
    """Return the text of a message, as four short parts in one order."""
    return f"{what}: got {given}; allowed: {allowed}. {todo}"


def value_error(what: str, *, given: object, allowed: str, todo: str) -> ValueError:
    """Return a ``ValueError`` of four parts, to be raised where a user's value is wrong."""
    return _of_user(ValueError(explain_error(what, given=given, allowed=allowed, todo=todo)))


def type_error(what: str, *, given: object, allowed: str, todo: str) -> TypeError:
    """Return a ``TypeError`` of four parts, to be raised where a user's value has the wrong type."""
    return _of_user(TypeError(explain_error(what, given=given, allowed=allowed, todo=todo)))


def no_file_error(what: str, *, given: object, allowed: str, todo: str) -> FileNotFoundError:
    """Return a ``FileNotFoundError`` of four parts, to be raised where a user names a file that is not there."""
    return _of_user(FileNotFoundError(explain_error(what, given=given, allowed=allowed, todo=todo)))


def is_of_user(error: BaseException) -> bool:
    """Whether an error tells a user of a wrong value; any other one is a fault of ours, or of what we call."""
    return getattr(error, "sparge_of_user", False)


def _of_user(error: E) -> E:
    error.sparge_of_user = True  # type: ignore[attr-defined]
    return error
