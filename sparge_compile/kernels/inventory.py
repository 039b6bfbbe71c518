"""Which kernels run on a device, and why the others do not: for the report and for ``sparge doctor``."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import torch

from . import capability, launch


class Kernel(NamedTuple):
    """A family of kernels, and why it does not run on a device: empty where it does."""

    name: str
    refusal: str


def kernels_on(device: torch.device) -> list[Kernel]:
    """The families of kernels of a type of device.

    On a Hopper GPU with a version of Triton that nobody has tried, the first call in a process tries its kernel, which
    takes seconds.
    """
    refused = capability.refusal(device, torch.float32, 64)
    refusal = refused[1] if refused else ""
    if device.type == "cpu":
        return [Kernel("torch on the CPU", refusal)]
    portable = Kernel("portable Triton", refusal)
    if device.type != "cuda" or refusal:
        return [portable]
    index = torch.cuda.current_device() if device.index is None else device.index
    hopper = import_module(f"{__package__}.triton.trial").hopper_refusal(torch.device("cuda", index))
    return [portable, Kernel("Hopper attention in Gluon", hopper)]


def summary(device: torch.device) -> str:
    """One line: the GPU, whether its launches were measured, what runs, and why the rest does not."""
    kernels = kernels_on(device)
    runs = ", ".join(kernel.name for kernel in kernels if not kernel.refusal) or "none"
    refused = "".join(f"; no {kernel.name}: {kernel.refusal}" for kernel in kernels if kernel.refusal)
    if device.type != "cuda":
        return f"{runs}{refused}"
    measured = "measured" if launch.measured(device) else "not measured"
    return f"{torch.cuda.get_device_name(device)}, launches {measured}: {runs}{refused}"
