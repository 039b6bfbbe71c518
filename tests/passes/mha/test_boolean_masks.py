"""Additive masks are followed back to the boolean ones that they were made of, unless somebody writes to one."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import Builder

from sparge_compile.passes.mha.boolean_masks import boolean_sources, hidden, spelling

B, S = 2, 6
INF = float("-inf")


def additive(b: Builder, mask, fill=INF, in_place=True):
    """What torch.nn makes of a boolean mask."""
    zeros = b.call(torch.zeros_like, mask, dtype=torch.float32)
    return b.method("masked_fill_" if in_place else "masked_fill", zeros, mask, fill)


def padding(b: Builder, name="padding"):
    return b.input(name, B, S, dtype=torch.bool)


def sources(make):
    """The names of the boolean masks that an additive one was made of, or None."""
    b = Builder()
    mask = make(b)
    found = boolean_sources(mask, b.reader(mask))
    return found if found is None else [node.name for node in found]


def two(b):
    pairs = b.input("pairs", S, S, dtype=torch.bool)
    wide = b.method("expand", b.method("view", additive(b, padding(b)), B, 1, 1, S), B, 3, 1, S)
    return b.call(operator.add, additive(b, pairs), wide)


FOLLOWED = {
    "a boolean mask is its own": (["padding"], padding),
    "filled in place": (["padding"], lambda b: additive(b, padding(b))),
    "filled": (["padding"], lambda b: additive(b, padding(b), in_place=False)),
    "overloads": (
        ["padding"],
        lambda b: b.call(
            torch.ops.aten.masked_fill.Scalar,
            b.call(torch.ops.aten.zeros_like.default, x := padding(b), dtype=torch.float32),
            x,
            INF,
        ),
    ),
    "a view": (["padding"], lambda b: b.method("view", additive(b, padding(b)), B, 1, 1, S)),
    "unsqueezed and expanded": (
        ["padding"],
        lambda b: b.method("expand", b.method("unsqueeze", additive(b, padding(b)), 1), B, S, S),
    ),
    "the sum of two": (["pairs", "padding"], two),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_the_spelling_of_torch_is_followed_back(case):
    want, make = FOLLOWED[case]
    assert sources(make) == want


def scaled(b):
    return b.call(operator.mul, additive(b, padding(b)), 2)


def zeros_read_elsewhere(b):
    mask = padding(b)
    zeros = b.call(torch.zeros_like, mask, dtype=torch.float32)
    b.call(torch.exp, zeros)
    return b.method("masked_fill_", zeros, mask, INF)


def zeros_of_another(b):
    zeros = b.call(torch.zeros_like, padding(b, "other"), dtype=torch.float32)
    return b.method("masked_fill_", zeros, padding(b), INF)


def fill_of_numbers(b):
    return b.method("masked_fill", b.input("bias", B, S), padding(b), INF)


UNKNOWN = {
    "numbers": lambda b: b.input("bias", B, S),
    "finite fill": lambda b: additive(b, padding(b), -1e9),
    "scaled": scaled,
    "fill of numbers": fill_of_numbers,
    "fill of the zeros of another mask": zeros_of_another,
    "zeros that somebody else reads": zeros_read_elsewhere,
    "a sum with numbers": lambda b: b.call(operator.add, additive(b, padding(b)), b.input("bias", B, S)),
    "a sum with a number": lambda b: b.call(operator.add, additive(b, padding(b)), 1.0),
    "a weighted sum": lambda b: b.call(torch.add, additive(b, padding(b)), additive(b, padding(b, "other")), alpha=2),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_says_more_is_not_followed(case):
    assert sources(UNKNOWN[case]) is None


def widened(b, x):
    return b.method("view", x, B, 1, 1, S)


WRITES = {
    "the mask": lambda b, mask, made: b.method("logical_not_", mask),
    "the mask, by |=": lambda b, mask, made: b.call(operator.ior, mask, padding(b, "other")),
    "the mask, by &=": lambda b, mask, made: b.call(operator.iand, mask, padding(b, "other")),
    "the mask, by an item": lambda b, mask, made: b.call(operator.setitem, mask, 0, True),
    "a view of the mask": lambda b, mask, made: b.method("logical_not_", b.method("view", mask, -1)),
    "the additive one": lambda b, mask, made: b.method("mul_", made, 2),
    "a view of the additive one": lambda b, mask, made: b.method("mul_", widened(b, made), 2),
    "with out": lambda b, mask, made: b.call(torch.logical_not, padding(b, "other"), out=mask),
}


@pytest.mark.parametrize("additive_mask", [True, False], ids=["additive", "boolean"])
@pytest.mark.parametrize("case", WRITES)
def test_a_mask_that_is_written_to_is_not_followed(case, additive_mask):
    b = Builder()
    mask = padding(b)
    made = additive(b, mask)
    WRITES[case](b, mask, made)
    end = widened(b, made if additive_mask else mask)
    target = end if additive_mask else mask
    of_the_mask = "additive one" not in case
    found = boolean_sources(target, b.reader(end))
    assert (found is None) == (additive_mask or of_the_mask)


def test_a_change_of_another_tensor_forbids_nothing():
    b = Builder()
    mask = padding(b)
    made = additive(b, mask)
    b.method("logical_not_", b.method("clone", mask))
    b.method("mul_", b.call(torch.exp, made), 2)
    assert boolean_sources(made, b.reader(made)) == [mask]


@pytest.mark.parametrize("make", [case[1] for case in FOLLOWED.values()], ids=FOLLOWED)
def test_the_boolean_mask_hides_where_the_additive_one_does(make):
    b = Builder()
    mask = make(b)
    names = {"padding": torch.rand(B, S) < 0.5, "pairs": torch.rand(S, S) < 0.5}
    inputs = b.graph.find_nodes(op="placeholder")
    given = [names[node.name] for node in inputs]
    (want,) = b.module(mask)(*given)
    got = hidden(mask, dict(zip(inputs, given, strict=True)))
    want = want if want.dtype == torch.bool else want == INF
    assert torch.equal(got.expand_as(want) if got.dim() <= want.dim() else got, want)


def test_the_spelling_of_a_mask_is_named_users_first():
    b = Builder()
    mask = padding(b)
    made = b.method("view", additive(b, mask), B, 1, 1, S)
    fill, zeros = made.args[0], made.args[0].args[0]
    assert list(dict.fromkeys(spelling(made))) == [made, fill, zeros]
    assert list(spelling(mask)) == []
