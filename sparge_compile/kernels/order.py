"""Token order: which tokens form a block where a sequence is a grid of space and time.

In: a :class:`Grid`, and the tile whose shape blocks shall have. Out: an :class:`Order`, a permutation of the tokens.
Nothing but numbers goes in, so an order is made on its device, without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import type_error, value_error
from .block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div
from .sizes import surely

# Frames, rows and columns; or these, and by how many of each the tiles are moved: the grid is a torus to them.
Tile = tuple[int, int, int] | tuple[int, int, int, int, int, int]

TILE: Tile = (4, 4, 4)
LEFT = -1  # as a size before or behind a grid: what the sequence has left, as in ``Tensor.view``
MADE_ORDERS = 64  # how many are kept; the oldest goes first
TIE = 1e-6  # what is closer is equal

_FORMS = (
    "Grid(prefix, frames, height, width, suffix), or these five numbers, or (frames, height, width); of prefix and "
    f"suffix one may be {LEFT}, what the sequence has left"
)


class Order(NamedTuple):
    """A permutation of L tokens: 64 rows that follow one another are a key block, 128 are a query block."""

    slots: Tensor  # int32 [L], the token of each row
    places: Tensor  # int32 [L], the row of each token


class Orders(NamedTuple):
    """The orders of the queries and the keys of a call, as ``sparge::attention`` takes them."""

    slots_q: Tensor | None = None
    places_q: Tensor | None = None
    slots_k: Tensor | None = None
    places_k: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether queries or keys have another order than that of their tokens."""
        return self.slots_q is not None or self.slots_k is not None


