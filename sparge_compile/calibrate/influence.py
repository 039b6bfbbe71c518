"""How much what a model returns depends on each attention head. In: a model, its calibration, inputs. Out: weights.

A calibration measures the error of each head's attention output. What becomes of it further on is another matter: a
model may feel an error of one head a hundred times as much as the same of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..backend import sparge
from ..distill.forwards import GraphCalls
from ..errors import type_error, value_error
from ..keeping import Kept
from ..options import Options
from ..running.listeners import heard_by
from ..running.observe import uncompiled
from ..thresholds.attachment import Attachment, attach
from ..thresholds.buffers import attached_to
from ..thresholds.calibration import Calibration
from ..thresholds.fronts import DENSE, Point
from ..user_model import user_model
from .run import arguments

REFERENCE = 0.2  # density at which a head is tried: sparse enough for an error that counts
REPEATS = 1e-6  # relative squared error up to which two dense runs count as the same

Trials = dict[str, list[Point | None]]  # by site the point that each head is tried at; None: only measured dense


def head_influence(
    model: nn.Module,
    calibration: Calibration,
    batches: Iterable[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Measure what an error of each head does to the model's output, for ``Calibration.at(influence=…)``.

    The model runs twice with all heads dense, and once for each head with that head alone sparse, at the measured pair
    whose density is nearest to 0.2: as many forwards for each batch as there are heads, and two. The weight of a head
    is ‖u − v‖² ÷ ‖v‖² of the two outputs over the square of that pair's mean relative error, a mean over the batches.
    Then Σ weight · error² over heads is the relative squared error of the output, as far as errors of heads add up.

    Args:
        model: the model, compiled or not, on its device and in evaluation mode. What this process has compiled, of this
            model or others, is compiled anew when it is used next.
        calibration: what ``sparge_compile.calibrate`` measured on it, without phases.
        batches: arguments of the model itself, each as for ``calibrate`` without ``call``. One or two typical ones are
            enough. All floating tensors that it returns count.
        options: the backend's; ``additive_masks`` matters, and must be what it was when the model was calibrated.
        progress: show a bar.

    Returns:
        A weight >= 0 for each head, by site. Of a head that was only measured dense it is 0.

    Raises:
        TypeError: not a module, not a calibration.
        ValueError: a calibration without measurements or with phases, no batch, a model in training mode, with
            thresholds attached, whose outputs differ from one call to the next, are not finite or all zero, or of which
            a calibrated site did not become sparse.
    """
    target = _check_model(model)
    trials = _trials(calibration)
    weights = {name: [0.0] * len(points) for name, points in trials.items()}
    count = 0
    with (
        _all_dense(target, trials, calibration.kept, Options.parse(options).additive_masks) as (attached, sparse),
        torch.no_grad(),
    ):
        for batch in batches:
            count += 1
            args, kwargs = arguments(batch)

            def run(args: Any = args, kwargs: Any = kwargs) -> list[Tensor]:
                return _floats(sparse(*_copied(args), **_copied(kwargs)))

            _add_influence(weights, trials, attached, run, progress)
    if not count:
        raise value_error(
            "head_influence: batches",
            given="none",
            allowed="at least one",
            todo="Is the iterable used up? Give a list.",
        )
    return {name: [weight / count for weight in values] for name, values in weights.items()}


def _check_model(model: Any) -> nn.Module:
    target: Any = user_model(model)
    if not isinstance(target, nn.Module):
        raise type_error(
            "head_influence: model",
            given=type(target).__name__,
            allowed="an nn.Module",
            todo="Pass the module that was calibrated.",
        )
    if target.training:
        raise value_error(
            "head_influence: model",
            given="one in training mode",
            allowed="evaluation mode",
            todo="Call model.eval().",
        )
    if any(attached_to(module) is not None for module in target.modules()):
        raise value_error(
            "head_influence: model",
            given="one with thresholds attached",
            allowed="one without",
            todo="Call remove() of what attach returned.",
        )
    return target


@contextmanager
def _all_dense(
    model: nn.Module, trials: Trials, kept: Mapping[str, Kept], additive_masks: bool
) -> Iterator[tuple[Attachment, Callable[..., Any]]]:
    """The model, compiled with sparse sites that keep all blocks, and the handle that changes that."""
    options: dict[str, Any] = {"topk": 1.0, "topp": 0.0, "min_seq_len": 0, "inner": "eager", "on_unsupported": "dense"}
    dense = Calibration({name: _dense(points) for name, points in trials.items()}, kept=kept)
    with attach(model, dense) as attached, uncompiled(model):
        yield attached, torch.compile(model, backend=sparge, options={**options, "additive_masks": additive_masks})


