"""What a user gives a model: batches, the arguments that each stands for, and what runs one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import type_error, value_error


def batches_and_call(
    model: nn.Module,
    batches: Iterable[Any] | None,
    forward_loop: Callable[[nn.Module], Any] | None,
    call: Callable[..., Any] | None,
) -> tuple[Iterable[Any], Callable[..., Any]]:
    """The batches, and what runs one."""
    if forward_loop is not None and batches is None:
        return [(model,)], forward_loop
    if batches is None or forward_loop is not None:
        raise value_error(
            "calibrate: inputs",
            given="none" if batches is None else "batches and a forward_loop",
            allowed="batches, or a forward_loop",
            todo="Give one of the two.",
        )
    return listed(batches), call or model


def listed(batches: Iterable[Any]) -> Iterable[Any]:
    """Batches, which a single one is not: iterating over it gives rows of a tensor, or names."""
    if isinstance(batches, (Tensor, Mapping, str)):
        raise type_error(
            "batches",
            given=f"a {type(batches).__name__}, which would be taken to pieces",
            allowed="an iterable of batches",
            todo="Put a single batch into a list: [batch].",
        )
    return batches


def first_batch(batches: Iterable[Any]) -> Any:
    """The first of the batches."""
    for batch in listed(batches):
        return batch
    raise no_batches()


def no_batches() -> ValueError:
    """The error of inputs without a batch."""
    return value_error("batches", given="none", allowed="at least one", todo="Is the iterable used up? Give a list.")


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping):
        return batch[0], dict(batch[1])
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})
