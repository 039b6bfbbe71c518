"""Calls that are recorded once and replayed: the same as calls that run, or not replayed."""

from __future__ import annotations

import ctypes
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparge_compile.kernels import attend

replay = pytest.importorskip("sparge_compile.kernels.triton.replay")
triton = pytest.importorskip("sparge_compile.kernels.triton")
recording = pytest.importorskip("sparge_compile.kernels.triton.recording")


class Compiled:
    """What Triton's compiler gives, as far as a launch needs it: ``run`` gets what Triton's launchers get."""

    function, packed_metadata = 7, ()

    def __init__(self, body: Callable[..., None]) -> None:
        self.body = body

    def run(self, *arguments: Any) -> None:
        (*_, stream, function, metadata), own = arguments[:6], arguments[9:]
        assert (stream, function, metadata, arguments[6:9]) == (3, 7, (), (None, None, None))
        self.body(*own)


class Kernel:
    """A kernel that adds: out = x + SCALE * y, on addresses."""

    arg_names = ("x_ptr", "y_ptr", "out_ptr", "n", "SCALE")

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(**arguments: Any) -> Compiled:
            compiled = Compiled(self.body)
            addresses = (x.data_ptr() if isinstance(x, Tensor) else x for x in map(arguments.get, self.arg_names))
            self.body(*addresses)
            return compiled

        return launch

    def body(self, x: int, y: int, out: int, n: int, scale: float) -> None:
        self.launches += 1
        x_at, y_at, out_at = ((ctypes.c_float * n).from_address(address) for address in (x, y, out))
        for i in range(n):
            out_at[i] = x_at[i] + scale * y_at[i]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that answers as a GPU would."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 3, raising=False)
    monkeypatch.setattr(replay, "_take", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))


KERNEL = Kernel()


def add(x: Tensor, y: Tensor, out: Tensor, scale: float) -> None:
    recording.launch(KERNEL, (1,), x_ptr=x, y_ptr=y, out_ptr=out, n=out.numel(), SCALE=scale)


