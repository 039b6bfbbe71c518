"""Token order: which tokens form a block where a sequence is a grid of space and time.

In: a :class:`Grid`, and a tile of it with at most as many tokens as a key block. Out: an :class:`Order`, which puts the
tokens of each tile into one block. Nothing but numbers goes in, so an order is made on its device, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import type_error, value_error
from .block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div

TILE = (2, 4, 8)  # frames, rows and columns of a tile
RUNS = QUERY_BLOCK // KEY_BLOCK  # key blocks in the rows of a query block
MADE_ORDERS = 64  # how many are kept; the oldest goes first

_FORMS = "Grid(prefix, frames, height, width, suffix), or these five numbers, or (frames, height, width)"


class Order(NamedTuple):
    """Tokens in blocks: of each run of 64 slots, the leading ones hold tokens, and the rest is padding.

    L tokens have 64 · n slots; n is even, so that a query block is two runs.
    """

    slots: Tensor  # int32 [64 * n], the token of each slot; a padding slot repeats a token of its own query block
    places: Tensor  # int32 [L], the slot of each token
    sizes: Tensor  # int32 [n], how many leading slots of each run hold tokens; 0 for a run that is all padding


class Orders(NamedTuple):
    """The orders of the queries and the keys of a call, as ``sparge::attention`` takes them."""

    slots_q: Tensor | None = None
    places_q: Tensor | None = None
    sizes_q: Tensor | None = None
    slots_k: Tensor | None = None
    sizes_k: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether queries or keys have another order than that of their tokens."""
        return self.slots_q is not None or self.slots_k is not None


