"""Which heads go to which rank, so that all ranks have about as much to do."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(costs: Sequence[float], ranks: int) -> list[int]:
    """The heads of rank 0, then those of rank 1, and so on: equally many for each, and of about equal cost.

    The dearest head first, each goes to the rank with the least cost that has room; then heads are swapped between the
    dearest rank and others while that makes it cheaper. Where that is no better than the heads as they come, these are
    it. The same numbers give the same order in every process.
    """
    order = _assigned(costs, ranks)
    come = list(range(len(costs)))
    return order if imbalance(costs, order, ranks) < imbalance(costs, come, ranks) * (1 - 1e-9) else come


def _assigned(costs: Sequence[float], ranks: int) -> list[int]:
    """The order that :func:`balanced` looks for."""
    room = len(costs) // ranks
    mine: list[list[int]] = [[] for _ in range(ranks)]

    def cost(heads: Sequence[int]) -> float:
        return sum(costs[head] for head in heads)

    for head in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        min((heads for heads in mine if len(heads) < room), key=cost).append(head)
    while (swap := _best_swap(costs, mine, cost)) is not None:
        (a, i), (b, j) = swap
        mine[a][i], mine[b][j] = mine[b][j], mine[a][i]
    return [head for heads in mine for head in sorted(heads)]


def _best_swap(costs: Sequence[float], mine: list[list[int]], cost) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Two heads, of the dearest rank and of another, whose swap makes the dearer of the two cheapest."""
    totals = [cost(heads) for heads in mine]
    dearest = max(range(len(mine)), key=totals.__getitem__)
    best, found = totals[dearest] * (1 - 1e-9), None
    for other in set(range(len(mine))) - {dearest}:
        for i, a in enumerate(mine[dearest]):
            for j, b in enumerate(mine[other]):
                less = costs[a] - costs[b]
                after = max(totals[dearest] - less, totals[other] + less)
                if less > 0 and after < best:
                    best, found = after, ((dearest, i), (other, j))
    return found


def imbalance(costs: Sequence[float], order: Sequence[int], ranks: int) -> float:
    """The cost of the dearest rank over the mean of all: 1 is perfect."""
    room = len(order) // ranks
    totals = [sum(costs[head] for head in order[rank * room :][:room]) for rank in range(ranks)]
    return max(totals) * ranks / sum(totals) if sum(totals) else 1.0
