"""Nodes as ATen calls: one name for all spellings, what is changed in place, what is random."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder

from sparge_compile.passes.read.calls import Calls

aten = torch.ops.aten


def lowered(make):
    """A one-node graph over x [2, 3] and y [2, 3]: the node, its inputs, and what lowering says."""
    b = Builder()
    x, y = b.input("x", 2, 3), b.input("y", 2, 3)
    node = make(b, x, y)
    return node, (x, y), Calls(b.module(node))


SPELLINGS = {
    "operator": ("add", lambda b, x, y: b.call(operator.add, x, y)),
    "torch": ("add", lambda b, x, y: b.call(torch.add, x, y)),
    "method": ("add", lambda b, x, y: b.method("add", x, y)),
    "method in place": ("add", lambda b, x, y: b.method("add_", x, y)),
    "operator in place": ("add", lambda b, x, y: b.call(operator.iadd, x, y)),
    "overload": ("add", lambda b, x, y: b.call(aten.add.Tensor, x, y)),
    "packet": ("add", lambda b, x, y: b.call(aten.add, x, y)),
    "truediv": ("div", lambda b, x, y: b.call(operator.truediv, x, y)),
    "module": ("relu", lambda b, x, y: b.module_call("act", torch.nn.ReLU(), x)),
    "function": ("relu", lambda b, x, y: b.call(F.relu, x)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_the_same_call(spelling):
    name, make = SPELLINGS[spelling]
    node, (x, y), calls = lowered(make)
    value = calls.value(node)
    assert value.call.name == name
    assert [read.node for read in value.call.inputs] == [x, y][: len(value.call.inputs)]


def test_a_product_of_four_dimensions_is_views_around_one_bmm():
    b = Builder()
    q, k, _ = b.qkv()
    node = b.call(operator.matmul, q, b.method("transpose", k, 2, 3))
    value, names = Calls(b.module(node)).value(node), []
    while value.call is not None:
        names.append(value.call.name)
        value = value.call.args[0]
    assert value.node is q and "bmm" in names
    assert set(names) <= {"bmm", "view", "_unsafe_view", "expand", "reshape", "clone"}


def test_a_node_is_lowered_once():
    node, _, calls = lowered(lambda b, x, y: b.call(torch.add, x, y))
    assert calls.value(node) is calls.value(node)


def test_arguments_by_position_name_and_default():
    node, _, calls = lowered(lambda b, x, y: b.call(torch.add, x, y, alpha=3))
    call = calls.value(node).call
    assert (call.argument(2, "alpha", 1), call.argument(9, "missing", "default")) == (3, "default")
    assert call.argument(0, "self") is call.args[0]


MUTATIONS = {
    "method": (0, lambda b, x, y: b.method("mul_", x, 2)),
    "operator": (0, lambda b, x, y: b.call(operator.imul, x, y)),
    "second argument": (1, lambda b, x, y: b.method("copy_", y, x)),
    "out": (1, lambda b, x, y: b.call(torch.exp, x, out=y)),
    "item": (0, lambda b, x, y: b.call(operator.setitem, x, 0, 1.0)),
    "flag": (0, lambda b, x, y: b.call(F.relu, x, inplace=True)),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_the_input_that_is_changed_is_named(case):
    which, make = MUTATIONS[case]
    node, inputs, calls = lowered(make)
    assert calls.mutated(node) == [inputs[which]]
    assert not calls.runs_quietly(node)


def test_what_changes_nothing_names_no_input():
    node, _, calls = lowered(lambda b, x, y: b.call(torch.mul, x, y))
    assert calls.mutated(node) == [] and calls.runs_quietly(node)


def test_randomness_is_noted():
    node, _, calls = lowered(lambda b, x, y: b.call(aten.bernoulli.p, x, 0.5))
    assert calls.value(node).call.random and not calls.runs_quietly(node)
    node, _, calls = lowered(lambda b, x, y: b.call(F.dropout, x, 0.5))
    assert not calls.runs_quietly(node)
    node, _, calls = lowered(lambda b, x, y: b.call(torch.rand_like, x))
    assert not calls.runs_quietly(node)
    node, _, calls = lowered(lambda b, x, y: b.call(F.dropout, x, 0.5, False))
    assert calls.runs_quietly(node)


def _raises(x, y):
    raise RuntimeError("cannot run on fake tensors")


def test_of_what_cannot_be_run_nothing_is_known():
    b = Builder()
    x, y = b.input("x", 2, 3), b.input("y", 2, 3)
    node = b.opaque(_raises, x, y, value=x.meta["example_value"])
    calls = Calls(b.module(node))
    assert calls.value(node) is None
    assert calls.mutated(node) == [x, y]  # either may be changed
    assert not calls.runs_quietly(node)


def test_a_module_with_parameters_is_not_run():
    node, _, calls = lowered(lambda b, x, y: b.module_call("linear", torch.nn.Linear(3, 3), x))
    assert calls.value(node) is None


def test_inputs_and_higher_order_operators_are_leaves():
    node, (x, _), calls = lowered(lambda b, x, y: b.call(torch.add, x, y))
    assert calls.value(x) is None
    (read, _) = calls.value(node).call.inputs
    assert read.node is x and read.call is None


def test_an_item_of_a_tuple_is_what_was_put_there():
    b = Builder()
    x = b.input("x", 2, 6)
    parts = b.method("chunk", x, 3, -1)
    last = b.call(operator.getitem, parts, 2)
    calls = Calls(b.module(last))
    assert calls.value(parts) is None  # not one tensor
    value = calls.value(last)
    assert value.shape == (2, 2) and value.call is not None


def test_the_dtype_of_an_input_is_the_graph_s():
    b = Builder()
    x = b.input("x", 2, 3, dtype=torch.bfloat16)
    node = b.call(torch.exp, x)
    (read,) = Calls(b.module(node)).value(node).call.inputs
    assert read.dtype == torch.bfloat16


def test_the_module_s_own_tensors_are_read():
    b = Builder()
    x = b.input("x", 2, 3)
    weight = b.attribute("weight", torch.nn.Parameter(torch.ones(2, 3)))
    node = b.graph.call_function(torch.mul, (x, weight))
    node.meta["example_value"] = x.meta["example_value"]
    calls = Calls(b.module(node))
    assert calls.fake(weight) is b.root.weight
    assert [read.node for read in calls.value(node).call.inputs] == [x, weight]
