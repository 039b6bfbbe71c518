"""Orders of tokens, and what they do to attention. In: errors at equal shares of blocks. Out: the best for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import value_error
from ..kernels.order import Tile, parse_tile, tile_text

RASTER = "raster"
ORDERS: tuple[str | Tile, ...] = (RASTER, (2, 4, 8), (4, 4, 4), (4, 8, 2), (8, 4, 2), (1, 8, 8))
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the key blocks: at which orders are compared, unless a sparsity is aimed at
AROUND = (0.5, 1.0, 2.0)  # times the density that is aimed at
FEWER = 8  # one of so many of the query blocks is looked at while orders are tried

LEAST = 0.005  # a relative error below which orders do not differ

Scores = dict["Tile | None", Tensor]  # the squared error of each head at each share, float64 [calls, H, shares]


class Trials(NamedTuple):
    """What orders do to the calls of sites. ``orders`` are tiles, and None for raster order."""

    orders: tuple[Tile | None, ...]
    shares: tuple[float, ...]
    sites: dict[str, Scores]

    def add(self, site: str, found: Scores) -> None:
        """Add a call of a site."""
        known = self.sites.setdefault(site, {})
        for order, errors in found.items():
            known[order] = torch.cat((known[order], errors)) if order in known else errors


def parse_orders(given: Iterable[Any] | None) -> tuple[Tile | None, ...]:
    """Return the orders that are to be tried, as tiles, and None for raster order.

    Args:
        given: of each order its tile, as three numbers or a text as ``"2x4x8"``, or ``"raster"``; None: ``ORDERS``.

    Raises:
        ValueError: none, or one that is neither.
    """
    found = tuple(dict.fromkeys(map(_parse, ORDERS if given is None else given)))
    if not found:
        raise value_error(
            "calibrate: orders", given="none", allowed="one or more", todo='Give ["raster"] for raster order alone.'
        )
    return found


def _parse(order: Any) -> Tile | None:
    if order == RASTER:
        return None
    if isinstance(order, str):
        sizes = order.replace("×", "x").split("x")
        order = tuple(map(int, sizes)) if all(size.isdecimal() for size in sizes) else order
    return parse_tile(order, 'calibrate: an order is "raster" or a tile')


def shares_for(target_sparsity: float | None) -> tuple[float, ...]:
    """Return the shares of key blocks at which orders are compared."""
    if target_sparsity is None:
        return SHARES
    return tuple(sorted({min(0.9, max(0.01, factor * (1 - target_sparsity))) for factor in AROUND}))


def best_for_attention(trials: Trials) -> Tile | None:
    """Return the order that leaves the attention of all sites the least error."""
    return min(trials.orders, key=lambda order: _badness([site[order] for site in trials.sites.values()]))


def _badness(errors: Sequence[Tensor]) -> float:
    """The mean over shares of the logarithm of the squared error, which is a mean over sites, calls and heads."""
    squared = torch.stack([each.mean((0, 1)) for each in errors]).mean(0)
    return float(squared.clamp(min=LEAST**2).log().mean())


def said(tiles: Mapping[str, Tile | None]) -> str:
    """Return orders in words."""
    counts: dict[Tile | None, int] = {}
    for tile in tiles.values():
        counts[tile] = counts.get(tile, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{n} in {RASTER if tile is None else tile_text(tile)}" for tile, n in ordered)
