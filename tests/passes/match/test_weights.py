"""From attention weights to their product with V: what may stand between, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, leaf

from sparge_compile.passes.match.attention import Refusal
from sparge_compile.passes.match.weights import Product, may_hold_tensor, product_of
from sparge_compile.passes.read.axes import new_layout
from sparge_compile.report import Reason

L, S, D = 6, 10, 4


def read(make, returned=lambda weights, made: [made]):
    """What is told of weights [1, 2, L, S] that ``make`` brings to a result; V is [1, 2, S, D]."""
    b = Builder()
    weights = b.call(torch.softmax, b.input("scores", 1, 2, L, S), -1)
    v = b.input("v", 1, 2, S, D)
    made = make(b, weights, v)
    reader = b.reader(*returned(weights, made))
    layout = new_layout((1, 2, L, S))
    return product_of(reader, weights, layout, layout[-1]), made, layout


def sizes(layout):
    return [[axis.size for axis in dim] for dim in layout]


PRODUCTS = {
    "matmul": lambda b, w, v: b.call(torch.matmul, w, v),
    "method": lambda b, w, v: b.method("matmul", w, v),
    "einsum": lambda b, w, v: b.call(torch.einsum, "bhls,bhsd->bhld", w, v),
    "dropout in evaluation": lambda b, w, v: b.call(torch.matmul, b.call(F.dropout, w, 0.5, False), v),
    "cast": lambda b, w, v: b.call(torch.matmul, b.method("to", b.method("double", w), torch.float32), v),
    "views": lambda b, w, v: b.call(torch.bmm, b.method("view", w, 2, L, S), b.method("view", v, 2, S, D)),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_the_product_with_values_is_found(case):
    found, made, layout = read(PRODUCTS[case])
    assert isinstance(found, Product), found
    assert found.node is made and sizes(found.layout)[-2:] == [[L], [D]]
    assert found.layout[-2] == layout[-2] and layout[-1][0] in [axis for dim in found.other.layout for axis in dim]


def test_the_product_of_what_is_transposed_is_found():
    def transposed(b, w, v):
        return b.call(torch.matmul, b.method("transpose", v, -1, -2), b.method("transpose", w, -1, -2))

    found, _, layout = read(transposed)
    assert isinstance(found, Product) and sizes(found.layout)[-2:] == [[D], [L]]
    assert found.layout[-1] == layout[-2]


def other_axis(b, w, v):
    return b.call(torch.matmul, b.method("transpose", w, -1, -2), b.input("rows", 1, 2, L, D))


REFUSED = {
    "scaled": (Reason.SCORES_CHANGED, lambda b, w, v: b.call(torch.matmul, b.call(torch.mul, w, 2), v)),
    "squared": (Reason.SCORES_CHANGED, lambda b, w, v: b.call(torch.matmul, b.call(torch.mul, w, w), v)),
    "dropout": (Reason.DROPOUT, lambda b, w, v: b.call(torch.matmul, b.call(F.dropout, w, 0.5), v)),
    "over another axis": (Reason.NOT_ATTENTION, other_axis),
    "twice": (
        Reason.WEIGHTS_USED,
        lambda b, w, v: b.call(torch.add, b.call(torch.matmul, w, v), b.call(torch.matmul, w, v)),
    ),
    "summed": (Reason.SCORES_CHANGED, lambda b, w, v: b.method("sum", w, -1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_uses_are_refused(case):
    reason, make = REFUSED[case]
    found, _, _ = read(make)
    assert isinstance(found, Refusal) and found.reason is reason


FILLED = {
    "masked_fill": (0.0, lambda b, w, m: b.method("masked_fill", w, m, 0.0)),
    "where": (0.0, lambda b, w, m: b.call(torch.where, m, b.call(torch.zeros_like, w), w)),
    "where, kept": (0.5, lambda b, w, m: b.call(torch.where, m, w, 0.5)),
}


@pytest.mark.parametrize("case", FILLED)
def test_where_weights_are_set_to_a_number_is_noted(case):
    """Whether it may be done is asked when the masks of the scores are known."""
    number, fill = FILLED[case]
    found, made, layout = read(lambda b, w, v: b.call(torch.matmul, fill(b, w, b.input("m", S, dtype=torch.bool)), v))
    assert isinstance(found, Product) and found.node is made and len(found.weights) == 2
    (term,) = found.filled
    assert (term.fill, term.kind, term.value.node.name) == (number, "keep" if "kept" in case else "drop", "m")
    assert term.layout == (layout[-1],)


def test_weights_changed_in_place_are_read_behind_the_change():
    def filled(b, w, v):
        b.method("masked_fill_", w, b.input("m", S, dtype=torch.bool), 0.0)
        return b.call(torch.matmul, w, v)

    found, made, _ = read(filled)
    assert isinstance(found, Product) and found.node is made and len(found.filled) == 1


def test_weights_that_are_returned_too_are_refused():
    found, _, _ = read(PRODUCTS["matmul"], lambda weights, made: [made, weights])
    assert isinstance(found, Refusal) and found.reason is Reason.WEIGHTS_USED


def test_weights_that_nobody_reads_are_no_attention():
    found, _, _ = read(lambda b, w, v: v)
    assert isinstance(found, Refusal) and found.reason is Reason.NOT_ATTENTION


def test_reading_sizes_is_no_use_of_weights():
    def sized(b, w, v):
        b.method("size", w, -1)
        return b.call(torch.matmul, w, v)

    found, made, _ = read(sized)
    assert isinstance(found, Product) and found.node is made


def test_whether_a_node_may_hold_a_tensor():
    b = Builder()
    x = b.input("x", 2, 6)
    size, parts = b.method("size", x, 0), b.method("chunk", x, 2)
    unknown = b.opaque(print, x)
    reader = b.reader(x)
    assert [may_hold_tensor(node, reader) for node in (x, parts, unknown, size)] == [True, True, True, False]
    assert leaf(x).shape == (2, 6)
