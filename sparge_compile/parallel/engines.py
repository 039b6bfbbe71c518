"""Heads are exchanged by a GPU's copy engines, in the place of NCCL's kernels.

A persistent matrix product has one block for each processor. One that a collective's kernel holds makes the product
twice as long, so what is under way meanwhile costs what it saves. Copies need no processor: parts are pushed into
memory that the ranks share (torch's symmetric memory), row by row from where they lie, so nothing is packed before; a
number behind them tells the receiver, whose stream waits for it without a processor as well.

Two places take turns. What came into one is copied out of it before its sender comes back to it: between the two the
sender waits for the receiver's next exchange. CUDA graphs, whose replays have the numbers of the capture, have a third
place, and kernels before and behind what is sent into it, in which all wait for all.

Letters: P ranks.
"""

from __future__ import annotations

import ctypes
import functools
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .. import ops  # noqa: F401  which defines the library
from ..errors import value_error

PLACES = 3
EVENTS = 64  # of exchanges that nobody waited for yet; where there are more, one is waited for with a later one
_NUMBERS = 4096  # bytes behind the places: what each rank has sent, counted
_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: an address says whose memory it is

library = torch.library.Library("sparge", "FRAGMENT")
library.define("all_to_all(Tensor parts, str group) -> Tensor")


def rows_of(x: Tensor) -> tuple[int, int, int] | None:
    """(rows, elements of a row, elements from one row's begin to the next's), where rows are all as far apart."""
    dims: list[tuple[int, int]] = []  # size and stride, the innermost first
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = dims[-1][0] * size, dims[-1][1]
        elif size != 1:
            dims.append((size, stride))
    (width, step), *outer = dims or [(1, 1)]
    if step != 1 or len(outer) > 1 or (outer and outer[0][1] < width):  # apart: an expanded row lies on itself
        return None
    rows, pitch = outer[0] if outer else (1, width)
    return rows, width, pitch


class _Rows(ctypes.Structure):
    """The driver's CUDA_MEMCPY2D."""

    _fields_ = (
        *(
            (f"{side}{name}", kind)
            for side in ("src", "dst")
            for name, kind in (
                ("XInBytes", ctypes.c_size_t),
                ("Y", ctypes.c_size_t),
                ("MemoryType", ctypes.c_uint),
                ("Host", ctypes.c_void_p),
                ("Device", ctypes.c_uint64),
                ("Array", ctypes.c_void_p),
                ("Pitch", ctypes.c_size_t),
            )
        ),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    )


_POINTER, _ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint
_FUNCTIONS = {
    "cuEventCreate": (_POINTER, _NUMBER),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuStreamWaitEvent": (_POINTER, _POINTER, _NUMBER),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, ctypes.c_size_t, _POINTER),
    "cuMemcpy2DAsync_v2": (_POINTER, _POINTER),
    "cuStreamWriteValue32_v2": (_POINTER, _ADDRESS, _NUMBER, _NUMBER),
    "cuStreamWaitValue32_v2": (_POINTER, _ADDRESS, _NUMBER, _NUMBER),
}


def _checked(code: int, function: Any, arguments: Any) -> None:
    if code:
        raise RuntimeError(
            f"sparge: copy engines did not exchange heads: {function.__name__} of the CUDA driver answered {code}. "
            "Leave copy_engines out: NCCL exchanges heads."
        )


@functools.cache
def _driver() -> ctypes.CDLL:
    """The functions of the driver that torch has none for, or that take the host longer by torch."""
    library = ctypes.CDLL("libcuda.so.1")
    for name, takes in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.errcheck = takes, _checked
    return library


@functools.cache
def _work() -> type[Any]:
    """What ``wait_tensor`` asks to have the current stream wait for a copy."""
    from torch._C._distributed_c10d import Work

    class Sent(Work):
        def __init__(self, event: int, sent: Tensor, device: int) -> None:
            super().__init__()
            self.event, self.device = event, device
            self.sent = sent  # nobody else's memory before

        def wait(self, timeout: Any = None) -> bool:
            _driver().cuStreamWaitEvent(torch._C._cuda_getCurrentRawStream(self.device), self.event, 0)
            return True

    return Sent


class _Plan:
    """How parts of these sizes and strides are copied."""

    def __init__(self, parts: Tensor) -> None:
        found = rows_of(parts[0])
        self.is_packed = found is None  # first, by torch
        rows, width, pitch = found or (1, parts[0].numel(), parts[0].numel())
        bytes_of = parts.element_size()
        self.size = parts[0].numel() * bytes_of
        self.step = self.size if self.is_packed else parts.stride(0) * bytes_of
        self.rows: Any = None
        if rows > 1:
            self.rows = _Rows(WidthInBytes=width * bytes_of, Height=rows, srcPitch=pitch * bytes_of)
            self.rows.dstPitch, self.rows.srcMemoryType, self.rows.dstMemoryType = width * bytes_of, _UNIFIED, _UNIFIED

    def copy(self, to: int, came: int, stream: int) -> None:
        """A part to an address, where its rows lie one behind the other."""
        if self.rows is None:
            _driver().cuMemcpyDtoDAsync_v2(to, came, self.size, stream)
        else:
            self.rows.dstDevice, self.rows.srcDevice = to, came
            _driver().cuMemcpy2DAsync_v2(ctypes.addressof(self.rows), stream)


