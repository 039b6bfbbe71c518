"""Samples in, a calibration out: each head's front of error and density, and the thresholds that fit an aim.

Thresholds come from all samples. How well they carry over is asked of others: they are chosen once more without every
fourth sample, and measured on those that were left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..fronts import MODES, Point, error_of, pareto, thin
from ..origin import Origin, PhaseCurves, SiteCurves
from ..thresholds import Calibration, Key, choose, from_points
from .curves import TOPK, TOPP
from .record import Batch, Sample

POINTS = 32  # of a front that is kept in the file
HOLD_OUT = 4  # every fourth sample is left out for the check
_ONLY_TOPP, _ONLY_TOPK = TOPK[0], TOPP[0]


@dataclass(frozen=True)
class Measured:
    """The samples of a site in one phase: errors and densities float32 [samples, H, K, P], and visible blocks."""

    error: Tensor
    kept: Tensor  # blocks
    visible: Tensor  # blocks, [samples, H]
    cost: float
    head_size: int

    @staticmethod
    def of(samples: Sequence[Sample], site: str) -> Measured:
        sums = [sample.sums for sample in samples]
        norm = torch.stack([x.norm for x in sums])
        error = torch.stack([x.error for x in sums]) / norm.masked_fill(norm == 0, 1.0)[..., None, None]
        visible = torch.stack([x.visible for x in sums])
        cost = sum(float(s.sums.visible.double().mean()) * s.blocks for s in samples)
        return Measured(error, torch.stack([x.kept for x in sums]), visible, cost, samples[0].head_size)

    def some(self, left_out: bool) -> Measured:
        """Every fourth sample, or the others."""
        out = torch.arange(len(self.error)) % HOLD_OUT == HOLD_OUT - 1
        which = out if left_out else ~out
        return replace(self, error=self.error[which], kept=self.kept[which], visible=self.visible[which])

    def points(self) -> list[list[Point]]:
        """Each head's measured points, for every pair of the grid that no other beats by both errors."""
        density = self.kept.sum(0) / self.visible.sum(0).clamp(min=1)[:, None, None]
        columns = [density, self.error.amax(0), self.error.mean(0)]
        return [
            [
                Point(topk, topp, *map(_rounded, rest))
                for (topk, topp), *rest in zip(_PAIRS, *(c[head].flatten().tolist() for c in columns), strict=True)
            ]
            for head in range(density.shape[0])
        ]

    def at(self, head: int, point: Point) -> tuple[Tensor, float]:
        """A head's error in each sample under the thresholds of a point, and its density."""
        k, p = TOPK.index(point.topk), TOPP.index(point.topp)
        density = self.kept[:, head, k, p].sum() / self.visible[:, head].sum().clamp(min=1)
        return self.error[:, head, k, p], float(density)


_PAIRS = list(product(TOPK, TOPP))
Table = Mapping[str, Sequence[Measured]]  # for each site, phase by phase


def table(batches: Mapping[int, Batch], starts: Sequence[float]) -> dict[str, list[Measured]]:
    """The samples by site and phase.

    Progress is the share of the model's calls in a batch that came before. A site that a phase has no sample of takes
    the samples of all phases there.
    """
    bounds = [0.0, *starts, 2.0]
    found: dict[str, list[list[Sample]]] = {}
    for number in sorted(batches):
        batch = batches[number]
        for sample in batch.samples:
            phases = found.setdefault(sample.site, [[] for _ in bounds[1:]])
            progress = sample.call / max(1, batch.calls)
            phases[max(i for i, start in enumerate(bounds) if start <= progress)].append(sample)
    return {
        site: [Measured.of(samples or [s for other in phases for s in other], site) for samples in phases]
        for site, phases in found.items()
    }


