"""What the benchmarks share: who runs (devices, versions), inputs, timing, tables.

Times are seconds inside and milliseconds in print. On CUDA a time is the median that ``triton.testing.do_bench`` gives,
or that of the GPU's work alone; on a CPU it is the median of calls that take turns with those of the rivals, since
other work disturbs it for seconds.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from sparge_compile.kernels.block_map import BlockMap

FLUSH_BYTES = 2**28  # more than any L2
HEAD_START = 4_000_000  # GPU cycles, some 2 ms: what the host needs to launch a call
TOKENS_OF_A_SCENE = 256  # rows over which the slow part of an input stays alike


# ---- who runs


def require(device: str) -> torch.device:
    """The device, or an exit with what is missing."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SystemExit("This benchmark was asked for CUDA, and torch sees no CUDA device. Try --device cpu.")
        if find_spec("triton") is None:
            raise SystemExit("The GPU kernels and their timing need Triton (pip install triton). Try --device cpu.")
    return torch.device(device)


def header(device: torch.device) -> str:
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if device.type == "cuda":
        triton = import_module("triton").__version__
        cudnn = torch.backends.cudnn.version()
        parts = [torch.cuda.get_device_name(device), *parts, f"Triton {triton}", f"cuDNN {cudnn}"]
    else:
        parts = [f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", *parts]
    return " | ".join(parts)


def kernels(device: torch.device) -> ModuleType:
    """The device's face: block_map, forward, pack and backward, with the arguments of the op schemas."""
    return import_module(f"sparge_compile.kernels.{'triton' if device.type == 'cuda' else 'cpu'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=["cuda", "cpu"], help=f"({here})")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16; float32 on a CPU"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; one is steadier on a shared machine")


def start(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Do as :func:`add_arguments` was told, print who runs; (device, dtype)."""
    device = require(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(header(device))
    return device, getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


# ---- inputs


def smooth(batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, H, L, D] whose rows change slowly, so that block means differ and scores have a standard deviation near 1."""
    scenes = max(2, length // TOKENS_OF_A_SCENE)
    slow = torch.randn(batch * heads, head_size, scenes, device=device)
    slow = torch.nn.functional.interpolate(slow, size=length, mode="linear", align_corners=True)
    slow = slow.mT.contiguous() * 1.2  # interpolation takes some of the deviation away
    # Contiguous: interpolation leaves memory that no fused kernel of torch takes.
    return (slow + 0.5 * torch.randn_like(slow)).to(dtype).contiguous().view(batch, heads, length, head_size)


def density(block_map: BlockMap, visible: int | None = None) -> float:
    """Kept over visible key blocks; ``visible`` of one head, or all of them."""
    counts, n_key = block_map.counts, block_map.indices.shape[-1]
    visible = counts.shape[-1] * n_key if visible is None else visible
    return counts.sum(dtype=torch.float64).item() / (counts.shape[0] * counts.shape[1] * visible)


# ---- timing


def seconds_each(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: float = 0.3,
    pick: Callable[[Sequence[float]], float] = statistics.median,
    gpu_only: bool = False,
) -> dict[str, float]:
    """The median time of each call, with about ``budget`` seconds spent on each, three runs at least.

    ``pick`` may take another one than the median of the runs on a CPU. ``gpu_only`` leaves out what the host takes to
    launch, as in a model whose host is ahead of the GPU.
    """
    if device.type == "cuda" and gpu_only:
        return {name: gpu_seconds(call, device, budget) for name, call in calls.items()}
    if device.type == "cuda":
        do_bench = import_module("triton").testing.do_bench
        rep = int(1000 * budget)
        options = {"warmup": rep // 10, "rep": rep, "return_mode": "median"}
        return {name: do_bench(call, **options) / 1000 for name, call in calls.items()}
    first = {name: seconds(call) for name, call in calls.items()}  # also warms up
    repeats = {name: max(3, min(50, round(budget / max(t, 1e-6)))) for name, t in first.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(repeats.values(), default=0)):
        for name, call in calls.items():
            if turn < repeats[name]:
                times[name].append(seconds(call))
    return {name: pick(t) for name, t in times.items()}


def gpu_seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """The median of what the GPU takes, with L2 emptied, between two events that are queued while it is kept busy."""
    call()
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def run() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        torch.cuda._sleep(HEAD_START)
        events[0].record()
        call()
        events[1].record()
        return events

    start, end = run()
    torch.cuda.synchronize(device)
    repeats = max(3, min(30, round(1000 * budget / start.elapsed_time(end))))
    events = [run() for _ in range(repeats)]
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def extra_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB above what is held before the call at its peak, results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return (peak - before) / 2**20


def kernel_seconds(call: Callable[[], object]) -> dict[str, float]:
    """The seconds that each kernel takes on this process's GPU in a call; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 1e6
        for event in seen.key_averages()
        if not event.is_user_annotation and event.self_device_time_total > 0
    }


def kernels_launched(call: Callable[[], object]) -> str:
    """The Triton kernels that a call launches, each once, in order; empty where it launches none, as on a CPU."""
    if find_spec("triton") is None:
        return ""
    names: list[str] = []

    def note(launch: Any) -> None:
        name = launch.get()["name"].strip("_").removesuffix("_kernel")
        if name not in names:
            names.append(name)

    hooks = import_module("triton").knobs.runtime.launch_enter_hook
    hooks.add(note)
    try:
        call()
    finally:
        hooks.remove(note)
    return ", ".join(names)


# ---- print


def table(rows: Sequence[Mapping[str, object]]) -> str:
    return tabulate(rows, headers="keys", floatfmt=".4g", missingval="–", tablefmt="github")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
