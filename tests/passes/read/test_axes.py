"""Layouts through views, permutations and broadcasts: they say which element stands where."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from graphs import Builder, leaf
from hypothesis import given
from hypothesis import strategies as st

from sparge_compile.passes.read import axes
from sparge_compile.passes.read.calls import Value


def follow(value: Value, layout: axes.Layout) -> axes.Layout | None:
    """The layout of a value from that of the node that it was computed from."""
    if value.call is None:
        return layout
    before = follow(value.call.args[0], layout)
    return None if before is None else axes.after(value.call, before, value.shape)


def back(value: Value, layout: axes.Layout) -> axes.Layout | None:
    """The layout of the node that a value was computed from, from that of the value."""
    while value.call is not None:
        earlier = axes.before(value.call, layout)
        if earlier is None:
            return None
        value, layout = value.call.args[0], earlier
    return axes.settle(layout)


def value_after(shape, method, *args):
    """What a method of an input of this shape computes."""
    b = Builder()
    x = b.input("x", *shape)
    y = b.method(method, x, *args)
    return b.reader(y).value(y)


def sizes(layout):
    return [[axis.size for axis in dim] for dim in axes.settle(layout)]


def position(dim, coordinates):
    """The index in a dimension at which the coordinates of its axes stand."""
    index = 0
    for axis in axes.settle_dim(dim):
        index = index * axis.size + coordinates[axis]
    return index


@st.composite
def walks(draw):
    """A shape, and some reshapes and permutations of it."""
    atoms = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    steps, shape = [], list(atoms)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(shape))))
            steps.append(("permute", *order))
            shape = [shape[i] for i in order]
        else:
            cut = draw(st.integers(0, len(shape)))
            merged = [math.prod(shape[:cut]), *shape[cut:]] if cut else shape
            split = [[2, n // 2] if n % 2 == 0 and draw(st.booleans()) else [n] for n in merged]
            shape = [n for part in split for n in part]
            steps.append(("reshape", *shape))
    return atoms, steps


@given(walks())
def test_a_layout_says_which_element_stands_where(walk):
    shape, steps = walk
    b = Builder()
    node, x = b.input("x", *shape), torch.arange(math.prod(shape)).reshape(shape)
    nodes = []
    for method, *args in steps:
        node, x = b.method(method, node, *args), getattr(x, method)(*args)
        nodes.append(node)
    reader = b.reader(node)
    first = layout = axes.new_layout(shape)
    for node in nodes:
        layout = follow(reader.value(node), layout)
        if layout is None:  # a reshape that cuts across axes: nothing is claimed
            return
    layout, first = axes.settle(layout), axes.settle(first)
    every = axes.axes_of(first)
    assert sorted(map(id, every)) == sorted(map(id, axes.axes_of(layout)))
    for at in itertools.product(*(range(axis.size) for axis in every)):
        coordinates = dict(zip(every, at, strict=True))
        there = tuple(position(dim, coordinates) for dim in layout)
        here = tuple(position(dim, coordinates) for dim in first)
        origin = 0
        for index, size in zip(here, shape, strict=True):
            origin = origin * size + index
        assert x[there].item() == origin
    for node in reversed(nodes):
        layout = back(reader.value(node), layout)
    assert layout == first


def test_a_dimension_of_size_one_has_no_axis():
    assert sizes(axes.new_layout((2, 1, 3))) == [[2], [], [3]]


def test_splitting_an_axis_is_seen_in_layouts_made_before():
    before = axes.new_layout((12, 5))
    after = axes.reshape(before, (3, 4, 5))
    assert sizes(after) == [[3], [4], [5]]
    assert sizes(before) == [[3, 4], [5]]
    assert axes.reshape(after, (12, 5)) == axes.settle(before)


def test_a_reshape_that_cuts_across_axes_has_no_layout():
    assert axes.reshape(axes.new_layout((2, 3)), (6,)) is not None
    assert axes.reshape(axes.new_layout((2, 3)), (3, 2)) is None
    assert axes.reshape(axes.new_layout((2, 3)), (2,)) is None  # something is left over
    assert axes.reshape(axes.new_layout((2,)), (2, 3)) is None  # something is lacking


def test_expand_gives_new_axes_and_keeps_the_others():
    value = value_after((3, 1), "expand", 2, 3, 4)
    rows, one = axes.new_layout((3, 1))
    made = axes.after(value.call, (rows, one), value.shape)
    assert made[1] == rows and sizes(made) == [[2], [3], [4]]
    assert axes.before(value.call, made) == (rows, ())


def test_a_tiled_dimension_has_its_own_axis_within_the_larger_one():
    value = value_after((3,), "repeat", 2)
    whole = axes.new_layout((6,))
    assert sizes(axes.before(value.call, whole)) == [[3]]
    assert sizes(whole) == [[2, 3]]
    assert axes.after(value.call, axes.new_layout((3,)), value.shape) is None  # not told forwards


def test_a_repeat_that_repeats_nothing_keeps_the_layout():
    value = value_after((3, 2), "repeat", 1, 1)
    layout = axes.new_layout((3, 2))
    assert axes.after(value.call, layout, value.shape) == layout


LAYOUTS = {
    "view": ((2, 6), "view", 3, 4),
    "transpose": ((2, 6), "transpose", 0, 1),
    "t": ((2, 6), "t"),
    "contiguous copy": ((2, 6), "clone"),
    "cast between floating dtypes": ((2, 6), "to", torch.bfloat16),
    "slice of all": ((2, 6), "narrow", 1, 0, 6),
    "select of the only one": ((1, 6), "select", 0, 0),
    "expand": ((1, 6), "expand", 4, 6),
}
NO_LAYOUTS = {
    "slice of some": ((2, 6), "narrow", 1, 0, 5),
    "select of one of two": ((2, 6), "select", 0, 0),
    "cast to whole numbers": ((2, 6), "to", torch.int64),
    "cast to bool": ((2, 6), "to", torch.bool),
    "flip": ((2, 6), "flip", 0),
    "roll": ((2, 6), "roll", 1),
    "product": ((2, 6), "mul", 2),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_only_lays_out_anew(case):
    value = value_after(*LAYOUTS[case])
    assert value.call is not None and axes.is_layout(value.call)


@pytest.mark.parametrize("case", NO_LAYOUTS)
def test_what_does_more_than_lay_out_anew(case):
    assert not axes.is_layout(value_after(*NO_LAYOUTS[case]).call)


@pytest.mark.parametrize("step", [1, 2])
def test_a_slice_of_every_second_entry_is_no_layout(step):
    b = Builder()
    y = b.call(torch.ops.aten.slice.Tensor, b.input("x", 6), 0, 0, None, step)
    assert axes.is_layout(b.reader(y).value(y).call) == (step == 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_copy_on_another_device_is_another_tensor(device):
    b = Builder()
    x = b.input("x", 2, 6)
    y = b.call(torch.ops.aten._to_copy.default, x, device=device)
    assert axes.is_layout(b.reader(y).value(y).call) == (device == "cpu")


def test_an_operand_that_was_broadcast_has_the_axes_of_the_dimensions_that_it_has():
    layout = axes.new_layout((2, 3, 4))
    assert axes.broadcast(layout, (3, 4)) == layout[1:]
    assert axes.broadcast(layout, (2, 1, 4)) == (layout[0], (), layout[2])


def test_symbolic_sizes_are_compared_without_a_guard():
    b = Builder()
    x = b.input("x", 8, 6, dynamic=(0,))
    shape = leaf(x).shape
    assert axes.same(shape[0], shape[0]) and not axes.same(shape[0], 8)
    merged = axes.reshape(axes.new_layout(shape), (shape[0] * 2, 3))
    assert [len(dim) for dim in merged] == [2, 1]
    assert axes.reshape(axes.new_layout(shape), (4, 12)) is None  # 8 is only an example
    assert not b.mode.shape_env.guards
