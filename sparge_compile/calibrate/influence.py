"""How much what a model returns depends on each attention head. In: a model, its calibration, inputs. Out: weights.

A calibration measures the error of each head's attention output. What becomes of it further on is another matter: a
model may feel an error of one head a hundred times as much as the same of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..backend import sparge
from ..distill.forwards import Heard
from ..errors import explain_error
from ..options import Options
from ..running.listeners import heard_by
from ..running.observe import uncompiled
from ..thresholds.attachment import attach
from ..thresholds.buffers import attached_to
from ..thresholds.calibration import Calibration
from ..thresholds.fronts import DENSE, Point
from ..user_model import user_model
from .run import arguments

REFERENCE = 0.2  # density at which a head is tried: sparse enough for an error that counts
REPEATS = 1e-6  # relative squared error up to which two dense runs count as the same


def head_influence(
    model: nn.Module,
    calibration: Calibration,
    batches: Iterable[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    progress: bool = False,
) -> dict[str, list[float]]:
    """What an error of each head's attention output does to the model's output, for ``Calibration.at(influence=…)``.

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
    target: Any = user_model(model)
    if not isinstance(target, nn.Module):
        raise TypeError(_wrong("model", type(target).__name__, "an nn.Module", "Pass the module that was calibrated."))
    if not isinstance(calibration, Calibration):
        todo = "Load a file with Calibration.load(path)."
        raise TypeError(_wrong("calibration", type(calibration).__name__, "a Calibration", todo))
    if target.training:
        raise _bad("model", "one in training mode", "evaluation mode", "Call model.eval().")
    if any(attached_to(module) is not None for module in target.modules()):
        raise _bad("model", "one with thresholds attached", "one without", "Call remove() of what attach returned.")
    from tqdm import tqdm

    tried = _tried(calibration)
    heads = [(name, i, point) for name, points in tried.items() for i, point in enumerate(points) if point is not None]
    settings = Options.parse(options)
    total = {name: [0.0] * len(points) for name, points in tried.items()}
    dense = {name: (DENSE[:2],) * len(points) for name, points in tried.items()}
    others: dict[str, Any] = {"topk": 1.0, "topp": 0.0, "min_seq_len": 0, "inner": "eager", "on_unsupported": "dense"}
    count = 0
    with attach(target, Calibration(dense)) as attached, uncompiled(target), torch.no_grad():
        sparse = torch.compile(target, backend=sparge, options={**others, "additive_masks": settings.additive_masks})

        def run() -> list[Tensor]:
            return _floats(sparse(*_copied(args), **_copied(kwargs)))

        for given in batches:
            args, kwargs = arguments(given)
            heard = Heard()
            with heard_by(heard):
                exact = run()
            if missing := sorted(set(tried).difference(heard.names)):
                todo = "Give inputs that reach them, and the options of the calibration (additive_masks)."
                raise _bad("sites", f"{', '.join(missing)}: not replaced or not run", "sparse ones", todo)
            if (error := _error(run(), exact)) > REPEATS:
                todo = "Switch off what is random in it, or keeps something from one call to the next (a cache)."
                raise _bad("model", f"outputs that differ by {error:.2g} between two calls", "the same ones", todo)
            count += 1
            for name, head, point in tqdm(heads, desc="influence", unit="head", disable=not progress):
                alone = (*dense[name][:head], point[:2], *dense[name][head + 1 :])
                attached.set(Calibration({name: alone}))
                total[name][head] += _error(run(), exact) / point.mean**2
                attached.set(Calibration({name: dense[name]}))
    if not count:
        raise _bad("batches", "none", "at least one", "Is the iterable used up?")
    return {name: [weight / count for weight in weights] for name, weights in total.items()}


def _copied(arguments: Any) -> Any:
    """Arguments that the model may change."""
    return tree_map_only(Tensor, Tensor.clone, arguments)


def _tried(calibration: Calibration) -> dict[str, list[Point | None]]:
    """For each head the point of its front that it is tried at; None where it was only measured dense."""
    if calibration.origin is None:
        raise _bad("calibration", "thresholds without measurements", "what sparge_compile.calibrate made", "Calibrate.")
    if calibration.phases:
        raise _bad("calibration", "one with phases", "one phase", "Calibrate the inputs of one phase on their own.")

    def nearest(front: Iterable[Point]) -> Point | None:
        fit = [point for point in front if point.density < 1 and point.mean > 0]
        return min(fit, key=lambda point: abs(point.density - REFERENCE), default=None)

    curves = calibration.origin.curves
    return {name: [nearest(front) for front in site.phases[0].heads] for name, site in curves.items()}


def _floats(output: Any) -> list[Tensor]:
    """The floating tensors in what a model returned, in float32, as they are now."""
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    found = [x.to(torch.float32, copy=True) for x in tensors if x.is_floating_point()]
    if not found:
        raise _bad("model", f"{type(output).__name__} without floating tensors", "tensors", "Have it return them.")
    return found


def _error(changed: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖u − v‖² ÷ ‖v‖²."""
    if [u.shape for u in changed] != [v.shape for v in exact]:
        raise _bad("model", "outputs whose shapes differ between calls", "the same ones", "Give other inputs.")
    norm = sum(float(v.square().sum()) for v in exact)
    error = sum(float((u - v).square().sum()) for u, v in zip(changed, exact, strict=True))
    if not (0 < norm < float("inf") and error < float("inf")):
        raise _bad("model", f"outputs with squares of {norm:g}", "finite numbers, not all 0", "Check model and inputs.")
    return error / norm


def _wrong(what: str, given: object, allowed: str, todo: str) -> str:
    return explain_error(f"head_influence: {what}", given=given, allowed=allowed, todo=todo)


def _bad(what: str, given: object, allowed: str, todo: str) -> ValueError:
    return ValueError(_wrong(what, given, allowed, todo))
