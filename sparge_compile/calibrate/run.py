"""``sparge_compile.calibrate``: record, search, and the file, for a model and its inputs."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import value_error
from ..kernels.block_map import KEY_BLOCK, QUERY_BLOCK
from ..notices import warn
from ..options import Options
from ..thresholds.calibration import Calibration
from ..thresholds.measured import Origin
from ..user_model import user_model
from .calls import ModelCall, NotedCalls
from .inputs import arguments, batches_and_call
from .inquiry import Inquiry
from .output import ask
from .processes import Processes
from .record import Batch, Recorder
from .search import Table, curves_of, search, table
from .settings import DEFAULT_ERROR, Settings, parse_aim
from .stages import Stages
from .state import Folder
from .steps import with_step_ends
from .trial import on_trial


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward_loop: Callable[[nn.Module], Any] | None = None,
    call: Callable[..., Any] | None = None,
    target_error: float | None = None,
    target_sparsity: float | None = None,
    target_output_error: float | None = None,
    influence: bool | None = None,
    by: str | None = None,
    mode: str = "hybrid",
    phases: Sequence[float] = (),
    options: Mapping[str, Any] | Options | None = None,
    query_blocks: int = 32,
    every: int = 1,
    memory: int = 1024,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    share_batches: bool = False,
    progress: bool = False,
) -> Calibration:
    """Find thresholds for each attention head of a model, from the model's own inputs.

    The model runs as it is, once for each batch; beside it, every pair of a grid is measured on some query blocks of
    every attention. Sites that the backend cannot replace, or that are too short, are left out.

    Args:
        model: the model, compiled or not, on its device and in evaluation mode.
        batches: its inputs: a tuple of arguments, a dict of keyword arguments, a tuple of both, or the single argument.
            They must be the same again if an interrupted run shall go on.
        forward_loop: instead of batches, a function that calls the model as often as it likes: one batch.
        call: runs a batch's arguments; default: the model. As in ``calibrate(pipe.transformer, prompts, call=pipe)``.
            If it takes ``callback_on_step_end``, as diffusers pipelines do, it is asked so where its steps end.
        target_error: bound of each head's relative L1 error Σ|O_sparse − O_dense| ÷ Σ|O_dense|, with as few blocks as
            it allows; a head that cannot keep it stays dense. Default 0.05, unless another aim is given.
        target_sparsity: share of the visible key blocks that the model skips in all, where it hurts least.
        target_output_error: bound of the relative L2 error ‖u − v‖ ÷ ‖v‖ of the model's output, a mean over inputs,
            with as few blocks as it allows. The model runs some hundred times more; of four batches one is held out and
            only checked. Give eight or more that are alike: the more their errors differ, the farther it stays below
            the bound. What was reached is in ``table()``.
        influence: whether heads on which the model's output depends are spared (``head_influence``), by as many more
            forwards as there are heads, 256 at most. Default: for a sparsity by the mean, with a warning where the
            model does not allow it; True: an error there. The output's error always needs it. It is in the file, so
            that ``Calibration.at`` aims with it.
        by: a head's error is its ``"worst"`` sample, the default for a bound on it, or the ``"mean"`` of all, the
            default otherwise. A sample is one call of the site.
        mode: ``"hybrid"``, or for comparison ``"topk"`` or ``"topp"`` alone.
        phases: where other thresholds begin, for denoising: shares in (0, 1) of those steps of a batch in which the
            model is called. Where nothing says how many calls a step has, each call is one.
        options: the backend's, as the model will be compiled with; ``min_seq_len``, ``additive_masks``, ``keep_keys``
            and ``dense_queries`` matter. What is kept is measured and saved with the thresholds, and so is what it
            gains: the errors with kept tokens and without, at equal sparsity, of each site's first sample.
            ``dense_layers`` is saved, too; such layers are measured, and count, as if they were sparse.
        query_blocks: how many blocks of 128 queries are looked at, for each call, head and batch element.
        every: in a batch, every so many calls of the model one is measured, beginning with the first.
        memory, seed: MiB of scratch memory on the device; the seed of the choice of query blocks.
        out: where to save the calibration. Until then finished batches are in ``<out>.partial``, from where a run with
            the same settings goes on. What interrupts a run is raised after the file has what there is, marked so.
        share_batches: divide the batches among the processes of ``torch.distributed``, which must be initialised; all
            return the same calibration, and the first one writes it.
        progress: show a bar, and in the end what took how long.

    Raises:
        ValueError: an aim or setting out of range or out of reach, no site that may become sparse, inputs that are not
            finite, batches in ``<out>.partial`` of another run; for the output's error, a model that cannot be asked:
            in training mode, with thresholds attached, or not the same from one call to the next.
    """
    aims = {
        "target_error": target_error,
        "target_sparsity": target_sparsity,
        "target_output_error": target_output_error,
    }
    aim = parse_aim(aims, by, mode)
    settings = Settings(aim, phases, Options.parse(options), query_blocks, every, memory, seed, influence)
    run = _Run(model, settings, out, share_batches, progress)
    return run(*batches_and_call(run.model, batches, forward_loop, call))


class _Run:
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
        )
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
            raise value_error(
                "calibrate: batches", given="none", allowed="at least one", todo="Is the iterable used up? Give a list."
            )
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
        with _bar(batches, self._done, self._progress and self._processes.is_first) as bar:
            for number, batch in enumerate(batches):
                count = number + 1
                if not self._processes.owns(number):
                    continue
                args, kwargs = arguments(batch)
                if number in self._done:
                    if self._noted is not None:
                        self._recorder.note(number, partial(call, *args, **kwargs))
                    continue
                recorded = self._recorder.record(number, partial(call, *args, **kwargs))
                self._done[number] = recorded
                if self._folder:
                    self._folder.save(number, recorded)
                at_once = self._processes.number
                bar.update(min(at_once, bar.total - bar.n) if at_once > 1 and bar.total else at_once)
        return count

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
        keeping = {name: settings.options.kept_of(name) for name in sites}
        try:
            with on_trial(self.model, sites, keeping, settings.options) as trial:
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
                f"sparge: a sparsity is aimed at without asking which heads the model's output depends on: {error} "
                "influence=False says so without a warning.",
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
        found = search(measured, self._settings.phases, origin, keeping, firsts)
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


def _bar(batches: Iterable[Any], done: Mapping[int, Batch], shown: bool) -> Any:
    from tqdm import tqdm

    total = len(batches) if isinstance(batches, Sized) else None
    return tqdm(total=total, initial=len(done), desc="calibrating", unit="batch", disable=not shown)
