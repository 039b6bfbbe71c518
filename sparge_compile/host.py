"""How slow the host of a GPU is: an eager call of dense attention is timed once, and other times scale with it.

Small attention is bound by the host, whose speed the shapes do not tell. The measurement takes a few milliseconds of a
little problem, and what it gives is rounded coarsely, so that decisions are the same in each process.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .cost_table import REFERENCE

logger = logging.getLogger("sparge_compile")

STEPS = 2  # of a factor of two: what is measured is rounded to one of them
SHAPE = (1, 1, 64, 64)
CALLS, ROUNDS = 20, 15  # the least of the rounds is the least disturbed
_measured: dict[torch.device, float] = {}


def slowness(device: torch.device) -> float:
    """Return how many times as long as where ``cost_table.HOST`` was measured the host of a GPU takes.

    Measured at most once for a device in a process; 1 while a CUDA graph is captured, when nothing may be measured.
    """
    if device in _measured:
        return _measured[device]
    if torch.cuda.is_current_stream_capturing():
        return 1.0
    seconds = time_dense_call(device)
    _measured[device] = 2.0 ** (round(STEPS * math.log2(seconds / REFERENCE)) / STEPS)
    logger.debug(
        "host of %s: %.1f us for a dense call, %.2f of the reference", device, 1e6 * seconds, _measured[device]
    )
    return _measured[device]


def time_dense_call(device: torch.device) -> float:
    """Return the host's seconds for one eager call of dense attention that nobody waits for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with ExitStack() as stack:
        # Decisions are made inside of traces, whose modes must not see this.
        for mode in (_disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False)):
            stack.enter_context(mode)
        x = torch.zeros(SHAPE, dtype=dtype, device=device)
        times = []
        for _ in range(ROUNDS):
            _wait(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                torch.ops.aten.scaled_dot_product_attention.default(x, x, x)  # which nobody has replaced
            times.append((time.perf_counter() - start) / CALLS)
        _wait(device)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
