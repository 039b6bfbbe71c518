"""The grid of space and time that a sequence of tokens is, and what a graph tells of it.

Frames, rows and columns are told by three axes that tokens are the product of. Two are rows and columns only where a
convolution has them, or patches of an image: frames and the tokens of a frame are two as well.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from ...kernels.order import Grid
from ..read.axes import Axis, Dim, Layout, same, settle_dim, size_of
from ..read.calls import Call, Value
from .tokens import Part

_SPATIAL = {"convolution", "upsample_nearest2d", "upsample_bilinear2d", "avg_pool2d", "_adaptive_avg_pool2d"}


class ShownGrid(NamedTuple):
    """A grid that a graph shows: parts of the sequence before it, its two or three axes, parts behind it.

    The nodes of symbolic sizes are of the outermost graph.
    """

    before: tuple[Part, ...]
    axes: tuple[Part, ...]
    after: tuple[Part, ...]

    @property
    def terms(self) -> tuple[tuple[Part | int, ...], ...]:
        """What prefix, frames, height, width and suffix are the sum of."""
        axes: list[tuple[Part | int, ...]] = [(axis,) for axis in self.axes]
        return (self.before, *[(1,)] * (3 - len(axes)), *axes, self.after)

    @property
    def grid(self) -> Grid:
        """The sizes, ints or symbols."""
        return Grid(*(sum(x if isinstance(x, int) else x.size for x in term) for term in self.terms))

    def cut(self, start: Any, size: Any) -> ShownGrid | None:
        """The grid of the part of the sequence that begins there and has this size; None where it is no whole part."""
        grid = self.grid
        area = grid.frames * grid.height * grid.width
        choices = [(parts, ()) if parts else ((),) for parts in (self.before, self.after)]
        for before, after in itertools.product(*choices):
            prefix, suffix = (sum(part.size for part in some) for some in (before, after))
            if same(start + prefix, grid.prefix) and same(prefix + area + suffix, size):
                return ShownGrid(before, self.axes, after)
        return None


class Told:
    """What a walk has learned of the axis that tokens lie along."""

    def __init__(self, token: Dim) -> None:
        self._token = token
        self._sizes: dict[Axis, Part] = {}
        self._is_spatial = False
        self._found: ShownGrid | str | None = None
        self.whole: Part | None = None  # where all tokens are one dimension of a node of the outermost graph
        self.seen: set[Any] = set()

    @property
    def axes(self) -> Dim:
        """The finest axes of the tokens that are known."""
        return settle_dim(self._token)

    @property
    def found(self) -> ShownGrid | str | None:
        """The grid, or why there is none; None where nothing is known."""
        if self._found is None and self._is_told:
            return ShownGrid((), tuple(self._sizes[axis] for axis in self.axes), ())
        return self._found

    @found.setter
    def found(self, found: ShownGrid | str | None) -> None:
        """Note what was found otherwise than by the axes."""
        self._found = found

    @property
    def is_complete(self) -> bool:
        """Whether there is an answer."""
        return self.found is not None

    @property
    def _is_told(self) -> bool:
        enough = len(self.axes) == 3 or (len(self.axes) == 2 and self._is_spatial)
        return enough and all(axis in self._sizes for axis in self.axes)

    def note(self, value: Value, layout: Layout, is_outermost: bool) -> None:
        """Learn from the dimensions of a value which node has which axis."""
        axes = self.axes

        def is_usable(axis: Axis) -> bool:
            return is_outermost or isinstance(axis.size, int)

        for place, dim in enumerate(layout):
            if dim == axes and is_outermost and value.node is not None:
                self.whole = self.whole or Part(size_of(axes), value.node, place)
            if len(dim) == 1 and dim[0] in axes and value.node is not None and is_usable(dim[0]):
                self._sizes.setdefault(dim[0], Part(dim[0].size, value.node, place))
        if len(axes) == 2:
            major = [dim for dim in layout if len(dim) == 2 and dim[0] in axes and dim[1] not in axes]
            if [dim[0] for dim in major] == list(axes) and same(major[0][1].size, major[1][1].size):
                self._is_spatial = True  # patches of an image

    def look_at(self, call: Call, layout: Layout) -> None:
        """Learn from the call that makes a tensor with this layout."""
        if call.name in _SPATIAL and len(self.axes) == 2:
            self._is_spatial |= [dim for dim in layout[2:] if dim] == [(axis,) for axis in self.axes]
