"""How much what a model returns depends on each attention head. In: a model, its calibration, inputs. Out: weights.

A calibration measures the error of each head's attention output. What becomes of it further on is another matter: a
model may feel an error of one head a hundred times as much as the same of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import type_error, value_error
from ..options import Options
from ..thresholds.calibration import Calibration
from ..thresholds.fronts import Point
from ..thresholds.site_curves import SiteCurves
from ..user_model import user_model
from .calls import ModelCall
from .inputs import arguments, listed
from .trial import Trial, dense_pairs, on_trial, squared_error

# A head is tried at the density that is aimed at, or at this one if that is denser: sparse enough for an error that is
# more than rounding.
DENSEST = 0.2
# Forwards that a calibration spends on it; of a model with more heads some of a site are tried together.
FORWARDS = 256

Weights = dict[str, list[float]]
Points = Mapping[str, Sequence[Point | None]]  # that heads are tried with, by site


def head_influence(
    model: nn.Module,
    calibration: Calibration,
    batches: Iterable[Any],
    *,
    density: float | None = None,
    options: Mapping[str, Any] | Options | None = None,
    progress: bool = False,
) -> Weights:
    """Measure what an error of each head does to the model's output, for ``Calibration.at(influence=…)``.

    ``calibrate`` does it by itself for a sparsity or a bound on the model's output; this is for other inputs or
    densities. The model runs twice with all heads dense, and once for each head with that head alone sparse: as many
    forwards for each batch as there are heads, and two. The weight of a head is ‖u − v‖² ÷ ‖v‖² of the two outputs over
    the square of the mean relative error of the pair that it is tried with. Then Σ weight · error² over heads is the
    relative squared error of the output, as far as errors of heads add up.

    Args:
        model: the model, compiled or not, on its device and in evaluation mode. What this process has compiled, of this
            model or others, is compiled anew when it is used next.
        calibration: what ``sparge_compile.calibrate`` measured on it, without phases.
        batches: arguments of the model itself, each as for ``calibrate`` without ``call``. One or two typical ones are
            enough. All floating tensors that it returns count.
        density: each head is tried with the measured pair whose density is nearest to this. Default: the density that
            the calibration has in all, or 0.2 if that is denser.
        options: the backend's; ``additive_masks`` and ``grid`` must be what they were when the model was calibrated.
        progress: show a bar.

    Returns:
        A weight >= 0 for each head, by site. Of a head that was only measured dense it is 0.

    Raises:
        TypeError: not a module, not a calibration.
        ValueError: a calibration without measurements or with phases, no batch, a density out of range, a model in
            training mode, with thresholds attached, whose outputs differ from one call to the next, are not finite or
            all zero, or of which a calibrated site did not become sparse.
    """
    target: Any = user_model(model)
    if not isinstance(target, nn.Module):
        raise type_error(
            "head_influence: model",
            given=type(target).__name__,
            allowed="an nn.Module",
            todo="Pass the module that was calibrated.",
        )
    curves, aimed_at = _checked_calibration(calibration)
    density = min(aimed_at, DENSEST) if density is None else _checked(density)
    sites = {name: len(pairs) for name, pairs in calibration.sites.items()}
    found = []
    with on_trial(target, sites, Options.parse(options), calibration.kept) as trial:
        trial.reorder(calibration.tiles)
        for number, batch in enumerate(listed(batches)):
            call = ModelCall.of(number, 0, *arguments(batch))
            found.append(of_call(trial, call, points_at(curves, 0, density), 1, progress))
    if not found:
        raise value_error(
            "head_influence: batches",
            given="none",
            allowed="at least one",
            todo="Is the iterable used up? Give a list.",
        )
    return mean(found)


def points_at(curves: Mapping[str, SiteCurves], phase: int, density: float) -> Points:
    """For each head the point of its front whose density is nearest; None: it was only measured dense."""

    def nearest(front: Iterable[Point]) -> Point | None:
        fit = [point for point in front if point.density < 1 and point.mean > 0]
        return min(fit, key=lambda point: abs(point.density - density), default=None)

    return {name: [nearest(front) for front in site.phases[phase].heads] for name, site in curves.items()}


def together(heads: int) -> int:
    """How many heads of a site are tried together, of a model with so many heads, for ``FORWARDS``."""
    return -(-heads // FORWARDS)


def forwards(heads: int) -> int:
    """How many forwards it takes of a model with so many heads: one for each, of two calls where heads are few."""
    return -(-heads // together(heads)) * (2 if of_two_calls(heads) else 1)


def of_two_calls(heads: int) -> bool:
    """Whether the heads of a model with so many are tried on two of its calls."""
    return heads * 2 <= FORWARDS


def of_call(trial: Trial, call: ModelCall, points: Points, at_once: int, progress: bool) -> Weights:
    """The weight of each head by one call of the model; ``at_once`` heads of a site are tried together, and share it.

    Raises:
        ValueError: a model that cannot be tried (:mod:`.trial`).
    """
    from tqdm import tqdm

    weights = {name: [0.0] * len(each) for name, each in points.items()}
    exact = trial.everything_kept(call)
    groups = list(_groups(points, at_once))
    for name, group in tqdm(groups, desc="influence", unit="forward", disable=not progress):
        pairs, squares = list(dense_pairs(len(points[name]))), 0.0
        for head, point in group:
            pairs[head] = point[:2]
            squares += point.mean**2
        error = squared_error(trial.sparse(call, {name: tuple(pairs)}), exact)
        for head, _ in group:
            weights[name][head] = error / squares
    return weights


def mean(found: Sequence[Weights]) -> Weights:
    """The mean of weights of several calls."""
    return {
        name: [sum(each) / len(found) for each in zip(*(weights[name] for weights in found), strict=True)]
        for name in found[0]
    }


def _groups(points: Points, at_once: int) -> Iterator[tuple[str, list[tuple[int, Point]]]]:
    for name, each in points.items():
        heads = [(head, point) for head, point in enumerate(each) if point is not None]
        for first in range(0, len(heads), at_once):
            yield name, heads[first : first + at_once]


def _checked_calibration(calibration: Any) -> tuple[Mapping[str, SiteCurves], float]:
    """The curves of a calibration that can be asked, and its density."""
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
            todo="calibrate measures it for phases by itself; or calibrate the inputs of one phase on their own.",
        )
    summary = calibration.summary()
    assert summary is not None
    return calibration.origin.curves, 1 - summary.sparsity


def _checked(density: Any) -> float:
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density < 1:
        raise value_error(
            "head_influence: density",
            given=repr(density),
            allowed="a share of the blocks in (0, 1)",
            todo="Leave it out for that of the calibration.",
        )
    return float(density)
