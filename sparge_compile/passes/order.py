"""The order of tokens at each site: tiles of which grid, or raster and why. The graph is only read.

A grid is stated (:mod:`.stated`), or shown by the graph (:mod:`.match.grid`). Queries and keys have each their own:
where a video attends to a text, its queries are in tiles and the keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import SymInt
from torch.fx import GraphModule, Node

from ..kernels.order import Grid, Tile, tile_of, tile_text
from ..kernels.sizes import surely
from ..options import Options
from .find import Match
from .match.attention import Operand
from .match.find_grid import Grids
from .mha.open import inputs_of
from .read.axes import Dim
from .read.fx_utils import size_hint, size_text
from .stated import SizedGrid, fitted, stated_grids

NO_GRID = "no grid known"
_GIVEN = "that is given"


@dataclass(frozen=True)
class SiteOrder:
    """The grids whose tiles are the blocks of a site, of its queries and of its keys; None: they stay as they are.

    ``why`` says, where both are None, what is missing or forbids it. ``meant`` is the tile that the thresholds of the
    site were measured in, if they were.
    """

    tile: Tile | None
    queries: SizedGrid | None = None
    keys: SizedGrid | None = None
    why: str = ""
    meant: Tile | None = None

    @property
    def is_raster(self) -> bool:
        """Whether all tokens stay as they are."""
        return self.queries is None and self.keys is None

    @property
    def lacks_grid(self) -> bool:
        """Whether all tokens stay as they are since no grid of theirs is known, or what is given does not fit."""
        return self.is_raster and (self.why == NO_GRID or _GIVEN in self.why)

    @property
    def misses(self) -> bool:
        """Whether the thresholds were measured in tiles, and the tokens stay in raster order all the same."""
        return self.is_raster and self.meant is not None

    def __str__(self) -> str:
        """The order, as a report says it."""
        tile = None if self.is_raster else self.tile
        other = self.meant is not None and self.meant != tile
        return self._sides() + (
            f"; thresholds measured in tiles {tile_text(self.meant)}" if other and self.meant else ""
        )

    def _sides(self) -> str:
        if self.is_raster:
            return f"raster: {self.why}"
        if self.queries is not None and self.keys is not None and self.queries.equals(self.keys):
            return self._text(self.queries)
        sides = (("queries", self.queries), ("keys", self.keys))
        return "; ".join(f"{name} {'raster' if grid is None else self._text(grid)}" for name, grid in sides)

    def _text(self, sized: SizedGrid) -> str:
        assert self.tile is not None
        tile = tile_of(self.tile, sized.grid)
        before, *axes, after = map(size_text, sized.grid)
        beside = [f"{size} {where}" for size, where in ((before, "before"), (after, "behind")) if size != 0]
        around = f" with {' and '.join(beside)}" if beside else ""
        return f"tiles {tile_text(tile)} of {_product(axes)}{around}"


def order_sites(
    graph_module: GraphModule,
    matches: Iterable[Match],
    options: Options,
    attached: Container[Node] = (),
    marked: Container[Node] = (),
    alike: Callable[[Match], Iterable[tuple[Match, bool]]] = lambda match: (),
) -> dict[Node, SiteOrder]:
    """The order of the tokens of those matches of a graph, and of those nested in it, that shall have one.

    Args:
        graph_module: the outermost graph.
        matches: those that become sparse.
        options: the backend's options.
        attached: the nodes of those matches whose thresholds are attached to the model.
        marked: those of which a marker in the graph says it, so that it holds for all modules that run the graph.
        alike: for a match, the same site in other modules that may run the same graph, and whether its thresholds are
            attached.

    Returns:
        By the match's node. What is in raster order, and was never to be in another, is left out.
    """
    matches = list(matches)
    wishes = {match.node: _wish(match, match.node in attached, options) for match in matches}
    others = {match.node: [_wish(*each, options) for each in alike(match)] for match in matches}
    wanted = [node for node in wishes if any(x.tile or x.meant for x in (wishes[node], *others[node]))]
    if not wanted:
        return {}
    markers = stated_grids(graph_module, matches)
    orders = _Orders(graph_module)
    found = {}
    for match in matches:
        node, wish = match.node, wishes[match.node]
        if any(other.grid != wish.grid for other in others[node]):
            order = SiteOrder(None, why="modules that share this graph are given other grids")
        elif node not in marked and any(other.tile != wish.tile for other in others[node]):
            order = SiteOrder(None, why="modules that share this graph are given other tiles")
        elif wish.tile is None:
            order = SiteOrder(None, why="as the options say")
        else:
            stated = markers.get(node) if wish.grid is None else SizedGrid.of_numbers(wish.grid, graph_module)
            order = orders.of(match, stated, wish.tile)
        if node in wanted:
            found[node] = replace(order, meant=wish.meant)
    return found


class _Wish(NamedTuple):
    """What is asked for a site: its tile, the one that its thresholds were measured in, the grid that is given."""

    tile: Tile | None
    meant: Tile | None
    grid: Grid | None


def _wish(match: Match, attached: bool, options: Options) -> _Wish:
    name = match.site.name
    meant = match.tile if attached or options.calibration is None else options.calibration.tile_of(name)
    return _Wish(options.tile_of(meant), meant, options.grid_of(name))


class _Orders:
    """Tells the order of each site of one graph and of those nested in it."""

    def __init__(self, root: GraphModule) -> None:
        self._root, self._grids = root, Grids()

    def of(self, match: Match, stated: SizedGrid | None, tile: Tile) -> SiteOrder:
        """The order of a site in such tiles; this grid is stated for it, if one is."""
        attention = match.attention
        assert attention is not None
        if attention.packing is not None or attention.is_causal or attention.ring is not None:
            why = "packed" if attention.packing is not None else "causal" if attention.is_causal else "in a ring"
            return SiteOrder(tile, why=why)
        axes = attention.axes
        queries = self._side(match, attention.query, axes.rows, attention.length, stated)
        keys = self._side(match, attention.key, axes.keys, attention.keys, stated)
        if isinstance(queries, str):
            return SiteOrder(tile, keys=None if isinstance(keys, str) else keys, why=queries)
        if isinstance(keys, str):
            return SiteOrder(tile, queries)
        if surely(attention.length == attention.keys) and not queries.equals(keys):
            return SiteOrder(tile, why="queries and keys are laid out in different grids")
        return SiteOrder(tile, queries, keys)

    def _side(
        self, match: Match, operand: Operand, tokens: Dim, size: Any, stated: SizedGrid | None
    ) -> SizedGrid | str:
        """The grid of queries or keys, or in words why there is none."""
        fitting = None if stated is None else fitted(stated, size, match)
        if fitting is not None:
            return fitting
        scope = match.scope
        if match.inside is not None:
            scope = scope.into(match.inside, match.node, inputs_of(match.node, match.reader))
        shown = self._grids.of(operand, tokens, scope)
        if shown is not None and not isinstance(shown, str):
            return SizedGrid(shown.grid, shown.terms, self._root)
        if stated is None:
            return shown or NO_GRID
        axes = _product(stated.grid[1:4])
        if stated.grid.is_open:
            return f"the grid {axes} {_GIVEN} is no part of {size_text(size)} tokens"
        given = f"the grid {axes} {_GIVEN} has {size_text(stated.grid.tokens)} tokens"
        changes = isinstance(size, SymInt) and size_hint(size) == size_hint(stated.grid.tokens)
        return f"{given}, and their number here changes" if changes else f"{given}, not {size_text(size)}"


def _product(sizes: Iterable[Any]) -> str:
    return "×".join(f"({size})" if " " in str(size) else str(size) for size in sizes)
