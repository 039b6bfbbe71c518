"""The ops as torch sees them: schemas, fake kernels, strides, autograd, autocast, what is saved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import Problem, Results, assert_results_bounded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

from sparge_compile import BlockMap, attention
from sparge_compile.kernels import capability, reference
from sparge_compile.kernels.block_map import pack

sparge = torch.ops.sparge


def qkv(batch=2, heads=4, kv_heads=2, length=200, keys=150, head_size=24, *, fused=False, grad=False):
    """Projections as models make them: [B, L, H, D] memory seen as [B, H, L, D], or slices of one fused tensor."""
    if fused:
        assert heads == kv_heads and length == keys
        packed = torch.randn(batch, length, 3, heads, head_size)
        parts = [packed[:, :, n].transpose(1, 2) for n in range(3)]
    else:
        shapes = [(batch, length, heads, head_size)] + 2 * [(batch, keys, kv_heads, head_size)]
        parts = [torch.randn(shape).transpose(1, 2) for shape in shapes]
    return [part.detach().requires_grad_(grad) for part in parts]


def thresholds(heads=4, topk=0.4, topp=0.3):
    return torch.tensor([[topk, topp]] * heads)


MASKS = {
    "none": lambda batch, length, keys: None,
    "key": lambda batch, length, keys: (
        torch.arange(keys).view(1, 1, 1, -1) < torch.tensor([keys, keys // 2]).view(-1, 1, 1, 1)
    ),
    "rows": lambda batch, length, keys: torch.rand(batch, 1, length, keys) > 0.3,
    "additive": lambda batch, length, keys: torch.randn(length, keys)[None, None],
}


@pytest.mark.parametrize(
    "mask, causal, fused",
    [("none", False, True), ("key", True, False), ("rows", False, False), ("additive", True, True)],
)
def test_opcheck(mask, causal, fused):
    shape = {"kv_heads": 4, "keys": 200} if fused else {}
    q, k, v = qkv(fused=fused, **shape)
    how = (MASKS[mask](2, q.shape[2], k.shape[2]), causal, 0.2)
    opcheck(sparge.block_map.default, (q, k, thresholds(), *how))
    lists = sparge.block_map(q, k, thresholds(), *how)
    static = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(sparge.pack.default, lists, test_utils=static)
    opcheck(sparge.forward.default, (*[x.requires_grad_() for x in (q, k, v)], *lists, *how))
    with torch.no_grad():
        out, lse = sparge.forward(q, k, v, *lists, *how)
        bits = sparge.pack(*lists)
    detached = [x.detach() for x in (torch.randn_like(out), q, k, v, out, lse)]
    grad_lse = torch.randn_like(lse) if causal else None
    opcheck(sparge.backward.default, (*detached, grad_lse, bits, *how))


def test_thresholds_of_a_stored_graph():
    pairs = [0.05, 0.2, 1.0, 0.0]
    opcheck(sparge.constant.default, (pairs, torch.device("cpu")), test_utils=("test_schema", "test_faketensor"))
    first = sparge.constant(pairs, "cpu")
    assert torch.equal(first, torch.tensor(pairs).view(2, 2)) and first.dtype == torch.float32
    first.zero_()  # nobody else's
    assert torch.equal(sparge.constant(pairs, "cpu"), torch.tensor(pairs).view(2, 2))


def test_opcheck_kept_tokens():
    q, k, v = qkv(grad=True)
    ranges = torch.tensor([[33554432.0, 33554432.0, 0.0, 70.0]]).expand(len(thresholds()), 4)
    opcheck(sparge.attention.default, (q, k, v, torch.cat([thresholds(), ranges], 1)), {"parts": [64, k.shape[2] - 64]})


def test_opcheck_attention():
    q, k, v = qkv(grad=True)
    opcheck(sparge.attention.default, (q, k, v, thresholds()), {"is_causal": True})


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)])
def test_output_has_the_stride_order_of_the_query(order):
    shape = [2, 3, 70, 16]
    q = torch.empty_permuted(shape, order).normal_()
    out = attention(q, torch.randn(shape), torch.randn(shape), topk=0.5)
    assert out.stride() == q.stride()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, torch.randn(shape), torch.randn(shape))]
        assert attention(*fake, topk=torch.full((3,), 0.5)).stride() == out.stride()


def test_slices_of_a_fused_projection_keep_their_order_without_its_gaps():
    q, k, v = qkv(kv_heads=4, keys=200, fused=True)
    out = attention(q, k, v, topk=0.5)
    assert out.stride() == (200 * 4 * 24, 24, 4 * 24, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_equal_the_reference(causal, mask):
    q, k, v = qkv(grad=True)
    m = MASKS[mask](2, 200, 150)
    out, lse = attention(q, k, v, m, is_causal=causal, enable_gqa=True, topk=0.4, topp=0.3, return_lse=True)
    lists = BlockMap(*sparge.block_map(q.detach(), k.detach(), thresholds(), m, causal, 24**-0.5))
    weight, weight_lse = torch.randn_like(out), torch.randn_like(lse)
    problem = Problem(*(x.detach() for x in (q, k, v)), lists, m, causal, 24**-0.5, weight, weight_lse)
    seen = lse != -torch.inf  # a row that sees no key has no gradient through its log-sum-exp
    grads = torch.autograd.grad((out * weight).sum() + (lse * weight_lse)[seen].sum(), (q, k, v))
    assert_results_bounded(Results(out.detach(), lse.detach(), *grads), problem)


def test_the_backward_keeps_one_bit_for_each_pair_of_blocks():
    q, k, v = qkv(grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attention(q, k, v, enable_gqa=True, topk=0.5)
    ours = {x.data_ptr() for x in (q, k, v, out)}
    rest = [x for x in saved if x.data_ptr() not in ours]
    assert sorted((x.dtype, tuple(x.shape)) for x in rest if x.dtype != torch.float32) == [(torch.int32, (2, 4, 3, 2))]
    assert [tuple(x.shape) for x in rest if x.dtype == torch.float32] == [(2, 4, 200)]  # the log-sum-exp


def test_the_compiled_backward_keeps_no_lists():
    q, k, v = qkv(keys=64 * 40, grad=True)  # 40 key blocks: two words
    saved = []
    compiled = torch.compile(lambda *x: attention(*x, enable_gqa=True, topk=0.5), backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        compiled(q, k, v)
    integers = [tuple(x.shape) for x in saved if x.dtype == torch.int32]
    assert integers == [(2, 4, 3, 3)]


def test_gradient_through_lse_alone():
    q, k, v = qkv(grad=True)
    lse = attention(q, k, v, enable_gqa=True, topk=1.0, return_lse=True)[1]
    got = torch.autograd.grad(lse.sum(), (q, k))
    scores = q @ k.repeat_interleave(2, 1).mT / 24**0.5
    want = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_training_in_eager_code_calls_the_kernels_themselves(monkeypatch):
    """Nobody traces or transforms the call, so the dispatcher has nothing to say; where somebody does, it is asked."""
    calls = []
    for name in ("attend_for_backward", "backward"):
        op = getattr(torch.ops.sparge, name)
        kernel = lambda *given, op=op: (calls.append(op._qualified_op_name), op.default(*given))[1]  # noqa: E731
        monkeypatch.setattr(op, "direct", kernel)
    q, k, v = (torch.randn(1, 2, 200, 16, requires_grad=True) for _ in range(3))
    attention(q, k, v, topk=0.5).sum().backward()
    assert calls == ["sparge::attend_for_backward", "sparge::backward"]
    torch.autograd.grad(attention(q, k, v, topk=0.5), q, torch.ones(2, *q.shape), is_grads_batched=True)
    negative = torch.randn(1, 2, 200, 16, dtype=torch.complex64).conj().imag
    attention(negative, k, v, topk=0.5)
    assert (len(calls), calls.count("sparge::backward")) == (3, 1)
    with torch.no_grad():
        attention(q, k, v, topk=0.5)
    assert len(calls) == 3


def test_second_derivatives_are_refused():
    q, k, v = qkv(grad=True)
    out = attention(q, k, v, enable_gqa=True, topk=0.5)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("of", range(3))
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_derivatives_are_refused(of, grad):
    """The kernels would drop the tangents without a word."""
    given = qkv(grad=grad)

    def attend(x):
        return attention(*given[:of], x, *given[of + 1 :], enable_gqa=True, topk=0.5)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(attend, (given[of],), (torch.ones_like(given[of]),))
    with forward_ad.dual_level():
        attend(given[of])  # nothing has a tangent
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            attend(forward_ad.make_dual(given[of], torch.ones_like(given[of])))


def test_topk_one_is_dense_attention():
    q, k, v = qkv(grad=True)
    got, want = attention(q, k, v, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_given_map_and_sparsity():
    q, k, v = qkv()
    kept = torch.rand(1, 4, 2, 3) > 0.4
    kept[..., 0] = True
    lists = BlockMap.from_dense(kept)
    out, sparsity = attention(q, k, v, enable_gqa=True, block_map=lists, return_sparsity=True)
    want, _ = reference.attention(q.double(), k.double(), v.double(), BlockMap.from_dense(kept.expand(2, 4, 2, 3)))
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sparsity, 1 - kept.float().mean())


def test_a_given_map_that_ignores_causality():
    """As many blocks as are visible, but not those: the CPU path once took it for dense attention."""
    q, k, v = qkv(kv_heads=4, length=64 * 6, keys=64 * 6)
    kept = torch.zeros(1, 1, 3, 6, dtype=torch.bool)
    kept[0, 0, 0, [0, 5]] = kept[0, 0, 1, :4] = kept[0, 0, 2, :] = True  # block 5 is invisible, block 1 is dropped
    out = attention(q, k, v, is_causal=True, block_map=BlockMap.from_dense(kept))
    want, _ = reference.attention(q, k, v, BlockMap.from_dense(kept.expand(2, 4, 3, 6)), None, True)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_sparsity_counts_visible_blocks_only():
    q, k, v = qkv(keys=64 * 8)
    mask = torch.arange(64 * 8) < 64 * 4  # half of the key blocks are padding
    _, everything = attention(q, k, v, mask, enable_gqa=True, return_sparsity=True)
    _, half = attention(q, k, v, mask, enable_gqa=True, topk=0.5, return_sparsity=True)
    assert everything == 0 and half == 0.5


def test_autocast_casts_like_dense_attention():
    q, k, v = qkv(kv_heads=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sparge.attention(q, k.bfloat16(), v, thresholds(topk=1.0))
        want = F.scaled_dot_product_attention(q, k.bfloat16(), v)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_nothing_is_allocated_by_data():
    """Equal shapes give equal shapes, whatever is in the tensors: the map's lists have room for every block."""
    for topk in (0.01, 1.0):
        q, k, _ = qkv()
        counts, indices = sparge.block_map(q, k, thresholds(topk=topk), None, False, 0.2)
        assert counts.shape == (2, 4, 2) and indices.shape == (2, 4, 2, 3)


