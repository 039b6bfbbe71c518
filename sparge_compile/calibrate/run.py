"""``sparge_compile.calibrate``: record, search, and the file, for a model and its inputs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import value_error
from ..kernels.block_map import KEY_BLOCK, QUERY_BLOCK
from ..options import Options
from ..thresholds.calibration import Calibration
from ..thresholds.checks import check_aim
from ..thresholds.fronts import BY, MODES
from ..thresholds.measured import Origin
from ..user_model import user_model
from ..version import __version__
from .processes import Processes
from .record import Batch, Recorder
from .search import search, table
from .state import Folder
from .steps import with_step_ends

DEFAULT_ERROR = 0.05  # of a head's attention output: below it, images of video models were seen not to change


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward_loop: Callable[[nn.Module], Any] | None = None,
    call: Callable[..., Any] | None = None,
    target_error: float | None = None,
    target_sparsity: float | None = None,
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
            it allows; a head that cannot keep it stays dense. Default 0.05, unless target_sparsity is given.
        target_sparsity: share of the visible key blocks that the model skips in all, where it hurts least.
        by: a head's error is its ``"worst"`` sample, the default for a bound on it, or the ``"mean"`` of all, the
            default for a sparsity. A sample is one call of the site.
        mode: ``"hybrid"``, or for comparison ``"topk"`` or ``"topp"`` alone.
        phases: where other thresholds begin, for denoising: shares in (0, 1) of those steps of a batch in which the
            model is called. Where nothing says how many calls a step has, each call is one.
        options: the backend's, as the model will be compiled with; ``min_seq_len``, ``additive_masks``,
            ``keep_keys`` and ``dense_queries`` matter. What is kept is measured and saved with the thresholds, and so
            is what it gains: the errors with kept tokens and without, at equal sparsity, of each site's first sample.
        query_blocks: how many blocks of 128 queries are looked at, for each call, head and batch element.
        every: in a batch, every so many calls of the model one is measured, beginning with the first.
        memory, seed: MiB of scratch memory on the device; the seed of the choice of query blocks.
        out: where to save the calibration. Until then finished batches are in ``<out>.partial``, from where a run with
            the same settings goes on. What interrupts a run is raised after the file has what there is, marked so.
        share_batches: divide the batches among the processes of ``torch.distributed``, which must be initialised; all
            return the same calibration, and the first one writes it.
        progress: show a bar.

    Raises:
        ValueError: an aim or setting out of range, no site that may become sparse, inputs that are not finite, batches
            in ``<out>.partial`` of another run.
    """
    aim = _aim(target_error, target_sparsity, by, mode)
    settings = _Settings(aim, phases, Options.parse(options), query_blocks, every, memory, seed)
    run = _Run(model, settings, out, share_batches, progress)
    return run(*_inputs(run.model, batches, forward_loop, call))


def _aim(target_error: float | None, target_sparsity: float | None, by: str | None, mode: str) -> dict[str, Any]:
    """The fields of an ``Origin`` that say what is aimed at; the rest by default."""
    if target_error is None and target_sparsity is None:
        target_error = DEFAULT_ERROR
    by = by or ("worst" if target_sparsity is None else "mean")
    for name, value, allowed in (("by", by, BY), ("mode", mode, MODES)):
        if value not in allowed:
            raise value_error(
                f"calibrate: {name}",
                given=repr(value),
                allowed=", ".join(map(repr, allowed)),
                todo=f"Give one of them, or leave {name} out.",
            )
    return check_aim(target_error, target_sparsity, by, mode)


@dataclass(frozen=True)
class _Settings:
    """The checked settings of a run beside the model and its inputs; see the arguments of ``calibrate``."""

    aim: Mapping[str, Any]
    phases: Sequence[float]
    options: Options
    query_blocks: int
    every: int
    memory: int  # MiB
    seed: int

    def __post_init__(self) -> None:
        for name in ("query_blocks", "every", "memory"):
            number = getattr(self, name)
            if type(number) is not int or number < 1:
                raise value_error(
                    f"calibrate: {name}",
                    given=repr(number),
                    allowed="a whole number, at least 1",
                    todo=f"Leave {name} out for a value that suits most models.",
                )
        starts = [float(start) for start in self.phases]
        if starts != sorted(set(starts)) or not all(0 < start < 1 for start in starts):
            raise value_error(
                "calibrate: phases",
                given=self.phases,
                allowed="ascending numbers in (0, 1)",
                todo="Give where each later phase begins.",
            )
        object.__setattr__(self, "phases", starts)

    def _kept(self) -> list[Any]:
        """What the options keep; nothing where they keep nothing."""
        options = self.options
        own = [options.keep_keys, options.dense_queries] if options.keep_keys is not None else []
        return own or ([dict(options.calibration.kept)] if options.calibration and options.calibration.kept else [])

    def of_samples(self, model: nn.Module) -> dict[str, Any]:
        """Return all that the samples of a batch depend on, for a folder of finished batches."""
        return {
            "version": __version__,
            "model": type(model).__qualname__,
            "options": [self.options.min_seq_len, self.options.additive_masks, *self._kept()],
            "numbers": [self.query_blocks, self.every, self.seed],
        }


