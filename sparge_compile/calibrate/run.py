"""``sparge_compile.calibrate``: record, search, and the file, for a model and its inputs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import explain_error
from ..kernels.block_map import KEY_BLOCK, QUERY_BLOCK
from ..options import Options
from ..thresholds.calibration import Calibration
from ..thresholds.checks import check_aim
from ..thresholds.fronts import BY, MODES
from ..thresholds.measured import Origin
from ..user_model import user_model
from ..version import __version__
from .record import Batch, Recorder
from .search import search, table
from .state import Folder

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

    The model runs as it is, once for each batch; beside it, some query blocks of every attention are computed once more
    and every pair of a grid is measured at once. Sites that the backend cannot replace, or that are too short, are left
    out.

    Args:
        model: the model, compiled or not, on its device and in evaluation mode.
        batches: inputs for the model: a tuple of arguments, a dict of keyword arguments, a tuple of both, or the single
            argument. Where they come from must give the same ones again if an interrupted run shall go on.
        forward_loop: instead of batches, a function that calls the model as often as it likes: one batch.
        call: what runs the model on a batch; it gets the batch's arguments. Default: the model itself. For a pipeline:
            ``calibrate(pipe.transformer, prompts, call=pipe)``.
        target_error: bound of each head's relative L1 error Σ|O_sparse − O_dense| ÷ Σ|O_dense|, with as few blocks as
            it allows; a head that cannot keep it stays dense. Default 0.05, unless target_sparsity is given.
        target_sparsity: share of the visible key blocks that the model skips in all, where it hurts least.
        by: the error of a head is its ``"worst"`` sample, the default for a bound on it, or the ``"mean"`` of all, the
            default for a sparsity. A sample is one call of the site.
        mode: ``"hybrid"``, or for comparison ``"topk"`` or ``"topp"`` alone.
        phases: where, in (0, 1) of a batch's model calls, other thresholds begin: for denoising.
        options: the backend's, as the model will be compiled with; ``min_seq_len`` and ``additive_masks`` matter.
        query_blocks: how many blocks of 128 queries are looked at, for each call, head and batch element.
        every: in a batch, every so many calls of the model one is measured, beginning with the first.
        memory: MiB of scratch memory on the device.
        seed: of the choice of query blocks.
        out: where to save the calibration. Finished batches are kept in ``<out>.partial`` until it is written, and a
            run with the same settings goes on from them. An interruption (Ctrl-C) writes what there is, marked as not
            complete, and is raised again.
        share_batches: divide the batches among the processes of ``torch.distributed``, which must be initialised; all
            return the same calibration, and the first one writes it.
        progress: show a bar.

    Raises:
        ValueError: an aim or setting out of range, no site that may become sparse, inputs that are not finite, batches
            in ``<out>.partial`` of another run.
    """
    target = user_model(model)
    if not isinstance(target, nn.Module):
        raise _bad("model", type(target).__name__, "an nn.Module", "Pass the module; `call` may be any function.")
    if (batches is None) == (forward_loop is None):
        raise _bad("inputs", "none or both", "batches, or a forward_loop", "Give one of the two.")
    if target_error is None and target_sparsity is None:
        target_error = DEFAULT_ERROR
    by = by or ("worst" if target_sparsity is None else "mean")
    for name, value, known in (("by", by, BY), ("mode", mode, MODES)):
        if value not in known:
            raise _bad(name, repr(value), ", ".join(map(repr, known)), "Change it.")
    for name, number in (("query_blocks", query_blocks), ("every", every), ("memory", memory)):
        if type(number) is not int or number < 1:
            raise _bad(name, repr(number), "a whole number, at least 1", "Change it.")
    starts = [float(start) for start in phases]
    if starts != sorted(set(starts)) or not all(0 < start < 1 for start in starts):
        raise _bad("phases", phases, "ascending numbers in (0, 1)", "Give where each later phase begins.")
    aim = check_aim(target_error, target_sparsity, by, mode)
    settings = Options.parse(options)
    recorder = Recorder(model, options=settings, query_blocks=query_blocks, every=every, memory=memory << 20, seed=seed)
    run = call or target
    if forward_loop is not None:
        batches, run = [(target,)], forward_loop

    rank, world, group = _processes() if share_batches else (0, 1, None)
    sampled = {
        "version": __version__,
        "model": type(target).__qualname__,
        "options": [settings.min_seq_len, settings.additive_masks],
        "numbers": [query_blocks, every, seed],
    }
    folder = None if out is None else Folder(Path(f"{os.fspath(out)}.partial"), sampled)
    done = folder.load() if folder else {}
    seen, whole = 0, False

    def result(complete: bool) -> Calibration:
        return search(
            _measured(done, seen if complete else None, starts, recorder),
            starts,
            Origin(
                model=type(target).__qualname__,
                created_with=f"torch {torch.__version__}",
                device=_device_name(target),
                query_block=QUERY_BLOCK,
                key_block=KEY_BLOCK,
                seed=seed,
                query_blocks=query_blocks,
                batches=len(done),
                complete=complete,
                **aim,
            ),
        )

    assert batches is not None
    try:
        with _bar(batches, done, progress and rank == 0) as bar:
            for number, given in enumerate(batches):
                seen = number + 1
                if number in done or number % world != rank:
                    continue
                args, kwargs = arguments(given)
                batch = recorder.record(number, lambda args=args, kwargs=kwargs: run(*args, **kwargs))  # type: ignore[misc]
                done[number] = batch
                if folder:
                    folder.save(number, batch)
                bar.update(1 if world == 1 else min(world, bar.total - bar.n if bar.total else world))
        whole = True
    finally:
        # Whatever ended it, an interruption above all: what was measured is worth a file.
        if not whole and out is not None and folder and rank == 0 and (done := folder.load()):
            result(complete=False).save(out)
    if group is not None:
        done = _gathered(done, world, group)
    done = {number: batch for number, batch in done.items() if number < seen}
    calibration = result(complete=True)
    if out is not None and rank == 0:
        calibration.save(out)
        assert folder is not None
        folder.remove()
    return calibration


