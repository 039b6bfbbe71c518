"""Attention written out around a softmax is matched; look-alikes are refused, each with its reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, written_out

from sparge_compile.passes.match.attention import Attention, Refusal
from sparge_compile.passes.match.decomposed import match_softmax
from sparge_compile.passes.match.softmax import is_softmax
from sparge_compile.passes.read.reader import Reader
from sparge_compile.report import Reason

B, H, L, S, D = 2, 3, 6, 10, 4
INF = float("-inf")


def scores_of(b: Builder, q, k, scale=0.5):
    return b.call(torch.mul, b.call(torch.matmul, q, b.method("transpose", k, -1, -2)), scale)


def weighted(b: Builder, scores, v):
    return b.call(torch.matmul, b.call(torch.softmax, scores, -1), v)


def matched(make) -> Attention | Refusal:
    """What is told of the softmax of a graph over q [B, H, L, D], k and v [B, H, S, D]."""
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D)
    made = make(b, q, k, v)
    reader = b.reader(*(made if isinstance(made, list) else [made]))
    (softmax,) = [node for node in b.graph.nodes if is_softmax(node, reader)]
    return match_softmax(softmax, reader)


def masked(kind):
    def make(b, q, k, v):
        scores = scores_of(b, q, k)
        if kind == "number":
            return weighted(b, b.call(torch.add, scores, b.input("mask", L, S)), v)
        return weighted(b, b.method("masked_fill", scores, b.input("mask", L, S, dtype=torch.bool), INF), v)

    return make


def folded(b, q, k, v):
    """Batch and heads in one dimension, as bmm takes them."""
    q, k, v = (b.method("reshape", x, B * H, -1, D) for x in (q, k, v))
    scores = b.call(torch.mul, b.call(torch.bmm, q, b.method("transpose", k, 1, 2)), 0.5)
    return b.method("view", b.call(torch.bmm, b.call(torch.softmax, scores, -1), v), B, H, L, D)


def einsum(b, q, k, v):
    scores = b.call(torch.mul, b.call(torch.einsum, "bhld,bhsd->bhls", q, k), 0.5)
    return b.call(torch.einsum, "bhls,bhsd->bhld", b.method("softmax", scores, -1), v)


def softmax_module(b, q, k, v):
    return b.call(torch.matmul, b.module_call("softmax", torch.nn.Softmax(-1), scores_of(b, q, k)), v)


def overloads(b, q, k, v):
    scores = b.call(torch.mul, b.call(torch.matmul, q, b.method("transpose", k, -1, -2)), 0.5)
    return b.call(torch.matmul, b.call(torch.ops.aten._softmax.default, scores, -1, False), v)


def scaled_query(b, q, k, v):
    return weighted(b, b.call(torch.matmul, b.call(torch.mul, q, 0.5), b.method("transpose", k, -1, -2)), v)


def in_place(b, q, k, v):
    scores = b.call(torch.matmul, q, b.method("transpose", k, -1, -2))
    b.method("mul_", scores, 0.5)
    return weighted(b, scores, v)


SPELLINGS = [written_out, folded, einsum, softmax_module, overloads, scaled_query, in_place]


@pytest.mark.parametrize("make", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_is_matched(make):
    found = matched(make)
    assert isinstance(found, Attention), found
    assert (found.length, found.keys, found.head_size, found.value_head_size) == (L, S, D, D)
    assert found.batch * found.heads == B * H
    assert found.scale == (1.0 if make is scaled_query else 0.5)
    assert not found.masks and not found.is_causal and found.dropout == 0
    products = [node for node in found.region if "matmul" in str(node.target) or "bmm" in str(node.target)]
    assert len(found.region) >= 3 and found.output in found.region
    assert make is einsum or len(products) == 2
    assert not any(node.op in ("placeholder", "output") for node in found.region)


@pytest.mark.parametrize("kind, mask", [("bool", "bool"), ("number", "additive")])
def test_masks_are_read(kind, mask):
    found = matched(masked(kind))
    assert isinstance(found, Attention) and found.mask_kind == mask
    assert found.masks[0].operand.node.name == "mask"


def test_a_triangle_is_causality():
    def make(b, q, k, v):
        k = v = q
        hidden = b.call(torch.triu, b.call(torch.ones, L, L, dtype=torch.bool), diagonal=1)
        return weighted(b, b.method("masked_fill", scores_of(b, q, k), hidden, INF), v)

    found = matched(make)
    assert found.is_causal and found.masks == ()


def dropped_out(b, q, k, v):
    weights = b.call(torch.softmax, scores_of(b, q, k), -1)
    return b.call(torch.matmul, b.call(F.dropout, weights, 0.5), v)


def weights_returned(b, q, k, v):
    weights = b.call(torch.softmax, scores_of(b, q, k), -1)
    return [b.call(torch.matmul, weights, v), weights]


def scores_returned(b, q, k, v):
    scores = scores_of(b, q, k)
    return [weighted(b, scores, v), scores]


def weights_scaled(b, q, k, v):
    return b.call(torch.matmul, b.call(torch.mul, b.call(torch.softmax, scores_of(b, q, k), -1), 2), v)


def scores_capped(b, q, k, v):
    return weighted(b, b.call(torch.tanh, scores_of(b, q, k)), v)


def scores_capped_far_behind_a_mask(b, q, k, v):
    """A mask as transformers builds it in a step with a cache, of more nodes than are searched."""
    hidden = b.call(torch.ones, L, S, dtype=torch.bool)
    for number in range(5):
        hidden = b.call(torch.logical_and, hidden, b.call(torch.ops.aten.scalar_tensor.default, bool(number)))
    capped = b.call(torch.mul, b.call(torch.tanh, b.call(torch.div, scores_of(b, q, k), 5.0)), 5.0)
    return weighted(b, b.call(torch.add, capped, b.call(torch.where, hidden, b.call(torch.zeros, ()), INF)), v)


def softmax_over_rows(b, q, k, v):
    weights = b.call(torch.softmax, scores_of(b, q, k), -2)
    return b.call(torch.matmul, weights, v)


def no_queries(b, q, k, v):
    return weighted(b, b.input("scores", B, H, L, S), v)


def no_values(b, q, k, v):
    return b.call(torch.softmax, scores_of(b, q, k), -1)


def classifier(b, q, k, v):
    return b.call(torch.softmax, b.call(torch.matmul, q, b.input("weight", D, 7)), -1)


def over_a_vector(b, q, k, v):
    return b.call(torch.softmax, b.input("vector", 7), -1)


def over_one_entry(b, q, k, v):
    return b.call(torch.softmax, b.input("column", 7, 1), -1)


def autocast_between(b, q, k, v):
    scores = scores_of(b, q, k)
    b.graph.call_function(torch.amp.autocast_mode._exit_autocast, (None,))
    return weighted(b, scores, v)


def key_changed_since(b, q, k, v):
    key = b.call(torch.neg, k)
    scores = scores_of(b, q, key)
    b.method("mul_", key, 2)
    return weighted(b, scores, v)


REFUSED = {
    dropped_out: Reason.DROPOUT,
    weights_returned: Reason.WEIGHTS_USED,
    scores_returned: Reason.SCORES_USED,
    weights_scaled: Reason.SCORES_CHANGED,
    scores_capped: Reason.SCORES_CHANGED,
    scores_capped_far_behind_a_mask: Reason.SCORES_CHANGED,
    softmax_over_rows: Reason.NOT_ATTENTION,
    no_queries: Reason.NOT_ATTENTION,
    no_values: Reason.NOT_ATTENTION,
    classifier: Reason.NOT_ATTENTION,
    over_a_vector: Reason.NOT_ATTENTION,
    over_one_entry: Reason.NOT_ATTENTION,
    autocast_between: Reason.CONTEXT,
    key_changed_since: Reason.IN_PLACE,
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda f: f.__name__)
def test_look_alikes_are_refused(make):
    found = matched(make)
    assert isinstance(found, Refusal) and found.reason is REFUSED[make], found


def test_a_change_of_the_mode_elsewhere_forbids_nothing():
    def make(b, q, k, v):
        out = written_out(b, q, k, v)
        b.graph.call_function(torch.amp.autocast_mode._exit_autocast, (None,))
        return out

    assert isinstance(matched(make), Attention)


def test_a_change_of_the_key_after_the_result_forbids_nothing():
    def make(b, q, k, v):
        key = b.call(torch.neg, k)
        out = written_out(b, q, key, v)
        b.method("mul_", key, 2)
        return out

    assert isinstance(matched(make), Attention)


@pytest.mark.parametrize("after", [False, True], ids=["kept", "changed"])
def test_a_result_that_is_changed_later_is_noted(after):
    def make(b, q, k, v):
        out = written_out(b, q, k, v)
        return b.method("mul_", out, 2) if after else out

    assert matched(make).rewritten == after


def test_the_region_is_what_only_the_scores_and_the_weights_read():
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D)
    key = b.method("transpose", k, -1, -2)
    product = b.call(torch.matmul, q, key)
    scaled = b.call(torch.mul, product, 0.5)
    softmax = b.call(torch.softmax, scaled, -1)
    out = b.call(torch.matmul, softmax, v)
    reader = b.reader(b.call(torch.add, out, 1))
    found = match_softmax(softmax, reader)
    assert found.region == (product, scaled, softmax, out)
    assert (found.query.node, found.key.node, found.value.node) == (q, k, v)


def test_a_softmax_without_shapes_is_refused():
    graph = torch.fx.Graph()
    softmax = graph.call_function(torch.softmax, (graph.placeholder("x"), -1))
    graph.output(softmax)
    found = match_softmax(softmax, Reader(torch.fx.GraphModule({}, graph)))
    assert found.reason is Reason.NO_SHAPES
