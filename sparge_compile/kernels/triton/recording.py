"""What a call does on a GPU, written down: the memory that it takes, and the kernels that it launches.

All kernels are launched through :func:`launch`, so that a recorder hears of them; a dispatch mode sees everything else.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launcher import Launcher, tensor_of

# Ops that take memory, or look at it in another way.
HARMLESS = frozenset(
    [
        *("empty", "empty_strided", "empty_permuted", "empty_like", "new_empty", "new_empty_strided"),
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "expand", "permute", "transpose"),
        *("unsqueeze", "squeeze", "select", "slice", "detach", "alias"),
    ]
)

_recording = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """``kernel[grid](*arguments, **named)``, noted where a call is being recorded."""
    compiled = kernel[grid](*arguments, **named)
    recorder = getattr(_recording, "active", None)
    if recorder is not None:
        recorder.note(compiled, kernel, grid, dict(zip(kernel.arg_names, arguments, strict=False)) | named)


@triton.jit
def _zero_kernel(x_ptr):
    tl.store(x_ptr, 0)


def zero(x: Tensor) -> Tensor:
    """One number, set to 0."""
    launch(_zero_kernel, (1,), x_ptr=x)
    return x


class Source(NamedTuple):
    """Where an address comes from: the ``number``-th of inputs and fresh memory, and how many bytes into it."""

    number: int
    offset: int


class Fresh(NamedTuple):
    """Memory that a call takes: a whole storage, as the first tensor in it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    size: int  # bytes of the storage

    @property
    def whole(self) -> bool:
        """Whether taking the tensor anew takes the storage anew."""
        reach = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset == 0 and reach * self.dtype.itemsize == self.size


class Recorder(TorchDispatchMode):
    """Watches a call: what it takes and launches, and whether it does anything else."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.first = len(inputs)  # the number of the first fresh memory
        self.sources = {x.data_ptr(): Source(n, 0) for n, x in reversed(list(enumerate(inputs)))}
        self.given = {x.untyped_storage().data_ptr() for x in inputs}
        self.fresh: list[Fresh] = []
        self.numbers: dict[int, int] = {}  # by the address of a storage
        self.steps: list[Launcher | tuple[int, Any]] = []  # a launch, or fresh memory and a number to fill it with
        self.held: list[Any] = []  # what was taken: no address comes twice
        self.faithful = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in ("zero_", "fill_"):
            self.note_fill(args[0], *args[1:] or (0,))
        else:
            self.faithful &= name in HARMLESS
        self.held.append(result)
        return result

    def __enter__(self) -> Recorder:
        self.outer, _recording.active = getattr(_recording, "active", None), self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _recording.active = self.outer
        super().__exit__(*exception)

    def source(self, x: Tensor) -> Source:
        """Where the address of a tensor comes from."""
        found = self.sources.get(x.data_ptr())
        if found is not None:
            return found
        storage = x.untyped_storage()
        start = storage.data_ptr()
        self.faithful &= start not in self.given  # a part of an input, which may lie elsewhere in the next one
        if start not in self.numbers:
            self.numbers[start] = self.first + len(self.fresh)
            self.fresh.append(Fresh(tuple(x.shape), x.stride(), x.dtype, x.data_ptr() - start, storage.nbytes()))
            self.held.append(x)
        return Source(self.numbers[start], x.data_ptr() - start)

    def note_fill(self, x: Tensor, number: Any) -> None:
        """Fresh memory, all of it, filled with a number."""
        source = self.source(x)
        fresh = source.number >= self.first and self.fresh[source.number - self.first]
        self.faithful &= bool(fresh and fresh.whole and fresh.shape == x.shape and fresh.dtype == x.dtype)
        self.faithful &= isinstance(number, (int, float))
        self.steps.append((source.number, number))

    def note(self, compiled: Any, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """One launch. Triton's interpreter compiles nothing."""
        self.faithful &= compiled is not None
        if self.faithful:
            ordered = [arguments.get(name) for name in kernel.arg_names]
            tensors = (x for x in map(tensor_of, ordered) if x is not None)
            self.steps.append(Launcher(compiled, grid, ordered, [self.source(x) for x in tensors]))
