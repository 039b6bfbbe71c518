"""Calls of a model that were made while it was calibrated, to be made again: its arguments, in CPU memory.

A few dozen are kept, however many there are: of every batch the same ones, as far as its calls are as many as others'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

MOST = 64  # calls that are kept
_OF_BATCH = 4  # calls that a batch keeps before whole batches are left out
_DEVICE_TYPES = ("cpu", "cuda")


class ModelCall(NamedTuple):
    """One call of a model: ``number`` counts those of its batch. Tensors of the arguments are copies on the CPU."""

    batch: int
    number: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    devices: Mapping[int, torch.device]  # of tensors that were elsewhere, by their place among all
    autocast: Mapping[str, torch.dtype]

    @staticmethod
    def of(batch: int, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        """Copy the arguments of a call that is about to be made."""
        devices: dict[int, torch.device] = {}
        count = 0

        def copy(x: Tensor) -> Tensor:
            nonlocal count
            devices[count] = x.device
            count += 1
            return x.detach().to("cpu", copy=True)

        args, kwargs = tree_map_only(Tensor, copy, (args, dict(kwargs)))
        casts = {kind: torch.get_autocast_dtype(kind) for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)}
        return ModelCall(batch, number, args, kwargs, devices, casts)

    def run(self, model: Any) -> Any:
        """Call a model with fresh copies of the arguments, which it may change, where they were."""
        count = 0

        def bring(x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return x.to(self.devices[count - 1], copy=True)

        args, kwargs = tree_map_only(Tensor, bring, (self.args, dict(self.kwargs)))
        with ExitStack() as stack:
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            return model(*args, **kwargs)


class NotedCalls:
    """The calls of a model that are kept. When they are too many, every second one of each batch goes, and once few are
    left of each, every second batch."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Keep nothing of what was offered."""
        self._calls: list[tuple[int, ModelCall]] = []  # with its number among those that were offered of its batch
        self._offered: Counter[int] = Counter()
        self._stride, self._batch_stride = 1, 1

    def note(self, batch: int, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Offer a call that is about to be made."""
        place = self._offered[batch]
        self._offered[batch] += 1
        if self._keeps(place, batch):
            self._calls.append((place, ModelCall.of(batch, number, args, kwargs)))
        while len(self._calls) > MOST:
            of_batch = Counter(call.batch for _, call in self._calls)
            if max(of_batch.values()) > _OF_BATCH or len(of_batch) == 1:
                self._stride *= 2
            else:
                self._batch_stride *= 2
            self._calls = [(place, call) for place, call in self._calls if self._keeps(place, call.batch)]

    def calls(self) -> list[ModelCall]:
        """Return what is kept, by batch and number."""
        return sorted((call for _, call in self._calls), key=lambda call: call[:2])

    def _keeps(self, place: int, batch: int) -> bool:
        return place % self._stride == 0 and batch % self._batch_stride == 0
