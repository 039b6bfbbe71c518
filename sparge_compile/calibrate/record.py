"""Run a user's model and measure its attention: batches in, samples out. The model computes what it computes anyway.

A sample is one call of one site (:mod:`.measuring`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module

from ..eager.observation import eager_calls_of
from ..kernels.order import Tile
from ..options import Options
from ..running.observe import calls_through, watching
from ..user_model import user_model
from .calls import NotedCalls
from .measuring import Measuring, Operands, Sample, SiteCall, to_host
from .orders import Trials
from .site_calls import SiteCalls


@dataclass
class Batch:
    """One batch as it was recorded: its samples, and for each call of the model, measured or not, which step it is in.

    Steps are numbered from 0 without gaps: they are those in which the model is called.
    """

    samples: list[Sample] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def progress(self, call: int) -> float:
        """Return the share of the model's steps that came before a call."""
        return self.steps[call] / (self.steps[-1] + 1)


class Recorder(SiteCalls):
    """Measures the sites of a model.

    Args:
        model: the model, compiled or not.
        options: the backend's; ``min_seq_len`` and ``additive_masks`` say which sites may become sparse.
        query_blocks: how many query blocks of each call, head and batch element are looked at.
        every: in a batch, every so many calls of the model one is measured, beginning with the first.
        memory: bytes of scratch memory on the device.
        seed: of the choice of query blocks.
        noted: keeps those calls of the model that are measured.
        tile: in whose tokens sites are measured whose grid is known; None: in raster order. See also :meth:`use`.
    """

    def __init__(
        self,
        model: Module,
        *,
        options: Options,
        query_blocks: int,
        every: int,
        memory: int,
        seed: int,
        noted: NotedCalls | None = None,
        tile: Tile | None = None,
    ) -> None:
        target = user_model(model)
        assert isinstance(target, Module)
        super().__init__(target, options)
        self._model, self._called = target, model
        self._every, self.noted = every, noted
        self._measuring = Measuring(options, query_blocks, memory, seed, tile)
        self._trials: Trials | None = None  # of orders, where these are what is recorded
        self._found: dict[str, int] | None = None  # sites with a grid, where these are
        self._watched = watching(target, self)
        self._batch, self._number = Batch(), 0
        self._ended = 0  # steps of this batch

    def record(self, number: int, run: Callable[[], Any]) -> Batch:
        """Return the samples of one batch; ``run`` calls the model on it, once or as often as it likes.

        It may say where a step ends, with :meth:`end_step`; if it does not, each call is a step.
        """
        self._batch, self._number, self._ended = Batch(), number, 0
        with calls_through(self._called, self._call), torch.no_grad():
            run()
        samples = [to_host(sample) for sample in self._batch.samples]
        return Batch(samples, without_gaps(self._batch.steps) if self._ended else list(range(self._calls)))

    def find_grids(self, number: int, run: Callable[[], Any]) -> tuple[dict[str, int], Batch]:
        """Return the sites whose grid is known, with their numbers of heads; if there is none, the batch is recorded.

        ``run`` is as for :meth:`record`. Only the first call is looked at, if it has such sites.
        """
        found = self._found = {}
        try:
            return found, self.record(number, run)
        finally:
            self._found = None

    def try_orders(
        self, number: int, run: Callable[[], Any], orders: Sequence[Tile | None], shares: Sequence[float]
    ) -> Trials:
        """Return what some orders of tokens do to the attention of a batch, where its grid is known.

        ``run`` is as for :meth:`record`; at these ``shares`` of the key blocks orders are compared.
        """
        trials = self._trials = Trials(tuple(orders), tuple(shares), {})
        self._measuring.candidates, self._measuring.shares = trials.orders, trials.shares
        try:
            self.record(number, run)
        finally:
            self._trials, self._measuring.candidates = None, ()
        return trials

    def use(self, tiles: Mapping[str, Tile | None]) -> None:
        """Measure these sites in these orders from now on."""
        self._measuring.tiles = tiles

    def note(self, number: int, run: Callable[[], Any]) -> None:
        """Have the calls of a batch kept that was recorded before."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._note(args, kwargs)
            self._batch.steps.append(0)
            return self._model(*args, **kwargs)

        self._batch, self._number = Batch(), number
        with calls_through(self._called, call), torch.no_grad():
            run()

    def _note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.noted is not None and self._calls % self._every == 0:
            self.noted.note(self._number, self._calls, args, kwargs)

    def end_step(self) -> None:
        """Say that a step of a denoising run is over: phases are shares of steps, however many calls each has."""
        self._ended += 1

    @property
    def _calls(self) -> int:
        """How often the model was called in this batch before."""
        return len(self._batch.steps)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model."""
        measured = self._calls % self._every == 0 and not self._found
        self.turns.clear()
        self._note(args, kwargs)
        try:
            if not measured:
                return self._model(*args, **kwargs)
            with eager_calls_of(self):
                return self._watched(*args, **kwargs)
        finally:
            self._batch.steps.append(self._ended)

    @property
    def wants_grids(self) -> bool:
        """Whether some site may be in tiles."""
        return self._found is not None or self._measuring.in_tiles

    def heard(self, name: str, turn: int, operands: Operands) -> None:
        """Measure a site."""
        site = SiteCall(name, self._number, self._calls, turn)
        if self._trials is not None:
            if any(operands.grids):
                self._trials.add(name, self._measuring.try_orders(site, operands))
        elif self._found is not None and any(operands.grids):
            self._found[name] = operands.query.shape[1]
        else:
            self._batch.samples.append(self._measuring.sample(site, operands))


def without_gaps(steps: Sequence[int]) -> list[int]:
    """Return ascending numbers of steps, renumbered from 0."""
    numbers = {step: number for number, step in enumerate(dict.fromkeys(steps))}
    return [numbers[step] for step in steps]


def tiles_of(batches: Mapping[int, Batch]) -> dict[str, Tile]:
    """Return the tile of each site that was measured in one."""
    samples = (sample for number in sorted(batches) for sample in batches[number].samples)
    return {sample.site: sample.tile for sample in samples if sample.tile is not None}
