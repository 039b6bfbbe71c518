"""Masks as formulas: at every index they hold what the tensor holds, and the unknown stays unknown."""

from __future__ import annotations

import itertools
import operator

import pytest
import sympy
import torch
from graphs import Builder, end_of, leaf
from sympy.logic.boolalg import Boolean

from sparge_compile.passes.read.formulas import as_cases, as_condition, formula, number

N = 5
ROW, KEY = sympy.symbols("row key", integer=True, nonnegative=True)


def arange(b, n=N, **options):
    return b.call(torch.arange, n, **options)


def column(b, x):
    return b.call(operator.getitem, x, (slice(None), None))


def ones(b, dtype=torch.bool):
    return b.call(torch.ones, N, N, dtype=dtype)


def said_of(b: Builder, node, *index):
    """The formula of a node at an index, as the end of the graph reads it."""
    reader = b.reader(node)
    return formula(reader, leaf(node), end_of(reader), index)


def compared(b, relation, dtype=torch.int64):
    i = arange(b, dtype=dtype)
    return b.call(relation, column(b, i), i)


def window(b):
    i = arange(b)
    near = b.call(torch.le, b.call(torch.sub, column(b, i), i), 2)
    return b.call(operator.and_, compared(b, torch.ge), near)


def filled_in_place(b):
    zeros = b.call(torch.zeros, N, N)
    b.method("masked_fill_", zeros, compared(b, torch.lt), float("-inf"))
    return zeros


def joined_in_place(b):
    mask = b.call(torch.eq, column(b, arange(b)), arange(b))
    b.call(operator.ior, mask, compared(b, torch.gt))
    return mask


def blocks(b):
    i = b.call(torch.floor_divide, arange(b), 2)
    return b.call(torch.eq, column(b, i), i)


