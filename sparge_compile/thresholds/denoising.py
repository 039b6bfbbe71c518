"""``diffusers_callback``: the phases of attached thresholds follow the steps of a diffusers pipeline.

A model's progress is the share of its own steps that are done: those in which the pipeline calls it. Calibration
measures by the same (calibrate/record.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import type_error
from ..user_model import user_model
from .attached import Attachment
from .steps import set_step


def diffusers_callback(*handles: Attachment | nn.Module) -> Callable[..., dict[str, Any]]:
    """Return a ``callback_on_step_end`` that switches phases between the steps of a diffusers pipeline.

    Of two experts that share a run (Wan 2.2), each has the steps in which it is called, as in calibration; give the
    handles of both. After a model's last step its first phase holds again, for the next run. Where a run was broken
    off, call ``handle.set_progress(0)``.

    Args:
        handles: what ``attach`` gave, for one model of the pipeline or several; or the models themselves, for the
            option ``dense_steps``.

    Raises:
        TypeError: no handle, or something else.
    """
    if not handles or not all(isinstance(handle, (Attachment, nn.Module)) for handle in handles):
        raise type_error(
            "diffusers_callback: bad handles",
            given=", ".join(type(handle).__name__ for handle in handles) or "none",
            allowed="what attach returned, for one model of the pipeline or several; or models",
            todo="handle = attach(pipe.transformer, calibration); diffusers_callback(handle).",
        )
    for handle in handles:
        if isinstance(handle, nn.Module):
            set_step(handle, 0)

    def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        for handle in handles:
            model: Any = handle if isinstance(handle, nn.Module) else handle.model
            steps = _steps_of(pipe, user_model(model))  # type: ignore[arg-type]
            done, count = sum(own <= step for own in steps), max(1, len(steps))
            done = done if done < len(steps) else 0
            if isinstance(handle, nn.Module):
                set_step(handle, done, count)
            else:
                handle.set_step(done, count)
        return values

    return on_step_end


def _steps_of(pipe: Any, model: nn.Module) -> Sequence[int]:
    """The numbers of the steps of this run in which a pipeline calls a model.

    Wan's pipelines give the timesteps from ``boundary_ratio`` of the training's on to ``transformer``, the others to
    ``transformer_2``. Other pipelines call each of their models in every step.
    """
    timesteps = pipe.scheduler.timesteps
    count = getattr(pipe, "num_timesteps", None) or len(timesteps)
    boundary, second = pipe.config.get("boundary_ratio"), getattr(pipe, "transformer_2", None)
    if boundary is None or not isinstance(second, nn.Module):
        return range(count)
    late = (timesteps[-count:] < boundary * pipe.scheduler.config.num_train_timesteps).tolist()
    is_second = any(module is model for module in second.modules())
    return [step for step, is_late in enumerate(late) if is_late == is_second]
