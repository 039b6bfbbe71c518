"""Where the steps of a denoising run end. In: what runs a pipeline. Out: the same, which tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_CALLBACK, _TENSORS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"


def with_step_ends(call: Callable[..., Any], ended: Callable[[], None]) -> Callable[..., Any]:
    """Return a function like ``call`` that calls ``ended`` after each step.

    It is asked through the argument ``callback_on_step_end`` that diffusers pipelines take; a callback that is given to
    the function is called as well. What has no such argument is returned as it is.
    """
    if not takes_callback(call):
        return call

    def run(*args: Any, **kwargs: Any) -> Any:
        theirs = kwargs.get(_CALLBACK)

        def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> Any:
            ended()
            return values if theirs is None else theirs(pipe, step, timestep, values)

        if (read := getattr(theirs, "tensor_inputs", None)) is not None:  # a PipelineCallback says what it reads
            kwargs[_TENSORS] = read
        return call(*args, **{**kwargs, _CALLBACK: on_step_end})

    return run


def takes_callback(call: Callable[..., Any]) -> bool:
    """Whether a function has an argument ``callback_on_step_end``."""
    try:
        return _CALLBACK in inspect.signature(call).parameters
    except (TypeError, ValueError):  # it has no signature that Python knows
        return False
