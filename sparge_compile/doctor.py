"""``sparge doctor``: what is installed, which kernels run here, whether they are right, and what they gain.

Goes in: a shape to time, or none. Comes out: an :class:`Examination`, which prints as what a bug report should contain.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cost import cost_model
from .errors import value_error
from .functional import attention
from .host import slowness, time_dense_call
from .installed import versions
from .kernels import check, inventory, launch
from .kernels.capability import HAS_TRITON

SMALL = {"length": 300, "keys": 330, "heads": 2, "key_heads": 1}  # a CPU and Triton's interpreter do it in a moment
SHAPES = {"cuda": (1, 12, 16_384, 128), "cpu": (1, 2, 4_096, 64)}  # what is timed unless a shape is given
REPEATS = 5


class Check(NamedTuple):
    """One kernel on one small problem: ``fault`` is empty where it computes the rule."""

    kernel: str
    problem: str
    fault: str


class Timing(NamedTuple):
    """Seconds of attention forward on the shape that was asked for; ``sparsity`` is what was reached."""

    shape: tuple[int, ...]
    dtype: str
    is_causal: bool
    sparsity: float
    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """Dense seconds over sparse seconds."""
        return self.dense / self.sparse


class Host(NamedTuple):
    """How long the host of a GPU takes, in seconds: an eager call of SDPA as it was measured, and how many times the
    cost model's reference that is, rounded; what the model therefore takes for a compiled call, dense and sparse."""

    eager_call: float
    slowness: float
    dense: float
    sparse: float


@dataclass
class Examination:
    """What was found on one device. Printed, it is what a bug report should contain."""

    versions: dict[str, str]
    device: str
    kernels: list[inventory.Kernel]
    launches: str
    checks: list[Check] = field(default_factory=list)
    host: Host | None = None  # of a GPU
    timing: Timing | None = None
    trouble: str = ""  # why nothing was timed

    @property
    def healthy(self) -> bool:
        """Whether some kernel runs and none is wrong."""
        return any(not kernel.refusal for kernel in self.kernels) and not any(each.fault for each in self.checks)

    @property
    def verdict(self) -> str:
        """What it comes to, in one sentence."""
        if not any(not kernel.refusal for kernel in self.kernels):
            return f"No kernel runs on {self.device}, so every attention stays dense: {self.kernels[0].refusal}."
        wrong = sorted({each.kernel for each in self.checks if each.fault})
        if wrong:
            return f"Do not use it here: {', '.join(wrong)} is wrong on {self.device}; please report all of the above."
        right = f"All is well: the kernels on {self.device} compute the rule"
        if self.timing is None:
            return f"{right}; nothing was timed{f' ({self.trouble})' if self.trouble else ''}."
        timing = self.timing
        if timing.speedup < 1:
            return (
                f"{right}. At {timing.sparsity:.0%} sparsity attention of this shape takes "
                f"{1 / timing.speedup:.1f} times as long as dense: try a longer one (--shape B,H,L,D)."
            )
        return (
            f"{right}, and at {timing.sparsity:.0%} sparsity attention is {timing.speedup:.1f} times faster than dense."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        found = {**asdict(self), "kernels": [x._asdict() for x in self.kernels], "verdict": self.verdict}
        found["checks"] = [x._asdict() for x in self.checks]
        found["timing"] = self.timing and self.timing._asdict()
        found["host"] = self.host and self.host._asdict()
        return {**found, "healthy": self.healthy}

    def __str__(self) -> str:
        lines = ["versions", *(f"  {name:16}{version}" for name, version in self.versions.items())]
        lines += [f"device\n  {self.device}, launches {self.launches}", "kernels"]
        lines += [f"  {kernel.name:26}{kernel.refusal or 'runs'}" for kernel in self.kernels]
        lines += ["checks", *(f"  {c.kernel:22}{c.problem:28}{c.fault or 'right'}" for c in self.checks)]
        if self.host:
            eager, slow, dense, sparse = self.host
            lines += [
                f"host\n  {1e6 * eager:.1f} us for an eager call of SDPA, {slow:.2g} times the reference: the cost "
                f"model takes {1e6 * dense:.0f} us for a compiled call, {1e6 * sparse:.0f} us for a sparse one",
            ]
        if self.timing:
            t = self.timing
            shape = "×".join(map(str, t.shape))
            lines += [
                f"time (forward, {shape}, {t.dtype}{', causal' if t.is_causal else ''})",
                f"  dense SDPA {1e3 * t.dense:.3f} ms, sparse {1e3 * t.sparse:.3f} ms, sparsity {t.sparsity:.1%}",
            ]
        return "\n".join([*lines, self.verdict])


def examine(
    device: torch.device,
    shape: tuple[int, int, int, int] | None = None,
    sparsity: float = 0.95,
    dtype: torch.dtype | None = None,
    is_causal: bool = False,
) -> Examination:
    """Look at a device: versions, kernels, their correctness, and the time of dense and sparse attention.

    Args:
        device: where.
        shape: (B, H, L, D) to time; a moderate one if None.
        sparsity: the share of key blocks to skip in what is timed, in [0, 1).
        dtype: of what is timed; bfloat16 on a GPU and float32 on a CPU if None.
        is_causal: whether what is timed is causal.

    Raises:
        ValueError: a sparsity out of range, or a shape with a size below one.
    """
    if not 0 <= sparsity < 1:
        raise value_error("sparsity is out of range", given=sparsity, allowed="[0, 1)", todo="0.95 is the paper's.")
    if shape is not None and min(shape) < 1:
        raise value_error("the shape is empty", given=shape, allowed="sizes from 1", todo="Give B,H,L,D.")
    kernels = inventory.kernels_on(device)
    found = Examination(versions(), _name(device), kernels, _launches(device))
    if any(not kernel.refusal for kernel in kernels):
        found.checks = _checks(device)
        found.host = _host(device) if device.type == "cuda" else None
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        try:
            found.timing = _time(device, shape or SHAPES[device.type], sparsity, dtype, is_causal)
        except (RuntimeError, ValueError) as error:  # out of memory, no kernel for this dtype and head size
            found.trouble = str(error).strip().splitlines()[0]
    return found


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)} ({device}, capability {major}.{minor}, {memory:.0f} GiB)"


