"""Calls that attend and are not replaced are sites with a reason; ops that only look like them are not."""

from __future__ import annotations

import pytest
import torch
from graphs import Builder
from torch import Tensor

from sparge_compile import explain
from sparge_compile.passes.find import find
from sparge_compile.passes.match.foreign import attends
from sparge_compile.report import Reason

H, L, D = 2, 256, 16

# Names of ops and of their tensors, as the libraries register them.
ATTENTION = {
    "flash_attn::_flash_attn_forward": "q k v alibi_slopes",
    "flash_attn::_flash_attn_varlen_forward": "q k v cu_seqlens_q cu_seqlens_k",
    "flash_attn_3::fwd": "q k v k_new v_new",
    "flash_attn::_flash_attn_qkvpacked_forward": "qkv alibi_slopes",
    "flash_attn::_flash_attn_kvpacked_forward": "q kv",
    "torch_attn::_varlen_attn": "query key value cu_seq_q cu_seq_k",
    "xformers::efficient_attention_forward_cutlass": "query key value attn_bias",
    "xformers_flash::flash_fwd": "query key value cu_seqlens_q",
    "sageattention::qk_int8_sv_f8_accum_f32_attn": "query key value output query_scale",
    "natten::na2d_forward": "query key value bias",
    "vllm::unified_attention_with_output": "query key value output",
    "vllm::unified_mla_attention": "q kv_c_normed k_pe",
    "transformer_engine::fused_attn_fwd": "cu_seqlens_q cu_seqlens_kv Q K V",
    "mine::my_attention": "queries keys values",
}
OTHER = {
    "flash_attn::_flash_attn_backward": "dout q k v out softmax_lse",
    "vllm::reshape_and_cache_flash": "key value key_cache value_cache",
    "vllm::fused_qk_norm_rope": "q k v positions",
    "flash_attn::rotary": "x cos sin",
    "xformers::sequence_parallel": "scatter_input weights",
    "sageattention::quant_per_block": "x scale",
    "mine::attention_bias": "positions table",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_ops_that_attend(name):
    assert attends(name, ATTENTION[name].split())


@pytest.mark.parametrize("name", OTHER)
def test_ops_that_do_not(name):
    assert not attends(name, OTHER[name].split())


@torch.library.custom_op("sparge_tests::ring_attn", mutates_args=())
def ring_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


@ring_attn.register_fake
def _(q, k, v, scale):
    return torch.empty_like(q)


@torch.library.custom_op("sparge_tests::attn_norm", mutates_args=())
def attn_norm(x: Tensor) -> Tensor:
    return x / 2


@attn_norm.register_fake
def _(x):
    return torch.empty_like(x)


@torch.compiler.allow_in_graph
def opaque_attention(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


class Layer(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, x):
        return self.attend(x, x, x)


@pytest.mark.parametrize(
    "attend, detail",
    [
        (lambda q, k, v: ring_attn(q, k, v, 0.5), "sparge_tests::ring_attn"),
        (lambda q, k, v: torch.ops.sparge_tests.ring_attn.default(q, k, v, 0.5), "sparge_tests::ring_attn"),
        (opaque_attention, "opaque_attention"),
    ],
    ids=["packet", "overload", "function"],
)
def test_a_custom_op_is_a_site_with_its_name_and_its_line(attend, detail):
    x = torch.randn(1, H, L, D)
    model = torch.nn.Sequential(Layer(attend))
    report = explain(model, {"min_seq_len": 0})(x)
    (row,) = report
    assert (row.kind, row.reason, row.name) == ("op", Reason.CUSTOM_OP, "0") and row.detail.endswith(detail)
    assert row.site.code.startswith(__file__) and "match/test_foreign.py:" in str(report)
    options = {"min_seq_len": 0, "inner": "eager"}
    with pytest.warns(UserWarning, match=rf"custom op is not replaced: .*{detail}.*test_foreign.py:\d+"):
        torch.testing.assert_close(torch.compile(model, backend="sparge", options=options)(x), model(x))
    with pytest.raises(Exception, match="custom op is not replaced"):
        torch.compile(model, backend="sparge", options={**options, "on_unsupported": "error"})(x)


def test_an_op_that_does_not_attend_is_no_site():
    assert not explain(lambda x: attn_norm(x))(torch.randn(2, 3)).sites


def test_nested_tensors_are_named():
    b = Builder()
    ragged = torch.nested.nested_tensor([torch.randn(H, 5, D), torch.randn(H, 7, D)])
    x = b.input("x", 1, H, L, D)
    x.meta["example_value"] = ragged
    node = b.graph.call_function(torch.nn.functional.scaled_dot_product_attention, (x, x, x))
    node.meta["example_value"] = ragged
    (match,) = find(b.module(node))
    assert match.is_attention and match.refusal.reason is Reason.NESTED
