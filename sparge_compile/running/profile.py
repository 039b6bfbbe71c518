"""A profile function of ours: called for what this thread does, and set aside while Dynamo compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

Profile = Callable[[FrameType, str, Any], None]


class Profiler:
    """Sets a profile function (``sys.setprofile``) and takes it off again; nobody else's is disturbed."""

    def __init__(self, function: Profile) -> None:
        self._function = torch._dynamo.disable(function)
        self._callbacks = (lambda args: sys.setprofile(None)), (lambda args: sys.setprofile(self._function))

    def start(self) -> bool:
        """Set the function; False where somebody else has set one in this thread."""
        if sys.getprofile() is not None:
            return False
        start, end = self._callbacks
        torch._dynamo.callback_handler.register_start_callback(start)
        torch._dynamo.callback_handler.register_end_callback(end)
        sys.setprofile(self._function)
        return True

    def stop(self) -> None:
        """Take it off."""
        sys.setprofile(None)
        handler = torch._dynamo.callback_handler
        for callbacks, callback in zip((handler.start_callbacks, handler.end_callbacks), self._callbacks, strict=True):
            if callback in callbacks:  # torch.compiler.reset empties them
                callbacks.remove(callback)