def test_packed_bits_are_the_map():
    kept = torch.rand(2, 3, 5, 70) > 0.5
    assert torch.equal(sparge.pack(*BlockMap.from_dense(kept)), pack(kept))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("topk, topp", [(0.01, 0.0), (0.3, 0.2)])
@pytest.mark.parametrize("mask", ["triangle", "window", "random", "padded on the left", "one key a row"])
def test_a_row_that_sees_a_key_in_dense_attention_sees_one_here(mask, causal, topk, topp):
    """The kept prefix alone may hold no key of a row: query block 0 of a triangle might keep key block 1 only."""
    length, keys = 330, 390
    row, key = torch.arange(length).view(-1, 1), torch.arange(keys).view(1, -1)
    allowed = {
        "triangle": key <= row,
        "window": (key <= row) & (key > row - 70),
        "random": torch.rand(length, keys) > 0.995,
        "padded on the left": (key >= 100).view(1, 1, 1, -1),
        "one key a row": key == (row * 37) % keys,
    }[mask]
    allowed = allowed.expand(1, 1, *allowed.shape[-2:]) if allowed.dim() == 2 else allowed
    q, k, v = qkv(kv_heads=4, length=length, keys=keys)
    lse = attention(q, k, v, allowed, is_causal=causal, topk=topk, topp=topp, return_lse=True)[1]
    sees = (allowed & (key <= row) if causal else allowed).any(-1).expand(2, 4, length)
    assert torch.equal(lse.isfinite(), sees)


