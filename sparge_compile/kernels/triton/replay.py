"""Calls that are recorded once and then replayed: what the host does for a call whose form it has met before.

Preparing a call costs more than the GPU needs for a small one: sizes are checked, launches chosen, arguments bound.
All of that follows from the call's form: dtypes, sizes, strides and alignment of its tensors, and its numbers. So the
first call of a form is watched: which memory it takes and which kernels it launches, with which arguments. The next one
takes as much memory and launches the same kernels on the new addresses, and does nothing else.

What cannot be repeated so (a call that does anything but take memory, fill it with a number, look at it and launch
kernels of ours: under a mask, below the limit, in Triton's interpreter) runs as it is each time; a dispatch mode
watches for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launcher import Launcher, tensor_of

FORMS = 1024  # how many are kept for an op; the oldest goes first
ALIGNMENT = 256  # bytes, of a piece of the workspace

# Ops that take memory, or look at it in another way.
HARMLESS = frozenset(
    [
        "empty",
        "empty_strided",
        "empty_permuted",
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "as_strided",
        "expand",
        "permute",
        "transpose",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "detach",
        "alias",
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


class _Source(NamedTuple):
    """Where an address comes from: the ``number``-th of inputs and fresh memory, and how many bytes into it."""

    number: int
    offset: int


class _Fresh(NamedTuple):
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


class _Recorder(TorchDispatchMode):
    """Watches a call: what it takes and launches, and whether it does anything else."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.first = len(inputs)  # the number of the first fresh memory
        self.sources = {x.data_ptr(): _Source(n, 0) for n, x in reversed(list(enumerate(inputs)))}
        self.given = {x.untyped_storage().data_ptr() for x in inputs}
        self.fresh: list[_Fresh] = []
        self.numbers: dict[int, int] = {}  # by the address of a storage
        self.steps: list[
            tuple[Any, Any]
        ] = []  # a launcher and its sources, or fresh memory and a number to fill it with
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

    def __enter__(self) -> _Recorder:
        self.outer, _recording.active = getattr(_recording, "active", None), self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _recording.active = self.outer
        super().__exit__(*exception)

    def source(self, x: Tensor) -> _Source:
        """Where the address of a tensor comes from."""
        found = self.sources.get(x.data_ptr())
        if found is not None:
            return found
        storage = x.untyped_storage()
        start = storage.data_ptr()
        self.faithful &= start not in self.given  # a part of an input, which may lie elsewhere in the next one
        if start not in self.numbers:
            self.numbers[start] = self.first + len(self.fresh)
            self.fresh.append(_Fresh(tuple(x.shape), x.stride(), x.dtype, x.data_ptr() - start, storage.nbytes()))
            self.held.append(x)
        return _Source(self.numbers[start], x.data_ptr() - start)

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
            self.steps.append((Launcher(compiled, grid, ordered), [self.source(x) for x in tensors]))


class _Output(NamedTuple):
    """A result: fresh memory, all of it or a view."""

    number: int
    view: tuple[Any, ...] | None  # sizes, strides, offset


class _Tape:
    """A recorded call."""

    def __init__(self, recorder: _Recorder, result: Any, device: torch.device) -> None:
        self.device = device
        self.steps = recorder.steps
        self.single = isinstance(result, Tensor)
        self.outputs = [self._output(x, recorder) for x in ((result,) if self.single else result)]
        self.taken = [(x.number, recorder.fresh[x.number - recorder.first]) for x in self.outputs if recorder.faithful]
        self.taken = list(dict(self.taken).items())
        recorder.faithful &= all(fresh.whole for _, fresh in self.taken)
        # All that is no result lies in one workspace.
        self.pieces: list[tuple[int, int]] = []  # number, offset
        self.workspace = 0
        # What is filled is taken by itself, as it is.
        filled = (number for number, _ in self.steps if isinstance(number, int) and recorder.faithful)
        self.taken += [(n, recorder.fresh[n - recorder.first]) for n in set(filled) if n not in dict(self.taken)]
        for number, fresh in enumerate(recorder.fresh, recorder.first):
            if number not in dict(self.taken):
                self.pieces.append((number, self.workspace))
                self.workspace += -(-fresh.size // ALIGNMENT) * ALIGNMENT
        self.room = [0] * len(recorder.fresh)

    def _output(self, x: Tensor, recorder: _Recorder) -> _Output:
        source = recorder.source(x)
        if source.number < recorder.first:
            recorder.faithful = False  # an input is given back
            return _Output(source.number, None)
        fresh = recorder.fresh[source.number - recorder.first]
        if (tuple(x.shape), x.stride(), x.dtype, source.offset) == fresh[:4]:
            return _Output(source.number, None)
        recorder.faithful &= x.dtype == fresh.dtype
        return _Output(source.number, (tuple(x.shape), x.stride(), source.offset // x.dtype.itemsize))

    def run(self, inputs: list[int]) -> Any:
        """The call on other tensors of the same form, which begin there."""
        addresses = inputs + self.room
        taken = {}
        for number, (shape, stride, dtype, *_) in self.taken:
            taken[number] = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
            addresses[number] = taken[number].data_ptr()
        if self.workspace:
            workspace = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
            start = workspace.data_ptr()
            for number, offset in self.pieces:
                addresses[number] = start + offset
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        for launcher, sources in self.steps:
            if isinstance(launcher, int):
                taken[launcher].fill_(sources)
            else:
                launcher([addresses[number] + offset for number, offset in sources], stream)
        if self.single:
            return self._result(taken, self.outputs[0])
        return tuple([self._result(taken, output) for output in self.outputs])

    @staticmethod
    def _result(taken: dict[int, Tensor], output: _Output) -> Tensor:
        number, view = output
        return taken[number] if view is None else taken[number].as_strided(*view)


def _form(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], list[Tensor], list[int]]:
    """What the launches of a call follow from; its tensors, and where they begin."""
    form: list[Any] = []
    tensors: list[Tensor] = []
    addresses: list[int] = []
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            form += (x.dtype, x.shape, x.stride(), address & 15)
            tensors.append(x)
            addresses.append(address)
        else:
            form.append(tuple(x) if isinstance(x, list) else x)
    if len(set(addresses)) < len(addresses):  # which tensors begin where another does is a part of the form
        form.append(tuple(map(addresses.index, addresses)))
    return tuple(form), tensors, addresses


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, a kernel of an op on tensors of a GPU, which replays calls of a form that it has met."""
    tapes: dict[Any, _Tape | None] = {}

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        form, tensors, addresses = _form(arguments)
        device = tensors[0].device
        key = (device.index, form)
        if key not in tapes:
            result, tape = _record(function, arguments, tensors)
            if len(tapes) >= FORMS:
                tapes.pop(next(iter(tapes)), None)
            tapes[key] = tape
            return result
        tape = tapes.get(key)
        if tape is None:
            return function(*arguments)
        if torch._C._cuda_getDevice() == device.index:
            return tape.run(addresses)
        with torch.cuda.device(device):
            return tape.run(addresses)

    return call


def _record(function: Callable[..., Any], arguments: Sequence[Any], inputs: list[Tensor]) -> tuple[Any, _Tape | None]:
    with _Recorder(inputs) as recorder:
        result = function(*arguments)
    tape = _Tape(recorder, result, inputs[0].device)
    return result, tape if recorder.faithful else None
