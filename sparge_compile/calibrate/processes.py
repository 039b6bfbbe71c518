"""The processes that divide the batches of a calibration run among themselves: one, or those of torch.distributed."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ..errors import value_error

Key = TypeVar("Key")
Value = TypeVar("Value")


class Processes:
    """This process alone, or with ``shared`` those of the initialised process group.

    Attributes:
        number: how many there are.
        is_first: whether this one writes and shows.

    Raises:
        ValueError: ``shared`` without a process group.
    """

    def __init__(self, shared: bool) -> None:
        self.number, self._rank = 1, 0
        self._group: Any = None
        if shared:
            distributed = torch.distributed
            if not distributed.is_available() or not distributed.is_initialized():
                raise value_error(
                    "calibrate: share_batches",
                    given="no process group",
                    allowed="an initialised one",
                    todo="Call init_process_group, or use torchrun.",
                )
            self.number, self._rank = distributed.get_world_size(), distributed.get_rank()
            self._group = distributed.new_group(backend="gloo")
        self.is_first = self._rank == 0

    def owns(self, number: int) -> bool:
        """Whether the batch with this number is for this process."""
        return number % self.number == self._rank

    def gather(self, own: dict[Key, Value]) -> dict[Key, Value]:
        """Return what all processes have, in each of them."""
        if self._group is None:
            return own
        parts: list[Any] = [None] * self.number
        torch.distributed.all_gather_object(parts, own, group=self._group)
        return {key: value for part in parts for key, value in part.items()}
