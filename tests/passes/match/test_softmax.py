"""Which nodes are softmaxes: by their names, or an exp that its sum divides or that of a log-softmax."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder

from sparge_compile.passes.match.softmax import is_softmax, softmax_of


def test_softmaxes_are_known_by_name_or_written_out():
    b = Builder()
    x = b.input("x", 3, 4)
    softmaxes = [
        b.call(torch.softmax, x, -1),
        b.call(F.softmax, x, -1),
        b.call(torch.special.softmax, x, -1),
        b.method("softmax", x, -1),
        b.module_call("module", torch.nn.Softmax(-1), x),
        b.call(torch.ops.aten._softmax.default, x, -1, False),
        b.call(torch.ops.aten._safe_softmax.default, x, -1),
        b.call(torch.exp, b.call(F.log_softmax, x, -1)),
        (by_hand := b.call(torch.ops.aten.exp.default, x)),
    ]
    normed = b.call(operator.truediv, by_hand, b.method("sum", by_hand, -1, True))
    others = [
        x,
        normed,
        b.method("exp", x),
        b.call(F.log_softmax, x, -1),
        b.call(operator.add, x, x),
        b.method("sigmoid", x),
        b.module_call("act", torch.nn.ReLU(), x),
    ]
    reader = b.reader(x)
    assert all(is_softmax(node, reader) for node in softmaxes)
    assert not any(is_softmax(node, reader) for node in others)


@pytest.mark.parametrize(
    "total, dim",
    [
        (lambda b, e: b.method("sum", e, -1, True), 2),
        (lambda b, e: b.method("unsqueeze", b.method("sum", e, 1), 1), 1),
        (lambda b, e: b.call(torch.ops.aten.sum.dim_IntList, e, [0], True), 0),
        (lambda b, e: b.method("unsqueeze", b.method("sum", e, 2), 1), None),  # of another row
        (lambda b, e: b.method("sum", e), None),
        (lambda b, e: b.method("sum", e, (0, 1), True), None),
        (lambda b, e: b.method("sum", b.call(operator.add, e, 1), -1, True), None),
        (lambda b, e: b.method("sum", b.method("mul_", e, 2), -1, True), None),  # of what it is by then
        (lambda b, e: b.method("mean", e, -1, True), None),
    ],
)
def test_an_exp_that_its_sum_divides_is_a_softmax_over_what_is_summed(total, dim):
    b = Builder()
    x = b.input("x", 3, 5, 5)
    exp = b.call(torch.exp, x)
    weights = b.call(operator.truediv, exp, total(b, exp))
    found = softmax_of(exp, b.reader(weights))
    assert found is None if dim is None else (found.node, found.user, found.dim) == (weights, exp, dim)


def test_an_exp_of_what_is_made_of_nothing_is_none():
    b = Builder()
    exp = b.call(torch.exp, b.call(torch.arange, 4.0))
    assert not is_softmax(exp, b.reader(exp))
