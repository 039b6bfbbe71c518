"""Fused calls: every spelling is read, and what cannot be replaced is refused with its reason."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder

from sparge_compile.passes.match.attention import Attention, Refusal
from sparge_compile.passes.match.sdpa import arguments_of, is_sdpa, match_sdpa
from sparge_compile.report import Reason

aten = torch.ops.aten
SDPA = F.scaled_dot_product_attention
TENSORS = {SDPA, aten.scaled_dot_product_attention, aten.scaled_dot_product_attention.default}


def matched(b: Builder, node) -> Attention | Refusal:
    assert is_sdpa(node)
    kernel = node.target not in TENSORS
    return match_sdpa(node, b.reader(b.call(operator.getitem, node, 0) if kernel else node))


SPELLINGS = {
    "function": lambda b, q, k, v: b.call(SDPA, q, k, v),
    "keywords": lambda b, q, k, v: b.call(SDPA, value=v, key=k, query=q),
    "packet": lambda b, q, k, v: b.call(aten.scaled_dot_product_attention, q, k, v),
    "overload": lambda b, q, k, v: b.call(aten.scaled_dot_product_attention.default, q, k, v),
    "kernel": lambda b, q, k, v: b.call(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling):
    b = Builder()
    q, k, v = b.qkv(batch=2, heads=4, length=6, keys=10, head_size=8)
    found = matched(b, node := SPELLINGS[spelling](b, q, k, v))
    assert [x.node for x in (found.query, found.key, found.value)] == [q, k, v]
    assert found.output is node and found.region == (node,) and not found.rewritten
    assert (found.batch, found.heads, found.kv_heads, found.length, found.keys) == (2, 4, 4, 6, 10)
    assert (found.masks, found.is_causal, found.scale, found.dropout) == ((), False, None, 0.0)
    assert found.result.shape == (2, 4, 6, 8)


@pytest.mark.parametrize(
    "other",
    [
        lambda b, q, k, v: b.call(torch.matmul, q, k),
        lambda b, q, k, v: b.call(torch.softmax, q, -1),
        lambda b, q, k, v: q,
    ],
    ids=["matmul", "softmax", "input"],
)
def test_other_nodes_are_no_fused_call(other):
    b = Builder()
    assert not is_sdpa(other(b, b.input("q", 2, 3), b.input("k", 3, 4), None))


def test_arguments_that_are_given_are_kept():
    b = Builder()
    q, k, v = b.qkv(dtype=torch.float16)
    node = b.call(SDPA, q, k, v, None, 0.25, True, scale=0.5)
    assert arguments_of(node)["dropout_p"] == 0.25
    found = matched(b, node)
    assert (found.is_causal, found.scale, found.dropout, found.dtype) == (True, 0.5, 0.25, torch.float16)


@pytest.mark.parametrize("kv_heads, shared", [(1, 4), (2, 2), (4, 1)])
def test_query_heads_may_share_a_key_head(kv_heads, shared):
    b = Builder()
    q, k, v = b.qkv(heads=4, kv_heads=kv_heads)
    found = matched(b, b.call(SDPA, q, k, v, enable_gqa=True))
    assert (found.heads, found.kv_heads) == (4, kv_heads)
    assert [axis.size for axis in found.axes.group] == [shared] * (shared > 1)


MASKS = {
    "of pairs": ((6, 10), torch.bool, "bool"),
    "of keys": ((1, 1, 1, 10), torch.bool, "bool"),
    "of heads": ((2, 6, 10), torch.bool, "bool"),
    "numbers": ((6, 10), torch.float32, "additive"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_are_read(case):
    shape, dtype, kind = MASKS[case]
    b = Builder()
    q, k, v = b.qkv(heads=2, length=6, keys=10)
    mask = b.input("mask", *shape, dtype=dtype)
    found = matched(b, b.call(SDPA, q, k, v, attn_mask=mask))
    assert found.mask_kind == kind and not found.is_causal
    (read,) = found.masks
    assert read.operand.node is mask and read.kind == ("keep" if dtype == torch.bool else "add")


def test_a_triangle_is_causality_and_no_mask():
    b = Builder()
    q, k, v = b.qkv(length=10, keys=10)
    mask = b.call(torch.tril, b.call(torch.ones, 10, 10, dtype=torch.bool))
    found = matched(b, b.call(SDPA, q, k, v, mask))
    assert found.is_causal and found.masks == ()


def refusals():
    def causal_and_mask(b):
        mask = b.input("mask", 6, 10, dtype=torch.bool)
        return b.opaque(SDPA, *b.qkv(), mask, 0.0, True, value=b._run(torch.empty, (1, 2, 6, 4), {}))

    def wide_mask(b):
        q, k, v = b.qkv(length=6, keys=10)
        mask = b.input("mask", 6, 9, dtype=torch.bool)
        return b.opaque(SDPA, q, k, v, mask, value=q.meta["example_value"])

    def without_values(b):
        q, k, v = b.qkv()
        q.meta.clear()
        return b.opaque(SDPA, q, k, v)

    def three_heads_of_four(b):
        q, k, v = b.qkv(heads=4, kv_heads=3)
        return b.opaque(SDPA, q, k, v, value=q.meta["example_value"])

    def without_gqa(b):
        q, k, v = b.qkv(heads=4, kv_heads=2)
        return b.opaque(SDPA, q, k, v, value=q.meta["example_value"])

    def dynamic_heads(b):
        x = b.input("x", 2, 4, 6, 8, dynamic=(1,))
        return b.call(SDPA, x, x, x)

    return {
        causal_and_mask: Reason.CAUSAL_AND_MASK,
        wide_mask: Reason.MASK_SHAPE,
        without_values: Reason.NO_SHAPES,
        three_heads_of_four: Reason.HEADS,
        without_gqa: Reason.HEADS,
        dynamic_heads: Reason.HEADS,
    }


REFUSED = refusals()


@pytest.mark.parametrize("make", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_be_replaced_is_refused(make):
    b = Builder()
    found = matched(b, make(b))
    assert isinstance(found, Refusal) and found.reason is REFUSED[make]


SHAPES = {  # q, and k and v: what leads rows and keys; then batch, query heads, key heads
    "two dimensions": ((), (), 1, 1, 1),
    "three": ((6,), (6,), 6, 1, 1),
    "five": ((2, 3, 4), (2, 3, 4), 6, 4, 4),
    "five, heads of one for all": ((2, 3, 4), (2, 3, 1), 6, 4, 1),
    "one batch of keys": ((2, 4), (1, 4), 2, 4, 4),
    "one batch of queries": ((1, 4), (3, 4), 3, 4, 4),
    "keys without a batch": ((2, 4), (4,), 2, 4, 4),
    "queries without a batch": ((4,), (2, 4), 2, 4, 4),
    "one head of queries": ((2, 1), (2, 4), 2, 4, 4),
}


@pytest.mark.parametrize("query, key, batch, heads, kv_heads", SHAPES.values(), ids=SHAPES)
def test_what_leads_rows_and_keys_broadcasts(query, key, batch, heads, kv_heads):
    b = Builder()
    q, k, v = b.input("q", *query, 6, 4), b.input("k", *key, 10, 4), b.input("v", *key, 10, 4)
    found = matched(b, b.call(SDPA, q, k, v))
    assert isinstance(found, Attention)
    assert (found.batch, found.heads, found.kv_heads, found.length, found.keys) == (batch, heads, kv_heads, 6, 10)


def test_a_kernel_of_which_more_is_read_is_refused():
    b = Builder()
    node = b.call(aten._scaled_dot_product_flash_attention_for_cpu.default, *b.qkv())
    lse = b.call(operator.getitem, node, 1)
    found = match_sdpa(node, b.reader(node, lse))
    assert isinstance(found, Refusal) and found.reason is Reason.OUTPUTS_USED


def test_operands_are_read_behind_copies_unless_they_were_changed_since():
    for writes in (False, True):
        b = Builder()
        q, k, v = b.qkv()
        source = b.call(torch.neg, k)
        copied = b.method("clone", source)
        if writes:
            b.method("mul_", source, 2)
        found = matched(b, b.call(SDPA, q, copied, v))
        assert isinstance(found, Refusal) == writes or found.key.node is (copied if writes else source)


def test_a_result_that_is_changed_later_is_noted():
    for writes in (False, True):
        b = Builder()
        node = b.call(SDPA, *b.qkv())
        late = b.method("mul_" if writes else "mul", node, 2)
        assert match_sdpa(node, b.reader(late)).rewritten == writes


def test_a_dynamic_length_is_kept_as_a_symbol():
    b = Builder()
    x = b.input("x", 2, 4, 64, 8, dynamic=(2,))
    found = matched(b, b.call(SDPA, x, x, x))
    assert isinstance(found.length, torch.SymInt) and found.heads == 4
