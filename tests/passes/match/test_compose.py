"""Which axes are batch, heads, rows and keys, and from which node each operand is read."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import Builder

from sparge_compile.passes.match.attention import Attention, Refusal
from sparge_compile.passes.match.decomposed import match_softmax
from sparge_compile.passes.match.softmax import is_softmax
from sparge_compile.report import Reason

B, H, L, S, D = 2, 4, 6, 10, 8


def composed(b: Builder, *outputs) -> Attention | Refusal:
    reader = b.reader(*outputs)
    (softmax,) = [node for node in b.graph.nodes if is_softmax(node, reader)]
    return match_softmax(softmax, reader)


def attend(b: Builder, q, k, v):
    """softmax(q kᵀ) v over the last two dimensions."""
    scores = b.call(torch.matmul, q, b.method("transpose", k, -1, -2))
    return b.call(torch.matmul, b.call(torch.softmax, scores, -1), v)


def shape(found: Attention):
    return found.batch, found.heads, found.kv_heads, found.length, found.keys, found.head_size


def split_heads(b, name, length, heads=H):
    """A projection [B, L, H·D] as [B, H, L, D]."""
    x = b.input(name, B, length, heads * D)
    return x, b.method("transpose", b.method("view", x, B, length, heads, D), 1, 2)


def test_four_dimensions_are_batch_heads_rows_and_features():
    b = Builder()
    found = composed(b, attend(b, *b.qkv(B, H, L, S, D)))
    assert shape(found) == (B, H, H, L, S, D)


def test_operands_are_read_where_they_are_b_h_l_d():
    b = Builder()
    (_, q), (_, k), (_, v) = (split_heads(b, name, n) for name, n in (("q", L), ("k", S), ("v", S)))
    found = composed(b, attend(b, q, k, v))
    assert shape(found) == (B, H, H, L, S, D)
    assert [x.node for x in (found.query, found.key, found.value)] == [q, k, v]
    assert all(x.layout == x.wanted for x in (found.query, found.key, found.value))


@pytest.mark.parametrize("split", [True, False], ids=["split from features", "never split"])
def test_folded_batch_and_heads_are_told_apart_by_how_heads_were_split(split):
    b = Builder()
    parts = []
    for name, length in (("q", L), ("k", S), ("v", S)):
        x = split_heads(b, name, length)[1] if split else b.input(name, B * H, length, D)
        parts.append(b.method("reshape", x, B * H, length, D) if split else x)
    found = composed(b, attend(b, *parts))
    assert shape(found) == ((B, H, H, L, S, D) if split else (B * H, 1, 1, L, S, D))


def repeated(b, x, times):
    """[B, Hk, S, D] with each head this often, in the words of transformers."""
    spread = b.method("expand", b.method("unsqueeze", x, 2), B, H // times, times, S, D)
    return b.method("reshape", spread, B, H, S, D)


@pytest.mark.parametrize("times", [2, 4])
def test_repeated_key_heads_are_read_before_they_were_repeated(times):
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D, kv_heads=H // times)
    found = composed(b, attend(b, q, repeated(b, k, times), repeated(b, v, times)))
    assert shape(found) == (B, H, H // times, L, S, D)
    assert (found.key.node, found.value.node) == (k, v)


def test_values_that_alone_are_not_repeated_keep_the_keys_whole():
    b = Builder()
    q, k, _ = b.qkv(B, H, L, S, D, kv_heads=2)
    v = b.input("values", B, H, S, D)
    found = composed(b, attend(b, q, repeated(b, k, 2), v))
    assert shape(found) == (B, H, H, L, S, D) and found.value.node is v


def test_keys_that_come_transposed_are_read_as_they_are():
    b = Builder()
    q, v = b.input("q", B, H, L, D), b.input("v", B, H, S, D)
    kt = b.input("kt", B, H, D, S)
    scores = b.call(torch.matmul, q, kt)
    found = composed(b, b.call(torch.matmul, b.call(torch.softmax, scores, -1), v))
    assert shape(found) == (B, H, H, L, S, D)
    assert found.key.node is kt and found.key.layout != found.key.wanted


def test_an_upcast_is_seen_through_and_a_downcast_is_not():
    for narrow, wide, through in (
        (torch.bfloat16, torch.float32, True),
        (torch.float64, torch.float32, False),
    ):
        b = Builder()
        q, k, v = b.qkv(B, H, L, S, D, dtype=narrow)
        casts = [b.method("to", x, wide) for x in (q, k, v)]
        found = composed(b, attend(b, *casts))
        assert [x.node for x in (found.query, found.key, found.value)] == ([q, k, v] if through else casts)
        assert found.dtype == torch.float32


def test_values_that_differ_from_query_to_query_are_no_attention():
    b = Builder()
    weights = b.call(torch.softmax, b.call(torch.matmul, b.input("q", B, L, D), b.input("kt", B, D, S)), -1)
    v = b.input("v", B, L, S, D)
    out = b.call(torch.matmul, b.method("unsqueeze", weights, 2), v)
    found = composed(b, out)
    assert isinstance(found, Refusal) and found.reason is Reason.NOT_ATTENTION


@pytest.mark.parametrize("writes", [False, True], ids=["kept", "changed"])
def test_an_operand_that_is_changed_before_the_result_is_refused(writes):
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D)
    key = b.call(torch.neg, k)
    scores = b.call(torch.matmul, q, b.method("transpose", key, -1, -2))
    b.method("mul_" if writes else "mul", key, 2)
    found = composed(b, b.call(torch.matmul, b.call(torch.softmax, scores, -1), v))
    if writes:
        assert isinstance(found, Refusal) and found.reason is Reason.IN_PLACE and key.name in found.detail
    else:
        assert found.key.node is key


@pytest.mark.parametrize("dynamic", [(2,), (0, 2)], ids=["length", "batch and length"])
def test_dynamic_sizes_in_dimensions_of_their_own_are_kept(dynamic):
    b = Builder()
    x = b.input("x", 3, H, 16, D, dynamic=dynamic)
    found = composed(b, attend(b, x, x, x))
    assert isinstance(found.length, torch.SymInt) and found.heads == H
    assert isinstance(found.batch, torch.SymInt) == (0 in dynamic)


@pytest.mark.parametrize("dynamic", [(1,), (0, 1)], ids=["one", "two"])
def test_two_dynamic_sizes_in_one_dimension_are_refused(dynamic):
    """All tokens of a batch attend to one another."""
    b = Builder()
    x = b.input("x", 3, 16, H * D, dynamic=dynamic)
    tokens = b.call(operator.mul, b.method("size", x, 0), b.method("size", x, 1))
    heads = b.method("transpose", b.method("view", x, tokens, H, D), 0, 1)
    found = composed(b, attend(b, heads, heads, heads))
    if dynamic == (0, 1):
        assert isinstance(found, Refusal) and found.reason is Reason.LAYOUT
    else:
        assert isinstance(found, Attention) and found.heads == H


@pytest.mark.parametrize("dynamic", [(1,), (0, 1)], ids=["one", "two"])
def test_two_dynamic_sizes_of_keys_are_refused_too(dynamic):
    """A few queries attend to all tokens of a batch."""
    b = Builder()
    q, x = b.input("q", H, L, D), b.input("x", 3, 16, H * D, dynamic=dynamic)
    tokens = b.call(operator.mul, b.method("size", x, 0), b.method("size", x, 1))
    split = b.method("view", x, b.method("size", x, 0), b.method("size", x, 1), H, D)
    heads = b.method("transpose", b.method("view", split, tokens, H, D), 0, 1)
    found = composed(b, attend(b, q, heads, heads))
    assert isinstance(found, Refusal if dynamic == (0, 1) else Attention)


def test_a_factor_of_the_scores_is_read_like_an_operand():
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D)
    by = b.input("temperature", H, 1, 1)
    scores = b.call(torch.mul, b.call(torch.matmul, q, b.method("transpose", k, -1, -2)), by)
    found = composed(b, b.call(torch.matmul, b.call(torch.softmax, scores, -1), v))
    (factor,) = found.factors
    assert factor.operand.node is by and not factor.inverse and not factor.operand.expand
    assert [len(dim) for dim in factor.operand.layout] == [1, 0, 0]
