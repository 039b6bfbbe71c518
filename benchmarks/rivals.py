"""Dense and sparse attention as calls to be timed: a forward, or a step (a forward with its backward).

Dense attention is SDPA by each of its fast kernels; sparse attention are our ops, called as Inductor's code calls them.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparge_compile
import sparge_compile.ops

Call = Callable[[], object]
FAST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
REST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
LONG = 1e-3  # seconds that a queue of calls should take the GPU
MOST_CALLS = 20
LONG_CALL = 0.1  # seconds


def projected(x: Tensor) -> Tensor:
    """[B, H, L, D] as a projection leaves it: in memory of [B, L, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def dense_calls(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, what: str, mask: Tensor | None = None
) -> dict[str, Call]:
    """SDPA by each of its fast kernels that takes these operands, by name; else by the next best that does."""
    fast = FAST if q.device.type == "cuda" else FAST[1:]
    found = {x.name: call for x in fast if (call := _dense_call(q, k, v, is_causal, what, mask, x)) is not None}
    for backend in () if found else REST:
        call = _dense_call(q, k, v, is_causal, what, mask, backend)
        if call is not None:
            return {backend.name: call}
    return found


def _dense_call(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, what: str, mask: Tensor | None, backend: SDPBackend
) -> Call | None:
    """SDPA by one kernel, or None where it does not take these operands."""
    shared = q.shape[1] != k.shape[1]
    if shared and backend not in FAST:  # only these take grouped heads; models repeat them for the others
        k, v, shared = *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)), False
    trains = what == "step"
    inputs = [x.detach().requires_grad_(trains) for x in (q, k, v)]
    grad_out = ones_for(q, v) if trains else None

    def call() -> object:
        with sdpa_kernel(backend), torch.set_grad_enabled(trains):
            out = F.scaled_dot_product_attention(*inputs, mask, is_causal=is_causal, enable_gqa=shared)
            return torch.autograd.grad(out, inputs, grad_out) if trains else out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except RuntimeError:
            return None
    return call


def ones_for(q: Tensor, v: Tensor) -> Tensor:
    """A gradient of the result [B, H, L, Dv], in memory as a projection's."""
    return projected(q.new_ones(*q.shape[:3], v.shape[3]))


def sparse_call(
    q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor, is_causal: bool, what: str, mask: Tensor | None = None
) -> Call:
    """Map and attention as one op, and its backward as another, called as Inductor's code calls them."""
    ops, how = torch.ops.sparge, (mask, is_causal, q.shape[-1] ** -0.5)
    grad_out = ones_for(q, v) if what == "step" else None

    @torch.no_grad()
    def forward() -> object:
        return ops.attend.direct(q, k, v, thresholds, *how)

    @torch.no_grad()
    def step() -> object:
        out, lse, bits = ops.attend_for_backward.direct(q, k, v, thresholds, *how)
        return ops.backward.direct(grad_out, q, k, v, out, lse, None, bits, *how)

    return forward if what == "forward" else step


class Attend(nn.Module):
    """A module that attends, as eager code does."""

    def __init__(self, is_causal: bool, shared: bool) -> None:
        super().__init__()
        self.is_causal, self.shared = is_causal, shared

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=self.shared)


@contextmanager
def replaced_call(
    q: Tensor, k: Tensor, v: Tensor, pair: tuple[float, float], is_causal: bool, what: str
) -> Iterator[Call]:
    """A call in eager code, sparse by ``replace_attention`` for as long as this is open."""
    trains, model = what == "step", Attend(is_causal, q.shape[1] != k.shape[1])
    inputs = [x.detach().requires_grad_(trains) for x in (q, k, v)]
    grad_out = ones_for(q, v) if trains else None

    def call() -> object:
        with torch.set_grad_enabled(trains):
            out = model(*inputs)
            return torch.autograd.grad(out, inputs, grad_out) if trains else out

    with sparge_compile.replace_attention(model, topk=pair[0], topp=pair[1], min_seq_len=0):
        yield call


def queued_seconds(call: Call, device: torch.device) -> float:
    """The GPU's seconds of one call among others in a CUDA graph, where the host has no part: the median of replays."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        call()  # compiles and records
        call()
        once = _gpu_seconds(call)
        is_long = once > 10 * LONG
        calls = 1 if is_long else max(5, min(MOST_CALLS, round(LONG / once)))  # once is the host's where that is longer
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        graph.capture_begin()  # torch.cuda.graph collects garbage and empties the cache each time
        for _ in range(calls):
            call()
        graph.capture_end()
        graph.replay()
        replays = 1 if is_long else 4
        times = [_gpu_seconds(graph.replay, replays) for _ in range(3 if is_long else 5)]
    graph.reset()
    return statistics.median(times) / calls


def _gpu_seconds(call: Call, calls: int = 1) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.current_stream().synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def wall_seconds(call: Call, device: torch.device, budget: float = 0.02, most: int = 10) -> float:
    """Wall time of one call in a queue of some that is waited for at its end: the median of three queues.

    A long call is timed once, after one that compiles and records.
    """
    call()
    once = _waited(call, 1, device)
    if once > LONG_CALL:
        return once
    call()
    calls = max(1, min(most, round(budget / 3 / once)))
    return statistics.median(_waited(call, calls, device) for _ in range(3))


def fastest(calls: Mapping[str, Call], device: torch.device) -> tuple[Call, float]:
    """The fastest of some calls, by a glance, and its wall time."""
    glances = {name: wall_seconds(call, device, 0.003) for name, call in calls.items()}
    best = min(glances, key=glances.__getitem__)
    is_long = glances[best] > LONG_CALL
    return calls[best], glances[best] if is_long else wall_seconds(calls[best], device)


def _waited(call: Call, calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls
