"""Samples in, a calibration out: each head's front of error and density, and the thresholds that fit an aim.

Thresholds come from all samples. How well they carry over is asked of others: they are chosen without a quarter of the
samples and measured on that quarter, four times. A bound on the error is tightened until it is kept there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from ..keeping import Kept
from ..kernels.order import Tile
from ..thresholds.calibration import Calibration, from_points
from ..thresholds.choice import Key, choose
from ..thresholds.fronts import MODES, Point, error_of, pareto, thin
from ..thresholds.measured import Origin
from ..thresholds.site_curves import PhaseCurves, SiteCurves
from .curves import TOPK, TOPP
from .measuring import Sample
from .record import Batch

POINTS = 32  # of a front that is kept in the file
FOLDS = 4  # parts of the samples, each of which is left out once
MARGINS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)  # of the bound, to search with
KEPT = 0.99  # the share of heads and samples that shall keep the bound where they were left out


@dataclass(frozen=True)
class Measured:
    """The samples of a site in one phase: errors and densities float32 [samples, H, K, P], and visible blocks."""

    error: Tensor
    kept: Tensor  # blocks
    visible: Tensor  # blocks, [samples, H]
    cost: float
    head_size: int

    @staticmethod
    def of(samples: Sequence[Sample]) -> Measured:
        """Put the samples of a site in a phase together."""
        sums = [sample.sums for sample in samples]
        norm = torch.stack([x.norm for x in sums])
        error = torch.stack([x.error for x in sums]) / norm.masked_fill(norm == 0, 1.0)[..., None, None]
        visible = torch.stack([x.visible for x in sums])
        cost = sum(float(s.sums.visible.double().mean()) * s.blocks for s in samples)
        return Measured(error, torch.stack([x.kept for x in sums]), visible, cost, samples[0].head_size)

    def fold(self, number: int, left_out: bool) -> Measured:
        """Return one part of the samples, or all the others."""
        part = torch.arange(len(self.error)) % FOLDS == number
        which = part if left_out else ~part
        return replace(self, error=self.error[which], kept=self.kept[which], visible=self.visible[which])

    def fronts(self, mode: str, by: str) -> list[tuple[Point, ...]]:
        """Return each head's points that no other beats, of the pairs that a mode may use.

        The hybrid mode may use all, the others one threshold alone. Of equal points the one with the larger thresholds
        stays.
        """
        rows = slice(None) if mode != "topp" else slice(0, 1)
        columns = slice(None) if mode != "topk" else slice(0, 1)
        pairs = [(topk, topp) for topk in TOPK[rows] for topp in TOPP[columns]][::-1]
        density = self.kept.sum(0) / self.visible.sum(0).clamp(min=1)[:, None, None]
        all_three = (density, self.error.amax(0), self.error.mean(0))
        density, worst, mean = (x[:, rows, columns].flatten(1).flip(1) for x in all_three)  # [H, pairs]
        error = worst if by == "worst" else mean
        order = error.argsort(dim=1, stable=True)
        order = order.gather(1, density.gather(1, order).argsort(dim=1, stable=True))
        sorted_error = error.gather(1, order)
        best_before = torch.nn.functional.pad(sorted_error.cummin(1).values[:, :-1], (1, 0), value=torch.inf)
        return [
            tuple(
                Point(*pairs[i], *(_rounded(float(x[head, i])) for x in (density, worst, mean)))
                for i in order[head][sorted_error[head] < best_before[head]].tolist()
            )
            for head in range(len(density))
        ]

    def at(self, head: int, point: Point) -> tuple[Tensor, float]:
        """Return a head's errors, float32 [samples], under the thresholds of a point, and its density."""
        k, p = TOPK.index(point.topk), TOPP.index(point.topp)
        density = self.kept[:, head, k, p].sum() / self.visible[:, head].sum().clamp(min=1)
        return self.error[:, head, k, p], float(density)


Table = Mapping[str, Sequence[Measured]]  # for each site, phase by phase


def table(batches: Mapping[int, Batch], starts: Sequence[float]) -> dict[str, list[Measured]]:
    """Return the samples by site and phase.

    Progress is the share of the model's steps in a batch that came before. A site that a phase has no sample of takes
    the samples of all phases there.
    """
    bounds = [0.0, *starts, 2.0]
    by_site: dict[str, list[list[Sample]]] = {}
    for number in sorted(batches):
        batch = batches[number]
        for sample in batch.samples:
            phases = by_site.setdefault(sample.site, [[] for _ in bounds[1:]])
            progress = batch.progress(sample.call)
            phases[max(i for i, start in enumerate(bounds) if start <= progress)].append(sample)
    return {
        site: [Measured.of(samples or [s for other in phases for s in other]) for samples in phases]
        for site, phases in by_site.items()
    }


def search(
    measured: Table,
    starts: Sequence[float],
    origin: Origin,
    keeping: Mapping[str, Kept] = MappingProxyType({}),
    firsts: Iterable[Sample] = (),
    tiles: Mapping[str, Tile] = MappingProxyType({}),
) -> Calibration:
    """Choose thresholds for the aim of ``origin``, which gets the fronts, the modes' sparsity, and the check.

    ``keeping`` says what each site keeps; ``firsts`` are samples that were measured without it, too. ``tiles`` are
    those that sites were measured in.
    """
    margin, held_out = _check(measured, origin)
    origin = replace(origin, margin=margin, held_out=held_out)
    curves = {mode: curves_of(measured, mode, origin.by) for mode in MODES}
    chosen = {mode: choose(replace(origin, curves=curves[mode])) for mode in MODES}
    modes = {mode: _rounded(_sparsity(curves[mode], points)) for mode, points in chosen.items()}
    own, points = curves[origin.mode], chosen[origin.mode]
    kept = {
        site: replace(some, phases=tuple(_thinned(p, i, site, points, origin.by) for i, p in enumerate(some.phases)))
        for site, some in own.items()
    }
    gains = {sample.site: _gain(sample, points, origin) for sample in firsts if sample.plain is not None}
    origin = replace(origin, curves=kept, modes=modes, gains=gains)
    return from_points(origin, starts, points, kept=keeping, tiles=tiles)


def _gain(sample: Sample, points: Mapping[Key, Point], origin: Origin) -> tuple[float, float]:
    """The mean error of a site's heads under their thresholds in one sample, and without kept tokens.

    Without them each head has, of its pairs, the one of least error that keeps no more blocks.
    """
    assert sample.plain is not None
    with_them, without = Measured.of([sample]), Measured.of([replace(sample, sums=sample.plain)])
    errors = []
    for head, front in enumerate(without.fronts(origin.mode, origin.by)):
        error, density = with_them.at(head, points[sample.site, 0, head])
        as_sparse = [point.mean for point in front if point.density <= density * (1 + 1e-4)]
        errors.append((float(error[0]), min(as_sparse, default=front[0].mean)))
    return _rounded(sum(e for e, _ in errors) / len(errors)), _rounded(sum(e for _, e in errors) / len(errors))


def curves_of(measured: Table, mode: str, by: str) -> dict[str, SiteCurves]:
    """Return the front of each head under a mode, with all of its points."""
    return {
        site: SiteCurves(
            phases[0].head_size,
            sum(len(phase.error) for phase in phases),
            tuple(PhaseCurves(_rounded(phase.cost), tuple(phase.fronts(mode, by))) for phase in phases),
        )
        for site, phases in measured.items()
    }


def _thinned(phase: PhaseCurves, number: int, site: str, points: Mapping[Key, Point], by: str) -> PhaseCurves:
    """The fronts as they are kept: few points, the chosen one among them."""
    heads = enumerate(phase.heads)
    chosen = (tuple(thin(pareto(front, by), POINTS, {points[site, number, i]} & set(front), by)) for i, front in heads)
    return replace(phase, heads=tuple(chosen))


def _sparsity(curves: Mapping[str, SiteCurves], points: Mapping[Key, Point]) -> float:
    costs = {key: curves[key[0]].phases[key[1]].cost for key in points}
    total = sum(costs.values())
    return 1 - sum(points[key].density * costs[key] for key in points) / total if total else 0.0


def _check(measured: Table, origin: Origin) -> tuple[float, dict[str, float]]:
    """The share of a bound to search with, and how thresholds do on samples that they were not chosen by.

    Only that of an error of heads is found here. With fewer samples of some site than there are folds, nothing is
    known: {}. Otherwise, over heads and samples that were left out: ``samples`` of a site, ``sparsity``,
    ``mean_error``, ``worst_error``; what the other samples had promised, ``expected_mean_error`` and
    ``expected_worst_error``; for a ``target_error``, ``within``: the share that keeps it, of heads with their mean or
    worst sample as the aim says.
    """
    least = min((len(m.error) for phases in measured.values() for m in phases), default=0)
    if least < FOLDS:
        return origin.margin, {}
    folds = []
    for number in range(FOLDS):
        seen = {site: [m.fold(number, left_out=False) for m in phases] for site, phases in measured.items()}
        fresh = {site: [m.fold(number, left_out=True) for m in phases] for site, phases in measured.items()}
        folds.append((curves_of(seen, origin.mode, origin.by), fresh))
    if origin.target_error is None:
        return origin.margin, {"samples": least, **_on_others(measured, folds, origin)}
    for margin in MARGINS:
        result = _on_others(measured, folds, replace(origin, margin=margin))
        if result["within"] >= KEPT:
            break
    return margin, {"samples": least, **result}


def _on_others(
    measured: Table, folds: Sequence[tuple[dict[str, SiteCurves], Table]], origin: Origin
) -> dict[str, float]:
    errors: dict[Key, list[Tensor]] = {}
    promised, kept, total = [], 0.0, 0.0
    for curves, fresh in folds:
        for key, point in choose(replace(origin, curves=curves)).items():
            site, phase, head = key
            error, density = fresh[site][phase].at(head, point)
            errors.setdefault(key, []).append(error)
            promised.append(error_of(point, origin.by))
            cost = measured[site][phase].cost
            kept, total = kept + density * cost, total + cost
    by_head = [torch.cat(parts) for parts in errors.values()]
    every = torch.cat(by_head)
    result = {
        "sparsity": 1 - kept / total,
        "mean_error": float(every.mean()),
        "worst_error": float(every.max()),
        "expected_mean_error": sum(promised) / len(promised),
        "expected_worst_error": max(promised),
    }
    if origin.target_error is not None:
        judged = every if origin.by == "worst" else torch.stack([x.mean() for x in by_head])
        result["within"] = float((judged <= origin.target_error).double().mean())
    return {name: _rounded(value) for name, value in result.items()}


def _rounded(value: float) -> float:
    """Four digits: what a file needs. The errors of a sample are known less well."""
    return float(f"{value:.4g}")
