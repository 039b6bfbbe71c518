"""The thresholds of attached sites through a denoising run: phases by progress, and steps and layers that are dense.

In: a calibration, which entry of it each site has. Out: values by site, on the CPU, for a phase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedule import Schedule
from .calibration import Calibration
from .fronts import DENSE
from .targets import Target, site_name

DENSE_STEP = -1  # the number of the phase in which all sites keep everything, whatever the calibration says

Values = dict[Target, Tensor]  # float32 [H or 1, 2 or 6]


@dataclass
class Phases:
    """``phases`` are the progress from which each holds, from 0 on, and its values; layers that are dense by plan keep
    everything in all of them."""

    schedule: Schedule
    phases: list[tuple[float, Values]]

    @staticmethod
    def of(
        calibration: Calibration,
        schedule: Schedule,
        entries: Callable[[Calibration], Mapping[Target, str]],
        wide: bool = False,
    ) -> Phases:
        """Return the phases of a calibration; ``entries`` says which entry of one each site has."""

        def values(target: Target, phase: Calibration, entry: str) -> Tensor:
            found = _tensor(phase, entry, wide)
            return all_kept(found) if schedule.is_dense_layer(site_name(target)) else found

        def of_phase(start: float) -> Values:
            phase = calibration.at_progress(start)
            return {target: values(target, phase, entry) for target, entry in entries(phase).items()}

        return Phases(schedule, [(start, of_phase(start)) for start in (0.0, *calibration.phases)])

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self.phases) > 1 or self.schedule.dense_steps is not None

    @property
    def first(self) -> int:
        """The number of the phase that a run begins with."""
        return DENSE_STEP if self.schedule.is_dense_step(0, None) else 0

    def at_progress(self, fraction: float) -> int:
        """The number of the phase that holds at a share of a run."""
        return max(i for i, (start, _) in enumerate(self.phases) if start <= fraction)

    def at_step(self, step: int, steps: int) -> int:
        """The number of the phase that holds in a step of a run of so many."""
        return DENSE_STEP if self.schedule.is_dense_step(step, steps) else self.at_progress(step / steps)

    def values(self, number: int) -> Values:
        """The thresholds in a phase, by its number."""
        found = self.phases[max(number, 0)][1]
        return {key: all_kept(each) for key, each in found.items()} if number == DENSE_STEP else found

    def most_rows(self, target: Target) -> int:
        """How many rows the thresholds of a site have, in the phase in which they are most."""
        return max(len(values[target]) for _, values in self.phases)

    def is_dense_layer(self, target: Target) -> bool:
        """Whether a site is dense by plan in every step."""
        return self.schedule.is_dense_layer(site_name(target))

    def planned(self, target: Target) -> bool | None:
        """True: a site is dense by plan in every step; False: in some; None: in none."""
        if self.is_dense_layer(target):
            return True
        at_times = self.schedule.dense_steps is not None or any(keeps_all(values[target]) for _, values in self.phases)
        return False if at_times and self.several else None

    def put(self, column: int, number: float) -> None:
        """Put a number into the thresholds of all phases, but for layers that are dense by plan."""
        for _, values in self.phases:
            for target in values:
                if not self.is_dense_layer(target):
                    changed = values[target].clone()  # made in inference mode, it may not be written to outside
                    changed[:, column] = number
                    values[target] = changed

    def add(self, values: Values) -> None:
        """Have sites that are not in it keep these thresholds in every phase."""
        self.phases = [(start, {**values, **own}) for start, own in self.phases]


def all_kept(values: Tensor) -> Tensor:
    """Thresholds that keep all blocks, and whatever else these hold."""
    return torch.cat([torch.tensor(DENSE[:2]).expand(len(values), -1), values[:, 2:]], 1)


def keeps_all(values: Tensor) -> bool:
    """Whether thresholds, which are on the CPU, keep all blocks."""
    return bool((values[:, 0] == 1).all())


def _tensor(calibration: Calibration, entry: str, wide: bool) -> Tensor:
    ranges = calibration.kept_of(entry).numbers if calibration.kept or wide else ()
    rows = [(*pair, *ranges) for pair in calibration.sites[entry]]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")  # whatever the default device: meta has no values
