"""Which axis of the attention problem each dimension of a tensor runs over, carried through views and permutations.

A layout gives for each dimension the axes that it is a product of, major to minor: ``[B·H, L, D]`` is
``((b, h), (l,), (d,))``. A dimension of size 1, and one that is broadcast, has none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .calls import Call
from .fx_utils import as_number, size_hint


class Axis:
    """One axis, of a size. It may turn out to be a product of finer ones, ``parts``."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Any) -> None:
        self.size = as_number(size)  # 4·s ÷ s
        self.parts: tuple[Axis, ...] | None = None

    def settled(self) -> Iterable[Axis]:
        """Itself, or the finest axes that it was split into."""
        if self.parts is None:
            yield self
        else:
            for part in self.parts:
                yield from part.settled()


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def new_dim(size: Any) -> Dim:
    """The axes of a dimension of which nothing else is known: one of its size, none for size 1."""
    return () if same(size, 1) else (Axis(size),)


def new_layout(shape: Sequence[Any]) -> Layout:
    """A layout of new axes, one for each dimension."""
    return tuple(new_dim(size) for size in shape)


def settle_dim(dim: Dim) -> Dim:
    """A dimension in terms of the finest axes."""
    return tuple(part for axis in dim for part in axis.settled())


def settle(layout: Layout) -> Layout:
    """A layout in terms of the finest axes."""
    return tuple(settle_dim(dim) for dim in layout)


def axes_of(layout: Layout) -> Dim:
    """All axes of a layout, settled, in order."""
    return tuple(axis for dim in settle(layout) for axis in dim)


def size_of(dim: Dim) -> Any:
    """The product of the sizes of a dimension's axes."""
    size: Any = 1
    for axis in settle_dim(dim):
        size = size * axis.size
    return size


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for certain; symbolic ones get no guard."""
    return bool(statically_known_true(a == b))


def reshape(layout: Layout, shape: Sequence[Any]) -> Layout | None:
    """The layout after a row-major reshape. Axes are split where the new shape cuts them; None where that fails."""
    left = deque(axes_of(layout))
    new: list[Dim] = []
    for size in shape:
        dim: list[Axis] = []
        have: Any = 1
        while not same(have, size):
            if not left:
                return None
            axis = left.popleft()
            want, full = size_hint(size), size_hint(have * axis.size)
            if want is None or full is None or want == 0:
                return None
            if full > want:
                need = size // have
                rest = axis.size // need
                if not same(need * have, size) or not same(need * rest, axis.size):
                    return None
                axis.parts = (Axis(need), Axis(rest))
                axis, minor = axis.parts
                left.appendleft(minor)
            dim.append(axis)
            have = have * axis.size
        new.append(tuple(dim))
    return None if left else settle(tuple(new))


RESHAPES = {
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "reshape",
    "unsqueeze",
    "squeeze",
    "alias",
    "lift_fresh",
    "slice",
    "select",
}
COPIES = {"clone", "_to_copy", "contiguous"}
PERMUTES = {"permute", "transpose", "t"}


def is_layout(call: Call) -> bool:
    """Whether a call only changes how its first argument is laid out (or copies or broadcasts it)."""
    if call.name == "slice":
        size = call.args[0].shape[call.argument(1, "dim", 0)]
        start, end, step = (call.argument(i, n, d) for i, n, d in ((2, "start", 0), (3, "end", None), (4, "step", 1)))
        return start in (None, 0) and step == 1 and (end is None or bool(statically_known_true(end >= size)))
    if call.name == "select":
        return same(call.args[0].shape[call.argument(1, "dim", 0)], 1)
    return call.name in RESHAPES | COPIES | PERMUTES | {"expand", "repeat"} and not (casts_values(call) or moves(call))


def moves(call: Call) -> bool:
    """Whether a copy is made on another device."""
    device = call.kwargs.get("device")
    return device is not None and torch.device(device) != call.args[0].device


def casts_values(call: Call) -> bool:
    """Whether a copy changes values: from or to another dtype than a floating one."""
    dtype = call.kwargs.get("dtype")
    given = call.args[0].dtype
    return dtype is not None and dtype != given and not (dtype.is_floating_point and given.is_floating_point)


def order_of(call: Call, rank: int) -> list[int]:
    """Dimension i of the result of a permutation is dimension order[i] of its argument."""
    order = list(range(rank))
    if call.name == "permute":
        return [int(d) % rank for d in call.args[1]]
    if rank >= 2:
        a, b = (0, 1) if call.name == "t" else (int(call.args[1]) % rank, int(call.args[2]) % rank)
        order[a], order[b] = order[b], order[a]
    return order


def before(call: Call, layout: Layout) -> Layout | None:
    """The layout of the argument of a layout call, from that of its result."""
    shape = call.args[0].shape
    if call.name in PERMUTES:
        order = order_of(call, len(shape))
        return tuple(layout[order.index(i)] for i in range(len(shape)))
    if call.name in ("expand", "repeat"):
        made = layout[len(layout) - len(shape) :]
        dims = [_unrepeated(dim, size) for dim, size in zip(made, shape, strict=True)]
        return None if None in dims else settle(tuple(d for d in dims if d is not None))
    return reshape(layout, shape)


def _unrepeated(dim: Dim, size: Any) -> Dim | None:
    """The axes of a dimension of this size that was expanded or tiled to ``dim``."""
    if same(size, 1):
        return ()
    if same(size_of(dim), size):
        return dim
    tiled = reshape((dim,), (size_of(dim) // size, size))
    return tiled[1] if tiled else None


def after(call: Call, layout: Layout, shape: Sequence[Any]) -> Layout | None:
    """The layout of the result, of this shape, of a layout call from that of its argument."""
    given = call.args[0].shape
    if call.name in PERMUTES:
        return tuple(layout[i] for i in order_of(call, len(given)))
    if call.name == "repeat":
        return layout if len(given) == len(shape) and all(map(same, given, shape)) else None
    if call.name == "expand":
        new = len(shape) - len(given)
        old = [*[()] * new, *layout]
        sizes = [*[1] * new, *given]
        return tuple(d if same(have, want) else new_dim(want) for d, have, want in zip(old, sizes, shape, strict=True))
    return reshape(layout, shape)


def broadcast(layout: Layout, shape: Sequence[Any]) -> Layout:
    """The layout of an operand of this shape that was broadcast to ``layout``."""
    made = layout[len(layout) - len(shape) :]
    return tuple(() if same(size, 1) else dim for dim, size in zip(made, shape, strict=True))