class Grid(NamedTuple):
    """A sequence that is a grid, raster by raster, with other tokens before and behind it. Sizes may be symbols.

    Token ``prefix + (f · height + y) · width + x`` is that of frame f, row y and column x. One of ``prefix`` and
    ``suffix`` may be ``LEFT``.
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

    @property
    def is_open(self) -> bool:
        """Whether what stands before or behind it is what a sequence has left."""
        return any(isinstance(size, int) and size == LEFT for size in (self.prefix, self.suffix))

    def within(self, tokens: Any) -> Grid:
        """The grid in a sequence of this many tokens: a number instead of ``LEFT``, negative if it is too short."""
        if not self.is_open:
            return self
        left = tokens - (self.tokens - LEFT)
        is_behind = isinstance(self.suffix, int) and self.suffix == LEFT
        return self._replace(suffix=left) if is_behind else self._replace(prefix=left)


def parse_grid(grid: Any, where: str) -> Grid:
    """A grid as a user gives it: a :class:`Grid`, its numbers, or (frames, height, width).

    Raises:
        TypeError, ValueError: it is something else. The messages begin with ``where``.
    """
    numbers = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(numbers) not in (3, 5) or not all(isinstance(x, (int, torch.SymInt)) for x in numbers):
        raise type_error(f"{where}: grid cannot be read", given=repr(grid), allowed=_FORMS, todo="Give whole numbers.")
    found = Grid._make(numbers if len(numbers) == 5 else (0, *numbers, 0))
    if not all(isinstance(x, int) for x in found):
        return found
    beside = found.prefix, found.suffix
    if min(found[1:4]) < 1 or min(beside) < LEFT:
        raise value_error(
            f"{where}: grid has no tokens", given=repr(grid), allowed=_FORMS, todo="Give 1 or more along each axis."
        )
    if beside == (LEFT, LEFT):
        raise value_error(
            f"{where}: grid may stand anywhere",
            given=repr(grid),
            allowed=_FORMS,
            todo=f"Say how many tokens stand before it, or behind it, and {LEFT} on the other side.",
        )
    return found


def parse_tile(tile: Any, where: str) -> Tile:
    """A tile as a user gives it: frames, rows and columns, at most 64 tokens together; and by how many it is moved.

    Raises:
        ValueError: it is something else. The message begins with ``where``.
    """
    numbers = tuple(tile) if isinstance(tile, (tuple, list)) else ()
    whole = len(numbers) in (3, 6) and all(type(x) is int and x >= (i < 3) for i, x in enumerate(numbers))
    if not whole or numbers[0] * numbers[1] * numbers[2] > KEY_BLOCK:
        raise value_error(
            f"{where}: tile is no box of tokens that a key block holds",
            given=repr(tile),
            allowed=f"(frames, rows, columns), at most {KEY_BLOCK} tokens, such as {TILE}, (3, 5, 4) or (1, 8, 8); or "
            f"these and by how many, 0 or more, its borders are moved along each axis: {(*TILE, 0, 2, 2)}",
            todo=f"Choose three numbers whose product is {KEY_BLOCK}, or little less.",
        )
    return numbers if any(numbers[3:]) else numbers[:3]


def tile_text(tile: Tile) -> str:
    """A tile in words."""
    moved = f" moved by {'×'.join(map(str, tile[3:]))}" if len(tile) > 3 else ""
    return "×".join(map(str, tile[:3])) + moved


def tile_of(tile: Tile, grid: Grid) -> Tile:
    """The tile that a grid is cut into: in an image, which has one frame, frames are more rows and columns, so that it
    is as square as it can be."""
    frames, height, width = tile[:3]
    if not surely(grid.frames == 1):
        return tile
    boxes = [(n * height, frames // n * width) for n in range(1, frames + 1) if frames % n == 0]
    return (1, *min(boxes, key=lambda box: max(box) / min(box)), *tile[3:])


def make_order(grid: Grid, tile: Sequence[int] | None, device: torch.device) -> Order:
    """The order of a grid whose blocks are compact: they come as close to tiles as whole blocks can.

    The grid is cut in two, and so are its parts, along the axis on which a part has the most tiles, at a row where a
    query block begins, or a key block in the end (a k-d tree). The cuts lie between tiles where these fit, so that a
    grid of whole tiles is cut into them. Tokens before and behind the grid stay where they are: where the grid begins
    or ends inside a block, it shares this one with them. All do where there is no tile, and in a sequence that is too
    short for the grid: where the number of those is negative. A tile that is moved is that of the grid that is moved
    the other way, whose planes, rows and columns come in again on the other side.
    """
    if tile is None or min(grid.prefix, grid.suffix) < 0:
        token = torch.arange(grid.tokens, dtype=torch.int32, device=device)
        return Order(token, token.clone())
    first, count = grid.prefix, grid.frames * grid.height * grid.width
    tokens, held = (
        torch.arange(start, end, device=device) for start, end in ((0, grid.tokens), (first, first + count))
    )
    begin, end = torch.full_like(held, first), torch.full_like(held, first + count)
    for _ in range(_levels(count)):
        held, begin, end = _cut(held, begin, end, grid, tile[:3])
    if len(tile) > 3:
        held = _moved(held, grid, tile[3:])
    slots = torch.cat((tokens[:first], held, tokens[first + count :]))
    return Order(slots.to(torch.int32), slots.argsort().to(torch.int32))


def _moved(held: Tensor, grid: Grid, by: Sequence[int]) -> Tensor:
    """Tokens of the grid that are so many frames, rows and columns further on."""
    number, found, size = held - grid.prefix, 0, 1
    for length, step in zip(reversed(grid[1:4]), reversed(by), strict=True):
        found = found + (number // size + step) % length * size
        size *= length
    return grid.prefix + found


def _levels(count: int) -> int:
    """How often parts are cut until each is a block. A cut leaves two thirds at the most, but for rounding."""
    blocks, levels = ceil_div(count, KEY_BLOCK), 2
    while blocks > 1:
        blocks, levels = blocks * 2 // 3, levels + 1
    return levels


def _cut(held: Tensor, begin: Tensor, end: Tensor, grid: Grid, tile: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each part of a grid in two: the tokens of the grid's rows [n], and where the part of each begins and ends.

    A part has its tokens in order of the axis that is cut, then of the next longest. So a cut that is not between two
    planes of the grid goes along a line in one, and that between two lines goes between two tokens.
    """
    number = held - grid.prefix
    where = torch.stack((number // (grid.height * grid.width), number // grid.width % grid.height, number % grid.width))
    several = begin // QUERY_BLOCK < (end - 1) // QUERY_BLOCK
    tiles = _tiles_in(where, begin - grid.prefix, end - grid.prefix, tile)  # [3, n]
    weighed = tiles * torch.stack([torch.full_like(tiles[0], 1 + TIE * axis) for axis in range(3)])
    # A query block is two tiles that touch on their largest face: where a tile is shortest, parts count half as long.
    # But three tiles are more than two on another axis, whose half might be no whole query blocks.
    short = weighed[tile.index(min(tile))]
    half = torch.where(short > 3 - TIE, (short / 2).clamp(min=2 + 9 * TIE), short / 2)
    short.copy_(torch.where(several, half, short))
    axes = weighed.argsort(0, descending=True)
    steps = torch.stack([torch.full_like(held, size) for size in grid[1:4]]).gather(0, axes)
    slow, middle, fast = where.gather(0, axes)
    key = ((begin - grid.prefix) * steps[0] + slow) * steps[1] + middle
    held = held[(key * steps[2] + fast).argsort()]

    longest = tiles.gather(0, axes)[0]
    # An even number of tiles, of which any face has whole query blocks; of two of them, one.
    leading = torch.where(longest > 3 - TIE, 2 * (longest / 4 + 0.5 - TIE).floor(), 1.0)
    at = begin + (end - begin) * leading / longest
    unit = torch.where(several, QUERY_BLOCK, KEY_BLOCK)
    at = (at / unit - TIE).round().long()
    lowest, highest = begin // unit + 1, (end - 1) // unit
    at = torch.where(lowest > highest, end, at.clamp(lowest, highest) * unit)  # a part inside one block stays whole
    row = torch.arange(len(held), device=held.device) + grid.prefix
    leads = row < at
    return held, torch.where(leads, begin, at), torch.where(leads, at, end)


def _tiles_in(where: Tensor, begin: Tensor, end: Tensor, tile: Sequence[int]) -> Tensor:
    """float64 [3, n]: how many tiles long the part of each token is, from the places [3, n] of tokens on the axes.

    The length is that of a box in which places vary as much, so that a few tokens of another plane do not count as one.
    ``begin`` and ``end`` [n] are the rows of a token's part. Sums of whole numbers are exact, in any order.
    """
    begin, end = begin.expand_as(where), end.expand_as(where)
    so_far = (F.pad(x.cumsum(1), (1, 0)) for x in (where, where * where))
    mean, mean_square = ((x.gather(1, end) - x.gather(1, begin)).double() / (end - begin) for x in so_far)
    length = (12 * (mean_square - mean.square()).clamp(min=0) + 1).sqrt()
    return torch.stack([x / n for x, n in zip(length, tile, strict=True)])


_made: dict[Any, Order] = {}
_instead: ContextVar[Mapping[Tile, Tile | None]] = ContextVar("instead", default=MappingProxyType({}))


@contextmanager
def made_as(instead: Mapping[Tile, Tile | None]) -> Iterator[None]:
    """Make orders of some tiles as those of others, None: of raster. A graph that runs eagerly so runs in any order."""
    before = _instead.set(instead)
    try:
        yield
    finally:
        _instead.reset(before)


def _made_elsewhere(grid: Grid, tile: Sequence[int] | None, device: torch.device) -> Order:
    """An order that is kept: made in a thread of its own. While CUDA graphs are prepared (torch's ``reduce-overhead``)
    their thread is given memory of theirs, of which nothing may be kept. Inference mode is left behind, too."""

    def make() -> Order:
        found = make_order(grid, tile, device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once: calls may be on any stream
        return found

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def copy_of_order(grid: Grid, tile: Sequence[int], device: torch.device) -> Order:
    """:func:`make_order` from a table of those that were made: a copy, for whoever writes to it."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    wanted: Any = tuple(tile)
    for other, made in _instead.get().items():
        if wanted in (other, tile_of(other, grid)):
            wanted = made and tile_of(made, grid)
            break
    key = (grid, wanted, device)
    found = _made.get(key)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return make_order(*key)  # it belongs to the graph
        found = _made_elsewhere(*key)
        if len(_made) >= MADE_ORDERS:
            _made.pop(next(iter(_made)), None)
        _made[key] = found
    return Order(*(x.clone() for x in found))
