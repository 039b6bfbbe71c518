"""Ask the model: how much its output depends on each head, and which thresholds leave it the error that is aimed at.

In: an aim with the fronts of all heads, a model on trial, calls of it. Out: the aim with what the model said.

What is predicted of the output, √Σ influence · error², holds as far as errors of heads add up. So the model runs a few
times with thresholds that are chosen by the prediction, each time by another bound, until its own error is right.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace

from ..errors import value_error
from ..thresholds.choice import choose
from ..thresholds.measured import Origin
from . import influence
from .inquiry import Errors, Inquiry, Points

TRIALS = 6  # of a bound, at most
CLOSE = 0.05  # an error that is so much below what is aimed at is near enough
SMALLER, TIMES = 0.9, 100  # by how much, and how often, a bound is made less until other thresholds keep it
SPARSER = 0.75  # of the density at which heads were tried: below it they are tried anew
FAR = 0.8  # of the bound; what lies below it is told of

# The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom; of more, 1.96 + 2.6 / n is near enough. Half of
# the 5 % is left for what the spread does not tell: thresholds do a little better on the runs that they were chosen by.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_LEAST_SAFETY = 2 / 3
_UNKNOWN_SPREAD = 0.9  # the safety where there is one run only


def ask(origin: Origin, inquiry: Inquiry) -> Origin:
    """Return an origin, which has curves and a sparsity or an error of the output as aim, with what the model said.

    Raises:
        ValueError: a model that cannot be tried, or an error that dense attention has already.
    """
    if origin.target_output_error is not None:
        return _corrected(origin, inquiry)
    density = influence.DENSEST if origin.target_sparsity is None else 1 - origin.target_sparsity
    origin = replace(origin, output=inquiry.influence(origin, min(density, influence.DENSEST)))
    return _with_errors(origin, inquiry.errors(origin, choose(origin)), held=set())


def _with_errors(origin: Origin, errors: Errors, held: set[int]) -> Origin:
    """Note what the chosen thresholds gave; ``held`` runs had no part in choosing them, and of a sparsity none had."""
    assert origin.output is not None
    points = choose(origin)
    others = [error for run, error in errors.items() if run in held]
    used = [error for run, error in errors.items() if run not in held]
    reached = {
        "runs": len(used),
        "error": statistics.fmean(used),
        "held_out_runs": len(others),
        "held_out_error": statistics.fmean(others) if others else 0.0,
        "held_out_worst": max(others, default=0.0),
    }
    trials = origin.output.trials or _trial(predicted(origin, points), statistics.fmean(used))
    reached = {name: float(f"{value:.4g}") for name, value in reached.items()}
    return replace(origin, output=replace(origin.output, reached=reached, trials=trials))


def _trial(expected: float, measured: float) -> tuple[tuple[float, float], ...]:
    return ((float(f"{expected:.6g}"), float(f"{measured:.6g}")),) if expected > 0 and measured > 0 else ()


def predicted(origin: Origin, points: Points) -> float:
    """√Σ influence · error² of chosen points, a mean over phases."""
    assert origin.output is not None
    total = 0.0
    for (name, phase, head), point in points.items():
        phases = origin.curves[name].phases
        share = phases[phase].cost / (sum(each.cost for each in phases) or 1.0)
        total += share * origin.output.influence[name][head] * point.mean**2
    return math.sqrt(total)


def density_of(origin: Origin, points: Points) -> float:
    """The share of the visible blocks that chosen points keep."""
    costs = {key: origin.curves[key[0]].phases[key[1]].cost for key in points}
    return sum(points[key].density * cost for key, cost in costs.items()) / (sum(costs.values()) or 1.0)


class _Tried:
    """Thresholds that were tried: the aim that they were chosen for, and the error of each run, held-out ones too."""

    def __init__(self, origin: Origin, points: Points, errors: Errors, held: set[int]) -> None:
        assert origin.target_output_error is not None
        self.origin, self.points, self.errors, self.held = origin, points, errors, held
        self.goal = origin.target_output_error
        self.bound = self.goal * origin.margin
        used = [error for run, error in errors.items() if run not in held]
        self.held_out = [error for run, error in errors.items() if run in held]
        self.error = statistics.fmean(used)
        self.aim = self.goal * safety_of(used)

    @property
    def is_safe(self) -> bool:
        """Whether the error is not above what is aimed at."""
        return self.error <= self.aim

    @property
    def is_right(self) -> bool:
        """Whether the error is as near to what is aimed at as it need be."""
        return self.is_safe and self.error >= self.aim * (1 - CLOSE)


def _corrected(origin: Origin, inquiry: Inquiry) -> Origin:
    """Aim at an error of the output: influence, and a few trials of the bound that thresholds are chosen by."""
    held = inquiry.held_out()
    origin = replace(origin, output=inquiry.influence(origin, influence.DENSEST))
    tried = _search(origin, inquiry, held, trials=1)
    density = density_of(origin, choose(_bounded(origin, _next_bound(origin, tried))))
    if density < SPARSER * influence.DENSEST:
        origin, tried = replace(origin, output=inquiry.influence(origin, density)), []
    return _finished(origin, inquiry, _search(origin, inquiry, held, TRIALS, tried))


def safety_of(errors: Sequence[float]) -> float:
    """The share of a bound to aim at, so that the mean of as many other runs keeps it in 95 of 100 cases.

    From the spread of the errors of the runs that were measured; both means scatter.
    """
    n, mean = len(errors), statistics.fmean(errors)
    if n < 2 or mean == 0:
        return _UNKNOWN_SPREAD
    factor = _STUDENT[n - 2] if n - 2 < len(_STUDENT) else 1.96 + 2.6 / (n - 1)
    return max(_LEAST_SAFETY, 1 / (1 + factor * statistics.stdev(errors) / mean * math.sqrt(2 / n)))


def _search(
    origin: Origin, inquiry: Inquiry, held: set[int], trials: int, tried: Sequence[_Tried] = ()
) -> list[_Tried]:
    """Try bounds of the prediction until the error is what the safety leaves of the goal, or nothing changes more."""
    tried = list(tried)
    while len(tried) < trials and not (tried and tried[-1].is_right):
        bounded = _bounded(origin, _next_bound(origin, tried))
        points = choose(bounded)
        for _ in range(TIMES):  # thresholds come in steps: what is not safe yet has to take one
            if not any(points == other.points for other in tried) or any(other.is_safe for other in tried):
                break
            bounded = replace(bounded, margin=bounded.margin * SMALLER)
            points = choose(bounded)
        if any(points == other.points for other in tried):
            break
        tried.append(_Tried(bounded, points, inquiry.errors(bounded, points), held))
    return tried


def _next_bound(origin: Origin, tried: Sequence[_Tried]) -> float:
    """The bound of the prediction that what was tried so far speaks for; first of all, the goal itself."""
    assert origin.target_output_error is not None and origin.output is not None
    if not tried:
        return origin.target_output_error
    known = replace(origin.output, trials=tuple(pair for each in tried for pair in _trial(each.bound, each.error)))
    last = tried[-1]
    return known.predicted_at(last.aim * (1 - CLOSE / 2)) if last.error else 2 * last.bound


def _bounded(origin: Origin, bound: float) -> Origin:
    """The same aim, with thresholds that are chosen for this error as it is predicted."""
    assert origin.target_output_error is not None
    return replace(origin, margin=bound / origin.target_output_error)


def _best(tried: Sequence[_Tried]) -> _Tried:
    """The trial of the largest error that is safe; if none is, that of the least.

    Raises:
        ValueError: even that is not within the goal.
    """
    safe = [each for each in tried if each.is_safe]
    best = max(safe, key=lambda each: each.error) if safe else min(tried, key=lambda each: each.error)
    if best.error > best.goal:
        raise value_error(
            "target_output_error is out of reach",
            given=f"{best.goal:g}; the least error that was reached is {best.error:.4g}",
            allowed="more than rounding makes of the model's output",
            todo="Allow a larger error, or run the model in a wider dtype, as float32.",
        )
    return best


def _finished(origin: Origin, inquiry: Inquiry, tried: Sequence[_Tried]) -> Origin:
    """Note what was found; where the held-out runs have more than the goal, it is found with a lower bound."""
    best = _best(tried)
    trials = tuple(pair for each in tried for pair in _trial(each.bound, each.error))
    assert origin.output is not None
    output = replace(origin.output, trials=trials, safety=float(f"{best.aim / best.goal:.4g}"))
    if best.error < FAR * best.aim:
        warnings.warn(
            f"sparge: the model's output has an error of {best.error:.4g}, less than the {best.goal:g} that is "
            "allowed: of the thresholds that were measured none comes nearer, so the model is less sparse than it "
            "might be. Longer inputs allow sparser ones.",
            stacklevel=2,
        )
    if best.held_out and (over := statistics.fmean(best.held_out) / best.goal) > 1:
        bounded = _bounded(origin, output.predicted_at(best.error / over * (1 - CLOSE)))
        points = choose(bounded)
        best = _Tried(bounded, points, inquiry.errors(bounded, points), best.held)
    return _with_errors(replace(best.origin, output=output), best.errors, best.held)
