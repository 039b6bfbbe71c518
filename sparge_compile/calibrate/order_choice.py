"""Choose the order of tokens of each site, by what the model returns.

In: a run over the first batch. Out: a tile for each site, or raster. Errors of attention alone would choose another
order than the model's output does, so the model makes a call again: in each order with all sites sparse, in the best of
them with each site alone, and in the next best with those alone that matter most. A model had best one order for all of
its sites: then one permutation where tokens enter it is enough, and blocks that share a graph go on doing so. Orders of
their own must win by a margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import is_of_user
from ..kernels.order import Tile
from .calls import ModelCall, NotedCalls
from .influence import forwards
from .orders import best_for_attention, shares_for
from .record import Batch, Recorder
from .settings import Settings
from .trial import KeptTrial, Trial

BEST = 3  # of the orders: in which sites are asked of alone
PART = 8  # in the best order, sites are asked of by so small a part of the forwards that their influence will take
MARGIN = 0.03  # by how much of the output's error an order of its own must win where a site alone is sparse
OWN_WINS = 0.05  # the same of all orders of sites together

Tiles = dict[str, "Tile | None"]
Groups = Sequence[Sequence[str]]  # of sites that are asked of together: one each, or neighbours of very many
Alone = Mapping["Tile | None", Mapping[str, float]]  # relative errors of the output with one site sparse, by order


def choose_orders(
    trials: KeptTrial, recorder: Recorder, noted: NotedCalls, settings: Settings, run: Callable[[], Any]
) -> tuple[Tiles, Batch | None]:
    """Return the tile of each site with a grid, None for raster order; and where there is no such site, the batch as it
    was recorded.

    Args:
        trials: of the model that ``recorder`` looks at.
        noted: gets the calls that the recorder notes.
        run: runs the first batch.
    """
    sites, batch = recorder.find_grids(0, run)
    if not sites:
        return {}, batch
    others = {sample.site: len(sample.sums.error) for sample in batch.samples}
    shares = shares_for(settings.aim.get("target_sparsity"))
    calls = noted.calls()
    one, other = calls[len(calls) // 4], calls[3 * len(calls) // 4]
    try:
        with trials.of(others | sites, recorder.codes) as trial:
            question = Question(trial, sites, shares[len(shares) // 2])
            return chosen(question, settings.orders, one, other, settings.asks_model), None
    except ValueError as error:  # a model that cannot be asked; whoever must ask it says so
        if not is_of_user(error):
            raise
        errors = recorder.try_orders(0, run, settings.orders, shares)
        return dict.fromkeys(sites, best_for_attention(errors)), None


class Question:
    """What the model's output loses where its sites, in some orders, read the same share of their blocks."""

    def __init__(self, trial: Trial, sites: Mapping[str, int], share: float) -> None:
        self._trial = trial
        self.pairs = {name: ((share, 0.0),) * heads for name, heads in sites.items()}
        number = max(1, forwards(sum(sites.values())) // PART)
        together = -(-len(sites) // number)
        names = list(sites)
        self.groups = [names[start : start + together] for start in range(0, len(names), together)]

    def all_sparse(self, orders: Mapping[str, Tile | None], call: ModelCall) -> float:
        """The relative error of the output with all sites sparse.

        Raises:
            ValueError: a model that cannot be tried (:mod:`.trial`).
        """
        self._trial.reorder(orders)
        return self._trial.error(call, self.pairs)

    def alone(self, orders: Mapping[str, Tile | None], call: ModelCall, groups: Groups) -> dict[str, float]:
        """The same of each site with its group alone sparse."""
        self._trial.reorder(orders)
        found: dict[str, float] = {}
        for group in groups:
            error = self._trial.error(call, {name: self.pairs[name] for name in group})
            found |= dict.fromkeys(group, error)
        return found


def chosen(question: Question, orders: Sequence[Tile | None], one: ModelCall, other: ModelCall, by_site: bool) -> Tiles:
    """Return the order of each site: that in which the model does best, or its own if these are better together.

    They are chosen by ``one`` call, and judged by an ``other``.
    """

    def everywhere(order: Tile | None) -> Tiles:
        return dict.fromkeys(question.pairs, order)

    errors = {order: question.all_sparse(everywhere(order), one) for order in orders}
    common, *next_best = sorted(orders, key=errors.__getitem__)[:BEST]
    if not by_site or len(question.groups) == 1:
        return everywhere(common)
    alone = {common: question.alone(everywhere(common), one, question.groups)}
    matter = sorted(question.groups, key=lambda group: -alone[common][group[0]])[: -(-len(question.groups) // 2)]
    alone |= {order: question.alone(everywhere(order), one, matter) for order in next_best}
    own = own_orders(alone, common)
    if own != everywhere(common):
        least = question.all_sparse(everywhere(common), other)
        if question.all_sparse(own, other) < least * (1 - OWN_WINS):
            return own
    return everywhere(common)


def own_orders(errors: Alone, common: Tile | None) -> Tiles:
    """Return the order of each site: that of the model, or the one in which it alone does best, by the margin."""
    found: Tiles = {}
    for name, least in errors[common].items():
        asked = [order for order in errors if name in errors[order]]
        own = min(asked, key=lambda order: errors[order][name])
        found[name] = own if errors[own][name] < least * (1 - MARGIN) else common
    return found
