"""The option ``precision``: what a site attends in, what the report says of it, training, and who is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparge_compile
from sparge_compile.kernels import allocate, eight_bits
from sparge_compile.kernels.how import How

SPARSE = {"min_seq_len": 0, "inner": "eager", "topk": 0.5, "topp": 0.0}


class Two(nn.Module):
    """Attention without a mask, and attention with one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(out, k, v, attn_mask=mask)


def operands(length: int = 300, keys: int = 260, size: int = 32) -> list[Tensor]:
    return [torch.randn(1, 2, n, size) for n in (length, keys, keys)]


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def test_a_site_attends_in_eight_bits_where_it_can_and_the_report_says_so() -> None:
    q, k, v = operands()
    mask = torch.rand(1, 1, 1, 260) < 0.9
    options = {**SPARSE, "topk": 1.0, "precision": "fp8"}
    report = sparge_compile.explain(Two(), options)(q, k, v, mask)
    assert [row.precision for row in report] == ["fp8", "float32: a mask"]
    assert "precision" in str(report) and report.to_dict()["sites"][0]["precision"] == "fp8"
    assert "precision" not in str(sparge_compile.explain(Two(), SPARSE)(q, k, v, mask))

    first = F.scaled_dot_product_attention
    exact = first(q, k, v)
    compiled = {name: torch.compile(first, backend="sparge", options={**options, "precision": name})
                for name in (None, "fp8")}  # fmt: skip
    assert relative(compiled[None](q, k, v), exact) < 1e-5
    assert 1e-3 < relative(compiled["fp8"](q, k, v), exact) < 4e-2
    rounded = eight_bits.rounded(q, k, v, How(None, False, 32**-0.5))
    torch.testing.assert_close(compiled["fp8"](q, k, v), first(*rounded), rtol=1e-4, atol=1e-5)


def test_the_backward_is_that_of_attention_over_the_rounded_operands() -> None:
    given = operands()
    how = How(None, False, 32**-0.5)
    blocks = sparge_compile.BlockMap.from_dense(torch.rand(1, 2, 3, 5) < 0.6)
    both = given, eight_bits.rounded(*given, how)
    mine, theirs = ([x.detach().clone().requires_grad_() for x in some] for some in both)
    out, lse = sparge_compile.attention(*mine, block_map=blocks, precision="fp8", return_lse=True)
    want, want_lse = sparge_compile.attention(*theirs, block_map=blocks, return_lse=True)
    torch.testing.assert_close((out, lse), (want, want_lse))
    (out.square().sum() + lse.sum() + want.square().sum() + want_lse.sum()).backward()
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    by_rule = sparge_compile.attention(*mine, topk=0.5, precision="fp8")
    by_rule.sum().backward()


def test_results_lie_in_memory_as_tracing_was_told() -> None:
    """As models have them: heads of a fused projection, whose rows are not adjacent."""
    qkv = torch.randn(1, 300, 3, 2, 32, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        q, k, v = x.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    options = {"min_seq_len": 0, "inner": "aot_eager", "topk": 1.0, "precision": "fp8"}
    compiled = torch.compile(attend, backend="sparge", options=options)(qkv)  # once: "view size is not compatible"
    q, k, v = (x.detach().requires_grad_() for x in qkv.transpose(1, 3).unbind(2))
    out = sparge_compile.attention(q, k, v, topk=1.0, precision="fp8")
    torch.testing.assert_close(compiled, out.transpose(1, 2).flatten(2))
    assert out.stride() == allocate.new_out(q, v).stride()
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.stride() == allocate.dense_like(x).stride()


def test_neither_a_bias_of_all_keys_nor_autocast_changes_the_backward() -> None:
    q, k, v = operands()
    bias = 20 * torch.randn(1, 2, 1, q.shape[3])

    def gradients(key: Tensor, autocast: bool = False) -> list[Tensor]:
        x = [y.detach().clone().requires_grad_() for y in (q, key, v)]
        out = sparge_compile.attention(*x, topk=0.9, precision="fp8").square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out.backward()
        return [y.grad for y in x]

    for x, y in zip(gradients(k + bias), gradients(k + bias, autocast=True), strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(gradients(k + bias), gradients(k), strict=True):
        assert relative(x, y) < 0.02


def test_of_no_keys_nothing_comes() -> None:
    q, k, v = (x.requires_grad_() for x in operands())
    out = sparge_compile.attention(q, k[:, :, :0], v[:, :, :0], topk=0.5, precision="fp8")
    assert not out.any()


def test_what_has_no_kernel_is_refused_by_name() -> None:
    q, k, v = operands(size=24)
    with pytest.raises(ValueError, match="no multiples of 16"):
        sparge_compile.attention(q, k, v, topk=0.5, precision="fp8")
    q, k, v = operands()
    with pytest.raises(ValueError, match="attn_mask"):
        sparge_compile.attention(q, k, v, torch.rand(260) < 0.9, topk=0.5, precision="fp8")
    with pytest.raises(ValueError, match="precision"):
        sparge_compile.attention(q, k, v, topk=0.5, precision="fp4")
    with pytest.raises(ValueError, match="precision"):
        sparge_compile.Options(precision="int4")