def _inputs(
    model: nn.Module,
    batches: Iterable[Any] | None,
    forward_loop: Callable[[nn.Module], Any] | None,
    call: Callable[..., Any] | None,
) -> tuple[Iterable[Any], Callable[..., Any]]:
    """The batches, and what runs one."""
    if forward_loop is not None and batches is None:
        return [(model,)], forward_loop
    if batches is None or forward_loop is not None:
        raise value_error(
            "calibrate: inputs",
            given="none" if batches is None else "batches and a forward_loop",
            allowed="batches, or a forward_loop",
            todo="Give one of the two.",
        )
    return batches, call or model


class _Run:
    """One run over a model's batches. Called, it returns the calibration; interrupted, it saves what there is."""

    def __init__(
        self,
        model: nn.Module,
        settings: _Settings,
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
        self._recorder = Recorder(
            model,
            options=settings.options,
            query_blocks=settings.query_blocks,
            every=settings.every,
            memory=settings.memory << 20,
            seed=settings.seed,
        )
        self._processes = Processes(share_batches)
        self._out = out
        partial_folder = Path(f"{os.fspath(out)}.partial") if out is not None else None
        self._folder = Folder(partial_folder, settings.of_samples(target)) if partial_folder else None
        self._done = self._folder.load() if self._folder else {}
        self._progress = progress

    def __call__(self, batches: Iterable[Any], call: Callable[..., Any]) -> Calibration:
        call = with_step_ends(call, self._recorder.end_step)
        whole = False
        try:
            count = self._measure(batches, call)
            whole = True
        finally:
            # Whatever ended it, an interruption above all: what was measured is worth a file.
            if not whole and self._out is not None and self._folder and self._processes.is_first:
                saved = self._folder.load()
                if saved:
                    self._calibration(saved, complete=False).save(self._out)
        done = self._processes.gather(self._done)
        if not count:
            raise value_error(
                "calibrate: batches", given="none", allowed="at least one", todo="Is the iterable used up? Give a list."
            )
        calibration = self._calibration({n: batch for n, batch in done.items() if n < count}, complete=True)
        if self._out is not None and self._processes.is_first:
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
                if number in self._done or not self._processes.owns(number):
                    continue
                args, kwargs = arguments(batch)
                recorded = self._recorder.record(number, partial(call, *args, **kwargs))
                self._done[number] = recorded
                if self._folder:
                    self._folder.save(number, recorded)
                at_once = self._processes.number
                bar.update(min(at_once, bar.total - bar.n) if at_once > 1 and bar.total else at_once)
        return count

    def _calibration(self, done: Mapping[int, Batch], complete: bool) -> Calibration:
        measured = table(done, self._settings.phases)
        if not measured:
            raise _nothing_measured(done)
        origin = Origin(
            model=type(self.model).__qualname__,
            created_with=f"torch {torch.__version__}",
            device=_device_name(self.model),
            query_block=QUERY_BLOCK,
            key_block=KEY_BLOCK,
            seed=self._settings.seed,
            query_blocks=self._settings.query_blocks,
            batches=len(done),
            complete=complete,
            **self._settings.aim,
        )
        keeping = {site: self._settings.options.kept_of(site) for site in measured}
        firsts = [sample for batch in done.values() for sample in batch.samples if sample.plain is not None]
        return search(measured, self._settings.phases, origin, keeping, firsts)


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


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping):
        return batch[0], dict(batch[1])
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _device_name(model: nn.Module) -> str:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _bar(batches: Iterable[Any], done: Mapping[int, Batch], shown: bool) -> Any:
    from tqdm import tqdm

    total = len(batches) if isinstance(batches, Sized) else None
    return tqdm(total=total, initial=len(done), desc="calibrating", unit="batch", disable=not shown)
