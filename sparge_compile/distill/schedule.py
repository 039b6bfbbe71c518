"""``SparsitySchedule``: attached thresholds that go from gentle to their target while a model trains.

Thresholds are run-time inputs of a compiled graph, so nothing is compiled anew. Without a schedule they stay as they
are, which is what the paper does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import value_error
from ..options import DEFAULT_TOPK, DEFAULT_TOPP
from ..pair import check_pair
from ..thresholds.attached import Attachment

_STATE = {"step", "steps", "start", "target"}


class SparsitySchedule:
    """Anneals what :func:`attach` put on a model.

    The target is what is attached when the schedule is made. ``topk`` falls geometrically (an equal share of the blocks
    is dropped at each step), ``topp`` linearly. A head whose target is gentler than ``start`` keeps its target.

    Args:
        attached: what ``attach`` gave, without phases.
        steps: calls of :meth:`step` until the target is reached; 0: it holds from the beginning.
        start: (topk, topp) to begin with; default: the backend's own defaults, which need no fine-tuning.

    Raises:
        ValueError: a start out of range, a negative number of steps, or thresholds with phases.
    """

    def __init__(
        self, attached: Attachment, steps: int, start: tuple[float, float] = (DEFAULT_TOPK, DEFAULT_TOPP)
    ) -> None:
        if type(steps) is not int or steps < 0:
            raise value_error(
                "SparsitySchedule: bad number of steps",
                given=repr(steps),
                allowed="a whole number from 0 on",
                todo="Give the number of optimizer steps that it shall take; 0 starts at the target.",
            )
        if attached.has_phases:
            raise value_error(
                "SparsitySchedule: the thresholds have phases",
                given="a calibration whose thresholds change during a denoising run",
                allowed="one set of thresholds",
                todo="Attach calibration.at_progress(...) while training, and the phases for inference.",
            )
        self._attached = attached
        self._steps = steps
        self._start = check_pair(*start, "SparsitySchedule: start")
        self._target = {name: values.detach().clone() for name, values in attached.buffers().items()}
        self._step = 0
        self._write()

    def step(self) -> None:
        """Go one step on: call it after each step of the optimizer. At the target nothing changes any more."""
        if self._step < self._steps:
            self._step += 1
            self._write()

    @property
    def progress(self) -> float:
        """The share of the steps that are taken, in [0, 1]."""
        return self._step / self._steps if self._steps else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return its step and its target, to be saved with the model, whose own state has the present thresholds."""
        target = {name: values.cpu() for name, values in self._target.items()}
        return {"step": self._step, "steps": self._steps, "start": list(self._start), "target": target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the model's thresholds are set to it.

        Raises:
            ValueError: a state of other sites or numbers of heads.
        """
        if set(state) != _STATE or {n: v.shape for n, v in state["target"].items()} != {
            n: v.shape for n, v in self._target.items()
        }:
            raise value_error(
                "SparsitySchedule: a state of other thresholds",
                given=", ".join(state.get("target", state))[:200],
                allowed=f"thresholds of {', '.join(self._target)[:200]}",
                todo="Attach the calibration that training began with.",
            )
        self._step, self._steps = state["step"], state["steps"]
        self._start = check_pair(state["start"][0], state["start"][1], "SparsitySchedule: start")
        self._target = {name: state["target"][name].to(values) for name, values in self._target.items()}
        self._write()

    def _write(self) -> None:
        with torch.no_grad():
            for name, values in self._attached.buffers().items():
                values.copy_(self._now(self._target[name]))

    def _now(self, target: Tensor) -> Tensor:
        """Thresholds [H, 2 or 6] at this step."""
        if self.progress == 1:  # exactly what was attached
            return target
        topk, topp = target[:, :2].unbind(-1)
        first = topk.clamp(min=self._start[0]), topp.clamp(min=self._start[1])
        share = self.progress
        now = torch.stack([first[0] ** (1 - share) * topk**share, first[1] + share * (topp - first[1])], -1)
        return torch.cat([now, target[:, 2:]], -1)
