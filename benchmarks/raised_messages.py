"""Which tests make the package raise or warn where: a plugin of pytest, and whoever runs it for ``messages.py``."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparge_compile"
RECORD = "SPARGE_MESSAGES"  # the folder to which each process writes

_test = ""
_raised: dict[str, str] = {}


def _note() -> None:
    frame = inspect.currentframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            _raised.setdefault(f"{path.relative_to(ROOT).as_posix()}:{frame.f_lineno}", _test)
        frame = frame.f_back


def pytest_configure() -> None:
    """Put recorders in the place of what makes messages, in every module that holds it."""
    from sparge_compile import errors

    for module in pkgutil.walk_packages([str(PACKAGE)], "sparge_compile."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    explain, warn = errors.explain_error, warnings.warn

    def explain_error(*args: Any, **kwargs: Any) -> str:
        _note()
        return explain(*args, **kwargs)

    def recorded(message: Any, category: Any = None, stacklevel: int = 1, **kwargs: Any) -> None:
        _note()
        warn(message, category, stacklevel + 1, **kwargs)

    for module in [m for name, m in sys.modules.items() if name.startswith("sparge_compile")]:
        if getattr(module, "explain_error", None) is explain:
            module.explain_error = explain_error  # type: ignore[attr-defined]
    warnings.warn = recorded  # type: ignore[assignment]


def pytest_runtest_setup(item: Any) -> None:
    """Know which test runs."""
    global _test
    _test = item.nodeid


def pytest_sessionfinish() -> None:
    """Write what was raised, from each worker."""
    Path(os.environ[RECORD], f"{os.getpid()}.json").write_text(json.dumps(_raised))


def witnesses(arguments: list[str]) -> dict[str, str]:
    """Run tests, and return for each line of the package that made a message a test in which it did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-p", "raised_messages", *arguments]
        paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, cwd=ROOT, env={**os.environ, RECORD: folder, "PYTHONPATH": paths}, stdout=sys.stderr)
        return {
            place: test for path in Path(folder).glob("*.json") for place, test in json.loads(path.read_text()).items()
        }
