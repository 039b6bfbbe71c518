"""What leaves every token of a sequence in its place: views, pointwise code, norms, projections, rotary embeddings.

In: a call, and the axes of its result's dimensions. Out: its arguments that have the same tokens at the same places,
with their axes; and the parts of which a call puts a sequence together. Whoever asks where tokens come from goes
backwards from queries and keys by these.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ...kernels.sizes import surely
from ..read.axes import Dim, Layout, before, broadcast, is_layout, new_dim, new_layout, same, settle, settle_dim
from ..read.calls import Call, Value
from ..read.fx_utils import as_number, value_of
from ..read.reader import Reader
from .attention import Operand


class Part(NamedTuple):
    """One part of a sequence: its size, and the dimension of a node that has it."""

    size: Any
    node: Node
    dim: int


def rows_of(operand: Operand, tokens: Dim, reader: Reader) -> tuple[Value, Layout, Dim] | None:
    """An operand as a value with an axis for each dimension, and those of its tokens; None where these are no whole
    dimension of it."""
    wanted, layout = settle_dim(tokens), settle(operand.layout)
    places = [place for place, dim in enumerate(layout) if dim and dim == wanted]
    fake = reader.fake(operand.node)
    if len(places) != 1 or not isinstance(fake, torch.Tensor):
        return None
    start = new_layout(tuple(fake.shape))
    return Value(tuple(fake.shape), fake.dtype, fake.device, node=operand.node), start, start[places[0]]


def parts_of_cat(call: Call, layout: Layout, token: Dim) -> tuple[Part, ...] | None:
    """The parts that a call puts together along the tokens, if it is such a call and all of them are nodes."""
    if call.name != "cat":
        return None
    dim = int(call.argument(1, "dim", 0)) % len(layout)
    parts = [Part(as_number(x.shape[dim]), x.node, dim) for x in call.args[0] if x.node is not None]
    whole = layout[dim] == token and len(parts) == len(call.args[0]) > 1
    return tuple(parts) if whole else None


class Cut(NamedTuple):
    """A part that is cut out of a sequence: along which dimension, and from where on."""

    dim: int
    start: Any


def start_of(start: Any, size: Any) -> Any:
    """Where a slice begins in a dimension of a size, as Python counts; None where that cannot be told."""
    if start is None:
        return None
    start = as_number(start + size) if surely(start < 0) else start
    start = max(start, 0) if isinstance(start, int) else start  # before the first row is the first row
    return start if surely(start >= 0) else None


def cut_of(value: Value, layout: Layout, token: Dim) -> Cut | None:
    """How a call cuts a value with all tokens in one dimension out of a sequence; None where it does something else."""
    call = value.call
    if call is None or call.name not in ("slice", "split_with_sizes") or is_layout(call):
        return None
    dim = int(call.argument(1 if call.name == "slice" else 2, "dim", 0)) % len(layout)
    if layout[dim] != token:
        return None
    if call.name == "slice":
        given = call.argument(2, "start")
        start = start_of(0 if given is None else given, call.args[0].shape[dim])  # a size is not asked if it is 0
        return None if start is None or call.argument(4, "step", 1) != 1 else Cut(dim, start)
    sizes = call.args[1]
    fitting = [i for i, size in enumerate(sizes) if same(size, value.shape[dim])]
    return Cut(dim, sum(sizes[: fitting[0]])) if len(fitting) == 1 else None


def written_rows(node: Node, layout: Layout, reader: Reader) -> tuple[Node, Node, Layout] | None:
    """What is written into a part of a tensor's last dimension, ``x[..., a:b] = rows``; who writes it; its layout."""
    for writer in reversed(reader.writers(node)):
        rows = writer.args[-1]
        fake = value_of(rows) if isinstance(rows, Node) else None
        if isinstance(fake, torch.Tensor) and _is_in_last_dimension(writer, node, len(layout), reader):
            return rows, writer, (*layout[:-1], new_dim(fake.shape[-1]))  # type: ignore[return-value]
    return None


def _is_in_last_dimension(writer: Node, node: Node, rank: int, reader: Reader) -> bool:
    """Whether a node writes to a tensor's slice along the last dimension: by an index, or into a view of it."""
    if writer.target is operator.setitem:
        index = writer.args[1] if isinstance(writer.args[1], tuple) else (writer.args[1],)
        full = all(x is Ellipsis or (isinstance(x, slice) and x == slice(None)) for x in index[:-1])
        reaches_last = len(index) == rank or (len(index) == 2 and index[0] is Ellipsis)
        return full and reaches_last and isinstance(index[-1], slice)
    view = reader.value(writer.args[0]) if isinstance(writer.args[0], Node) else None
    call = None if view is None else view.call
    if call is None or call.name != "slice" or call.args[0].node is not node:
        return False
    name = str(getattr(writer.target, "__name__", writer.target))
    return name.split(".")[0] == "copy_" and int(call.argument(1, "dim", 0)) % rank == rank - 1


