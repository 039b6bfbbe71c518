"""Training below the limit of an op on a GPU: torch's flash kernels, where they take the call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparge_compile import ops  # noqa: F401
from sparge_compile.kernels import attend, dense
from sparge_compile.kernels.how import How

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]
BELOW = 100_000  # keys


@pytest.mark.parametrize(
    "kv_heads, is_causal, head_size", [(4, False, 64), (4, True, 128), (2, False, 128), (1, True, 72)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("contiguous", [False, True])
def test_below_the_limit_training_is_flash_attention(kv_heads, is_causal, head_size, dtype, contiguous, monkeypatch):
    monkeypatch.setattr(attend, "full_map", lambda *given: pytest.fail("our kernels read every block"))
    torch.manual_seed(0)
    sizes = [(2, 700, 4), (2, 600 + 100 * is_causal, kv_heads), (2, 600 + 100 * is_causal, kv_heads)]
    q, k, v = (torch.randn(*size, head_size, dtype=dtype).transpose(1, 2) for size in sizes)
    if contiguous:
        q, k, v = (x.contiguous() for x in (q, k, v))
    how = How(None, is_causal, 0.1)
    assert dense.has_backward(q, k, v, how)
    x = [y.detach().requires_grad_() for y in (q, k, v)]
    thresholds = torch.tensor([[0.1, 0.0]] * 4)
    out, lse, _ = torch.ops.sparge.attend_for_backward(*x, thresholds, *how[:3], BELOW)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, x, weight)
    exact = [y.detach().double().requires_grad_() for y in (q, k, v)]
    repeated = [y.repeat_interleave(4 // kv_heads, 1) for y in exact[1:]]
    want = F.scaled_dot_product_attention(exact[0], *repeated, is_causal=is_causal, scale=0.1)
    scores = 0.1 * exact[0] @ repeated[0].mT
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if is_causal else torch.tensor(True)
    expected = torch.autograd.grad(want, exact, weight.double())
    torch.testing.assert_close(lse.double(), scores.masked_fill(~visible, -torch.inf).logsumexp(-1), atol=0.02, rtol=0)
    for found, true in zip((out, *grads), (want, *expected), strict=True):
        assert (found.double() - true).norm() < 0.02 * true.norm()
    # The stride of a dimension of size one says nothing: torch may give any.
    for found, given in zip((out, *grads), (q, q, k, v), strict=True):
        assert [found.stride(d) for d in range(4) if found.shape[d] > 1] == [
            given.stride(d) for d in range(4) if given.shape[d] > 1
        ]


def test_a_gradient_of_the_log_sum_exp_goes_on_with_our_kernels():
    torch.manual_seed(0)
    x = [torch.randn(1, 2, 300, 64, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    thresholds = torch.tensor([[0.1, 0.0]] * 2)
    out, lse, _ = torch.ops.sparge.attend_for_backward(*x, thresholds, None, False, 0.125, BELOW)
    found = torch.autograd.grad(out.float().square().sum() + lse.sin().sum(), x)
    exact = [y.detach().double().requires_grad_() for y in x]
    scores = 0.125 * exact[0] @ exact[1].mT
    want = torch.autograd.grad((scores.softmax(-1) @ exact[2]).square().sum() + scores.logsumexp(-1).sin().sum(), exact)
    for a, b in zip(found, want, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()
