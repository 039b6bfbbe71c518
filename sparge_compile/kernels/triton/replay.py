"""Calls that are recorded once and then replayed: what the host does for a call whose form it has met before.

Preparing a call costs more than the GPU needs for a small one: sizes are checked, launches chosen, arguments bound.
All of that follows from the call's form: dtypes, sizes, strides and alignment of its tensors, and its numbers. So the
first call of a form is watched: which memory it takes and which kernels it launches, with which arguments. The next one
takes as much memory and launches the same kernels on the new addresses, and does nothing else.

What cannot be repeated so (a call that does anything but take memory, fill it with a number, look at it and launch
kernels of ours: below the limit, in Triton's interpreter) runs as it is each time; a dispatch mode
watches for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recording import Recorder

_UNKNOWN: Any = object()
_NUMBERS = {type(None), bool, int, float, tuple}
FORMS = 1024  # how many are kept for an op; the oldest goes first
ALIGNMENT = 256  # bytes, of a piece of the workspace
_MISALIGNED = 15  # the bits of an address that kernels are compiled for


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
        self.whole = all(x.view is None for x in self.outputs)
        self.shapes = [(number, *fresh[:3]) for number, fresh in self.taken]  # with strides and dtypes
        self.device_index = device.index

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
        for number, shape, stride, dtype in self.shapes:
            taken[number] = fresh = _take(shape, stride, dtype)
            addresses[number] = fresh.data_ptr()
        if self.workspace:
            workspace = _take((self.workspace,), (1,), torch.uint8)
            start = workspace.data_ptr()
            for number, offset in self.pieces:
                addresses[number] = start + offset
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        for step in self.steps:
            if isinstance(step, tuple):
                taken[step[0]].fill_(step[1])
            else:
                step(addresses, stream)
        if self.single:
            return self._result(taken, self.outputs[0])
        if self.whole:
            return tuple([taken[number] for number, _ in self.outputs])
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
            form += (x.dtype, x.shape, x.stride(), address & _MISALIGNED)
            tensors.append(x)
            addresses.append(address)
    form.append(tensors[0].get_device())
    if len(set(addresses)) < len(addresses):  # which tensors begin where another does is a part of the form
        form.append(tuple(map(addresses.index, addresses)))
    return tuple(form), tensors, addresses


class Replayed:
    """``function``, a kernel of an op on tensors of a GPU, which replays calls of a form that it has met."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._tapes: dict[Any, _Tape | None] = {}  # None for a form that cannot be replayed

    def __call__(self, *arguments: Any) -> Any:
        """Return what the function does."""
        form, tensors, addresses = _form(arguments)
        tape = self._tapes.get(form, _UNKNOWN)
        if tape is _UNKNOWN:
            result, self._tapes[form] = _record(self.function, arguments, tensors)
            if len(self._tapes) > FORMS:
                self._tapes.pop(next(iter(self._tapes)), None)
            return result
        if tape is None:
            return self.function(*arguments)
        if torch._C._cuda_getDevice() == tape.device_index:
            return tape.run(addresses)
        with torch.cuda.device(tape.device):
            return tape.run(addresses)

    def tape(self, arguments: Sequence[Any]) -> _Tape | None:
        """What calls of this form are replayed from; None where they are not, or none was met."""
        return self._tapes.get(_form(arguments)[0])


class Line:
    """A replayed kernel in a line of compiled code, whose arguments have one form in all calls but for addresses.

    Only these are looked at, so it takes the host half as long. What the code is promised of the results, their
    ``layouts`` (sizes and strides of each), is checked once.
    """

    def __init__(self, replayed: Replayed, layouts: Sequence[Any]) -> None:
        self._replayed = replayed
        self._layouts = layouts
        self._places: list[int] = []  # of the tensors among the arguments
        self._tape: _Tape | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Return what the kernel does."""
        tape = self._tape
        if tape is None:
            return self._first(arguments)
        addresses = [arguments[n].data_ptr() for n in self._places]
        if not _are_apart(addresses) or torch._C._cuda_getDevice() != tape.device_index:
            return self._replayed(*arguments)
        return tape.run(addresses)

    def _first(self, arguments: Sequence[Any]) -> Any:
        result = self._replayed(*arguments)
        for x, (shape, stride) in zip((result,) if isinstance(result, Tensor) else result, self._layouts, strict=True):
            assert x.shape == shape and all(n < 2 or a == b for n, a, b in zip(shape, x.stride(), stride, strict=True))
        places = [n for n, x in enumerate(arguments) if isinstance(x, Tensor)]
        if _are_apart([arguments[n].data_ptr() for n in places]):
            self._places, self._tape = places, self._replayed.tape(arguments)
        return result


def _are_apart(addresses: list[int]) -> bool:
    """Whether addresses are aligned, and no two are one: what a form says of most."""
    together = 0
    for address in addresses:
        together |= address
    return not together & _MISALIGNED and len(set(addresses)) == len(addresses)


def _record(function: Callable[..., Any], arguments: Sequence[Any], inputs: list[Tensor]) -> tuple[Any, _Tape | None]:
    with Recorder(inputs) as recorder:
        result = function(*arguments)
    tape = _Tape(recorder, result, inputs[0].device)
    return result, tape if recorder.faithful else None