def _measured(done: Mapping[int, Batch], expected: int | None, starts: Sequence[float], recorder: Recorder) -> Any:
    if expected == 0:
        raise _bad("batches", "none", "at least one", "Is the iterable used up?")
    found = table(done, starts)
    if not found and not any(batch.calls for batch in done.values()):
        raise _bad("model", "one that the inputs never reach", "the module that is called", "Does `call` run it?")
    if not found:
        raise _bad(
            "model",
            "no attention that may become sparse",
            "attention of at least min_seq_len keys",
            "sparge_compile.explain(model)(...) says why sites stay dense; options={'min_seq_len': 0} lets all in.",
        )
    return found


def arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a batch stands for."""
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], Mapping):
        return given[0], dict(given[1])
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else ((given,), {})


def _processes() -> tuple[int, int, Any]:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        raise _bad(
            "share_batches", "no process group", "an initialised one", "Call init_process_group, or use torchrun."
        )
    return distributed.get_rank(), distributed.get_world_size(), distributed.new_group(backend="gloo")


def _gathered(done: dict[int, Batch], world: int, group: Any) -> dict[int, Batch]:
    """The batches of all processes, in each of them."""
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, done, group=group)
    return {number: batch for part in parts for number, batch in part.items()}


def _device_name(model: nn.Module) -> str:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _bar(batches: Iterable[Any], done: Mapping[int, Batch], shown: bool) -> Any:
    from tqdm import tqdm

    total = len(batches) if isinstance(batches, Sized) else None
    return tqdm(total=total, initial=len(done), desc="calibrating", unit="batch", disable=not shown)


def _bad(what: str, given: object, allowed: str, todo: str) -> ValueError:
    return ValueError(explain_error(f"calibrate: {what}", given=given, allowed=allowed, todo=todo))
