"""One call of the op: dense below its limit, sparse above, with the outputs and gradients of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import sparge_compile.ops  # noqa: F401
from sparge_compile.kernels import allocate, attend, cpu
from sparge_compile.kernels.how import How
from sparge_compile.limit import Limit

SPARSE, DENSE = (), (10_000,)  # limits that hold, and that do not, for the sizes here
ATTEND, KEEPING = torch.ops.sparge.attend, torch.ops.sparge.attend_for_backward


def operands(length=300, keys=200, heads=4, kv_heads=2, value_size=16, grad=False):
    """Projections [B, L, H, D] seen as [B, H, L, D], and thresholds."""
    shapes = [(2, length, heads, 16), (2, keys, kv_heads, 16), (2, keys, kv_heads, value_size)]
    qkv = [torch.randn(shape).transpose(1, 2).detach().requires_grad_(grad) for shape in shapes]
    return *qkv, torch.tensor([[0.3, 0.0]] * heads)


def mask(keys=200):
    return torch.arange(keys).view(1, 1, 1, -1) < torch.tensor([keys, 70]).view(2, 1, 1, 1)


HOW = {"plain": (None, False), "causal": (None, True), "mask": (mask(), False), "causal and mask": (mask(), True)}


@pytest.mark.parametrize("value_size", [16, 24])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("grad", [False, True])
def test_below_the_limit_a_call_is_dense(how, grad, value_size):
    q, k, v, thresholds = operands(value_size=value_size, grad=grad)
    attn_mask, is_causal = HOW[how]
    call = (lambda *x: KEEPING(*x)[0]) if grad else ATTEND
    out = call(q, k, v, thresholds, attn_mask, is_causal, 0.25, *DENSE)
    visible = torch.ones(300, 200, dtype=torch.bool).tril() if is_causal else torch.ones(300, 200, dtype=torch.bool)
    visible = visible if attn_mask is None else visible & attn_mask
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert out.stride() == allocate.out_strides(q, v) == allocate.new_out(q, v).stride()
    if grad:
        weight = torch.randn_like(out)
        got, true = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, want))
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how, kv_heads, value_size, is_flash", [
    ("plain", 4, 16, True), ("causal", 4, 16, True), ("mask", 4, 16, False), ("plain", 2, 16, False),
    ("plain", 4, 24, False),
])  # fmt: skip
@pytest.mark.parametrize("with_lse", [False, True])
def test_training_below_the_limit_runs_torchs_kernels_where_they_take_the_call(
    how, kv_heads, value_size, is_flash, with_lse, monkeypatch
):
    """A gradient of the log-sum-exp is none that they take: then ours go on from what they computed."""
    q, k, v, _ = operands(kv_heads=kv_heads, value_size=value_size)
    maps, full_map = [], attend.full_map
    monkeypatch.setattr(attend, "full_map", lambda *given: maps.append(1) or full_map(*given))
    rest = (*HOW[how], 0.25)
    out, lse, bits = attend.attend_for_backward(cpu, q, k, v, torch.ones(4, 2), *rest, *DENSE)
    assert len(maps) == (not is_flash) and not bits.any()
    visible = torch.ones(300, 200, dtype=torch.bool).tril() if HOW[how][1] else torch.ones(300, 200, dtype=torch.bool)
    visible = visible if HOW[how][0] is None else visible & HOW[how][0]
    x = [y.detach().requires_grad_() for y in (q, k, v)]
    keys, values = (y.repeat_interleave(4 // kv_heads, 1) for y in x[1:])
    scores = (0.25 * x[0] @ keys.mT).masked_fill(~visible, -torch.inf)
    want, want_lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
    torch.testing.assert_close((out, lse), (want, want_lse), atol=1e-5, rtol=1e-5)
    grads = torch.randn_like(out), torch.randn_like(lse) if with_lse else None
    found = attend.backward(cpu, grads[0], q, k, v, out, lse, grads[1], bits, *How(*rest), *DENSE)
    given = [want, want_lse][: 1 + with_lse]
    expected = torch.autograd.grad(given, x, list(grads[: 1 + with_lse]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(maps) == (0 if is_flash else 1) + (not is_flash or with_lse)
    assert [y.stride() for y in found] == [allocate.dense_like(y).stride() for y in (q, k, v)]


def test_above_the_limit_it_is_sparse():
    *qkv, thresholds = operands()
    out = ATTEND(*qkv, thresholds, None, False, 0.25, 200)
    lists = cpu.block_map(*qkv[:2], thresholds, None, False, 0.25)
    assert torch.equal(out, cpu.forward(*qkv, *lists, None, False, 0.25)[0])
    assert not torch.allclose(out, ATTEND(*qkv, thresholds, None, False, 0.25, 201))


@pytest.mark.parametrize("limit", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("how, value_size", [("causal", 16), ("causal and mask", 16), ("plain", 24)])
def test_opcheck(how, value_size, limit):
    *qkv, thresholds = operands(value_size=value_size, grad=True)
    opcheck(KEEPING.default, (*qkv, thresholds, *HOW[how], 0.25, *limit))
    opcheck(ATTEND.default, (*(x.detach() for x in qkv), thresholds, *HOW[how], 0.25, *limit))


def test_what_was_lowered_for_inference_can_be_trained():
    """An exported program is lowered where no gradient is in sight."""
    *qkv, thresholds = operands(grad=True)
    found, want = ATTEND(*qkv, thresholds, None, True, 0.25), KEEPING(*qkv, thresholds, None, True, 0.25)[0]
    assert torch.equal(found, want)
    for a, b in zip(torch.autograd.grad(found.sum(), qkv), torch.autograd.grad(want.sum(), qkv), strict=True):
        assert torch.equal(a, b)


def test_sizes_that_tracing_could_not_know_are_checked_when_the_op_runs():
    q, k, v, thresholds = operands()
    with pytest.raises(ValueError, match="key and value differ"):
        ATTEND(q, k, v[:, :, 1:], thresholds, None, False, 0.25)
    with pytest.raises(ValueError, match="attn_mask has the wrong shape"):
        ATTEND(q, k, v, thresholds, mask(199), False, 0.25)


def test_the_map_of_everything_is_one_for_all_heads():
    q, k, _, _ = operands()
    lists = attend.full_map(q, k, How(None, True, 0.25))
    assert lists.counts.tolist() == [[[2, 4, 4]]]
    assert lists.indices.shape == (1, 1, 3, 4) and lists.indices[0, 0, 0].tolist() == [0, 1, 2, 3]


def test_bits_have_room_for_every_length():
    for length, keys in ((1, 1), (128, 2048), (129, 2049), (5000, 9000)):
        q, k = torch.empty(1, 2, length, 8, device="meta"), torch.empty(1, 2, keys, 8, device="meta")
        room = allocate.new_bits(q, k, How(None, False, 0.25))
        used = attend.used_bits(room, q, k, How(None, False, 0.25))
        assert used.shape[2:] == (-(-length // 128), -(-keys // 2048))
        assert min(room.shape[2:]) >= 2


def test_a_gain_is_linear_in_products_numbers_and_pairs():
    limit = Limit(64, (-1.0, 1e-3, -1e-2, -1e-1))
    gain = -1.0 + 1e-3 * (2 * 4 * 128 * 64 * 12) - 1e-2 * (2 * (4 * 128 + 2 * 64) * 16) - 1e-1 * (2 * 4 * 128 * 64)
    assert limit.gained(2, 4, 2, 128, 64, 16, 8) == [pytest.approx(gain)]  # a score takes 16 products, a value 8
    assert not limit.holds(2, 4, 2, 128, 64, 16, 16) and limit.holds(2, 4, 2, 128, 64, 200, 200)
    assert not limit.holds(2, 4, 2, 128, 63, 200, 200)  # too few keys, whatever they gain
    both = Limit(0, (*limit.gain, 1.0, 0.0, 0.0, -1e-4))
    assert both.holds(1, 1, 1, 64, 64, 200, 200) and not both.holds(2, 4, 2, 128, 64, 200, 200)  # every form must hold
