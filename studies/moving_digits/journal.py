"""What a run says, on the screen and in a file that lies beside what it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import sparge_compile


def journal(path: Path, device: torch.device, mode: str = "w") -> Callable[[str], None]:
    """A function that says a line. The first says with which versions, and where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open(mode)

    def say(text: str) -> None:
        print(text, flush=True)
        print(text, file=file, flush=True)

    say(f"torch {torch.__version__}, {where(device)}, sparge_compile {sparge_compile.__version__}")
    return say


def where(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
