"""Choose the order of tokens of each site, by what the model returns.

In: a run over the first batch. Out: a tile for each site, or raster. Errors of attention alone would choose another
order than the model's output does, so the model makes a few of its calls again in each order: with all sites sparse,
and with each alone. A model had best one order for all of its sites: then one permutation where tokens enter it is
enough, and blocks that share a graph go on doing so. Orders of their own must win by a margin.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kernels.order import Tile
from .calls import ModelCall, NotedCalls
from .influence import FORWARDS
from .orders import Trials, best_for_attention, shares_for
from .record import Batch, Recorder
from .settings import Settings
from .trial import on_trial

ASKED = 2  # calls of the model that are made again in each order, of those of the first batch
MARGIN = 0.03  # by how much of the output's error an order of its own must win where a site alone is sparse
OWN_WINS = 0.05  # the same of all orders of sites together

Tiles = dict[str, "Tile | None"]


class Errors(NamedTuple):
    """Relative errors of the model's output in one order: with all sites sparse, and with each alone."""

    together: float
    alone: Mapping[str, float]


def choose_orders(
    model: nn.Module, recorder: Recorder, noted: NotedCalls, settings: Settings, run: Callable[[], Any]
) -> tuple[Tiles, Batch | None]:
    """Return the tile of each site with a grid, None for raster order; and where there is no such site, the batch as it
    was recorded.

    Args:
        model: the model that ``recorder`` looks at.
        noted: gets the calls that the recorder notes.
        run: runs the first batch.
    """
    shares = shares_for(settings.aim.get("target_sparsity"))
    trials, batch = recorder.try_orders(0, run, settings.orders, shares)
    if not trials.sites:
        return {}, batch
    calls = noted.calls()
    step = -(-len(calls) // ASKED)
    ask = Question(model, settings, trials, calls[step // 2 :: step])
    try:
        errors = {order: ask(dict.fromkeys(trials.sites, order), each=True) for order in trials.orders}
        common = min(trials.orders, key=lambda order: errors[order].together)
        chosen: Tiles = dict.fromkeys(trials.sites, common)
        own = own_orders(errors, common)
        if own != chosen and ask(own).together < errors[common].together * (1 - OWN_WINS):
            chosen = own
    except ValueError:  # a model that cannot be asked; whoever must ask it says so
        chosen = dict.fromkeys(trials.sites, best_for_attention(trials))
    return chosen, None


def own_orders(errors: Mapping[Tile | None, Errors], common: Tile | None) -> Tiles:
    """Return the order of each site: that of the model, or the one in which it alone does best, by the margin."""
    found: Tiles = {}
    for name, least in errors[common].alone.items():
        own = min(errors, key=lambda order: errors[order].alone[name])
        found[name] = own if errors[own].alone[name] < least * (1 - MARGIN) else common
    return found


class Question:
    """What the model's output loses where its sites, in some orders, read the share of blocks that is aimed at."""

    def __init__(self, model: nn.Module, settings: Settings, trials: Trials, calls: Sequence[ModelCall]) -> None:
        self._model, self._settings, self._calls = model, settings, calls
        self._heads = {name: next(iter(scores.values())).shape[1] for name, scores in trials.sites.items()}
        share = trials.shares[len(trials.shares) // 2]
        self._pairs = {name: ((share, 0.0),) * number for name, number in self._heads.items()}
        together = -(-len(self._pairs) * len(trials.orders) // FORWARDS)  # of a model with very many sites
        names = list(self._pairs)
        self._groups = [names[start : start + together] for start in range(0, len(names), together)]
        self._dense: dict[tuple[int, int], list[Tensor]] = {}

    def __call__(self, orders: Mapping[str, Tile | None], each: bool = False) -> Errors:
        """Ask the model; ``each``: for each site alone too, on one of the calls.

        Raises:
            ValueError: a model that cannot be tried (:mod:`.trial`).
        """
        kept = {name: self._settings.options.kept_of(name) for name in self._heads}
        tiles = {name: order for name, order in orders.items() if order is not None}
        options = self._settings.options
        with on_trial(self._model, self._heads, options, kept=kept, tiles=tiles, dense=self._dense) as trial:
            together = statistics.fmean(trial.error(call, self._pairs) for call in self._calls)
            alone: dict[str, float] = {}
            for group in self._groups if each else ():
                error = trial.error(self._calls[0], {name: self._pairs[name] for name in group})
                alone |= dict.fromkeys(group, error)
        return Errors(together, alone)