class Counted:
    """A function that counts how often it ran."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0
        self.__name__ = "counted"

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.function(*arguments)


def twice(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """x + 2 * scale * y, by way of a workspace."""
    between, out = torch.empty_like(x), torch.empty_like(x)
    add(x, y, between, scale)
    add(between, y, out, scale)
    return out


def pair(shape: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


def test_a_form_runs_once_and_is_replayed_on_other_memory() -> None:
    function = Counted(twice)
    call = replay.Replayed(function)
    for _ in range(3):
        x, y = pair()
        assert torch.allclose(call(x, y, 0.5), x + y)
    assert function.calls == 1


@pytest.mark.parametrize("other", ["shape", "strides", "number", "dtype"])
def test_another_form_is_recorded_by_itself(other: str) -> None:
    function = Counted(lambda x, y, scale: (twice(x, y, scale), x.stride(), x.shape, x.dtype)[0])
    call = replay.Replayed(function)
    x, y = pair((4, 4))
    call(x, y, 0.5)
    if other == "shape":
        x, y, scale = *pair((4, 5)), 0.5
    elif other == "strides":
        x, y, scale = x.t(), y.t(), 0.5
    elif other == "number":
        scale = 1.5
    else:
        x, y, scale = x.int().view(torch.float32), y, 0.5
        function = Counted(lambda x, y, scale: torch.empty_like(x))
        call = replay.Replayed(function)
        assert call(x, y, scale).dtype == torch.float32
        assert call(x.int(), y, scale).dtype == torch.int32
        assert function.calls == 2
        return
    assert torch.allclose(call(x, y, scale), x + 2 * scale * y)
    assert function.calls == 2


def test_one_tensor_given_twice_is_another_form() -> None:
    function = Counted(twice)
    call = replay.Replayed(function)
    x, y = pair()
    assert torch.allclose(call(x, x, 0.5), 2 * x)
    assert torch.allclose(call(x, y, 0.5), x + y)
    assert torch.allclose(call(y, y, 0.5), 2 * y)
    assert function.calls == 2


def _copies(x: Tensor, y: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(x)
    add(x.clone(), y, out, scale)
    return out


def _fills_a_part(x: Tensor, y: Tensor, scale: float) -> Tensor:
    between, out = torch.empty_like(x), torch.empty_like(x)
    between[0].fill_(1.0), between[1].fill_(2.0)
    add(between, y, out, scale)
    return out


def _fills_in_what_is_given(x: Tensor, y: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(x)
    add(x.zero_(), y, out, scale)
    return out


def _reads_a_part(x: Tensor, y: Tensor, scale: float) -> Tensor:
    out = torch.empty(3)
    add(x[1], y[1], out, scale)
    return out


def _gives_back(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return x


@pytest.mark.parametrize("function", [_copies, _fills_a_part, _fills_in_what_is_given, _reads_a_part, _gives_back])
def test_what_does_more_is_run_each_time(function: Callable[..., Tensor]) -> None:
    counted = Counted(function)
    call = replay.Replayed(counted)
    for n in range(3):
        x, y = pair()
        assert torch.equal(call(x, y, 0.5), function(x, y, 0.5))
        assert counted.calls == n + 1


def test_fresh_memory_is_filled() -> None:
    def filled(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        between, out = torch.empty_like(x).fill_(2.5), torch.empty_like(x).zero_()
        add(between, y, out[0], scale)
        return out, between

    function = Counted(filled)
    call = replay.Replayed(function)
    for _ in range(3):
        x, y = pair()
        poison = [torch.full((2, 3), torch.nan) for _ in range(8)]  # what the next memory held before
        del poison
        out, between = call(x, y, 0.5)
        assert torch.equal(between, torch.full((2, 3), 2.5))
        assert torch.equal(out[1], torch.zeros(3))
        assert torch.allclose(out[0], 2.5 + 0.5 * y[0])
    assert function.calls == 1


def test_results_may_be_several_and_views() -> None:
    def both(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out = torch.empty(2, 6)
        add(x, y, out, scale)
        return out[:, 1:4], twice(x, y, scale)

    function = Counted(both)
    call = replay.Replayed(function)
    for _ in range(3):
        x, y = torch.randn(2, 6), torch.randn(2, 6)
        part, whole = call(x, y, 0.5)
        assert torch.allclose(part, (x + 0.5 * y)[:, 1:4])
        assert torch.allclose(whole, x + y)
        assert part.stride() == (6, 1)
    assert function.calls == 1


def test_no_tensor_is_kept() -> None:
    call = replay.Replayed(twice)
    x, y = pair()
    kept = [weakref.ref(z) for z in (x, y, call(x, y, 0.5))]
    del x, y
    gc.collect()
    assert [z() for z in kept] == [None, None, None]


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "FORMS", 3)
    function = Counted(twice)
    call = replay.Replayed(function)
    for n in (1, 2, 3, 4, 1):
        x, y = pair((1, n))
        assert torch.allclose(call(x, y, 0.5), x + y)
    assert function.calls == 5
    call(*pair((1, 4)), 0.5)
    assert function.calls == 5


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """How often the form of a call was looked at."""
    counted = Counted(replay._form)
    monkeypatch.setattr(replay, "_form", counted)
    return counted


def line(function: Callable[..., Any], layout: Any = ((2, 3), (3, 1))) -> Any:
    return replay.Line(replay.Replayed(function), (layout,))


def test_a_line_of_code_looks_at_the_form_of_its_first_call_alone(looks: Counted) -> None:
    function = Counted(twice)
    call = line(function)
    call(*pair(), 0.5)
    looked = looks.calls
    for _ in range(3):
        x, y = pair()
        assert torch.allclose(call(x, y, 0.5), x + y)
    assert function.calls == 1 and looks.calls == looked


@pytest.mark.parametrize("way", ["one tensor", "misaligned"])
def test_a_line_of_code_looks_again_where_addresses_say_more(looks: Counted, way: str) -> None:
    call = line(twice)
    x, y = pair()
    call(x, y, 0.5)
    looked = looks.calls
    y = x if way == "one tensor" else torch.randn(7)[1:].view(2, 3)
    for _ in range(2):
        assert torch.allclose(call(x, y, 0.5), x + y)
    assert looks.calls == looked + 2
    x, y = pair()
    assert torch.allclose(call(x, y, 0.5), x + y)
    assert looks.calls == looked + 2


@pytest.mark.parametrize("layout", [((3, 2), (3, 1)), ((2, 3), (1, 2))])
def test_a_line_of_code_that_was_promised_another_layout_is_an_error(layout: Any) -> None:
    with pytest.raises(AssertionError):
        line(twice, layout)(*pair(), 0.5)


def test_what_is_not_replayed_runs_in_a_line_too() -> None:
    function = Counted(_copies)
    call = line(function)
    for n in range(3):
        x, y = pair()
        assert torch.allclose(call(x, y, 0.5), x + 0.5 * y)
        assert function.calls == n + 1


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "keys": (torch.arange(150) < 140, False),
    "keys, causal": (torch.arange(150) < 140, True),
    "rows": (torch.ones(200, 150, dtype=torch.bool), False),
    "numbers": (torch.zeros(200, 150), True),
}


@pytest.mark.parametrize("how", MASKS)
def test_every_kind_of_call_is_replayed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but memory, fills and launches: so the second call of a form runs none of our code."""
    launched: list[str] = []

    def launch(kernel: Any, grid: Any, **named: Any) -> None:
        arguments = {name: named.get(name) for name in kernel.arg_names}
        recorder = getattr(recording._recording, "active", None)
        launched.append(kernel.fn.__name__)
        if recorder is not None:
            recorder.note(Compiled(lambda *_: launched.append("replayed")), kernel, grid, arguments)

    monkeypatch.setattr(recording, "launch", launch)
    mask, is_causal = MASKS[how]
    mask = None if mask is None else mask.view(1, 1, -1, 150)
    q, k, v = (torch.randn(1, 2, length, 16) for length in (200, 150, 150))
    options = (mask, is_causal, 0.25)
    forward = Counted(functools.partial(attend.attend_for_backward, triton))
    call = replay.Replayed(forward)
    thresholds = torch.tensor([[0.5, 0.0]] * 2)
    for _ in range(3):
        out, lse, bits = call(q, k, v, thresholds, *options)
    backward = Counted(functools.partial(attend.backward, triton))
    call = replay.Replayed(backward)
    for _ in range(3):
        call(torch.ones_like(out), q, k, v, out, lse, None, bits, *options)
    assert (forward.calls, backward.calls) == (1, 1)
    first = [name for name in launched if name != "replayed"]
    assert launched.count("replayed") == 2 * len(first)