def _dense(points: Sequence[Any]) -> tuple[tuple[float, float], ...]:
    return (DENSE[:2],) * len(points)


def _add_influence(
    weights: dict[str, list[float]],
    trials: Trials,
    attached: Attachment,
    run: Callable[[], list[Tensor]],
    progress: bool,
) -> None:
    """Add to each head's weight what one batch, which ``run`` runs, says of it."""
    from tqdm import tqdm

    graphs = GraphCalls()
    with heard_by(graphs):
        exact = run()
    if missing := sorted(set(trials).difference(graphs.names)):
        raise value_error(
            "head_influence: sites",
            given=f"{', '.join(missing)}: not replaced or not run",
            allowed="sparse ones",
            todo="Give inputs that reach them, and the options of the calibration (additive_masks).",
        )
    if (error := _error(run(), exact)) > REPEATS:
        raise value_error(
            "head_influence: model",
            given=f"outputs that differ by {error:.2g} between two calls",
            allowed="the same ones",
            todo="Switch off what is random in it, or keeps something from one call to the next (a cache).",
        )
    keeping = attached.get().kept
    heads = [(name, i, point) for name, points in trials.items() for i, point in enumerate(points) if point is not None]
    for name, head, point in tqdm(heads, desc="influence", unit="head", disable=not progress):
        dense = _dense(trials[name])
        kept = {site: what for site, what in keeping.items() if site == name}
        attached.set(Calibration({name: (*dense[:head], point[:2], *dense[head + 1 :])}, kept=kept))
        weights[name][head] += _error(run(), exact) / point.mean**2
        attached.set(Calibration({name: dense}, kept=kept))


def _copied(arguments: Any) -> Any:
    """Arguments that the model may change."""
    return tree_map_only(Tensor, Tensor.clone, arguments)


def _trials(calibration: Calibration) -> Trials:
    """For each head the point of its front whose density is nearest to ``REFERENCE``."""
    if not isinstance(calibration, Calibration):
        raise type_error(
            "head_influence: calibration",
            given=type(calibration).__name__,
            allowed="a Calibration",
            todo="Load a file with Calibration.load(path).",
        )
    if calibration.origin is None:
        raise value_error(
            "head_influence: calibration",
            given="thresholds without measurements",
            allowed="what sparge_compile.calibrate made",
            todo="Calibrate the model.",
        )
    if calibration.phases:
        raise value_error(
            "head_influence: calibration",
            given="one with phases",
            allowed="one phase",
            todo="Calibrate the inputs of one phase on their own.",
        )

    def nearest(front: Iterable[Point]) -> Point | None:
        fit = [point for point in front if point.density < 1 and point.mean > 0]
        return min(fit, key=lambda point: abs(point.density - REFERENCE), default=None)

    curves = calibration.origin.curves
    return {name: [nearest(front) for front in site.phases[0].heads] for name, site in curves.items()}


def _floats(output: Any) -> list[Tensor]:
    """The floating tensors in what a model returned, in float32, as they are now."""
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    floats = [x.to(torch.float32, copy=True) for x in tensors if x.is_floating_point()]
    if not floats:
        raise value_error(
            "head_influence: model",
            given=f"{type(output).__name__} without floating tensors",
            allowed="tensors",
            todo="Have it return them.",
        )
    return floats


def _error(changed: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖u − v‖² ÷ ‖v‖²."""
    if [u.shape for u in changed] != [v.shape for v in exact]:
        raise value_error(
            "head_influence: model",
            given="outputs whose shapes differ between calls",
            allowed="the same ones",
            todo="Give other inputs.",
        )
    norm = sum(float(v.square().sum()) for v in exact)
    error = sum(float((u - v).square().sum()) for u, v in zip(changed, exact, strict=True))
    if not (0 < norm < float("inf") and error < float("inf")):
        raise value_error(
            "head_influence: model",
            given=f"outputs with squares of {norm:g}",
            allowed="finite numbers, not all 0",
            todo="Check model and inputs.",
        )
    return error / norm