def search(measured: Table, starts: Sequence[float], origin: Origin) -> Calibration:
    """Thresholds for the aim of ``origin``, which is completed with fronts, the modes' sparsity, and the check."""
    everything = _fronts(measured, origin.by)
    found = {mode: choose(replace(origin, curves=_only(everything, mode, origin.by))) for mode in MODES}
    points = found[origin.mode]
    kept = {
        site: replace(
            curves, phases=tuple(_thinned(phase, i, site, points, origin.by) for i, phase in enumerate(curves.phases))
        )
        for site, curves in everything.items()
    }
    modes = {mode: _rounded(_sparsity(everything, chosen)) for mode, chosen in found.items()}
    complete = replace(origin, curves=kept, modes=modes, held_out=_check(measured, origin))
    return from_points(complete, starts, points)


def _fronts(measured: Table, by: str) -> dict[str, SiteCurves]:
    return {
        site: SiteCurves(
            phases[0].head_size,
            sum(len(phase.error) for phase in phases),
            tuple(
                PhaseCurves(_rounded(phase.cost), tuple(tuple(points) for points in phase.points())) for phase in phases
            ),
        )
        for site, phases in measured.items()
    }


def _only(curves: Mapping[str, SiteCurves], mode: str, by: str) -> dict[str, SiteCurves]:
    """The fronts with the points that a mode may use: the hybrid all, the others one threshold alone."""

    def usable(point: Point) -> bool:
        return (mode != "topk" or point.topp == _ONLY_TOPK) and (mode != "topp" or point.topk == _ONLY_TOPP)

    return {
        site: replace(
            c,
            phases=tuple(
                replace(p, heads=tuple(tuple(pareto(filter(usable, h), by)) for h in p.heads)) for p in c.phases
            ),
        )
        for site, c in curves.items()
    }


def _thinned(phase: PhaseCurves, number: int, site: str, points: Mapping[Key, Point], by: str) -> PhaseCurves:
    """The fronts as they are kept: few points, the chosen one among them."""
    heads = tuple(
        thin(pareto(front, by), POINTS, {points[site, number, head]} & set(front), by)
        for head, front in enumerate(phase.heads)
    )
    return replace(phase, heads=heads)


def _sparsity(curves: Mapping[str, SiteCurves], points: Mapping[Key, Point]) -> float:
    costs = {key: curves[key[0]].phases[key[1]].cost for key in points}
    total = sum(costs.values())
    return 1 - sum(points[key].density * costs[key] for key in points) / total if total else 0.0


def _check(measured: Table, origin: Origin) -> dict[str, float]:
    """How thresholds of three samples out of four do on the fourth: empty where some site has fewer than four.

    ``samples`` that were left out, of a site; ``sparsity`` on them; ``mean_error`` and ``worst_error`` there over heads
    and samples, ``expected_mean_error`` and ``expected_worst_error`` as the other samples had promised; for a
    ``target_error``, ``within``: the share of (head, sample) that keeps it.
    """
    if not measured or min(len(m.error) for phases in measured.values() for m in phases) < HOLD_OUT:
        return {}
    seen = {site: [m.some(left_out=False) for m in phases] for site, phases in measured.items()}
    curves = _only(_fronts(seen, origin.by), origin.mode, origin.by)
    points = choose(replace(origin, curves=curves))
    errors, promised, kept, total = [], [], 0.0, 0.0
    for (site, phase, head), point in points.items():
        fresh = measured[site][phase].some(left_out=True)
        error, density = fresh.at(head, point)
        errors.append(error)
        promised.append(error_of(point, origin.by))
        cost = measured[site][phase].cost
        kept, total = kept + density * cost, total + cost
    every = torch.cat(errors)
    checked: dict[str, Any] = {
        "samples": min(len(m.some(left_out=True).error) for phases in measured.values() for m in phases),
        "sparsity": 1 - kept / total,
        "mean_error": float(every.mean()),
        "worst_error": float(every.max()),
        "expected_mean_error": sum(promised) / len(promised),
        "expected_worst_error": max(promised),
    }
    if origin.target_error is not None:
        checked["within"] = float((every <= origin.target_error).float().mean())
    return {name: value if name == "samples" else _rounded(value) for name, value in checked.items()}


def _rounded(value: float) -> float:
    """Four digits: what a file needs. The errors of a sample are known less well."""
    return float(f"{value:.4g}")
