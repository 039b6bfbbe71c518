"""From scores back to the product of queries and keys: scales and masks are noted, what does not fit is refused."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import Builder, end_of, leaf

from sparge_compile.passes.match.attention import Refusal
from sparge_compile.passes.match.scores import Scores, scores_of
from sparge_compile.passes.read.axes import axes_of, new_layout
from sparge_compile.report import Reason

L, S = 6, 10
INF = float("-inf")


def traced(make) -> Scores | Refusal:
    """What is told of scores [1, 2, L, S] that ``make`` changes."""
    b = Builder()
    q, k, _ = b.qkv(length=L, keys=S)
    product = b.call(torch.matmul, q, b.method("transpose", k, -1, -2))
    scores = make(b, product)
    reader = b.reader(scores)
    layout = new_layout(leaf(scores).shape)
    found = scores_of(reader, leaf(scores), end_of(reader), layout, layout[-1])
    if isinstance(found, Scores):
        assert found.node is product
        assert set(axes_of(found.key.layout)) & set(layout[-1]) and not set(axes_of(found.query.layout)) & set(
            layout[-1]
        )
    return found


def mask(b, *shape, dtype=torch.bool):
    return b.input("mask", *shape, dtype=dtype)


SCALES = {
    "nothing": (1.0, lambda b, s: s),
    "mul": (0.5, lambda b, s: b.call(torch.mul, s, 0.5)),
    "div": (0.25, lambda b, s: b.call(operator.truediv, s, 4)),
    "both": (2.0, lambda b, s: b.call(torch.mul, b.call(torch.div, s, 2.0), 4.0)),
    "neg": (-1.0, lambda b, s: b.call(operator.neg, s)),
    "in place": (0.5, lambda b, s: b.method("mul_", s, 0.5)),
    "full": (0.5, lambda b, s: b.call(torch.mul, b.call(torch.full, (), 0.5), s)),
    "from the right of a difference": (-1.0, lambda b, s: b.call(torch.rsub, s, 0.0)),
    "a constant more": (1.0, lambda b, s: b.call(torch.add, s, 7.0)),
    "cast": (0.5, lambda b, s: b.method("to", b.call(torch.mul, s, 0.5), torch.float64)),
    "views": (1.0, lambda b, s: b.method("view", b.method("view", s, 2, L, S), 1, 2, L, S)),
}


@pytest.mark.parametrize("case", SCALES)
def test_scales_that_are_known(case):
    scale, make = SCALES[case]
    found = traced(make)
    assert isinstance(found, Scores) and found.scale == scale
    assert found.terms == [] and found.factors == []


TERMS = {
    "masked_fill": ("drop", 1.0, lambda b, s: b.method("masked_fill", s, mask(b, L, S), INF)),
    "masked_fill_": ("drop", 1.0, lambda b, s: b.method("masked_fill_", s, mask(b, L, S), -1e9)),
    "where": ("keep", 1.0, lambda b, s: b.call(torch.where, mask(b, L, S), s, INF)),
    "where turned round": ("drop", 1.0, lambda b, s: b.call(torch.where, mask(b, L, S), INF, s)),
    "add": ("number", 1.0, lambda b, s: b.call(torch.add, s, mask(b, L, S, dtype=torch.float32))),
    "add from the left": ("number", 1.0, lambda b, s: b.call(operator.add, mask(b, S, dtype=torch.float32), s)),
    "sub": ("number", -1.0, lambda b, s: b.call(torch.sub, s, mask(b, L, S, dtype=torch.float32))),
    "add, scaled": (
        "number",
        0.5,
        lambda b, s: b.call(torch.mul, b.call(torch.add, s, mask(b, L, S, dtype=torch.float32)), 0.5),
    ),
}


@pytest.mark.parametrize("case", TERMS)
def test_masks_are_noted(case):
    kind, factor, make = TERMS[case]
    found = traced(make)
    assert isinstance(found, Scores), found
    (term,) = found.terms
    assert (term.kind, term.factor, term.value.node.name, found.fixed) == (kind, factor, "mask", True)


def test_what_is_alike_for_all_keys_changes_no_weight():
    found = traced(lambda b, s: b.call(torch.add, s, mask(b, L, 1, dtype=torch.float32)))
    assert isinstance(found, Scores) and found.terms == []


@pytest.mark.parametrize("name, inverse", [("mul", False), ("div", True)])
def test_a_tensor_that_scales_rows_is_a_factor(name, inverse):
    found = traced(lambda b, s: b.call(getattr(torch, name), s, mask(b, 2, L, 1, dtype=torch.float32)))
    ((factor, _, _, inverted),) = found.factors
    assert factor.node.name == "mask" and inverted == inverse and found.scale == 1.0


REFUSED = {
    "scale along the keys": lambda b, s: b.call(torch.mul, s, mask(b, S, dtype=torch.float32)),
    "fill that does not hide": lambda b, s: b.method("masked_fill", s, mask(b, L, S), -5.0),
    "fill of an unknown number": lambda b, s: b.method("masked_fill", s, mask(b, L, S), b.input("fill")),
    "hidden scores turned round": lambda b, s: b.call(operator.neg, b.method("masked_fill", s, mask(b, L, S), INF)),
    "a mask scaled at run time": lambda b, s: b.call(
        torch.mul, b.method("masked_fill", s, mask(b, L, S), INF), b.input("by")
    ),
    "scaled by nothing": lambda b, s: b.call(torch.mul, s, 0.0),
    "tanh": lambda b, s: b.call(torch.tanh, s),
    "clamp": lambda b, s: b.method("clamp", s, -1, 1),
    "sum of two products": lambda b, s: b.call(torch.add, s, b.call(torch.neg, s)),
    "add with alpha": lambda b, s: b.call(torch.add, s, mask(b, L, S, dtype=torch.float32), alpha=2),
    "rounded quotient": lambda b, s: b.call(torch.div, s, 2.0, rounding_mode="floor"),
    "detach": lambda b, s: b.method("detach", s),
    "flip": lambda b, s: b.method("flip", s, -1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_scores_otherwise_is_refused(case):
    found = traced(REFUSED[case])
    assert isinstance(found, Refusal) and found.reason is Reason.SCORES_CHANGED


@pytest.mark.parametrize("scores_first", [True, False], ids=["scores, fill", "fill, scores"])
def test_the_reason_is_what_changed_the_scores_not_what_fills_them(scores_first):
    def capped(b, s):
        fill = b.call(torch.ops.aten.scalar_tensor.default, INF)
        chosen = (b.call(torch.tanh, s), fill)
        return b.call(torch.where, mask(b, L, S), *(chosen if scores_first else chosen[::-1]))

    assert traced(capped) == Refusal(Reason.SCORES_CHANGED, "by tanh")


@pytest.mark.parametrize("scores_first", [True, False], ids=["scores + mask", "mask + scores"])
def test_the_reason_is_what_changed_the_scores_not_what_a_mask_is_made_of(scores_first):
    def capped(b, s):
        zero, low = (b.call(torch.ops.aten.scalar_tensor.default, number) for number in (0.0, INF))
        added = b.call(torch.where, mask(b, L, S), zero, low)
        both = (b.call(torch.tanh, s), added)
        return b.call(torch.add, *(both if scores_first else both[::-1]))

    assert traced(capped) == Refusal(Reason.SCORES_CHANGED, "by tanh")


def test_a_fill_that_is_not_known_is_named():
    found = traced(REFUSED["fill of an unknown number"])
    assert isinstance(found, Refusal) and found.detail == "filled with a tensor"


def no_product(make):
    b = Builder()
    scores = make(b, b.input("scores", 2, L, S))
    reader = b.reader(scores)
    layout = new_layout(leaf(scores).shape)
    return scores_of(reader, leaf(scores), end_of(reader), layout, layout[-1])


@pytest.mark.parametrize("changed", [False, True], ids=["input", "scaled input"])
def test_scores_that_no_product_makes_are_no_attention(changed):
    found = no_product(lambda b, x: b.call(torch.mul, x, 0.5) if changed else x)
    assert isinstance(found, Refusal) and found.reason is Reason.NOT_ATTENTION


def test_a_very_long_way_is_given_up():
    def shifted(times):
        def make(b, s):
            for _ in range(times):
                s = b.call(torch.add, s, 1.0)
            return s

        return make

    assert isinstance(traced(shifted(50)), Scores)
    assert traced(shifted(70)).reason is Reason.NOT_ATTENTION


@pytest.mark.parametrize("beta", [0, 2])
def test_a_product_with_something_added(beta):
    b = Builder()
    added, q, k = b.input("added", 2, L, S), b.input("q", 2, L, 4), b.input("k", 2, 4, S)
    scores = b.call(torch.baddbmm, added, q, k, beta=beta, alpha=0.5)
    reader = b.reader(scores)
    layout = new_layout((2, L, S))
    found = scores_of(reader, leaf(scores), end_of(reader), layout, layout[-1])
    assert found.scale == 0.5 and [term.factor for term in found.terms] == [2.0] * (beta != 0)
    assert found.query.value.node is q and found.key.value.node is k


def test_a_product_of_keys_and_queries_is_turned_round():
    b = Builder()
    q, k = b.input("q", 2, L, 4), b.input("k", 2, S, 4)
    scores = b.method("transpose", b.call(torch.bmm, k, b.method("transpose", q, 1, 2)), 1, 2)
    reader = b.reader(scores)
    layout = new_layout((2, L, S))
    found = scores_of(reader, leaf(scores), end_of(reader), layout, layout[-1])
    assert found.key.value.node is k and [axis.size for axis in axes_of(found.query.layout)] == [2, 4, L]
