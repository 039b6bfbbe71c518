"""Which version of a tensor a node reads, after it was changed in place in every way that a graph can spell."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import CHECKPOINT, Builder

from sparge_compile.passes.read.calls import Calls
from sparge_compile.passes.read.writes import Writes, may_write

aten = torch.ops.aten


def writes_of(b: Builder, *outputs) -> Writes:
    return Writes(Calls(b.module(*outputs)))


IN_PLACE = {
    "mul_": lambda b, x, y: b.method("mul_", x, 2),
    "masked_fill_": lambda b, x, y: b.method("masked_fill_", x, b.call(torch.gt, y, 0), 0.0),
    "*=": lambda b, x, y: b.call(operator.imul, x, 2),
    "+=": lambda b, x, y: b.call(operator.iadd, x, y),
    "/=": lambda b, x, y: b.call(operator.itruediv, x, 2),
    "__iadd__": lambda b, x, y: b.method("__iadd__", x, y),
    "item": lambda b, x, y: b.call(operator.setitem, x, 0, 1.0),
    "slice": lambda b, x, y: b.call(operator.setitem, x, (slice(None), slice(0, 2)), 1.0),
    "out": lambda b, x, y: b.call(torch.mul, y, 2, out=x),
    "overload": lambda b, x, y: b.call(aten.mul_.Tensor, x, y),
    "packet": lambda b, x, y: b.call(aten.mul_, x, y),
    "copy_": lambda b, x, y: b.call(aten.copy_.default, x, y),
    "relu inplace": lambda b, x, y: b.call(F.relu, x, inplace=True),
    "relu True": lambda b, x, y: b.call(F.relu, x, True),
    "module": lambda b, x, y: b.module_call("act", torch.nn.ReLU(inplace=True), x),
    "zero_": lambda b, x, y: b.call(torch.zero_, x),
}
QUIET = {
    "mul": lambda b, x, y: b.method("mul", x, 2),
    "*": lambda b, x, y: b.call(operator.mul, x, 2),
    "relu": lambda b, x, y: b.call(F.relu, x),
    "relu False": lambda b, x, y: b.call(F.relu, x, False),
    "sum with a True": lambda b, x, y: b.call(torch.sum, x, 0, True),
    "module": lambda b, x, y: b.module_call("act", torch.nn.ReLU(), x),
    "out elsewhere": lambda b, x, y: b.call(torch.mul, x, 2, out=y),
    "copy into a copy": lambda b, x, y: b.method("copy_", b.method("clone", x), y),
    "change of a copy": lambda b, x, y: b.call(operator.imul, b.method("clone", x), 2),
}


def around(make):
    """x, read before and after what ``make`` puts in between."""
    b = Builder()
    x, y = b.input("x", 3, 4), b.input("y", 3, 4)
    early = b.call(torch.exp, x)
    between = make(b, x, y)
    late = b.call(torch.exp, x)
    return writes_of(b, early, late), x, early, between, late


@pytest.mark.parametrize("case", IN_PLACE)
def test_who_reads_after_a_change_sees_the_change(case):
    writes, x, early, writer, late = around(IN_PLACE[case])
    assert writes.version(x, early) is x
    assert writes.version(x, late) is writer
    assert writes.writers(x) == [writer] and writes.written(writer) == [x]
    assert writes.changed(x, x, None) and writes.changed(x, early, late)
    assert not writes.changed(x, writer, late)
    assert not writes.changed(x, early, late, ignore=[writer])


@pytest.mark.parametrize("case", QUIET)
def test_who_reads_what_was_not_changed_sees_it(case):
    writes, x, _, between, late = around(QUIET[case])
    assert writes.version(x, late) is x
    assert writes.writers(x) == [] and x not in writes.written(between)
    assert not writes.changed(x, x, None)


@pytest.mark.parametrize("spelling", [operator.ior, operator.iand, operator.ixor], ids=lambda f: f.__name__)
def test_boolean_operators_in_place(spelling):
    b = Builder()
    x, y = b.input("x", 3, dtype=torch.bool), b.input("y", 3, dtype=torch.bool)
    writer = b.call(spelling, x, y)
    late = b.call(torch.logical_not, x)
    writes = writes_of(b, late)
    assert writes.version(x, late) is writer and writes.version(y, late) is y


def test_shifts_in_place():
    b = Builder()
    x = b.input("x", 3, dtype=torch.int32)
    writer = b.call(operator.irshift, x, 1)
    late = b.call(torch.neg, x)
    assert writes_of(b, late).version(x, late) is writer


def test_changes_one_after_the_other():
    b = Builder()
    x = b.input("x", 3)
    first = b.method("mul_", x, 2)
    middle = b.call(torch.exp, x)
    second = b.method("add_", first, 1)
    late = b.call(torch.exp, x)
    writes = writes_of(b, middle, late)
    assert writes.version(x, middle) is first
    assert writes.version(x, late) is second
    assert writes.version(first, late) is second
    assert writes.writers(x) == [first, second]


VIEWS = {
    "view": lambda b, x: b.method("view", x, -1),
    "transpose": lambda b, x: b.method("transpose", x, 0, 1),
    "slice": lambda b, x: b.call(operator.getitem, x, (slice(None), slice(0, 2))),
    "row": lambda b, x: b.call(operator.getitem, x, 0),
    "expand": lambda b, x: b.method("unsqueeze", x, 0),
}


@pytest.mark.parametrize("view", VIEWS)
def test_what_was_changed_through_a_view_has_no_version(view):
    b = Builder()
    x = b.input("x", 3, 4)
    seen = VIEWS[view](b, x)
    writer = b.method("mul_", seen, 2)
    late = b.call(torch.exp, x)
    writes = writes_of(b, late)
    assert writes.version(x, late) is None
    assert writes.version(seen, late) is writer
    assert writes.writers(x) == writes.writers(seen) == [writer]
    assert writes.changed(x, x, late)


def test_a_copy_of_a_view_is_another_tensor():
    b = Builder()
    x = b.input("x", 3, 4)
    copied = b.method("clone", b.method("t", x))
    b.method("mul_", copied, 2)
    late = b.call(torch.exp, x)
    writes = writes_of(b, late)
    assert writes.version(x, late) is x and writes.writers(x) == []


def nested_graph(outer: Builder, make) -> torch.fx.GraphModule:
    b = Builder(of=outer)
    return b.module(make(b, b.input("inner", 3, 4)))


@pytest.mark.parametrize("writing", [True, False], ids=["writes", "reads"])
def test_a_graph_that_an_operator_runs_may_change_its_inputs(writing):
    b = Builder()
    x, other = b.input("x", 3, 4), b.input("other", 3, 4)
    body = nested_graph(b, lambda inner, y: inner.method("mul_" if writing else "mul", y, 2))
    caller = b.nested(CHECKPOINT, body, x)
    late = b.call(torch.exp, x)
    writes = writes_of(b, caller, late, other)
    assert writes.version(x, late) is (caller if writing else x)
    assert writes.writers(x) == [caller] * writing
    assert writes.version(other, late) is other


def test_a_graph_within_a_nested_graph_may_write_too():
    b = Builder()
    x = b.input("x", 3, 4)
    middle = Builder(of=b)
    y = middle.input("middle", 3, 4)
    innermost = nested_graph(b, lambda inner, z: inner.method("mul_", z, 2))
    body = middle.module(middle.call(operator.getitem, middle.nested(CHECKPOINT, innermost, y), 0))
    caller = b.nested(CHECKPOINT, body, x)
    late = b.call(torch.exp, x)
    assert writes_of(b, late).version(x, late) is caller


@torch.library.custom_op("sparge_test_writes::double", mutates_args={"x"})
def double(x: torch.Tensor) -> None:
    x.mul_(2)


double.register_fake(lambda x: None)


def test_custom_operators_say_what_they_change():
    writes, x, _, writer, late = around(lambda b, x, y: b.call(torch.ops.sparge_test_writes.double.default, x))
    assert may_write(writer) and writes.writers(x) == [writer] and writes.changed(x, x, late)


def _unknown_(x, y):
    raise RuntimeError("cannot run on fake tensors")


def test_what_cannot_be_run_but_is_named_in_place_may_change_all_its_inputs():
    b = Builder()
    x, y, z = (b.input(name, 3) for name in "xyz")
    writer = b.opaque(_unknown_, x, y, value=x.meta["example_value"])
    writes = writes_of(b, writer, z)
    assert writes.writers(x) == writes.writers(y) == [writer] and writes.writers(z) == []


def test_a_tensor_inside_vmap_lies_where_the_one_outside_lies():
    from torch._C._functorch import _add_batch_dim, _remove_batch_dim, _vmap_decrement_nesting, _vmap_increment_nesting

    b = Builder()
    x = b.input("x", 3, 4)
    level = _vmap_increment_nesting(3, "error")
    try:
        wrapped = b.call(_add_batch_dim, x, 0, level)
        changed = b.method("add_", wrapped, 1)
        back = b.call(_remove_batch_dim, wrapped, level, 3, 0)
        late = b.call(torch.exp, x)
        writes = writes_of(b, back, late)
        assert writes.writers(x) == [changed] and writes.version(x, changed) is x
        assert writes.version(x, late) is None  # changed through what wraps it
    finally:
        _vmap_decrement_nesting()


def test_tensors_without_storage_are_taken_to_share_theirs():
    b = Builder()
    x, y = b.input("x", 3, 4), b.input("y", 3, 4)
    sparse = b.method("to_sparse", x)
    other = b.method("to_sparse", y)
    changed = b.method("mul_", sparse, 2)
    late = b.call(torch.exp, x)
    writes = writes_of(b, changed, other, late)
    assert writes.writers(other) == [changed] and writes.writers(x) == []


def test_a_tensor_subclass_lies_where_its_parts_lie():
    from torch.testing._internal.two_tensor import TwoTensor

    b = Builder()
    x, y = b.input("x", 3, 4), b.input("y", 3, 4)
    both = b.call(TwoTensor, x, y)
    changed = b.method("mul_", both, 2)
    late = b.call(torch.exp, y)
    writes = writes_of(b, changed, late)
    assert changed in writes.writers(y) and writes.version(y, late) is None
