"""A student that keeps more blocks late in sampling, and over a run as many as one that always keeps the same.

Errors of the first steps, in much noise, are small and mended by those that follow; those of the last ones stay. What
a step keeps is a phase of the calibration, as pipelines have it by ``sparge_compile.diffusers_callback``.
"""

from __future__ import annotations

import torch
from distil import everywhere
from setups import Setup
from torch import Tensor, nn

from sparge_compile import Calibration
from sparge_compile.thresholds.attached import Attachment

STARTS = (0.0, 0.62, 0.82, 0.94)  # of the phases, in shares of the steps
# Of 392 key blocks, in each phase. The last steps go far in time: nothing mends their errors.
KEPT = {"by step": (8, 20, 48, 110), "by step, evener": (14, 24, 30, 50)}


def in_phases(setup: Setup, kind: str, order: str, target: float = 0.951) -> Calibration:
    """The thresholds, each phase one pair of Top-k; twice as many blocks for 90 %, four times as many for 80 %."""
    times = round((1 - target) / (1 - 0.951))
    pairs = ((min(1.0, times * kept / 392), 0.0) for kept in KEPT[kind])
    first, *others = (everywhere(pair, order, setup.sizes[1]) for pair in pairs)
    phases = zip(STARTS[1:], others, strict=True)
    return Calibration(first.sites, {start: each.sites for start, each in phases}, tiles=first.tiles)


def time_at(progress: float, shift: float) -> float:
    """The time of sampling when this share of its steps is done."""
    return shift * (1 - progress) / (1 + (shift - 1) * (1 - progress))


def times(shift: float) -> list[tuple[float, float]]:
    """From when to when each phase lasts."""
    starts = [time_at(start, shift) for start in STARTS]
    return list(zip([*starts[1:], 0.0], starts, strict=True))


class ByStep(nn.Module):
    """A model whose thresholds are set for the times that it is called with."""

    def __init__(self, model: nn.Module, attached: Attachment, shift: float) -> None:
        super().__init__()
        self.model, self.attached, self.shift = model, attached, shift

    def forward(self, mixed: Tensor, when: Tensor, classes: Tensor) -> Tensor:
        is_in = [
            [low < time <= high or time <= low == 0.0 for time in when.tolist()] for low, high in times(self.shift)
        ]
        found: Tensor | None = None
        for start, those in zip(STARTS, is_in, strict=True):
            if any(those):
                self.attached.set_progress(start)
                velocity = self.model(mixed, when, classes)
                mine = torch.tensor(those, device=when.device).view(-1, *(1,) * (velocity.dim() - 1))
                found = velocity if found is None else torch.where(mine, velocity, found)
        assert found is not None, "no time is in no phase"
        return found


def in_each(steps: int) -> list[float]:
    """Of the steps of sampling, where their phases start."""
    return [max(start for start in STARTS if start <= step / steps) for step in range(steps)]
