"""Reading backwards: what computed a value, which nodes hold it, and where the way ends."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, end_of, leaf

from sparge_compile.passes.read.axes import new_layout


def holders_of(b: Builder, node, *others):
    """The nodes that hold what the output reads as ``node``, nearest first."""
    reader = b.reader(node, *others)
    return reader.holders(leaf(node), end_of(reader), new_layout(leaf(node).shape))


def test_a_tensor_is_held_by_all_nodes_back_to_where_it_is_more_than_laid_out_anew():
    b = Builder()
    x = b.input("x", 2, 6)
    doubled = b.call(torch.mul, x, 2)
    split = b.method("view", doubled, 2, 3, 2)
    moved = b.method("transpose", split, 0, 1)
    found = holders_of(b, moved)
    assert [held.node for held in found] == [moved, split, doubled]
    assert [held.user.op for held in found] == ["output", "call_method", "call_method"]
    (three, two, half), of_split, of_doubled = found[0].layout, found[1].layout, found[2].layout
    assert of_split == (two, three, half) and of_doubled == (two, (*three, *half))


def test_an_input_is_the_last_holder():
    b = Builder()
    x = b.input("x", 2, 6)
    assert [held.node for held in holders_of(b, b.method("t", x))][-1] is x


def test_copies_are_noted_and_views_are_not():
    b = Builder()
    x = b.input("x", 2, 6)
    copied = b.method("contiguous", b.method("clone", b.method("t", x)))
    found = holders_of(b, copied)
    assert found[-1].node is x and found[-1].copied and not found[0].copied
    b = Builder()
    x = b.input("x", 2, 6)
    assert not any(held.copied for held in holders_of(b, b.method("t", x)))


def test_the_way_ends_where_a_gradient_is_stopped():
    b = Builder()
    x = b.input("x", 2, 6, requires_grad=True)
    with torch.no_grad():
        stopped = b.method("clone", x)
    assert [held.node for held in holders_of(b, stopped)] == [stopped]
    b = Builder()
    x = b.input("x", 2, 6, requires_grad=True)
    kept = b.method("clone", x)
    assert [held.node for held in holders_of(b, kept)] == [kept, x]


def test_an_inner_step_of_a_node_is_held_by_no_node():
    b = Builder()
    x, y = b.input("x", 2, 3, 4), b.input("y", 2, 4, 5)
    product = b.call(torch.matmul, x, y)
    reader = b.reader(product)
    inner = reader.value(product)
    while inner.call.name != "bmm":
        inner = inner.call.args[0]
    assert reader.holder(inner, product) is None
    assert reader.holder(leaf(product), end_of(reader)) is product


def test_a_definition_is_the_call_and_its_node():
    b = Builder()
    x = b.input("x", 2, 3)
    y = b.call(torch.exp, x)
    reader = b.reader(y)
    value, node = reader.definition(leaf(y), end_of(reader))
    assert node is y and value.call.name == "exp"
    assert reader.definition(leaf(x), y) is None  # an input has none


def test_a_definition_is_that_of_the_version_that_is_read():
    b = Builder()
    x = b.input("x", 2, 3)
    y = b.call(torch.exp, x)
    early = b.call(torch.neg, y)
    writer = b.method("mul_", y, 2)
    late = b.call(torch.neg, y)
    reader = b.reader(early, late)
    value, node = reader.definition(leaf(y), early)
    assert (value.call.name, node) == ("exp", y)
    value, node = reader.definition(leaf(y), late)
    assert (value.call.name, node) == ("mul", writer)
    assert reader.holder(leaf(y), late) is writer and reader.holder(leaf(y), early) is y


def test_what_was_changed_through_a_view_has_no_definition():
    b = Builder()
    y = b.call(torch.exp, b.input("x", 2, 3))
    b.method("mul_", b.method("view", y, -1), 2)
    late = b.call(torch.neg, y)
    reader = b.reader(late)
    assert reader.definition(leaf(y), late) is None
    assert [held.node for held in reader.holders(leaf(y), late, new_layout((2, 3)))] == [y]


PURE = {
    "add": lambda b, x: b.call(torch.add, x, 1),
    "overload": lambda b, x: b.call(torch.ops.aten.add.Tensor, x, 1),
    "method": lambda b, x: b.method("view", x, -1),
    "module": lambda b, x: b.module_call("act", torch.nn.ReLU(), x),
    "dropout in evaluation": lambda b, x: b.call(F.dropout, x, 0.5, False),
}


def _raises(x):
    raise RuntimeError("cannot run on fake tensors")


IMPURE = {
    "add_": lambda b, x: b.method("add_", x, 1),
    "overload in place": lambda b, x: b.call(torch.ops.aten.add_.Tensor, x, 1),
    "+=": lambda b, x: b.call(operator.iadd, x, 1),
    "item": lambda b, x: b.call(operator.setitem, x, 0, 1.0),
    "dropout": lambda b, x: b.call(F.dropout, x, 0.5),
    "random overload": lambda b, x: b.call(torch.ops.aten.bernoulli.p, x, 0.5),
    "unknown": lambda b, x: b.opaque(_raises, x, value=x.meta["example_value"]),
    "module in place": lambda b, x: b.module_call("act", torch.nn.ReLU(inplace=True), x),
}


@pytest.mark.parametrize("case", [*PURE, *IMPURE])
def test_whether_only_its_result_tells_that_a_node_ran(case):
    b = Builder()
    node = (PURE | IMPURE)[case](b, b.input("x", 4))
    assert b.reader(node).is_pure(node) == (case in PURE)


def test_nodes_stand_in_the_order_of_the_graph():
    b = Builder()
    x = b.input("x", 2)
    y = b.call(torch.exp, x)
    reader = b.reader(y)
    assert [reader.position(node) for node in (x, y, end_of(reader))] == [0, 1, 2]


def test_what_nobody_reads_in_the_end_is_dead():
    """But what acts by itself, or is no tensor that is known, is not."""
    b = Builder()
    x = b.input("x", 2, 6)
    read = b.call(torch.neg, x)
    mean = b.call(torch.mean, x, 1)
    centred = b.call(torch.sub, mean, 1.0)
    checked = b.call(torch.gt, x, 0)
    b.opaque(torch.ops.aten._assert_async.default, b.call(torch.all, checked))
    b.method("mul_", b.call(torch.abs, x), 2.0)
    b.opaque(print, read)
    seen = b.opaque(torch.ops.aten._assert_tensor_metadata.default, x, None, None, torch.float32)  # as export has it
    reader = b.reader(read)
    assert {node for node in reader.owner.graph.nodes if reader.is_dead(node)} == {mean, centred, seen}
    assert reader.dead_readers(x) == [mean, centred, seen] and reader.dead_readers(read) == []
