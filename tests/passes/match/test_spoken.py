"""Calls of other libraries in graphs: what the tables of spellings do not vary."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import sparge_compile
from sparge_compile.report import Reason

sys.path.append(str(Path(__file__).parents[2] / "whole"))
import flash_2
import flash_3
import other_libraries  # noqa: F401  importing it registers its ops

B, H, L, D = 2, 2, 150, 16
LOOK = {"min_seq_len": 0, "on_unsupported": "dense"}
DENSE = {**LOOK, "topk": 1.0, "topp": 0.0, "inner": "aot_eager"}


def qkv(requires_grad=False):
    return [torch.randn(B, L, H, D, requires_grad=requires_grad) for _ in "qkv"]


def assert_replaced(function, inputs, options=DENSE, dynamic=False):
    (row,) = sparge_compile.explain(function, options)(*inputs)
    assert row.status == "sparse", row.reason
    got = torch.compile(function, backend="sparge", fullgraph=True, options=options, dynamic=dynamic)(*inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-5, atol=1e-5)
    return got, row


def test_a_bias_changes_scores():
    def call(q, k, v, bias):
        return torch.ops.sparge_others.memory_efficient_attention_forward(q, k, v, bias, 0.0, 0.3)

    inputs = (*qkv(), torch.randn(B, H, L, L))
    (row,) = sparge_compile.explain(call, LOOK)(*inputs)
    assert (row.kind, row.reason, row.site.mask) == ("xformers", Reason.ADDITIVE_MASK, "additive")
    assert_replaced(call, inputs, {**DENSE, "additive_masks": True})


def test_a_scale_that_depends_on_the_length():
    def call(q, k, v):
        return flash_3.flash_attn_func(q, k, v, softmax_scale=0.02 * q.shape[1] ** 0.5)

    inputs = qkv()
    for x in inputs:
        torch._dynamo.maybe_mark_dynamic(x, 1)
    assert_replaced(call, inputs, dynamic=None)


def test_a_function_in_checkpointed_code_learns():
    def call(q, k, v):
        return checkpoint(lambda *x: flash_2.flash_attn_func(*x, causal=True) * 2, q, k, v, use_reentrant=False)

    inputs = qkv(requires_grad=True)
    got, _ = assert_replaced(call, inputs)
    pairs = zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(call(*inputs).sum(), inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_result_that_is_changed_in_place():
    def call(q, k, v):
        out = flash_2.flash_attn_func(q, k, v)
        return out.mul_(2)

    assert_replaced(call, qkv())


def test_a_call_that_stays_keeps_its_function():
    def call(q, k, v):
        return flash_2.flash_attn_func(q, k, v, softcap=5.0) + flash_3.flash_attn_func(q, k, v)

    inputs = qkv(requires_grad=True)
    rows = list(sparge_compile.explain(call, LOOK)(*inputs))
    assert [(row.kind, row.status) for row in rows] == [("flash_attn", "dense"), ("flash_attn", "sparse")]
    assert rows[0].reason is Reason.SOFTCAP and rows[0].detail == "softcap = 5.0"
    got = torch.compile(call, backend="sparge", fullgraph=True, options=DENSE)(*inputs)
    torch.testing.assert_close(got, call(*inputs), rtol=1e-5, atol=1e-5)


def test_packed_rows_are_not_taken_for_the_parts_of_one_sequence():
    """Text and image of one sample stand together; those of another follow."""

    def call(text, image, cu):
        x = torch.cat([text, image], 1).flatten(0, 1).unflatten(1, (H, D))
        longest = text.shape[1] + image.shape[1]
        return torch.ops.sparge_torch_211._varlen_attn(x, x, x, cu, cu, longest, longest)[0]

    inputs = (torch.randn(B, 20, H * D), torch.randn(B, L, H * D), torch.tensor([0, 170, 340], dtype=torch.int32))
    text = {**DENSE, "topk": 0.3, "keep_keys": "text"}
    call(*inputs)
    got = torch.compile(call, backend="sparge", fullgraph=True, options=text)(*inputs)
    plain = torch.compile(call, backend="sparge", fullgraph=True, options={**DENSE, "topk": 0.3})(*inputs)
    torch.testing.assert_close(got, plain)


def test_autocast_leaves_operands_alone_as_it_does_those_of_the_call():
    def call(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.ops.sparge_others.memory_efficient_attention_forward(q, k, v, None, 0.0, 0.3)

    inputs = qkv()
    got = torch.compile(call, backend="sparge", fullgraph=True, options=DENSE)(*inputs)
    want = torch.ops.sparge_others.memory_efficient_attention_forward(*inputs, None, 0.0, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # float32, as the graph that was traced has it


def test_one_list_of_lengths_in_training_says_what_to_do():
    """torch breaks the graph at the function, and what its backward needs is then a result of a graph."""

    def call(q, cu):
        out, lse, _ = torch.ops.sparge_torch_211._varlen_attn(q, q, q, cu, cu, L, L)
        return out, lse

    cu = torch.tensor([0, L], dtype=torch.int32)
    (row,) = sparge_compile.explain(call, LOOK)(torch.randn(L, H, D), cu)
    assert row.reason is Reason.OUTPUTS_USED and "let cu_seqlens_k be a copy" in row.detail
    (row,) = sparge_compile.explain(lambda q, cu: call(q, cu)[0], LOOK)(torch.randn(L, H, D), cu)
    assert row.status == "sparse"