_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # which argument has the rows; columns come next
_NORMS = {"native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"}
_ELEMENTWISE = {"_to_copy", "copy", "complex", "polar", "detach", "_conj"}  # beside what torch tags as pointwise
_SOFTMAXES = {"_softmax", "_log_softmax"}
_REDUCTIONS = {"mean": 1, "sum": 1, "amax": 1, "amin": 1, "var": 1, "var_mean": 1, "linalg_vector_norm": 2}  # of dims


def earlier(call: Call, layout: Layout) -> Iterator[tuple[Value, Layout]]:
    """The arguments of a call that have the same tokens at the same places, with their layouts."""
    if is_layout(call):
        if (at := before(call, layout)) is not None:
            yield call.args[0], at
    elif torch.Tag.pointwise in call.op.tags or call.name in _ELEMENTWISE:
        yield from ((x, broadcast(layout, x.shape)) for x in call.inputs if len(x.shape) <= len(layout))
    elif call.name in _PRODUCTS:
        rows, columns = call.args[_PRODUCTS[call.name] :][:2]
        inner, lead = new_dim(rows.shape[-1]), layout[:-2]
        yield rows, (*layout[:-1], inner)
        yield columns, (*lead, inner, layout[-1])
        yield from ((x, broadcast(layout, x.shape)) for x in call.inputs[:-2])
    elif call.name == "linear":
        x, weight, *bias = call.inputs
        if len(weight.shape) == 2:
            yield x, (*layout[:-1], new_dim(x.shape[-1]))
            yield weight, (layout[-1], new_dim(weight.shape[-1]))
            yield from ((y, layout[-1:]) for y in bias)
    elif call.name in _NORMS:
        rank = len(layout) - len(call.args[1])  # a norm over the tokens loses them here
        yield call.args[0], (*layout[:rank], *map(new_dim, call.args[0].shape[rank:]))
        yield from ((y, tuple(map(new_dim, y.shape))) for y in call.inputs[1:])
    elif call.name == "native_group_norm":
        x, *others = call.inputs
        yield x, (*map(new_dim, x.shape[:2]), *layout[2:])
        yield from ((y, tuple(map(new_dim, y.shape))) for y in others)
    elif call.name in _REDUCTIONS:
        yield call.args[0], _unreduced(call, layout)
    else:
        yield from _cut(call, layout)


def mixes(call: Call, rank: int) -> set[int] | None:
    """Along which dimensions of its result, of this rank, a call brings together what stands at several places.

    Along all others :func:`earlier` says all that it reads. None: nothing is known of the call.
    """
    known = is_layout(call) or torch.Tag.pointwise in call.op.tags
    if call.random:
        return None
    if call.name in _NORMS:
        return set(range(rank - len(call.args[1]), rank))
    if call.name == "native_group_norm":
        return {0, 1}
    if not known and call.name in (*_CUTS, "stack"):
        return {_cut_dim(call, rank)}
    if call.name in _SOFTMAXES:
        return {int(call.args[1]) % rank}
    if call.name == "view_as_real":
        return {rank - 1}
    known = known or call.name in (*_ELEMENTWISE, *_VIEWS, *_PRODUCTS, *_REDUCTIONS, "linear")
    return set() if known else None


def _unreduced(call: Call, layout: Layout) -> Layout:
    """The layout of what was summed up along some dimensions."""
    x = call.args[0]
    given = call.argument(_REDUCTIONS[call.name], "dim")
    rank = len(x.shape)
    dims = {int(d) % rank for d in ([given] if isinstance(given, int) else given or range(rank))}
    left = iter(layout if len(layout) < rank else [dim for i, dim in enumerate(layout) if i not in dims])
    return tuple(new_dim(size) if i in dims else next(left) for i, size in enumerate(x.shape))


_CUTS = {"slice", "split", "split_with_sizes", "chunk", "cat", "slice_scatter"}
_VIEWS = {"select", "unbind", "stack", "view_as_complex", "view_as_real"}


def _cut_dim(call: Call, rank: int) -> int:
    return int(call.argument(1 if call.name in ("slice", "cat", "stack") else 2, "dim", 0)) % rank


def _cut(call: Call, layout: Layout) -> Iterator[tuple[Value, Layout]]:
    """Calls that cut or join along a dimension: the other dimensions keep their axes."""
    rank = len(layout)
    if call.name in _CUTS:
        dim = _cut_dim(call, rank)
        for x in call.inputs:
            if len(x.shape) == rank:
                yield x, (*layout[:dim], new_dim(x.shape[dim]), *layout[dim + 1 :])
    elif call.name in ("select", "unbind"):
        x = call.args[0]
        dim = int(call.argument(1, "dim", 0)) % (rank + 1)
        yield x, (*layout[:dim], new_dim(x.shape[dim]), *layout[dim:])
    elif call.name == "stack":
        dim = _cut_dim(call, rank)
        yield from ((x, (*layout[:dim], *layout[dim + 1 :])) for x in call.inputs)
    elif call.name in _SOFTMAXES:
        yield call.args[0], layout
    elif call.name == "view_as_complex":
        yield call.args[0], (*layout, new_dim(2))
    elif call.name == "view_as_real":
        yield call.args[0], layout[:-1]
