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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recording import Recorder

_UNKNOWN = object()
_NUMBERS = {type(None), bool, int, float, tuple}
FORMS = 1024  # how many are kept for an op; the oldest goes first
ALIGNMENT = 256  # bytes, of a piece of the workspace


def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


# Memory of the current device: the call by which Inductor's code takes it is the quicker one.
_take = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty)


class _Output(NamedTuple):
    """A result: fresh memory, all of it or a view."""

    number: int
    view: tuple[Any, ...] | None  # sizes, strides, offset


class _Tape:
    """A recorded call."""

    def __init__(self, recorder: Recorder, result: Any, device: torch.device) -> None:
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
        filled = (step[0] for step in self.steps if isinstance(step, tuple) and recorder.faithful)
        self.taken += [(n, recorder.fresh[n - recorder.first]) for n in set(filled) if n not in dict(self.taken)]
        for number, fresh in enumerate(recorder.fresh, recorder.first):
            if number not in dict(self.taken):
                self.pieces.append((number, self.workspace))
                self.workspace += -(-fresh.size // ALIGNMENT) * ALIGNMENT
        self.room = [0] * len(recorder.fresh)

    def _output(self, x: Tensor, recorder: Recorder) -> _Output:
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
        """The call on other tensors of the same form, which begin there, on the current device."""
        addresses = inputs + self.room
        taken = {}
        for number, (shape, stride, dtype, *_) in self.taken:
            taken[number] = fresh = _take(shape, stride, dtype)
            addresses[number] = fresh.data_ptr()
        if self.workspace:
            workspace = _take((self.workspace,), (1,), torch.uint8)
            start = workspace.data_ptr()
            for number, offset in self.pieces:
                addresses[number] = start + offset
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        for step in self.steps:
            if isinstance(step, tuple):
                taken[step[0]].fill_(step[1])
            else:
                step(addresses, stream)
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
        kind = type(x)
        if kind in _NUMBERS:
            form.append(x)
        elif kind is list:
            form.append(tuple(x))
        else:
            address = x.data_ptr()
            form += (x.dtype, x.shape, x.stride(), address & 15)
            tensors.append(x)
            addresses.append(address)
    form.append(tensors[0].get_device())
    if len(set(addresses)) < len(addresses):  # which tensors begin where another does is a part of the form
        form.append(tuple(map(addresses.index, addresses)))
    return tuple(form), tensors, addresses


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, a kernel of an op on tensors of a GPU, which replays calls of a form that it has met."""
    tapes: dict[Any, Any] = {}  # a tape, or None for a form that cannot be replayed

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        form, tensors, addresses = _form(arguments)
        tape = tapes.get(form, _UNKNOWN)
        if tape is _UNKNOWN:
            result, tapes[form] = _record(function, arguments, tensors)
            if len(tapes) > FORMS:
                tapes.pop(next(iter(tapes)), None)
            return result
        if tape is None:
            return function(*arguments)
        if torch._C._cuda_getDevice() == tape.device.index:
            return tape.run(addresses)
        with torch.cuda.device(tape.device):
            return tape.run(addresses)

    return call


def _record(function: Callable[..., Any], arguments: Sequence[Any], inputs: list[Tensor]) -> tuple[Any, _Tape | None]:
    with Recorder(inputs) as recorder:
        result = function(*arguments)
    tape = _Tape(recorder, result, inputs[0].device)
    return result, tape if recorder.faithful else None