KNOWN = {
    "tril": lambda b: b.call(torch.tril, ones(b)),
    "triu from a diagonal": lambda b: b.call(torch.triu, ones(b, torch.float32), diagonal=2),
    "tril below": lambda b: b.method("tril", ones(b), -1),
    "ge": lambda b: compared(b, torch.ge),
    "lt": lambda b: compared(b, torch.lt),
    "ne": lambda b: compared(b, operator.ne),
    "floats": lambda b: compared(b, torch.le, torch.float32),
    "not": lambda b: b.call(torch.logical_not, compared(b, torch.gt)),
    "~": lambda b: b.call(operator.invert, compared(b, torch.gt)),
    "window": window,
    "or in place": joined_in_place,
    "fill in place": filled_in_place,
    "xor": lambda b: b.call(operator.xor, compared(b, torch.ge), compared(b, torch.eq)),
    "where": lambda b: b.call(torch.where, compared(b, torch.ge), 0.0, float("-inf")),
    "masked_fill": lambda b: b.method("masked_fill", b.call(torch.zeros, N, N), compared(b, torch.lt), -1e9),
    "full and triu": lambda b: b.call(torch.triu, b.call(torch.full, (N, N), -1e9), diagonal=1),
    "one less": lambda b: b.call(torch.mul, b.call(torch.rsub, b.call(torch.tril, ones(b, torch.float32)), 1), -1e4),
    "transposed": lambda b: b.method("t", b.call(torch.tril, ones(b))),
    "from a start": lambda b: b.call(
        torch.ge, column(b, b.call(torch.arange, 3, 3 + N)), b.call(torch.arange, 0, 2 * N, 2)
    ),
    "slice": lambda b: b.call(
        operator.getitem, b.call(torch.tril, b.call(torch.ones, 9, 9)), (slice(2, 2 + N), slice(4, 4 + N))
    ),
    "expanded": lambda b: b.method("expand", b.call(torch.lt, arange(b), 3), N, N),
    "joined": lambda b: b.call(
        torch.cat, [b.call(torch.ones, N, 2), b.call(torch.tril, b.call(torch.ones, N, N - 2))], dim=1
    ),
    "cast": lambda b: b.method("to", b.call(torch.tril, ones(b)), torch.float32),
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_formula_holds_what_the_tensor_holds(case):
    b = Builder()
    node = KNOWN[case](b)
    said = said_of(b, node, ROW, KEY)
    (tensor,) = b.module()()
    assert isinstance(said, Boolean) == (tensor.dtype == torch.bool)
    for row, key in itertools.product(range(N), range(N)):
        at = {ROW: row, KEY: key}
        if tensor.dtype == torch.bool:
            assert bool(said.xreplace(at).simplify()) == bool(tensor[row, key]), (row, key)
            continue
        (value,) = [value.subs(at) for condition, value in said if condition.subs(at) == sympy.true]
        assert float(value) == float(tensor[row, key]), (row, key)


@pytest.mark.parametrize(
    "case, want", [("tril", KEY - ROW <= 0), ("ge", ROW - KEY >= 0), ("~", ROW - KEY <= 0), ("lt", ROW - KEY < 0)]
)
def test_a_comparison_of_indices_is_told_as_one_condition(case, want):
    b = Builder()
    assert as_condition(said_of(b, KNOWN[case](b), ROW, KEY)) == want


def unknown_functions(said):
    conditions = [part for case in as_cases(said) for part in case]
    return set().union(*(x.atoms(sympy.core.function.AppliedUndef) for x in conditions))


UNKNOWN = {
    "input": lambda b, x: b.call(torch.gt, x, 0),
    "sine": lambda b, x: b.call(torch.sin, b.method("to", compared(b, torch.ge), torch.float32)),
    "blocks of a rounded quotient": lambda b, x: b.call(torch.add, blocks(b), x),
    "positions in bfloat16": lambda b, x: compared(b, torch.ge, torch.bfloat16),
    "bytes below zero": lambda b, x: b.call(torch.mul, b.call(torch.sub, ones(b, torch.uint8), 2), x),
    "flipped": lambda b, x: b.method("flip", b.call(torch.tril, ones(b)), 0),
    "fill with a fraction of whole numbers": lambda b, x: b.call(torch.add, b.call(torch.full, (N, N), 0.5), x),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_understood_is_a_function_of_its_indices(case):
    b = Builder()
    node = UNKNOWN[case](b, b.input("x", N, N))
    assert unknown_functions(said_of(b, node, ROW, KEY))


def test_an_unknown_tensor_depends_on_the_indices_that_it_has():
    b = Builder()
    keys = b.input("keys", N, dtype=torch.bool)
    wide = b.method("expand", keys, N, N)
    assert as_condition(said_of(b, wide, ROW, KEY)).free_symbols == {KEY}
    b = Builder()
    both = b.input("both", N, N, dtype=torch.bool)
    assert as_condition(said_of(b, both, ROW, KEY)).free_symbols == {ROW, KEY}


def test_a_tensor_before_and_after_a_change_is_two_functions():
    b = Builder()
    x = b.input("x", N)
    early = b.call(torch.exp, x)
    again = b.call(torch.exp, x)
    b.method("mul_", x, 2)
    late = b.call(torch.exp, x)
    reader = b.reader(early, again, late)
    before, same, after = (formula(reader, leaf(x), user, [KEY]) for user in (early, again, late))
    assert before == same and before != after


def test_what_was_changed_through_a_view_is_unknown():
    b = Builder()
    mask = b.call(torch.tril, ones(b))
    b.method("logical_not_", b.method("view", mask, -1))
    assert unknown_functions(said_of(b, mask, ROW, KEY))


NUMBERS = {
    "python": (lambda b: 0.25, 0.25),
    "full": (lambda b: b.call(torch.full, (), 0.25), 0.25),
    "tensor of one": (lambda b: b.call(torch.full, (1, 1), 3), 3.0),
    "root": (lambda b: b.call(torch.rsqrt, b.call(torch.full, (), 16.0)), 0.25),
    "product": (lambda b: b.call(torch.mul, b.call(torch.full, (), 2.0), 3), 6.0),
    "minus infinity": (lambda b: b.call(torch.full, (), float("-inf")), float("-inf")),
    "an input": (lambda b: b.input("x"), None),
    "the same number twice": (lambda b: b.call(torch.full, (2,), 0.25), 0.25),
    "two numbers": (lambda b: b.call(torch.arange, 2), None),
    "a triangle": (lambda b: b.call(torch.tril, b.call(torch.ones, 2, 2)), None),
    "a power of an input": (lambda b: b.call(torch.pow, b.input("x"), 2), None),
    "not a number": (lambda b: b.call(torch.full, (), float("nan")), None),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_the_one_number_that_a_value_holds(case):
    make, want = NUMBERS[case]
    b = Builder()
    made = make(b)
    end = b.output(*[made] * isinstance(made, torch.fx.Node))
    value = leaf(made) if isinstance(made, torch.fx.Node) else made
    assert number(b.reader(), value, end) == want


def test_conditions_and_cases_are_two_spellings_of_one_thing():
    condition = sympy.Le(KEY, ROW)
    cases = as_cases(condition)
    assert cases == [(condition, 1), (sympy.Gt(KEY, ROW), 0)]
    assert as_condition(cases).equals(condition)
    assert as_cases(sympy.true) == [(sympy.true, 1)]


def test_a_sum_of_very_many_is_given_up():
    b = Builder()
    x = b.call(torch.zeros, N)
    for _ in range(150):
        x = b.call(torch.add, x, 1)
    assert unknown_functions(said_of(b, x, KEY))
    b = Builder()
    x = b.call(torch.zeros, N)
    for _ in range(50):
        x = b.call(torch.add, x, 1)
    assert as_cases(said_of(b, x, KEY)) == [(sympy.true, 50)]
