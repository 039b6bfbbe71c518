"""What masks say: nothing, causality, a condition on keys, one on pairs, or numbers that change scores."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import Builder, end_of, leaf

from sparge_compile.passes.match.attention import Axes, Refusal
from sparge_compile.passes.match.masks import Meaning, Term, understand
from sparge_compile.passes.read.axes import broadcast, new_dim
from sparge_compile.report import Reason

B, H, N = 2, 3, 6
INF = float("-inf")


def said(make, kind="keep", **options) -> Meaning | Refusal:
    """What a mask says of scores [B, H, N, N]; with ``make`` giving several, what they say together."""
    b = Builder()
    made = make(b)
    nodes = made if isinstance(made, list) else [made]
    reader = b.reader(*nodes)
    batch, heads, rows, keys, feature = map(new_dim, (B, H, N, N, 4))
    axes = Axes(batch, heads, (), rows, keys, feature, feature)
    weights = (batch, heads, rows, keys)
    terms = [
        Term(leaf(node), end_of(reader), broadcast(weights, leaf(node).shape), each, **options)
        for node, each in zip(nodes, kind if isinstance(kind, list) else [kind] * len(nodes), strict=True)
    ]
    return understand(reader, terms, axes)


def ones(b, dtype=torch.bool):
    return b.call(torch.ones, N, N, dtype=dtype)


def tril(b):
    return b.call(torch.tril, ones(b))


def positions(b, relation):
    i = b.call(torch.arange, N)
    return b.call(relation, b.method("unsqueeze", i, 1), i)


def padding(b, *shape):
    return b.input("padding", *(shape or (B, 1, 1, N)), dtype=torch.bool)


def triangle(b, fill=INF):
    return b.call(torch.triu, b.call(torch.full, (N, N), fill), diagonal=1)


CAUSAL = {
    "tril": ("keep", tril),
    "row >= key": ("keep", lambda b: positions(b, torch.ge)),
    "row < key, hidden": ("drop", lambda b: positions(b, torch.lt)),
    "triu, hidden": ("drop", lambda b: b.call(torch.triu, ones(b), diagonal=1)),
    "numbers": ("number", triangle),
    "large numbers": ("number", lambda b: triangle(b, -1e9)),
    "fill in place": (
        "number",
        lambda b: b.method("masked_fill_", b.call(torch.zeros, N, N), positions(b, torch.lt), INF),
    ),
    "with dimensions of one": ("keep", lambda b: b.method("view", tril(b), 1, 1, N, N)),
    "expanded": ("keep", lambda b: b.method("expand", tril(b), B, H, N, N)),
}
NOT_CAUSAL = {
    "transposed": ("keep", lambda b: b.method("t", tril(b))),
    "without the diagonal": ("keep", lambda b: positions(b, torch.gt)),
    "one more": ("keep", lambda b: b.call(torch.tril, ones(b), diagonal=1)),
    "kept where hidden": ("drop", tril),
    "of an input": ("keep", lambda b: b.call(torch.tril, b.input("mask", N, N, dtype=torch.bool))),
    "changed through a view": (
        "keep",
        lambda b: [m := tril(b), b.method("logical_not_", b.method("view", m, -1))][0],
    ),
}


@pytest.mark.parametrize("case", CAUSAL)
def test_causality_is_told_and_leaves_no_mask(case):
    kind, make = CAUSAL[case]
    assert said(make, kind) == Meaning((), True)


@pytest.mark.parametrize("case", NOT_CAUSAL)
def test_what_is_nearly_causal_remains_a_mask(case):
    kind, make = NOT_CAUSAL[case]
    found = said(make, kind)
    assert len(found.masks) == 1 and found.masks[0].row is None


NOTHING = {
    "all seen": ("keep", ones),
    "none hidden": ("drop", lambda b: b.call(torch.zeros, N, N, dtype=torch.bool)),
    "zeros": ("number", lambda b: b.call(torch.zeros, N, N)),
    "positions that all are": ("keep", lambda b: b.call(torch.lt, b.call(torch.arange, N), N)),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_mask_that_hides_nothing_says_nothing(case):
    kind, make = NOTHING[case]
    assert said(make, kind) == Meaning((), False)


def only(found):
    assert isinstance(found, Meaning), found
    (mask,) = found.masks
    return mask


def test_a_condition_on_keys_is_read_from_one_row():
    mask = only(said(padding))
    assert (mask.kind, mask.row, mask.operand.node.name) == ("keep", "first", "padding")
    assert said(padding).is_causal is False


def test_a_condition_on_keys_and_causality_are_told_apart():
    found = said(lambda b: b.call(operator.and_, padding(b), tril(b)))
    assert found.is_causal and only(found).row == "last"  # which sees all that is not padding


def test_two_masks_say_both():
    found = said(lambda b: [padding(b), tril(b)])
    assert found.is_causal and only(found).operand.node.name == "padding"


def test_a_condition_on_pairs_stays_whole():
    found = said(lambda b: b.input("pairs", N, N, dtype=torch.bool), "drop")
    mask = only(found)
    assert (mask.kind, mask.row, found.is_causal) == ("drop", None, False)


def test_a_condition_on_rows_and_keys_joined_by_or_stays_whole():
    found = said(lambda b: b.call(operator.or_, padding(b), tril(b)))
    assert only(found).row is None and not found.is_causal


def test_a_mask_is_read_before_it_was_broadcast():
    mask = only(said(lambda b: b.method("expand", padding(b), B, H, N, N)))
    assert mask.operand.node.name == "padding" and not mask.operand.expand
    assert [len(dim) for dim in mask.operand.layout] == [1, 0, 0, 1]


HIDING = {
    "minus infinity": INF,
    "large": -1e9,
    "the least that hides": -1e4,
}


@pytest.mark.parametrize("fill", HIDING.values(), ids=HIDING)
def test_numbers_that_hide_are_a_condition(fill):
    def make(b):
        return b.call(torch.where, padding(b), 0.0, fill)

    mask = only(said(make, "number"))
    assert (mask.kind, mask.row) == ("hide", "first")


ADDED = {
    "an input": lambda b: b.input("bias", N, N),
    "not low enough to hide": lambda b: b.call(torch.where, padding(b), 0.0, -100.0),
    "two levels": lambda b: b.call(torch.where, padding(b), 1.0, INF),
    "distances": lambda b: b.method("to", positions(b, torch.sub), torch.float32),
}


@pytest.mark.parametrize("case", ADDED)
def test_numbers_that_change_scores_are_added(case):
    found = said(ADDED[case], "number", factor=0.5)
    mask = only(found)
    assert (mask.kind, mask.factor, mask.row) == ("add", 0.5, None)


def test_scores_that_are_raised_as_far_are_refused():
    found = said(lambda b: triangle(b, 1e9), "number")
    assert isinstance(found, Refusal) and found.reason is Reason.SCORES_CHANGED
    assert isinstance(said(lambda b: triangle(b, -1e9), "number"), Meaning)
    assert isinstance(said(lambda b: triangle(b, -1e9), "number", factor=-1.0), Refusal)


@pytest.mark.parametrize("factor, hides", [(1.0, True), (0.5, True), (1e-9, False)])
def test_what_hides_must_hide_when_it_is_scaled(factor, hides):
    found = said(padding, "drop", fill=-1e9, factor=factor)
    assert isinstance(found, Meaning if hides else Refusal)


@pytest.mark.parametrize("factor, kind", [(0.5, "hide"), (1e-9, "add"), (-1.0, None)])
def test_numbers_that_hide_must_hide_when_they_are_scaled(factor, kind):
    found = said(lambda b: b.call(torch.where, padding(b), 0.0, -1e9), "number", factor=factor)
    if kind is None:
        assert isinstance(found, Refusal) and found.reason is Reason.SCORES_CHANGED
    else:
        assert only(found).kind == kind


@pytest.mark.parametrize("spelling", [operator.iand, operator.ior])
def test_a_mask_that_is_joined_in_place_says_what_it_says_then(spelling):
    def make(b):
        mask = tril(b)
        b.call(spelling, mask, padding(b, N))
        return mask

    found = said(make)
    assert len(found.masks) == 1 and found.is_causal == (spelling is operator.iand)
    assert found.masks[0].row == ("last" if found.is_causal else None)


def test_a_mask_of_very_many_comparisons_is_kept_as_it_is():
    def make(terms):
        def many(b):
            i = b.call(torch.arange, N)
            mask = tril(b)
            for _ in range(terms):
                seen = b.call(torch.lt, i, b.input(f"length_{len(b.graph.nodes)}", dtype=torch.int64))
                mask = b.call(operator.and_, mask, seen)
            return mask

        return many

    assert said(make(3)).is_causal
    assert not said(make(70)).is_causal
