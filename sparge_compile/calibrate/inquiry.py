"""What a model on trial is asked: how much its output depends on each head, and its error under thresholds.

In: a trial, calls of the model. Out: weights and errors, over all processes that share the calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import value_error
from ..thresholds.choice import Key, thresholds_of
from ..thresholds.fronts import Point
from ..thresholds.measured import Origin
from ..thresholds.output import ModelOutput
from . import influence
from .calls import ModelCall
from .trial import Trial

HELD_OUT = 4  # of so many runs one is held out, where there are as many

Points = Mapping[Key, Point]
Errors = dict[int, float]  # by run
Call = tuple[int, int]  # a batch, and the number of a call in it


@dataclass(frozen=True)
class Inquiry:
    """A model on trial, and the calls of it that this process has.

    ``progress_of`` tells how much of a batch's steps is done at a call. ``gather`` puts the dicts of all processes
    together. A *run* is a batch, whose calls belong together; or, of a single batch, a call.
    """

    trial: Trial
    calls: Sequence[ModelCall]
    starts: Sequence[float]  # of the later phases
    progress_of: Callable[[ModelCall], float]
    gather: Callable[[dict[Any, Any]], dict[Any, Any]]
    show: bool = False

    def influence(self, origin: Origin, density: float) -> ModelOutput:
        """How much the output depends on each head, tried at about this density.

        Raises:
            ValueError: a model that cannot be tried (:mod:`.trial`), or that depends on no head.
        """
        heads = sum(len(curves.phases[0].heads) for curves in origin.curves.values())
        at_once = influence.together(heads)
        keys = sorted(self._gathered(lambda call: 0.0))
        wanted = [keys[len(keys) // 2]]
        if influence.of_two_calls(heads) and len(keys) > 1:
            wanted = [keys[len(keys) // 4], keys[3 * len(keys) // 4]]

        def of_call(call: ModelCall) -> influence.Weights:
            points = influence.points_at(origin.curves, self._phase(call), density)
            return influence.of_call(self.trial, call, points, at_once, self.show)

        every = self._gathered(of_call, wanted)
        weights = influence.mean([every[key] for key in sorted(every)])
        if not any(x for each in weights.values() for x in each):
            raise value_error(
                "calibrate: the model's output",
                given="one that depends on no attention head",
                allowed="a model that returns what its attention computes",
                todo="Have it return a floating tensor that comes from its last layer.",
            )
        rounded = {name: tuple(float(f"{x:.4g}") for x in each) for name, each in weights.items()}
        return ModelOutput(rounded, float(f"{density:.4g}"))

    def held_out(self) -> set[int]:
        """A part of the runs, which has no say in which thresholds are chosen."""
        return set(sorted(self._by_run(self._gathered(lambda call: 0.0)))[HELD_OUT - 1 :: HELD_OUT])

    def errors(self, origin: Origin, points: Points) -> Errors:
        """The relative error of the output under chosen points, a mean over the calls of each run."""
        phases = [thresholds_of(origin, points, phase) for phase in range(1 + len(self.starts))]
        return self._by_run(self._gathered(lambda call: self.trial.error(call, phases[self._phase(call)])))

    def _phase(self, call: ModelCall) -> int:
        progress = self.progress_of(call)
        return max(i for i, start in enumerate((0.0, *self.starts)) if start <= progress)

    def _gathered(self, ask: Callable[[ModelCall], Any], wanted: Collection[Call] | None = None) -> dict[Call, Any]:
        """What is found for each call, or each wanted one, by whichever process has it. An error is raised in all."""
        found: dict[Any, Any] = {}
        failed: ValueError | None = None
        try:
            found = {call[:2]: ask(call) for call in self.calls if wanted is None or call[:2] in wanted}
        except ValueError as error:
            failed, found = error, {None: str(error)}
        every = self.gather(found)
        if failed is not None:
            raise failed
        if None in every:
            raise ValueError(every[None])
        return every

    @staticmethod
    def _by_run(found: Mapping[Call, float]) -> Errors:
        several = len({batch for batch, _ in found}) > 1
        by_run: dict[int, list[float]] = {}
        for (batch, number), error in sorted(found.items()):
            by_run.setdefault(batch if several else number, []).append(error)
        return {run: statistics.fmean(errors) for run, errors in by_run.items()}