def _launches(device: torch.device) -> str:
    if device.type != "cuda":
        return "need no table"
    return "measured on this GPU" if launch.measured(device) else "not measured on this GPU"


def _checks(device: torch.device) -> list[Check]:
    """Map, forward and backward on small problems, each by itself; in Triton's interpreter as well, if that is on."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if device.type == "cuda":
        return _checks_of("triton", "", dtypes, ((64, False), (128, True)), device)
    found = _checks_of("cpu", "", dtypes, ((64, False), (128, True)), device)
    if os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON:
        found += _checks_of("triton", "interpreted ", (torch.float32,), ((64, True),), device)
    return found


def _checks_of(
    face: str, word: str, dtypes: Iterable[torch.dtype], sizes: Iterable[tuple[int, bool]], device: torch.device
) -> list[Check]:
    kernels = import_module(f"{__package__}.kernels.{face}")
    found = []
    for dtype, (head_size, is_causal) in itertools.product(dtypes, sizes):
        problem = check.Problem(head_size, dtype, is_causal, **SMALL)
        found += [
            Check(f"{word}map", str(problem), _fault(check.wrong_map, kernels.block_map, problem, device)),
            Check(f"{word}forward", str(problem), _fault(check.wrong_forward, kernels.forward, problem, device)),
            Check(f"{word}backward", str(problem), _fault(check.wrong_backward, kernels, problem, device)),
        ]
    return found


def _fault(wrong: Callable[..., str], *args: Any) -> str:
    """What a check finds; a kernel that raises is at fault, too."""
    try:
        return wrong(*args)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.name}: {' '.join(str(error).split())[:200]}"


def _host(device: torch.device) -> Host:
    costs = cost_model(device)
    return Host(time_dense_call(device), slowness(device), costs.dense_host, costs.sparse_host)


def _time(device: torch.device, shape: tuple[int, ...], sparsity: float, dtype: torch.dtype, is_causal: bool) -> Timing:
    """Dense and sparse forward, in turns, each the median of a few calls."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))

    def sparse() -> Any:
        return attention(q, k, v, is_causal=is_causal, topk=1 - sparsity, topp=0.0)

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    with torch.no_grad():
        _, reached = attention(q, k, v, is_causal=is_causal, topk=1 - sparsity, topp=0.0, return_sparsity=True)
        times: dict[str, list[float]] = {"dense": [], "sparse": []}
        for turn in range(REPEATS + 1):  # the first warms up
            for name, call in (("dense", dense), ("sparse", sparse)):
                took = seconds(call, device)
                times[name] += [took] if turn else []
    medians = {name: statistics.median(each) for name, each in times.items()}
    return Timing(shape, str(dtype).removeprefix("torch."), is_causal, float(reached), **medians)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes on a device, its launches and its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def as_json(found: Examination) -> str:
    """An examination as a JSON document."""
    return json.dumps(found.to_dict(), indent=2)
