"""The order of tokens at each site: tiles of which grid, or raster and why. The graph is only read.

A grid is stated (:mod:`.stated`), or shown by the graph (:mod:`.match.grid`). Queries and keys have each their own:
where a video attends to a text, its queries are in tiles and the keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import SymInt
from torch.fx import GraphModule, Node

from ..kernels.order import Grid
from ..kernels.sizes import surely
from ..options import Options
from .find import Match
from .match.attention import Operand
from .match.find_grid import Grids
from .match.scope import Scope
from .mha.open import inputs_of
from .read.axes import Dim
from .read.fx_utils import size_hint, size_text
from .read.reader import Reader
from .stated import SizedGrid, fitted, stated_grids

NO_GRID = "no grid known"

Tile = tuple[int, int, int]


@dataclass(frozen=True)
class SiteOrder:
    """The grids whose tiles are the blocks of a site, of its queries and of its keys; None: they stay as they are.

    ``why`` says, where both are None, what is missing or forbids it.
    """

    tile: Tile
    queries: SizedGrid | None = None
    keys: SizedGrid | None = None
    why: str = ""

    @property
    def is_raster(self) -> bool:
        """Whether all tokens stay as they are."""
        return self.queries is None and self.keys is None

    def __str__(self) -> str:
        """The order, as a report says it."""
        if self.is_raster:
            return f"raster: {self.why}"
        if self.queries is not None and self.keys is not None and self.queries.equals(self.keys):
            return self._text(self.queries)
        sides = (("queries", self.queries), ("keys", self.keys))
        return "; ".join(f"{name} {'raster' if grid is None else self._text(grid)}" for name, grid in sides)

    def _text(self, sized: SizedGrid) -> str:
        tile = tile_of(self.tile, sized.grid)
        before, *axes, after = map(size_text, sized.grid)
        beside = [f"{size} {where}" for size, where in ((before, "before"), (after, "behind")) if size != 0]
        around = f" with {' and '.join(beside)}" if beside else ""
        return f"tiles {_product(tile)} of {_product(axes)}{around}"


def tile_of(tile: Tile, grid: Grid) -> Tile:
    """The tile that a grid is cut into: what it has of frames is rows in an image, which has one frame."""
    frames, height, width = tile
    return (1, frames * height, width) if surely(grid.frames == 1) else tile


def order_sites(
    graph_module: GraphModule,
    matches: Iterable[Match],
    options: Options,
    alike: Callable[[Match], Iterable[tuple[Match, bool]]] = lambda match: (),
) -> dict[Node, SiteOrder]:
    """The order of the tokens of each of these matches of a graph and those nested in it, by the match's node.

    Args:
        graph_module: the outermost graph.
        matches: those that become sparse.
        options: the backend's options, of which ``token_order`` is ``"tiles"``.
        alike: for a match, the same site in other modules that may run the same graph.
    """
    matches = list(matches)
    markers = stated_grids(graph_module, matches)
    orders = _Orders(graph_module, matches, options.tile)
    found = {}
    for match in matches:
        given = options.grid_of(match.site.name)
        if any(options.grid_of(other.site.name) != given for other, _ in alike(match)):
            found[match.node] = orders.raster("modules that share this graph are given other grids")
        else:
            stated = markers.get(match.node) if given is None else SizedGrid.of_numbers(given, graph_module)
            found[match.node] = orders.of(match, stated)
    return found


class _Orders:
    """Tells the order of each site of one graph and of those nested in it."""

    def __init__(self, root: GraphModule, matches: Iterable[Match], tile: Tile) -> None:
        readers = [match.reader for match in matches if match.graph_module is root]
        self._root = Scope(readers[0] if readers else Reader(root))
        self._grids = Grids()
        self._tile = tile

    def raster(self, why: str) -> SiteOrder:
        """The order of a site whose tokens stay as they are."""
        return SiteOrder(self._tile, why=why)

    def of(self, match: Match, stated: SizedGrid | None) -> SiteOrder:
        """The order of a site, for which this grid is stated, if one is."""
        attention = match.attention
        assert attention is not None
        if attention.packing is not None or attention.is_causal:
            return self.raster("packed" if attention.packing is not None else "causal")
        axes = attention.axes
        queries = self._side(match, attention.query, axes.rows, attention.length, stated)
        keys = self._side(match, attention.key, axes.keys, attention.keys, stated)
        if isinstance(queries, str):
            return SiteOrder(self._tile, keys=None if isinstance(keys, str) else keys, why=queries)
        if isinstance(keys, str):
            return SiteOrder(self._tile, queries)
        if surely(attention.length == attention.keys) and not queries.equals(keys):
            return self.raster("queries and keys are laid out in different grids")
        return SiteOrder(self._tile, queries, keys)

    def _side(
        self, match: Match, operand: Operand, tokens: Dim, size: Any, stated: SizedGrid | None
    ) -> SizedGrid | str:
        """The grid of queries or keys, or in words why there is none."""
        fitting = None if stated is None else fitted(stated, size, match)
        if fitting is not None:
            return fitting
        scope = self._scope(match)
        shown = None if scope is None else self._grids.of(operand, tokens, scope)
        if shown is not None and not isinstance(shown, str):
            return SizedGrid(shown.grid, shown.terms, self._root.reader.owner)
        if stated is None:
            return shown or NO_GRID
        given = f"the grid {_product(stated.grid[1:4])} that is given has {size_text(stated.grid.tokens)} tokens"
        changes = isinstance(size, SymInt) and size_hint(size) == size_hint(stated.grid.tokens)
        return f"{given}, and their number here changes" if changes else f"{given}, not {size_text(size)}"

    def _scope(self, match: Match) -> Scope | None:
        """Where the operands of a match stand; None where that is not known."""
        scope: Scope | None = self._root
        for caller in match.callers:
            scope = None if scope is None else scope.nested(caller.node)
        if scope is None or match.inside is None:
            return scope
        return scope.into(match.inside, match.node, Reader(match.inside), inputs_of(match.node, match.reader))


def _product(sizes: Iterable[Any]) -> str:
    return "×".join(f"({size})" if " " in str(size) else str(size) for size in sizes)
