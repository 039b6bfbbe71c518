"""The loss between what student and teacher give, and which parts of what they give count.

In: the outputs [B, ...] of both, and those of sites [B, H, L, Dv]. Out: an error for each sample, float32 [B].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import type_error, value_error


class Prediction(NamedTuple):
    """A training forward by student and teacher: outputs [B, ...], and those of sites [B, H, L, Dv] by name."""

    student: Tensor
    teacher: Tensor
    weights: dict[str, float]  # of the sites that count
    student_sites: dict[str, list[Tensor]]
    teacher_sites: dict[str, list[Tensor]]


def errors_by_sample(prediction: Prediction) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the error of each sample, float32 [B], and its parts, detached means over the samples.

    ‖u − v‖² ÷ n + Σ w · ‖o − p‖² ÷ ‖p‖² ÷ number of sites: see ``DistillationHook.loss``.
    """
    total = squared_error(prediction.student, prediction.teacher) / max(1, prediction.teacher[0].numel())
    parts = {"output": total.detach().mean()}
    samples = len(total)
    for name, weight in prediction.weights.items():
        calls = zip(prediction.student_sites[name], prediction.teacher_sites[name], strict=True)
        relative = torch.stack([relative_error(o, p, samples) for o, p in calls]).mean(0)
        parts[name] = relative.detach().mean()
        total = total + weight / len(prediction.weights) * relative
    return total, parts


class _SquaredError(torch.autograd.Function):
    """Σ (x − y)² of each sample [B] in float32. Nothing is kept for the backward but x and y as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return _squares(x.float() - y.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        grad = grad.view(-1, *[1] * (x.dim() - 1))
        return (2 * grad * (x.float() - y.float())).to(x.dtype), None


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Return Σ (x − y)² of each sample, float32 [B], of x and y [B, ...] in any dtype; y takes no gradient."""
    return _SquaredError.apply(x, y.detach())


def relative_error(x: Tensor, y: Tensor, samples: int) -> Tensor:
    """Return ‖x − y‖² ÷ ‖y‖² of each sample, float32 [samples].

    x, y [n, ...] may have windows or heads folded into their batch; where n is no multiple of ``samples``, each sample
    gets the error of all of them.
    """
    error, size = squared_error(x, y), _squares(y)
    if len(size) % samples:
        error, size = error.sum().expand(samples), size.sum().expand(samples)
    else:
        error, size = (z.view(samples, -1).sum(1) for z in (error, size))
    return error / size.clamp(min=torch.finfo(torch.float32).tiny)


def _squares(x: Tensor) -> Tensor:
    return x.float().square().flatten(1).sum(1)


def output_selector(select: Any) -> Callable[[Any], Tensor]:
    """Return a function from what a model gives to the tensor [B, ...] that counts.

    Args:
        select: an index, a key, the name of an attribute, or a function; None: the output itself, or the first entry of
            a tuple, dict or dataclass.

    Raises:
        TypeError: something else; and by the function that is returned, where it leads to no tensor [B, ...].
    """
    if not (select is None or callable(select) or (isinstance(select, (int, str)) and not isinstance(select, bool))):
        raise type_error(
            "DistillationHook: bad select",
            given=repr(select),
            allowed="an index, a name or a function",
            todo="Give the place of the prediction in the model's output, as 0 or 'sample', or leave select out.",
        )

    def selected(output: Any) -> Tensor:
        tensor = _part(output, select)
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise type_error(
                "DistillationHook: select finds no tensor [B, ...] in the output",
                given=f"{type(tensor).__name__} in {type(output).__name__}",
                allowed="an index, a key, an attribute or a function that leads to the prediction",
                todo="Pass select=.",
            )
        return tensor

    return selected


def _part(output: Any, select: Any) -> Any:
    if callable(select):
        return select(output)
    if isinstance(select, str):
        return output[select] if isinstance(output, Mapping) else getattr(output, select)
    if select is not None:
        return output[select]
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    if isinstance(output, (tuple, list)):
        return output[0] if output else None
    if dataclasses.is_dataclass(output):
        return getattr(output, dataclasses.fields(output)[0].name)
    return output


def layer_weights(layers: Any) -> dict[str, float]:
    """Return the weights of sites by name or pattern; none where no site counts.

    Raises:
        ValueError: no number from 0 on, nor a mapping to such.
    """
    weights = dict(layers) if isinstance(layers, Mapping) else {"*": layers}
    for name, weight in weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not isinstance(name, str) or not is_number or not weight >= 0:
            raise value_error(
                "DistillationHook: bad layers",
                given=repr(layers),
                allowed="a number from 0 on, or one for each name or pattern",
                todo="Give one weight for all sites, as 0.1, or a dict, as {'blocks.*': 0.1}.",
            )
    return weights if any(weights.values()) else {}
