"""``sparge_compile.calibrate``: record, search, and the file, for a model and its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..options import Options
from ..thresholds.calibration import Calibration
from .conduct import Run
from .inputs import batches_and_call
from .orders import parse_orders
from .settings import Settings, parse_aim


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
    orders: Iterable[str | Sequence[int]] | None = None,
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
        forward_loop: instead of batches, a function that calls the model as often as it likes: one batch. It is run
            twice where orders of tokens are tried; with ``orders=["raster"]``, once.
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
        orders: which tokens may form a block: ``"raster"`` and tiles of space and time, as (2, 4, 8) or ``"2x4x8"``.
            They are tried on the first batch, which runs once more for that. Where the grid of a site's tokens is
            known, it is measured in the order in which the model's output has the least error, or in one of its own
            where that pays. It is in the file, and what is compiled with the file has it too. Default: raster, (2, 4,
            8), (4, 4, 4), (4, 8, 2), (8, 4, 2), (1, 8, 8). Of a single one nothing is tried, nor with the option
            ``token_order``, which says it instead.
        by: a head's error is its ``"worst"`` sample, the default for a bound on it, or the ``"mean"`` of all, the
            default otherwise. A sample is one call of the site.
        mode: ``"hybrid"``, or for comparison ``"topk"`` or ``"topp"`` alone.
        phases: where other thresholds begin, for denoising: shares in (0, 1) of those steps of a batch in which the
            model is called. Where nothing says how many calls a step has, each call is one.
        options: the backend's, as the model will be compiled with; ``min_seq_len``, ``additive_masks``, ``keep_keys``,
            ``dense_queries``, ``token_order``, ``tile``, ``grid`` and ``precision`` matter. In eight bits the error is
            that of rounding and of the blocks that are left out, together. What is kept is measured and saved with the
            thresholds, and so is what it gains: the errors with kept tokens and without, at equal sparsity, of each
            site's first sample.
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
    given = Options.parse(options)
    tried = parse_orders(orders) if given.token_order is None else (given.tile_of(None),)
    settings = Settings(aim, phases, given, query_blocks, every, memory, seed, influence, tried)
    run = Run(model, settings, out, share_batches, progress)
    return run(*batches_and_call(run.model, batches, forward_loop, call))