class Lane:
    """What the ranks of a group share, and the stream in which this rank's exchanges follow one another.

    All of them make it, and call ``exchange`` as often and with as much.
    """

    def __init__(self, group: Any, capacity: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self.group, self.capacity, self.count, self.is_recorded = group, -(-capacity // 512) * 512, 0, False
        self.device, size = torch.cuda.current_device(), PLACES * self.capacity + _NUMBERS
        torch.cuda.synchronize()  # nobody waits for what an earlier lane sent
        self.memory = symmetric.empty(size, dtype=torch.uint8, device=torch.device("cuda", self.device)).zero_()
        self.shared = symmetric.rendezvous(self.memory, group.group_name)
        self.rank, self.ranks = self.shared.rank, self.shared.world_size
        self.others = [(self.rank + step) % self.ranks for step in range(1, self.ranks)]
        self.begin = [self.shared.get_buffer(p, (size,), torch.uint8).data_ptr() for p in range(self.ranks)]
        self.numbers = [begin + PLACES * self.capacity for begin in self.begin]
        self.plans: dict[Any, _Plan] = {}
        self.side = torch.cuda.Stream(priority=-1)
        made = [ctypes.c_void_p() for _ in range(EVENTS + 1)]
        for event in made:
            _driver().cuEventCreate(ctypes.addressof(event), 2)  # without times
        self.ready, *events = (event.value for event in made)
        self.events = cycle(events)
        torch.cuda.synchronize()
        self.shared.barrier()  # all numbers are zero
        torch.cuda.synchronize()

    def exchange(self, parts: Tensor) -> Tensor:
        """parts [P, ...]: part p goes to rank p, whose part comes in its place, contiguous; to be waited for."""
        key = parts.shape, parts.stride(), parts.dtype
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = _Plan(parts)
        driver, stream, size, rank = _driver(), self.side.cuda_stream, plan.size, self.rank
        x = parts.contiguous() if plan.is_packed else parts
        out = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        captured = torch.cuda.is_current_stream_capturing()
        begin, end, place = x.data_ptr(), out.data_ptr(), (2 if captured else self.count % 2) * self.capacity
        self.count += not captured
        self.is_recorded |= captured
        number, event = self.count & 0xFFFFFFFF, next(self.events)
        driver.cuEventRecord(self.ready, torch._C._cuda_getCurrentRawStream(self.device))
        driver.cuStreamWaitEvent(stream, self.ready, 0)
        if captured:
            self._barrier()
        for p in self.others:
            plan.copy(self.begin[p] + place + rank * size, begin + p * plan.step, stream)
            if not captured:
                driver.cuStreamWriteValue32_v2(stream, self.numbers[p] + 4 * rank, number, 0)
        plan.copy(end + rank * size, begin + rank * plan.step, stream)
        if captured:
            self._barrier()
        for p in reversed(self.others):
            if not captured:  # until it is that number, or a later one
                driver.cuStreamWaitValue32_v2(stream, self.numbers[rank] + 4 * p, number, 0)
            driver.cuMemcpyDtoDAsync_v2(end + p * size, self.begin[rank] + place + p * size, size, stream)
        driver.cuEventRecord(event, stream)
        torch._C._distributed_c10d._register_work(out, _work()(event, x, self.device))
        return out

    def _barrier(self) -> None:
        with torch.cuda.stream(self.side):
            self.shared.barrier()


lanes: dict[str, Lane] = {}  # by group, whose exchanges go this way
_recorded: list[Lane] = []  # smaller ones, whose memory CUDA graphs have recorded


def use(group: Any) -> None:
    """As long as a group lives, heads are exchanged by copy engines among its processes; all of them call it.

    Raises:
        ValueError: not on GPUs, or GPUs that do not share memory.
    """
    name = group.group_name
    if name in lanes and lanes[name].group is group:
        return
    try:
        if not torch.cuda.is_available():
            raise RuntimeError("no GPU")
        lanes[name] = Lane(group, 2**21)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise value_error(
            "heads cannot be exchanged by copy engines",
            given=f"processes that share no memory ({error})",
            allowed="GPUs of one host, each of which reaches the others' memory",
            todo="Leave copy_engines out: NCCL exchanges heads.",
        ) from error
    tell_inductor()


def drop_of_a_group_before(group: Any) -> None:
    """A group that has the name of one that was destroyed has nothing of it."""
    lane = lanes.get(group.group_name)
    if lane is not None and lane.group is not group:
        del lanes[group.group_name]


def all_to_all(parts: Tensor, group: str) -> Tensor:
    """parts [P, ...], in any strides, exchanged among the ranks of a group: [P, ...], contiguous, to be waited for."""
    lane = lanes.get(group)
    if lane is None:
        raise value_error(
            "heads cannot be exchanged by copy engines",
            given=f"the group {group!r}, which has none in this process",
            allowed="what Ranks.of(group, copy_engines=True) was called for",
            todo="Call it in every process before the compiled program.",
        )
    needed = parts.numel() * parts.element_size()
    if lane.capacity < needed:
        if torch.cuda.is_current_stream_capturing():
            raise value_error(
                "heads cannot be exchanged by copy engines",
                given=f"{needed:,} bytes in a CUDA graph that is recorded, where {lane.capacity:,} are shared by now",
                allowed="sizes that were exchanged before",
                todo="Call the model once with these inputs before it is recorded.",
            )
        if lane.is_recorded:
            _recorded.append(lane)
        lane = lanes[group] = Lane(lane.group, needed)
    return lane.exchange(parts)


def all_to_all_like(parts: Tensor, group: str) -> Tensor:
    """What tracing sees of :func:`all_to_all`."""
    return torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)


library.impl("all_to_all", all_to_all, "CUDA")
library.impl("all_to_all", all_to_all_like, "Meta")


@functools.cache
def tell_inductor() -> None:
    """The op is an exchange that is under way until it is waited for, as torch's own are."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    op = torch.ops.sparge.all_to_all.default

    @register_lowering(op, type_promotion_kind=None)
    def lower(parts: Any, group: str) -> Any:
        sent: Any = ir._CollectiveKernel.create_out_of_place(op, parts, group)
        return ir.TensorBox.create(sent)
