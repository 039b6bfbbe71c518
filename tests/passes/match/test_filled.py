"""Weights that are set to 0 behind the softmax: where only what is hidden is, this is attention, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from graphs import Builder

from sparge_compile.passes.match.attention import Attention
from sparge_compile.passes.match.decomposed import match_softmax
from sparge_compile.passes.match.softmax import is_softmax
from sparge_compile.report import Reason

B, H, L, D = 2, 3, 6, 4  # as many keys as queries: a mask that is transposed is of the same shape
INF = float("inf")
aten = torch.ops.aten


class Made:
    """The parts of attention under a mask ``hides`` [L, L], as far as the weights ``w``."""

    def __init__(self, how: str = "filled") -> None:
        self.b = b = Builder()
        q, k, self.v = b.qkv(B, H, L, L, D)
        self.product = b.call(torch.matmul, q, b.method("transpose", k, -1, -2))
        self.hides = b.input("hides", L, L, dtype=torch.bool)
        self.added = b.input("added", L, L)
        later = b.call(torch.triu, b.call(torch.ones, L, L, dtype=torch.bool), diagonal=1)
        self.both = b.call(torch.logical_or, later, self.hides)
        if how == "unmasked":
            self.scores = self.product
        elif how == "added":
            self.scores = b.call(torch.add, self.product, self.added)
        elif how == "causal":
            self.scores = b.method("masked_fill", b.method("masked_fill", self.product, later, -INF), self.hides, -INF)
        else:
            self.scores = b.method("masked_fill", self.product, self.hides, -INF if how == "filled" else -1e9)
        self.w = b.call(torch.softmax, self.scores, -1)

    def over(self, name, x, dim=-1, keepdim=True):
        return self.b.call(getattr(torch, name), x, dim, keepdim)

    def no(self, x):
        return self.b.call(torch.logical_not, x)

    def is_inf(self, x, number=-INF):
        return self.b.call(torch.eq, x, number)

    def where(self, condition, fill=0.0, w=None):
        fill = self.b.call(torch.full_like, self.w, fill)
        return self.b.call(torch.where, condition, fill, self.w if w is None else w)

    def found(self, weights):
        reader = self.b.reader(self.b.call(torch.matmul, weights, self.v))
        (softmax,) = [node for node in self.b.graph.nodes if is_softmax(node, reader)]
        return match_softmax(softmax, reader)


def safe_softmax(m):
    """As torch decomposes it."""
    return m.where(m.no(m.over("any", m.no(m.is_inf(m.scores)))))


def nan_to_num_decomposed(m):
    w = m.where(m.b.call(torch.isnan, m.w))
    w = m.where(m.is_inf(m.w), -3e38, w)
    return m.where(m.is_inf(m.w, INF), 3e38, w)


def in_place(m):
    m.b.method("masked_fill_", m.w, m.b.call(torch.isnan, m.w), 0.0)
    return m.w


def rows_unsqueezed(m):
    return m.where(m.b.method("unsqueeze", m.over("all", m.hides, -1, False), -1))


def written_between(m):
    m.b.method("logical_not_", m.hides)
    return m.where(m.hides)


HIDDEN = {
    "safe softmax": safe_softmax,
    "all scores": lambda m: m.where(m.over("all", m.is_inf(m.scores))),
    "no score above": lambda m: m.where(m.no(m.over("any", m.b.call(torch.gt, m.scores, -INF)))),
    "isneginf": lambda m: m.where(m.over("all", m.b.call(torch.isneginf, m.scores))),
    "isinf": lambda m: m.where(m.over("all", m.b.call(torch.isinf, m.scores))),
    "each score": lambda m: m.where(m.is_inf(m.scores)),
    "isnan": lambda m: m.where(m.b.call(torch.isnan, m.w)),
    "not itself": lambda m: m.b.method("masked_fill", m.w, m.b.call(torch.ne, m.w, m.w), 0),
    "nan_to_num": lambda m: m.b.call(torch.nan_to_num, m.w),
    "nan_to_num, decomposed": nan_to_num_decomposed,
    "in place": in_place,
    "twice": lambda m: m.b.call(torch.nan_to_num, safe_softmax(m), 0.0),
}
OF_THE_MASK = {
    "the mask": lambda m: m.b.method("masked_fill", m.w, m.hides, 0.0),
    "the mask, kept": lambda m: m.b.call(torch.where, m.no(m.hides), m.w, 0.0),
    "its rows": lambda m: m.where(m.over("all", m.hides)),
    "its rows, unsqueezed": rows_unsqueezed,
    "rows that see a key": lambda m: m.b.call(torch.where, m.over("any", m.no(m.hides)), m.w, 0.0),
    "its columns": lambda m: m.where(m.over("all", m.hides, -2)),
    "some of it": lambda m: m.where(m.b.call(torch.logical_and, m.hides, m.b.input("n", L, L, dtype=torch.bool))),
    "a number": lambda m: m.where(m.b.call(torch.eq, m.b.method("long", m.hides), 1)),
}


@pytest.mark.parametrize("how", ["filled", "lowered", "added"])
@pytest.mark.parametrize("case", HIDDEN)
def test_what_tells_from_scores_or_weights_that_all_is_hidden_is_seen_through(case, how):
    m = Made(how)
    found = m.found(HIDDEN[case](m))
    assert isinstance(found, Attention), found
    assert [mask.operand.node for mask in found.masks] == [m.added if how == "added" else m.hides]
    assert {m.w, m.product} <= set(found.region)


@pytest.mark.parametrize("how", ["filled", "lowered"])
@pytest.mark.parametrize("case", OF_THE_MASK)
def test_what_the_mask_hides_may_be_filled(case, how):
    m = Made(how)
    found = m.found(OF_THE_MASK[case](m))
    assert isinstance(found, Attention), found


def test_an_added_mask_hides_where_it_is_infinite():
    m = Made("added")
    assert isinstance(m.found(m.where(m.over("all", m.is_inf(m.added)))), Attention)


def test_causality_and_padding_hide_together():
    m = Made("causal")
    found = m.found(m.where(m.b.call(torch.logical_or, m.both, m.over("all", m.both))))
    assert isinstance(found, Attention) and found.is_causal and len(found.masks) == 1


def test_without_a_mask_no_weight_is_filled():
    m = Made("unmasked")
    found = m.found(safe_softmax(m))
    assert isinstance(found, Attention) and found.masks == ()


SEEN = {
    "another mask": lambda m: m.where(m.b.input("n", L, L, dtype=torch.bool)),
    "more than the mask": lambda m: m.where(m.b.call(torch.logical_or, m.hides, m.b.input("n", L, dtype=torch.bool))),
    "what is seen": lambda m: m.where(m.no(m.hides)),
    "the mask, transposed": lambda m: m.where(m.b.method("transpose", m.hides, 0, 1)),
    "rows with a hidden key": lambda m: m.where(m.over("any", m.hides)),
    "rows with a hidden score": lambda m: m.where(m.over("any", m.is_inf(m.scores))),
    "rows of others": lambda m: m.where(m.b.method("transpose", m.over("all", m.hides), 0, 1)),
    "not all hidden": lambda m: m.where(m.no(m.over("all", m.is_inf(m.scores)))),
    "scores of another number": lambda m: m.where(m.over("all", m.is_inf(m.scores, -1.0))),
    "scores that are seen": lambda m: m.where(m.b.call(torch.ne, m.scores, -INF)),
    "scores before the mask": lambda m: m.where(m.over("all", m.b.call(torch.lt, m.product, -5.0))),
    "one score for all": lambda m: m.where(m.is_inf(m.b.call(aten.slice.Tensor, m.scores, -1, 1, 2))),
    "small weights": lambda m: m.where(m.b.call(torch.lt, m.w, 0.01)),
    "not NaN": lambda m: m.where(m.no(m.b.call(torch.isnan, m.w))),
    "NaN of another": lambda m: m.where(m.b.call(torch.isnan, m.added)),
    "another number": lambda m: m.where(m.over("all", m.hides), 1.0),
    "NaN to another number": lambda m: m.b.call(torch.nan_to_num, m.w, 1.0),
    "no number": lambda m: m.b.call(torch.where, m.hides, m.added, m.w),
    "the mask, changed": written_between,
}


@pytest.mark.parametrize("case", SEEN)
def test_what_may_be_seen_may_not_be_filled(case):
    m = Made()
    found = m.found(SEEN[case](m))
    assert not isinstance(found, Attention) and found.reason in (Reason.SCORES_CHANGED, Reason.WEIGHTS_USED), found


def test_an_added_mask_that_is_low_hides_no_key_for_certain():
    m = Made("added")
    found = m.found(m.where(m.over("all", m.b.call(torch.eq, m.added, -1e4))))
    assert not isinstance(found, Attention) and found.reason is Reason.SCORES_CHANGED


def test_what_asks_for_hidden_rows_may_not_be_read_elsewhere():
    m = Made()
    empty = m.over("all", m.is_inf(m.scores))
    out = m.b.call(torch.matmul, m.where(empty), m.v)
    reader = m.b.reader(out, empty)
    (softmax,) = [node for node in m.b.graph.nodes if is_softmax(node, reader)]
    assert match_softmax(softmax, reader).reason is Reason.WEIGHTS_USED


def test_values_made_of_weights_leave_nothing_to_skip():
    m = Made()
    m.v = m.b.call(torch.mul, m.v, m.over("sum", m.b.call(torch.isnan, m.w)))
    assert m.found(m.w).reason is Reason.SCORES_USED