class Padding(NamedTuple):
    """What an order costs: blocks that tokens do not fill are read as if they were full."""

    tokens: int
    slots: int  # those of all blocks with a token

    @property
    def share(self) -> float:
        """The share of slots that hold no token."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


class Grid(NamedTuple):
    """A sequence that is a grid, raster by raster, with other tokens before and behind it. Sizes may be symbols.

    Token ``prefix + (f · height + y) · width + x`` is that of frame f, row y and column x.
    """

    prefix: Any
    frames: Any
    height: Any
    width: Any
    suffix: Any = 0

    @property
    def tokens(self) -> Any:
        """Tokens of the whole sequence."""
        return self.prefix + self.frames * self.height * self.width + self.suffix

    def runs(self, tile: Sequence[int]) -> tuple[Any, Any, Any]:
        """How many runs of 64 slots the prefix, the grid and the suffix have: whole query blocks each."""
        tiles = tiles_of(self, tile)
        return (
            ceil_div(self.prefix, QUERY_BLOCK) * RUNS,
            ceil_div(tiles[0] * tiles[1] * tiles[2], RUNS) * RUNS,
            ceil_div(self.suffix, QUERY_BLOCK) * RUNS,
        )

    def padding(self, tile: Sequence[int] = TILE) -> Padding:
        """What tiles of this grid cost."""
        tiles = tiles_of(self, tile)
        blocks = tiles[0] * tiles[1] * tiles[2] + sum(ceil_div(x, KEY_BLOCK) for x in (self.prefix, self.suffix))
        return Padding(self.tokens, blocks * KEY_BLOCK)


def tiles_of(grid: Grid, tile: Sequence[int]) -> tuple[Any, Any, Any]:
    """How many tiles a grid has along each axis; those at its far edges may be smaller."""
    frames, height, width = (ceil_div(n, size) for n, size in zip(grid[1:4], tile, strict=True))
    return frames, height, width


def parse_grid(grid: Any, where: str) -> Grid:
    """A grid as a user gives it: a :class:`Grid`, its numbers, or (frames, height, width).

    Raises:
        TypeError, ValueError: it is something else. The messages begin with ``where``.
    """
    numbers = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(numbers) not in (3, 5) or not all(isinstance(x, (int, torch.SymInt)) for x in numbers):
        raise type_error(f"{where}: grid cannot be read", given=repr(grid), allowed=_FORMS, todo="Give whole numbers.")
    found = Grid._make(numbers if len(numbers) == 5 else (0, *numbers, 0))
    if all(isinstance(x, int) for x in found) and (min(found) < 0 or min(found[1:4]) < 1):
        raise value_error(
            f"{where}: grid has no tokens", given=repr(grid), allowed=_FORMS, todo="Give 1 or more along each axis."
        )
    return found


def parse_tile(tile: Any, where: str) -> tuple[int, int, int]:
    """A tile as a user gives it: frames, rows and columns, at most 64 tokens together.

    Raises:
        ValueError: it is something else. The message begins with ``where``.
    """
    numbers = tuple(tile) if isinstance(tile, (tuple, list)) else ()
    whole = len(numbers) == 3 and all(type(x) is int and x > 0 for x in numbers)
    if not whole or numbers[0] * numbers[1] * numbers[2] > KEY_BLOCK:
        raise value_error(
            f"{where}: tile is no box of tokens that a key block holds",
            given=repr(tile),
            allowed=f"(frames, rows, columns), at most {KEY_BLOCK} tokens, such as {TILE}, (3, 5, 4) or (1, 8, 8)",
            todo=f"Choose three numbers whose product is {KEY_BLOCK}, or little less: Grid.padding says what it costs.",
        )
    return numbers


def make_order(grid: Grid, tile: Sequence[int], device: torch.device) -> Order:
    """The order of a grid by tiles, each of them a block, and two neighbours a query block.

    Tiles at the far edges of the grid that are cut by them are short blocks. What stands before and behind the grid
    has blocks of its own, in its own order.
    """
    before, tiles, after = (torch.arange(n, device=device) for n in grid.runs(tile))
    parts = (
        _line(before, 0, grid.prefix),
        _tiles(tiles, grid, tile),
        _line(after, grid.tokens - grid.suffix, grid.suffix),
    )
    tokens, sizes = (torch.cat(x) for x in zip(*parts, strict=True))  # [n, 64], [n]
    slots, sizes = tokens.flatten().to(torch.int32), sizes.to(torch.int32)
    return Order(slots, places_of(slots, sizes, grid.tokens), sizes)


def places_of(slots: Tensor, sizes: Tensor, length: Any) -> Tensor:
    """int32 [L], the slot of each token, from the other two parts of an order."""
    padding = ~held_slots(sizes)
    slot = torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)
    places = slots.new_zeros(length + 1)  # padding goes to one behind all tokens
    return places.scatter(0, slots.masked_fill(padding, length).long(), slot)[:length].clone()


def held_slots(sizes: Tensor) -> Tensor:
    """bool [64 * n]: the slots that hold tokens."""
    return (torch.arange(KEY_BLOCK, device=sizes.device) < sizes.unsqueeze(-1)).flatten()


def _line(run: Tensor, first: int, length: int) -> tuple[Tensor, Tensor]:
    """(tokens [n, 64], sizes [n]) of runs of consecutive tokens, from ``first`` on."""
    token = run.unsqueeze(-1) * KEY_BLOCK + torch.arange(KEY_BLOCK, device=run.device)
    return first + token.clamp(max=length - 1), (length - run * KEY_BLOCK).clamp(0, KEY_BLOCK)


def _tiles(run: Tensor, grid: Grid, tile: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(tokens [n, 64], sizes [n]) of the tiles of a grid."""
    count = tiles_of(grid, tile)
    last = count[0] * count[1] * count[2] - 1
    places = _snake(run.clamp(max=last), count, rows_first=tile[1] < tile[2])
    corner = [at * size for at, size in zip(places, tile, strict=True)]
    extent = [(n - at).clamp(max=size) for n, at, size in zip(grid[1:4], corner, tile, strict=True)]
    size = extent[0] * extent[1] * extent[2]
    lane = torch.arange(KEY_BLOCK, device=run.device)
    lane = torch.where(lane < size.unsqueeze(-1), lane, 0)  # [n, 64]
    rows, columns = extent[1].unsqueeze(-1), extent[2].unsqueeze(-1)
    inside = (lane // (rows * columns), lane // columns % rows, lane % columns)
    f, y, x = (at.unsqueeze(-1) + step for at, step in zip(corner, inside, strict=True))
    token = grid.prefix + (f * grid.height + y) * grid.width + x
    return token, torch.where(run <= last, size, 0)


def _snake(number: Tensor, count: Sequence[int], rows_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where in a grid of tiles a tile is: along a line that turns at each edge, so that each touches the next.

    The line runs along that axis of space in which tiles are shorter, so that two together are as round as can be.
    """
    fast, middle = (count[1], count[2]) if rows_first else (count[2], count[1])
    line, slow = number // fast, number // (fast * middle)
    a, b = number % fast, line % middle
    a = torch.where(line % 2 == 1, fast - 1 - a, a)
    b = torch.where(slow % 2 == 1, middle - 1 - b, b)
    return (slow, a, b) if rows_first else (slow, b, a)


_made: dict[Any, Order] = {}


def copy_of_order(grid: Grid, tile: Sequence[int], device: torch.device) -> Order:
    """:func:`make_order` from a table of those that were made: a copy, for whoever writes to it."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (grid, tuple(tile), device)
    found = _made.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = make_order(*key)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return found  # it belongs to the graph
            torch.cuda.current_stream(device).synchronize()  # once: the next call may be on another stream
        if len(_made) >= MADE_ORDERS:
            _made.pop(next(iter(_made)), None)
        _made[key] = found
    return Order(*(x.clone() for x in found))
