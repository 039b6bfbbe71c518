"""Libraries that only pictures need: imported when one is drawn, with an error that says what to install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import explain_error

_EXTRA = 'pip install -e ".[plot]"'


def needed(module: str, what: str) -> Any:
    """Import a module of the extra ``plot``; ``what`` is what it is needed for.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        todo = f"Run `pip install {package}`; the extra `plot` has all that pictures need (in a clone: `{_EXTRA}`)."
        raise ImportError(explain_error(f"{what} needs {package}", given="none", allowed=package, todo=todo)) from error
