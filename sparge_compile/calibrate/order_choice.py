"""Choose the order of tokens of each site, by what the model returns.

In: a run over the first batch. Out: a tile for each site, or raster. Errors of attention alone would choose another
order for the model than its output does, so the model makes a few of its calls again in each order. A model had best
one order for all of its sites: then one permutation where tokens enter it is enough, and blocks that share a graph go
on doing so. Orders of their own are asked of the model, too, and must win by a margin.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..kernels.order import Tile
from .calls import ModelCall, NotedCalls
from .orders import Trials, best_for_attention, own_orders, shares_for
from .record import Batch, Recorder
from .settings import Settings
from .trial import on_trial

ASKED = 2  # calls of the model that are made again in each order, of those of the first batch
OWN_WINS = 0.1  # by how much of the output's error orders of sites must win over one for all


def choose_orders(
    model: nn.Module, recorder: Recorder, noted: NotedCalls, settings: Settings, run: Callable[[], Any]
) -> tuple[dict[str, Tile | None], Batch | None]:
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
    ask = partial(output_error, model, settings, trials, calls[step // 2 :: step], {})
    try:
        errors = {order: ask(dict.fromkeys(trials.sites, order)) for order in trials.orders}
        common = min(trials.orders, key=errors.__getitem__)
        own = own_orders(trials, common)
        chosen: dict[str, Tile | None] = dict.fromkeys(trials.sites, common)
        if own != chosen and ask(own) < errors[common] * (1 - OWN_WINS):
            chosen = own
    except ValueError:  # a model that cannot be asked; whoever must ask it says so
        chosen = dict.fromkeys(trials.sites, best_for_attention(trials))
    return chosen, None


def output_error(
    model: nn.Module,
    settings: Settings,
    trials: Trials,
    calls: Sequence[ModelCall],
    dense: dict[tuple[int, int], list[Tensor]],
    orders: Mapping[str, Tile | None],
) -> float:
    """The relative error of what the model returns where its sites, in these orders, read the same share of blocks.

    ``dense`` are the outputs of calls that are known, and gets those that were not.

    Raises:
        ValueError: a model that cannot be tried (:mod:`.trial`).
    """
    heads = {name: next(iter(scores.values())).shape[1] for name, scores in trials.sites.items()}
    pairs = {name: ((trials.shares[len(trials.shares) // 2], 0.0),) * number for name, number in heads.items()}
    kept = {name: settings.options.kept_of(name) for name in heads}
    tiles = {name: order for name, order in orders.items() if order is not None}
    with on_trial(model, heads, settings.options, kept=kept, tiles=tiles, dense=dense) as trial:
        return statistics.fmean(trial.error(call, pairs) for call in calls)
