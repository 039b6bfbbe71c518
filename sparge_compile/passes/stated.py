"""Grids that a user states: by the option ``grid``, or by ``attach(..., grid=)``, which leaves markers in the graph.

In: the graph and its matches. Out: for each match the grid that is stated for it, and whether it fits what is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import SymInt
from torch.fx import GraphModule, Node

from .. import ops  # noqa: F401  importing it registers the ops
from ..kernels.order import LEFT, Grid
from ..kernels.sizes import surely
from ..naming import module_base, module_path
from .find import Match
from .match.tokens import Part, rows_of
from .read.fx_utils import calls_of, size_hint, value_of


class Left(NamedTuple):
    """What a sequence has left beside the other sizes of its grid."""

    whole: Part | int


Sum = tuple["Part | Node | int", ...]


class SizedGrid(NamedTuple):
    """A grid, and for each of its five sizes what it is the sum of: numbers, and nodes of ``owner`` that have them; one
    may be what is left."""

    grid: Grid
    terms: tuple[Sum | Left, ...]
    owner: GraphModule

    @classmethod
    def of_numbers(cls, grid: Grid, owner: GraphModule) -> SizedGrid:
        """A grid of numbers, to be used in a graph."""
        return cls(grid, tuple((size,) for size in grid), owner)

    @property
    def is_fixed(self) -> bool:
        """Whether all of its sizes are numbers."""
        return not any(isinstance(size, SymInt) for size in self.grid)

    @property
    def is_alone(self) -> bool:
        """Whether nothing stands before or behind the grid."""
        return surely(self.grid.prefix == 0) and surely(self.grid.suffix == 0)

    def equals(self, other: SizedGrid) -> bool:
        """Whether two grids have the same sizes for certain."""
        return all(surely(a == b) for a, b in zip(self.grid, other.grid, strict=True))


def stated_grids(graph_module: GraphModule, matches: Iterable[Match]) -> dict[Node, SizedGrid]:
    """The grid that a marker states for a match, by the node of the match.

    A marker with the name of the site counts most, then one with a pattern for it, then one in its module.
    """
    matches = list(matches)
    found: dict[Node, tuple[int, SizedGrid]] = {}
    for owner, node in calls_of(graph_module):
        if not is_grid(node):
            continue
        sizes: Any = node.args[:5]
        sites = str(node.args[5])
        stated = SizedGrid(Grid(*map(value_of, sizes)), tuple((size,) for size in sizes), owner)
        for match in matches:
            name = match.site.name
            if sites:
                rank = 2 if name == sites else int(fnmatchcase(name, sites)) or None
            else:
                is_here = (module_base(match.node), match.path) == (module_base(node), module_path(node))
                rank = 0 if is_here else None
            known = found[match.node][0] if match.node in found else -1
            if rank is not None and owner in match.graphs and (rank > known or rank == known == 0):
                found[match.node] = rank, stated
    return {node: stated for node, (_, stated) in found.items()}


def is_grid(node: Node) -> bool:
    """Whether a node is a marker that states a grid."""
    return node.op == "call_function" and node.target in (torch.ops.sparge.grid, torch.ops.sparge.grid.default)


def fitted(stated: SizedGrid, size: Any, match: Match) -> SizedGrid | None:
    """A stated grid for a sequence of this size; None where it is one of another size, or may be.

    Symbols that nothing relates are taken to agree where they did when they were traced: the op checks at each call.
    """
    if stated.grid.is_open:
        return _filled(stated, size, match)
    tokens = stated.grid.tokens

    def agrees(number: Any) -> bool:
        return surely(tokens == number) or (not stated.is_fixed and size_hint(tokens) == size_hint(number) is not None)

    if agrees(size):
        return stated
    if not stated.is_alone or isinstance(match.parts, str):
        return None
    held = [at for at, part in enumerate(match.parts) if agrees(part.size)]
    if len(held) != 1 or not surely(sum(part.size for part in match.parts) == size):
        return None
    before, after = match.parts[: held[0]], match.parts[held[0] + 1 :]
    beside: list[Sum] = [tuple(x.size if isinstance(x.size, int) else x for x in some) for some in (before, after)]
    has_nodes = any(isinstance(x, Part) for term in beside for x in term)
    if has_nodes and not stated.is_fixed and stated.owner is not match.graph_module:
        return None
    prefix, suffix = (sum(part.size for part in some) for some in (before, after))
    owner = match.graph_module if has_nodes else stated.owner
    terms = (beside[0], *stated.terms[1:4], beside[1])
    return SizedGrid(stated.grid._replace(prefix=prefix, suffix=suffix), terms, owner)


def _filled(stated: SizedGrid, size: Any, match: Match) -> SizedGrid | None:
    """A stated grid with what a sequence of this size has left, where it is open; None where that cannot be told."""
    attention = match.attention
    assert attention is not None
    grid = stated.grid.within(size)
    is_joint = surely(attention.length == attention.keys)
    if not is_joint or min(size_hint(x) or 0 for x in (grid.prefix, grid.suffix)) < 0:
        return None
    owner, whole = stated.owner, size
    if not isinstance(size, int):
        begun = None if match.inside is not None else rows_of(attention.query, attention.axes.rows, match.reader)
        if begun is None or not (stated.is_fixed or owner is match.graph_module):
            return None
        _, layout, token = begun
        owner, whole = match.graph_module, Part(size, attention.query.node, layout.index(token))
    terms = [Left(whole) if isinstance(x, int) and x == LEFT else stated.terms[i] for i, x in enumerate(stated.grid)]
    return SizedGrid(grid, tuple(terms), owner)
