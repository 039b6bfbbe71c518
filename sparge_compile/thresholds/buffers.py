"""Thresholds on a user's module: the child that holds them as buffers, and the hook that shows them to the backend.

A child of its own, because a float buffer of the module itself would be cast by ``model.half()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import ops

CHILD = "sparge"  # the child's name, and so a part of the keys in a state dict


class Attached(Module):
    """Thresholds of a module's attentions, float32 [H, 2], or [1, 2] for all heads, by index.

    Index 0 is the module's first attention, 1 its second; ``ops.REST`` is for all that have no index here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indices: tuple[int, ...] = ()

    def put(self, index: int, values: Tensor) -> None:
        """Hold thresholds for an index; values of the same shape are written in place, and nothing is compiled anew."""
        buffer = self._buffers.get(buffer_name(index))
        if buffer is not None and buffer.shape == values.shape:
            with torch.no_grad():
                buffer.copy_(values)
            return
        # Out of inference mode, so that the buffer can be written to there and elsewhere.
        with torch.inference_mode(False):
            fresh = values.to(buffer.device if buffer is not None else values.device, torch.float32, copy=True)
            self.register_buffer(buffer_name(index), fresh)
        self.indices = tuple(sorted({*self.indices, index}))

    def get(self, index: int) -> Tensor | None:
        """Return the buffer for the attention of this index, or None where none is meant for it."""
        buffer = self._buffers.get(buffer_name(index))
        return buffer if buffer is not None else self._buffers.get(buffer_name(ops.REST))

    def drop(self, index: int) -> None:
        """Take off the thresholds for an index, if there are any."""
        if index in self.indices:
            delattr(self, buffer_name(index))
            self.indices = tuple(i for i in self.indices if i != index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attached:
        """Move with the model, and stay float32: a share of 0.05 in half precision would be another share."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == torch.float32 else buffer.to(moved.device)
        return self


def attached_to(module: Module | None) -> Attached | None:
    """Return the thresholds that are attached to a module, or None."""
    child = None if module is None else module._modules.get(CHILD)
    return child if isinstance(child, Attached) else None


def mark(module: Module, args: Any) -> None:
    """Put a marker for each of a module's thresholds into the graph: a forward pre-hook.

    One function for all modules, so that Dynamo's guards let equal blocks share a graph.
    """
    attached: Any = module._modules[CHILD]
    for index in attached.indices:
        torch.ops.sparge.mark(attached._buffers[buffer_name(index)], index)


def buffer_name(index: int) -> str:
    """Return the name of the buffer for an index."""
    return "thresholds" if index == 0 else "thresholds_rest" if index == ops.REST else f"thresholds_{index}"
