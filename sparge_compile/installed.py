"""What is installed here, by name and version: what a bug report should contain."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from .version import __version__

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """What is installed, by name."""
    found = {"sparge-compile": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # with what it was built for
    if torch.cuda.is_available():
        found["CUDA" if torch.version.hip is None else "ROCm"] = str(torch.version.cuda or torch.version.hip)
        found["driver"] = "unknown" if torch.version.hip else _driver()
    return found


def _driver() -> str:
    """The version of CUDA up to which the driver goes, which torch knows by a private name."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"up to CUDA {ask() // 1000}.{ask() % 1000 // 10}" if ask else "unknown"
