"""One calibration run: batches in, a calibration out, or what there is of it when the run is interrupted."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import value_error
from ..kernels.block_map import KEY_BLOCK, QUERY_BLOCK
from ..kernels.order import Tile
from ..notices import warn
from ..thresholds.calibration import Calibration
from ..thresholds.measured import Origin
from ..user_model import user_model
from .calls import ModelCall, NotedCalls
from .inputs import arguments, no_batches
from .inquiry import Inquiry
from .order_choice import choose_orders
from .orders import said
from .output import ask
from .processes import Processes
from .record import Batch, Recorder, tiles_of
from .search import Table, curves_of, search, table
from .settings import DEFAULT_ERROR, Settings
from .stages import Stages, bar_of
from .state import Folder
from .steps import with_step_ends
from .trial import KeptTrial


class Run:
    """One run over a model's batches. Called, it returns the calibration; interrupted, it saves what there is."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        out: str | os.PathLike[str] | None,
        share_batches: bool,
        progress: bool,
    ) -> None:
        target = user_model(model)
        if not isinstance(target, nn.Module):
            raise value_error(
                "calibrate: model",
                given=type(target).__name__,
                allowed="an nn.Module",
                todo="Pass the module; `call` may be any function.",
            )
        self.model = target
        self._settings = settings
        self._noted = NotedCalls() if settings.asks_model else None
        self._recorder = Recorder(
            model,
            options=settings.options,
            query_blocks=settings.query_blocks,
            every=settings.every,
            memory=settings.memory << 20,
            seed=settings.seed,
            noted=self._noted,
            tile=settings.orders[0] if len(settings.orders) == 1 else None,
        )
        self._trials = KeptTrial(target, settings.options)
        self._orders: dict[str, Tile | None] = {}  # that were chosen, of all sites with a grid
        self._processes = Processes(share_batches)
        self._out = out
        partial_folder = Path(f"{os.fspath(out)}.partial") if out is not None else None
        self._folder = Folder(partial_folder, settings.of_samples(target)) if partial_folder else None
        self._done = self._folder.load() if self._folder else {}
        self._progress = progress
        self._stages = Stages()

    def __call__(self, batches: Iterable[Any], call: Callable[..., Any]) -> Calibration:
        call = with_step_ends(call, self._recorder.end_step)
        whole = False
        try:
            with self._trials:
                with self._stages("samples"):
                    count = self._measure(batches, call)
                done = self._processes.gather(self._done)
                calibration = self._aimed({n: batch for n, batch in done.items() if n < count}) if count else None
            whole = True
        finally:
            # Whatever ended it, an interruption above all: what was measured is worth a file.
            if not whole and self._out is not None and self._folder and self._processes.is_first:
                saved = self._folder.load()
                if saved:
                    part = table(saved, self._settings.phases)
                    self._searched(saved, part, self._origin(saved, complete=False)).save(self._out)
        if calibration is None:
            raise no_batches()
        if self._processes.is_first:
            if self._progress:
                print(self._stages, file=sys.stderr)
            if self._out is not None:
                calibration.save(self._out)
                assert self._folder is not None
                self._folder.remove()
        return calibration

    def _measure(self, batches: Iterable[Any], call: Callable[..., Any]) -> int:
        """Record this process's share of the batches that are not done; return how many batches there are."""
        count = 0
        with bar_of(batches, len(self._done), self._progress and self._processes.is_first) as bar:
            for number, batch in enumerate(batches):
                count = number + 1
                args, kwargs = arguments(batch)
                run = partial(call, *args, **kwargs)
                tries_orders = number == 0 and len(self._settings.orders) > 1
                bar.set_postfix_str("choosing the order of tokens" if tries_orders else "")
                is_recorded = tries_orders and self._choose_orders(run)
                if not self._processes.owns(number):
                    continue
                if number in self._done and not is_recorded:
                    if self._noted is not None:
                        self._recorder.note(number, run)
                    continue
                if not is_recorded:
                    self._keep(number, self._recorder.record(number, run))
                at_once = self._processes.number
                bar.update(min(at_once, bar.total - bar.n) if at_once > 1 and bar.total else at_once)
        return count

    def _choose_orders(self, run: Callable[[], Any]) -> bool:
        """Have each site measured in the order that does best on the first batch, in all processes alike.

        Where no site has a grid, that batch is recorded by then; returns whether it is.
        """
        tiles, batch = None, None
        if self._processes.is_first:
            tiles = self._folder.load_tiles() if self._folder else None
            if tiles is None and 0 not in self._done:
                with self._stages("orders"):
                    noted = self._noted or NotedCalls()
                    self._recorder.noted = noted
                    tiles, batch = choose_orders(self._trials, self._recorder, noted, self._settings, run)
                    self._recorder.noted = self._noted
                if batch is not None:
                    self._keep(0, batch)
                else:
                    noted.forget()  # it is recorded once more
                    if self._folder:
                        self._folder.save_tiles(tiles)
        self._orders = self._processes.gather({0: tiles or {}} if self._processes.is_first else {})[0]
        self._recorder.use(self._orders)
        if self._orders:
            self._stages.note("orders", said(self._orders))
        return batch is not None

    def _keep(self, number: int, batch: Batch) -> None:
        self._done[number] = batch
        if self._folder:
            self._folder.save(number, batch)

    def _aimed(self, done: Mapping[int, Batch]) -> Calibration:
        """The calibration of a run that is complete; its model is asked, if it shall be."""
        measured: Table = table(done, self._settings.phases)
        origin = self._origin(done, complete=True)
        if not measured:
            raise _nothing_measured(done)
        if self._noted is not None:
            with self._stages("the model's output"):
                measured, origin = self._asked(done, measured, origin, self._noted.calls())
        with self._stages("search"):
            return self._searched(done, measured, origin)

    def _asked(
        self, done: Mapping[int, Batch], measured: Table, origin: Origin, calls: Sequence[ModelCall]
    ) -> tuple[Table, Origin]:
        """What the model says of its output; samples of runs that are held out are left out."""
        settings = self._settings
        sites = {name: phases[0].error.shape[1] for name, phases in measured.items()}
        try:
            with self._trials.of(sites) as trial:
                trial.reorder(self._orders or tiles_of(done))
                inquiry = Inquiry(
                    trial,
                    calls,
                    settings.phases,
                    lambda call: done[call.batch].progress(call.number),
                    self._processes.gather,
                    self._progress and self._processes.is_first,
                )
                if origin.target_output_error is not None and len(done) > 1:
                    held = inquiry.held_out()
                    measured = table({n: batch for n, batch in done.items() if n not in held}, settings.phases)
                curves = curves_of(measured, origin.mode, origin.by)
                asked = ask(replace(origin, curves=curves), inquiry)
                self._stages.note("the model's output", f"{trial.forwards} forwards")
        except ValueError as error:
            if settings.influence or origin.target_output_error is not None:
                raise
            warn(
                "influence",
                "sparge: a sparsity is aimed at without asking which heads the model's output depends on, which leaves "
                f"it more error: {error} influence=False says so without a warning.",
            )
            return measured, origin
        return measured, replace(asked, curves={})

    def _origin(self, done: Mapping[int, Batch], complete: bool) -> Origin:
        aim = self._settings.aim
        if not complete and "target_output_error" in aim:  # the model cannot be asked yet
            aim = {**aim, "target_output_error": None, "target_error": DEFAULT_ERROR}
        return Origin(
            model=type(self.model).__qualname__,
            created_with=f"torch {torch.__version__}",
            device=_device_name(self.model),
            query_block=QUERY_BLOCK,
            key_block=KEY_BLOCK,
            seed=self._settings.seed,
            query_blocks=self._settings.query_blocks,
            batches=len(done),
            complete=complete,
            **aim,
        )

    def _searched(self, done: Mapping[int, Batch], measured: Table, origin: Origin) -> Calibration:
        if not measured:
            raise _nothing_measured(done)
        keeping = {site: self._settings.options.kept_of(site) for site in measured}
        firsts = [sample for batch in done.values() for sample in batch.samples if sample.plain is not None]
        found = search(measured, self._settings.phases, origin, keeping, firsts, tiles_of(done))
        layers = self._settings.options.dense_layers
        return found if layers is None else found.scheduled(dense_layers=layers)


def _nothing_measured(done: Mapping[int, Batch]) -> ValueError:
    if not any(batch.steps for batch in done.values()):
        return value_error(
            "calibrate: model",
            given="one that the inputs never reach",
            allowed="the module that is called",
            todo="Give the module that `call` or the forward_loop runs.",
        )
    return value_error(
        "calibrate: model",
        given="no attention that may become sparse",
        allowed="attention of at least min_seq_len keys",
        todo="sparge_compile.explain(model)(...) says why sites stay dense; options={'min_seq_len': 0} lets all in.",
    )


def _device_name(model: nn.Module) -> str:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