def test_masks_of_the_smallest_number_are_masks():
    """finfo.min instead of -inf: its sums overflow, which once made the causal diagonal invisible."""
    q, k, v = qkv(kv_heads=4, keys=200)
    hidden = torch.ones(200, 200).triu(1) > 0
    small = torch.zeros(200, 200).masked_fill(hidden, torch.finfo(torch.float32).min)
    got = attention(q, k, v, small, topk=1.0)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5, rtol=1e-5)


def test_sparsity_under_a_mask_of_the_smallest_number():
    q, k, v = (x.half() for x in qkv(kv_heads=4, keys=64 * 8))
    small = torch.zeros(1, 1, 1, 64 * 8, dtype=torch.float16)
    small[..., 128:] = torch.finfo(torch.float16).min
    assert attention(q, k, v, small, topk=1.0, return_sparsity=True)[1] == 0


def test_two_halves_of_the_keys_merge_by_their_log_sum_exps():
    """As in ring attention, forward and backward; rows that see no key of one half get nothing of it."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, 16, dtype=torch.float32, requires_grad=True) for n in (150, 200, 200)]
    seen = torch.rand(2, 1, 150, 200) < 0.9
    seen[:, :, 20:40, :110] = False  # no key of the first half
    weights = torch.randn(2, 3, 150, 16)

    def merged(q, k, v):
        halves = (slice(0, 110), slice(110, 200))
        parts = [attention(q, k[:, :, i], v[:, :, i], seen[..., i], topk=1.0, return_lse=True) for i in halves]
        (out1, lse1), (out2, lse2) = parts
        assert torch.isneginf(lse1[:, :, 20:40]).all() and not out1[:, :, 20:40].any()
        lse = torch.logaddexp(lse1, lse2)
        return out1 * (lse1 - lse).exp().unsqueeze(-1) + out2 * (lse2 - lse).exp().unsqueeze(-1), lse

    def whole(q, k, v):
        scores = (q @ k.mT * 16**-0.5).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    results = []
    for compute in (merged, whole):
        out, lse = compute(*inputs)
        results.append((out, lse, *torch.autograd.grad((out * weights).sum() + lse.square().sum(), inputs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5 * want.abs().max().item(), rtol=0)


def test_what_a_gpu_lacks_is_asked_without_a_graph_break(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))

    @torch.compile(backend="eager", fullgraph=True)
    def ask(x):
        return x - 1 if capability.refusal(torch.device("cuda", 0), torch.float32, 64) else x

    assert ask(torch.zeros(())) == -1
