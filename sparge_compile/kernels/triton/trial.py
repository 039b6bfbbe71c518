"""Whether the kernels in Gluon run here, and the trial of versions of Triton that nobody has tried.

Gluon is experimental: another version may compile a kernel to something wrong, to nothing, or to what never ends. So a
version that is not on record tries the Hopper kernels on small problems first, once per process and device, in a
process of its own, where a crash or a hang takes nothing with it. That process has its own context, so the trial may
come at any time: while a graph is compiled or captured, too. What comes out of it is said in one warning.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from .. import allocate, check, launch
from ..how import How

# (major, minor) of Triton with which the kernels in Gluon ran on a GPU, against the reference: the forward, both.
TRIED = ((3, 6), (3, 7), (3, 8), (3, 9))
TRIED_BACKWARD = ((3, 6), (3, 8))
TRIED_IN_EIGHT_BITS = ((3, 6),)  # with others the portable kernel attends in eight bits

SECONDS = 300  # for the trial; a fresh machine takes some 20
PLACE = Path(__file__).parents[3]  # where the package is imported from


def version() -> tuple[int, int]:
    """(major, minor) of the Triton that is installed."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def hopper_refusal(device: torch.device, tried: tuple[tuple[int, int], ...] = TRIED) -> str:
    """Why the kernels that are written for Hopper do not run on a device; empty where they do.

    ``tried`` are the versions that need no trial: those of the forward, or ``TRIED_BACKWARD``.
    """
    if launch.architecture(device) != 9:
        return "not a Hopper GPU"
    return "" if version() in tried else _outcome(device)


@functools.cache
def _outcome(device: torch.device) -> str:
    """Why the kernels do not run with this version of Triton, by trial; empty where they do."""
    fault = _try(device)
    _warn(fault)
    return f"Triton {triton.__version__} was tried: {fault}" if fault else ""


def _warn(fault: str) -> None:
    outcome = (
        f"They failed ({fault}), so the portable kernels attend instead: right, and slower."
        if fault
        else "They passed, so they are used."
    )
    warnings.warn(
        f"sparge: the attention kernels for Hopper GPUs are new to Triton {triton.__version__}; they were checked "
        f"against the rule. {outcome} `sparge doctor` shows more.",
        stacklevel=2,
    )


def _try(device: torch.device) -> str:
    """What is wrong with the Hopper kernels on a device, found out in another process; empty if nothing is."""
    paths = [str(PLACE), *(os.path.abspath(path) for path in sys.path if path)]
    command = [sys.executable, "-c", f"from {__name__} import main; main({device.index or 0})"]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            cwd=PLACE,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it did not end in {SECONDS} seconds"
    except OSError as error:
        return f"no process for the check: {error}"
    if done.returncode == 0:
        return ""
    return done.stdout.strip() or f"the check ended with status {done.returncode}"


def main(index: int) -> None:
    """Try the Hopper kernels on a GPU; where something is wrong, print it and exit with status 1."""
    device = torch.device("cuda", index)
    try:
        fault = _fault(device)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        print(" ".join(fault.split())[:300])
        sys.exit(1)


def _fault(device: torch.device) -> str:
    from . import forward_hopper, lists, schedule
    from .backward_key import key_gradients
    from .backward_query import query_gradient

    def forward(
        q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, mask: None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = allocate.new_out(q, v), allocate.new_lse(q)
        (order,) = schedule.schedule(schedule.Lists(counts.expand(*q.shape[:2], -1), reverse=is_causal))
        forward_hopper.forward(q, k, v, counts, indices, How(mask, is_causal, scale), out, lse, order)
        return out, lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: None, bits: Tensor, *how: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = How(*how)
        kept, readers = lists.unpack(bits, *allocate.map_shape(q, k, given)[2:])
        first, second = schedule.of_backward(kept.counts, readers.counts, q, k, given)
        dq, delta = query_gradient(dout, q, k, v, out, lse, dlse, kept, given, first)
        return dq, *key_gradients(dout, q, k, v, lse, delta, readers, given, second)

    face = SimpleNamespace(forward=forward, backward=backward, pack=lists.pack)
    with torch.cuda.device(device):
        for head_size in forward_hopper.STAGES:
            for is_causal in (False, True):
                problem = check.Problem(head_size, torch.bfloat16, is_causal)
                fault = check.wrong_forward(forward, problem, device) or check.wrong_backward(face, problem, device)
                if fault:
                    return fault
    return ""
