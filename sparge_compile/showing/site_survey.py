"""One site of a survey: which blocks its heads read, call by call, what that takes and what it does to the attention.

In: operands of its calls. Out: values.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .. import ops
from ..calibrate.measuring import Operands
from ..calibrate.site_calls import SiteCalls
from ..doctor import seconds
from ..functional import visible_in
from ..kernels.how import How
from ..kernels.order import Tile
from ..options import Options
from ..pair import Pair

REPEATS = 3  # of a timed call, of which the median counts
_BUDGET = 2.0  # seconds after which a call is not repeated


@dataclass
class SiteSurvey:
    """A site under some thresholds.

    Attributes:
        name: its name; ``shape``: batch, heads, queries, keys and head size of the first call.
        calls: the numbers of the model's calls that were looked at.
        densities: for each of them the kept share of the visible key blocks of each head; 1 where it is dense by plan.
        visible: visible key blocks of all these calls and heads.
        block_map: of one call near the middle of the run, bool [H, Nq, Nk], of the first of its batch; None where all
            are dense by plan. ``mapped``: the number of that call.
        tile: in whose tokens it is; None: raster order.
        seconds: attention of one call, dense and sparse; None where it was not timed.
        errors: the relative L1 error Σ|O_sparse − O_dense| ÷ Σ|O_dense| of each head in that call.
    """

    name: str
    shape: tuple[int, int, int, int, int]
    calls: list[int] = field(default_factory=list)
    densities: list[tuple[float, ...]] = field(default_factory=list)
    visible: int = 0
    block_map: Tensor | None = None
    mapped: int | None = None
    tile: Tile | None = None
    seconds: tuple[float, float] | None = None
    errors: tuple[float, ...] = ()

    @property
    def sparsity(self) -> float:
        """Mean over calls and heads."""
        return 1 - statistics.fmean(density for each in self.densities for density in each)

    def by_head(self) -> list[float]:
        """The sparsity of each head, a mean over calls."""
        return [1 - statistics.fmean(each) for each in zip(*self.densities, strict=True)]

    def by_call(self) -> list[float]:
        """The sparsity of each call that was looked at, a mean over heads."""
        return [1 - statistics.fmean(each) for each in self.densities]

    def row(self) -> tuple[str, ...]:
        """The site as a row of texts: name, shape, calls, sparsity, error, dense and sparse milliseconds."""
        batch, heads, length, keys, head_size = self.shape
        shape = f"{batch} {heads} {length}×{keys} {head_size}"
        error = f"{statistics.fmean(self.errors):.4f}" if self.errors else ""
        times = ("", "") if self.seconds is None else tuple(f"{x * 1e3:.2f}" for x in self.seconds)
        return self.name, shape, str(len(self.calls)), f"{self.sparsity:.1%}", error, *times


class Surveyor(SiteCalls):
    """Looks at the sites of a model while it runs dense. ``steps``: which step of the run each call of it is."""

    def __init__(self, model: nn.Module, options: Options, steps: Sequence[int], every: int, timed: bool) -> None:
        super().__init__(model, options)
        self._steps, self._timed = steps, timed
        self._middle = len(range(0, len(steps), every)) // 2 * every
        self._number = 0
        self._at: dict[float, Options] = {}
        self._found: dict[str, SiteSurvey] = {}

    def begin(self, number: int) -> None:
        """The model is about to be called for the ``number``-th time, from 0 on."""
        self._number = number
        self.turns.clear()

    def sites(self) -> tuple[SiteSurvey, ...]:
        """Return what was seen."""
        return tuple(self._found.values())

    @property
    def wants_grids(self) -> bool:
        """Whether some site may be in tiles."""
        return self._options.orders_tokens

    def heard(self, name: str, turn: int, operands: Operands) -> None:
        """Look at a site; of several turns in one call of the model, at the first."""
        if turn:
            return
        heads, head_size = operands.query.shape[1], operands.query.shape[3]
        site = self._found.setdefault(name, SiteSurvey(name, _shape(operands)))
        site.calls.append(self._number)
        pairs, options = self._thresholds(name, heads, head_size)
        measured = None if options.calibration is None else options.calibration.tile_of(name)
        tile = options.tile_of(measured)
        if tile is not None and any(operands.grids):
            operands, site.tile = operands.in_tiles(tile), tile
        rows = torch.tensor(options.rows_of(name, pairs)).to(operands.query.device)
        with torch.autocast(operands.query.device.type, enabled=False):
            self._look(site, operands, rows, is_dense=all(pair[0] == 1 for pair in pairs))

    def _thresholds(self, name: str, heads: int, head_size: int) -> tuple[Sequence[Pair], Options]:
        """Those that hold now, and the options with what holds beside them."""
        step, steps = self._steps[self._number], self._steps[-1] + 1
        options = self._at.get(step)
        if options is None:
            given = self._options.calibration
            now = None if given is None else given.at_progress(step / steps)
            options = self._at[step] = replace(self._options, calibration=now)
        plans = [self._options.schedule, *([self._options.calibration.schedule] if self._options.calibration else [])]
        if any(plan.is_dense_step(step, steps) for plan in plans):
            return ((1.0, 0.0),) * heads, options
        return options.thresholds_of(name, heads, head_size), options

    def _look(self, site: SiteSurvey, operands: Operands, thresholds: Tensor, is_dense: bool) -> None:
        how = How(
            operands.attn_mask,
            operands.is_causal,
            operands.scale,
            operands.bottom_right,
            parts=list(operands.parts) or None,
            slots_q=operands.slots[0],
            slots_k=operands.slots[1],
        )
        of_call = operands.query, operands.key, operands.value
        found = ops.build_map(*of_call, thresholds, how)
        visible = visible_in(found, *of_call[:2], how).sum((0, 2, 3))  # [H]
        kept = found.counts.expand(*of_call[0].shape[:2], -1).sum((0, 2))
        site.densities.append(tuple((kept / visible.clamp(min=1)).tolist()))
        site.visible += int(visible.sum())
        if is_dense:
            return
        if site.block_map is None or self._number <= self._middle:
            site.block_map, site.mapped = found.to_dense()[0].cpu(), self._number
        if self._timed and site.seconds is None:
            _time(site, of_call, thresholds, how)


def _time(site: SiteSurvey, of_call: tuple[Tensor, Tensor, Tensor], thresholds: Tensor, how: How) -> None:
    """Time a call, dense and sparse in turns, and compare what they give; nothing where SDPA does not compute it."""
    query, key, value = of_call
    if how.is_causal and (how.attn_mask is not None or how.diagonal(query.shape[2], key.shape[2])):
        return
    shared = query.shape[1] != key.shape[1]
    calls = {
        "dense": lambda: nn.functional.scaled_dot_product_attention(
            query, key, value, how.attn_mask, is_causal=how.is_causal, scale=how.scale, enable_gqa=shared
        ),
        "sparse": lambda: ops.attend_by_rule(query, key, value, thresholds, how)[0],
    }
    dense, sparse = (call().double().nan_to_num() for call in calls.values())  # also to warm up
    error, norm = (x.abs().sum((0, 2, 3)) for x in (sparse - dense, dense))
    site.errors = tuple((error / norm.clamp(min=torch.finfo(torch.float32).tiny)).tolist())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        if sum(map(sum, times.values())) < _BUDGET:
            for name, call in calls.items():
                times[name].append(seconds(call, query.device))
    site.seconds = (statistics.median(times["dense"]), statistics.median(times["sparse"]))


def _shape(operands: Operands) -> tuple[int, int, int, int, int]:
    batch, heads, length, head_size = operands.query.shape
    return batch, heads, length, operands.key.shape[2], head_size
