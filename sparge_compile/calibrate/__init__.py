"""Calibration: record, search, write. The package is a function too: ``sparge_compile.calibrate(model, batches)``.

The public function has the name of its package, and either may be imported first, so the module itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from .run import calibrate

        return calibrate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
