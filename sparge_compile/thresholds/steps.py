"""Which step of a denoising run a model is in, for plans that are options. In: what a caller says. Out: the step.

What is attached to a model has a handle that is told (``Attachment.set_step``); compiled code alone has none.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import type_error, value_error
from ..user_model import bare, user_model

_now: WeakKeyDictionary[nn.Module, tuple[int, int | None]] = WeakKeyDictionary()


def set_step(model: nn.Module, step: int, steps: int | None = None) -> None:
    """Say which step of a denoising run a model is in, for the option ``dense_steps``.

    ``diffusers_callback(model)`` says it of a pipeline's steps.

    Args:
        model: the model, compiled or not.
        step: the number of the step that begins, from 0 on, among those in which this model is called.
        steps: how many there are; None: not known, and plans from a run's end do not hold.

    Raises:
        TypeError: no module. ValueError: numbers that are none of a step in a run.
    """
    target: Any = user_model(model)
    if not isinstance(target, nn.Module):
        raise type_error(
            "set_step: bad model",
            given=type(target).__name__,
            allowed="an nn.Module",
            todo="Pass the model that is compiled, as pipe.transformer.",
        )
    check_step(step, steps)
    _now[bare(target)] = step, steps


def step_of(root: nn.Module | None) -> tuple[int, int | None]:
    """The step that a model is in, its own or that of a model around it or in it.

    Raises:
        ValueError: nobody has said so.
    """
    if root is not None:
        if (found := _now.get(root)) is not None:
            return found
        inside = set(root.modules())
        for model, said in _now.items():
            if model in inside or any(module is root for module in model.modules()):
                return said
    raise value_error(
        "some steps are dense by plan (dense_steps), and nothing says which step it is",
        given="a call of " + ("an unknown model" if root is None else type(root).__name__),
        allowed="calls after sparge_compile.set_step(model, step, steps)",
        todo="Call it before each step, or give a pipeline callback_on_step_end="
        "sparge_compile.diffusers_callback(pipe.transformer).",
    )


def check_step(step: Any, steps: Any) -> None:
    """Raise a ``ValueError`` unless this is a step of a run of so many; None: it is not known how many."""
    known = steps is None or type(steps) is int
    if not known or type(step) is not int or step < 0 or (steps is not None and step >= steps):
        raise value_error(
            "set_step: no step of a run",
            given=f"step {step!r} of {steps!r}",
            allowed="whole numbers, the step from 0 to below their number",
            todo="Give the number of the step that begins, and how many there are.",
        )
