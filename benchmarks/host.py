"""The host's share of a call: microseconds until the next line of Python runs, here and in SDPA.

    python benchmarks/host.py               # a GPU; prints tables for docs/kernel-notes.md
    python benchmarks/host.py --profile     # and where the time of an eager call goes

Host times are of calls that nobody waits for, of a problem that the GPU finishes sooner: the least of nine rounds,
since other work on a shared host only adds to them.
Wall times are medians of whole calls, in queues of ten. Both columns of a row come from one run.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparge_compile
import sparge_compile.ops

SMALL = (1, 8, 1024, 64)
SHAPES = {"Flux": (1, 24, 4608, 128), "LTX": (1, 32, 7168, 64), "SDXL": (2, 10, 4096, 64)}
DENSE = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
KEPT = 0.1
LAYERS = 10


def operands(shape: tuple[int, ...], device: str, grad: bool = False) -> list[Tensor]:
    """q, k, v [B, H, L, D], as a projection leaves them: [B, L, H, D] memory."""
    batch, heads, length, size = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made = (torch.randn(batch, length, heads, size, dtype=dtype, device=device) for _ in range(3))
    return [x.transpose(1, 2).detach().requires_grad_(grad) for x in made]


def host_time(call: Callable[[], Any], device: str, calls: int = 100, rounds: int = 9) -> float:
    """Microseconds of the host for one call."""
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    _wait(device)
    return min(times) * 1e6


def wall_time(call: Callable[[], Any], device: str, calls: int = 10, rounds: int = 15) -> float:
    """Microseconds of one call in a queue of some, waited for at its end."""
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e6


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the rule, as a user calls it."""
    return sparge_compile.attention(q, k, v, topk=KEPT, topp=0.0)


class One(torch.nn.Module):
    """One attention, as eager code calls it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Layers(torch.nn.Module):
    """Attention after attention, with nothing between."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(LAYERS):
            q = F.scaled_dot_product_attention(q, k, v)
        return q


def compiled(backend: str, **how: Any) -> Callable[..., Tensor]:
    """The layers, compiled: by Inductor alone, or with each attention sparse."""
    torch._dynamo.reset()
    if backend == "sparge":
        options = {"topk": KEPT, "topp": 0.0, "min_seq_len": 0}
        if "mode" in how:
            options["inductor_mode"] = how.pop("mode")
        return torch.compile(Layers(), backend="sparge", options=options, **how)
    return torch.compile(Layers(), backend=backend, **how)


def _layers(backend: str, inputs: list[Tensor], **how: Any) -> Callable[[], Tensor]:
    call = compiled(backend, **how)
    return lambda: call(*inputs)


def _step(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    ones = torch.ones_like(inputs[0])
    return lambda: call(*inputs).backward(ones)


def host_rows(device: str) -> list[list[Any]]:
    """Host times of one call, eager and compiled, inference and training."""
    rows: list[list[Any]] = []
    eager: tuple[Callable[..., Tensor], ...] = (F.scaled_dot_product_attention, sparse)
    backends = ("inductor", "sparge")
    inputs = operands(SMALL, device)
    with torch.no_grad():
        rows.append(["eager, inference", *(host_time(partial(f, *inputs), device) for f in eager)])
        times = [host_time(_layers(b, inputs), device, calls=20) / LAYERS for b in backends]
        rows.append(["compiled, inference", *times])
    inputs = operands(SMALL, device, grad=True)
    rows.append(["eager, training", *(host_time(_step(f, inputs), device, calls=20) for f in eager)])
    times = [host_time(_step(compiled(b), inputs), device, calls=5) / LAYERS for b in backends]
    rows.append(["compiled, training", *times])
    return rows


def replaced_rows(device: str) -> list[list[Any]]:
    """Host times of one call in eager code, as it is and with ``replace_attention``, inference and training."""
    rows: list[list[Any]] = []
    options = {"topk": KEPT, "topp": 0.0, "min_seq_len": 0}
    for what in ("inference", "training"):
        model, inputs = One(), operands(SMALL, device, grad=what == "training")
        call: Callable[[], Any] = _step(model, inputs) if what == "training" else partial(model, *inputs)
        with torch.set_grad_enabled(what == "training"):
            dense = host_time(call, device, calls=20)
            with sparge_compile.replace_attention(model, options):
                rows.append([f"replaced, {what}", dense, host_time(call, device, calls=20)])
    return rows


def part_rows(device: str) -> list[list[Any]]:
    """Host times of the parts of an eager call."""
    q, k, v = operands(SMALL, device)
    thresholds = torch.tensor([[KEPT, 0.0]] * q.shape[1], device=device)
    op, scale = torch.ops.sparge.attend.default, q.shape[-1] ** -0.5
    parts = {
        "torch.empty of a few bytes": partial(torch.empty, 1, device=device),
        "op attend": partial(op, q, k, v, thresholds, None, False, scale),
        "op attention": partial(torch.ops.sparge.attention, q, k, v, thresholds),
        "attention()": partial(sparse, q, k, v),
    }
    with torch.no_grad():
        return [[name, host_time(call, device)] for name, call in parts.items()]


def wall_row(name: str, shape: tuple[int, ...], device: str) -> list[Any]:
    """Wall times of one call at the size of an image model, beside the fastest dense one."""
    inputs = operands(shape, device)
    dense = []
    with torch.no_grad():
        for backend in DENSE:
            with sdpa_kernel(backend):
                dense.append(wall_time(partial(F.scaled_dot_product_attention, *inputs), device))
        eager = wall_time(partial(sparse, *inputs), device)
        ours, alone = (wall_time(_layers(b, inputs), device, 3) / LAYERS for b in ("sparge", "inductor"))
        graph = wall_time(_layers("sparge", inputs, mode="reduce-overhead"), device, 3) / LAYERS
    best = min(*dense, alone)
    return [name, min(dense), alone, eager, best / eager, ours, best / ours, graph, best / graph]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="profile an eager call")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    device = given.device

    def table(rows: list[list[Any]], *head: str) -> None:
        print(tabulate(rows, head, floatfmt=".2f" if len(head) > 4 else ".1f", tablefmt="github"), flush=True)

    print(torch.__version__, torch.cuda.get_device_name() if device == "cuda" else device, flush=True)
    table(part_rows(device), "part", "host, us")
    table(host_rows(device) + replaced_rows(device), "one call", "SDPA, us", "sparse, us")
    if device == "cuda":
        head = ("shape", "dense eager", "dense compiled", "eager", "gain", "compiled", "gain", "CUDA graph", "gain")
        table([wall_row(name, shape, device) for name, shape in SHAPES.items()], *head)
    if given.profile:
        q, k, v = operands(SMALL, device)
        with torch.no_grad(), cProfile.Profile() as profile:
            for _ in range(500):
                sparse(q, k, v)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
