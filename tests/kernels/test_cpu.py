"""The CPU kernels against the definition: block maps for equality, values and gradients for closeness in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import Problem, Results, assert_results_bounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic

from sparge_compile.kernels import allocate, cpu, reference
from sparge_compile.kernels.block_map import KEY_BLOCK, BlockMap, ceil_div
from sparge_compile.kernels.cpu import attention as cpu_attention
from sparge_compile.kernels.cpu import batches as cpu_batches

LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 200, 300, 384)
MASKS = (None, "padding", "bool", "float", "float heads", "hidden rows")
LAYOUTS = ("bhld", "blhd", "fused", "transposed")
PLAIN = None, False, 0.25  # no mask, not causal, a scale


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other make tiny operations take milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """torch.empty, also inside torch, gives NaN (or the largest integer); the outputs are filled by hand as well."""
    was = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    for name in ("dense_like", "new_out"):
        plain = getattr(allocate, name)
        monkeypatch.setattr(allocate, name, lambda *x, plain=plain: plain(*x).fill_(math.nan))
    yield
    torch.use_deterministic_algorithms(was[0])
    deterministic.fill_uninitialized_memory = was[1]


class Case(NamedTuple):
    batch: int = 1
    key_heads: int = 2
    group: int = 1
    length: int = 300
    keys: int = 300
    head_size: int = 16
    is_causal: bool = False
    mask: str | None = None
    topk: float = 0.3
    topp: float = 0.0
    layout: str = "bhld"
    scale: float | None = None
    value_size: int | None = None  # that of keys

    @property
    def heads(self) -> int:
        return self.key_heads * self.group

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, L, D], k [B, Hk, S, D], v [B, Hk, S, Dv] of slowly changing rows, so that block scores differ."""
        torch.manual_seed(sum(self[:6]))
        q = smooth(self.batch, self.heads, self.length, self.head_size)
        k, v = (
            smooth(self.batch, self.key_heads, self.keys, size)
            for size in (self.head_size, self.value_size or self.head_size)
        )
        return tuple(in_layout(x.to(dtype), self.layout) for x in (q, k, v))

    def thresholds(self) -> Tensor:
        """[H, 2], another topk for each head."""
        topk = self.topk * torch.linspace(1, 0.5 if self.topk < 1 else 1, self.heads)
        return torch.stack([topk, torch.full_like(topk, self.topp)], 1)

    def attn_mask(self) -> Tensor | None:
        torch.manual_seed(7)
        rows, keys = self.length, self.keys
        if self.mask == "padding":
            return (torch.arange(keys) < torch.randint(0, keys + 1, (self.batch, 1))).view(self.batch, 1, 1, keys)
        if self.mask == "bool":
            return torch.rand(1, self.heads, rows, keys) > 0.3
        if self.mask == "float":
            return torch.randn(rows, keys).masked_fill(torch.rand(rows, keys) > 0.7, -math.inf)[None, None]
        if self.mask == "float heads":
            return torch.randn(self.batch, self.heads, 1, keys)
        if self.mask == "hidden rows":
            return (torch.rand(rows, 1) > 0.5).expand(rows, keys)[None, None]
        return None

    def options(self) -> tuple[Tensor | None, bool, float]:
        return self.attn_mask(), self.is_causal, self.head_size**-0.5 if self.scale is None else self.scale


def smooth(batch: int, heads: int, rows: int, head_size: int) -> Tensor:
    slow = torch.randn(batch, heads, rows // 40 + 1, head_size, dtype=torch.float64)
    return slow.repeat_interleave(40, 2)[:, :, :rows] + 0.5 * torch.randn(batch, heads, rows, head_size).double()


def in_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "blhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":  # a slice of wider rows
        return torch.cat([x, x.flip(-1)], -1)[..., : x.shape[-1]]
    if layout == "transposed":  # rows that are not adjacent memory
        return x.mT.contiguous().mT
    return x


cases = st.builds(
    Case,
    batch=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    length=st.sampled_from(LENGTHS),
    keys=st.sampled_from(LENGTHS),
    head_size=st.sampled_from((16, 24, 64)),
    is_causal=st.booleans(),
    mask=st.sampled_from(MASKS),
    topk=st.sampled_from((0.05, 0.3, 0.6, 1.0)),
    topp=st.sampled_from((0.0, 0.2, 0.7, 1.0)),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from((None, 0.3)),
    value_size=st.sampled_from((None, 8, 24)),
)


def error(found: Tensor, true: Tensor) -> float:
    """The largest difference; infinities must agree."""
    assert torch.equal(found.isinf(), true.isinf()) and not found.isnan().any()
    return (found.double() - true.double()).masked_fill(true.isinf(), 0.0).abs().amax().item()


def gradients(
    case: Case, x: tuple[Tensor, ...], block_map: BlockMap, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """By autograd, through the definition in float64."""
    x = tuple(t.double().detach().requires_grad_() for t in x)
    out, lse = reference.attention(*x, block_map, *case.options())
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
    return torch.autograd.grad(loss, x)


# ---- against the definition


@given(case=cases)
@settings(max_examples=60)
def test_block_map_equals_reference(case: Case):
    q, k, _ = case.inputs(torch.float64)
    found = BlockMap(*cpu.block_map(q, k, case.thresholds(), *case.options()))
    true = reference.block_map(q, k, case.thresholds(), *case.options())
    assert torch.equal(found.counts, true.counts) and found.counts.dtype == torch.int32
    assert torch.equal(found.to_dense(), true.to_dense()) and found.indices.dtype == torch.int32


@given(case=cases)
@settings(max_examples=60)
def test_forward_is_the_definition_in_float64(case: Case):
    x = case.inputs(torch.float64)
    block_map = reference.block_map(*x[:2], case.thresholds(), *case.options())
    out, lse = cpu.forward(*x, *block_map, *case.options())
    true_out, true_lse = reference.attention(*x, block_map, *case.options())
    assert error(out, true_out) < 1e-12 and error(lse, true_lse) < 1e-12
    assert out.shape == (*x[0].shape[:3], x[2].shape[3])
    assert out.stride() == allocate.new_out(x[0], x[2]).stride()


@given(case=cases, with_lse=st.booleans())
@settings(max_examples=60)
def test_backward_is_the_definition_in_float64(case: Case, with_lse: bool):
    x = case.inputs(torch.float64)
    block_map = reference.block_map(*x[:2], case.thresholds(), *case.options())
    out, lse = cpu.forward(*x, *block_map, *case.options())
    sees_none = lse == -math.inf
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if with_lse else None
    found = cpu.backward(dout, *x, out, lse, dlse, cpu.pack(*block_map), *case.options())

    for grad, given_to in zip(found, x, strict=True):
        assert grad.stride() == allocate.dense_like(given_to).stride() and not grad.isnan().any()
    assert (found[0][sees_none] == 0).all()
    true = gradients(case, x, block_map, dout, dlse)
    assert all(error(g, t) < 1e-11 for g, t in zip(found, true, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("topk", [0.2, 1.0])
def test_error_is_that_of_dense_attention(dtype: torch.dtype, is_causal: bool, topk: float):
    case = Case(group=2, length=400, keys=400, head_size=64, is_causal=is_causal, topk=topk, layout="blhd")
    x = case.inputs(dtype)
    block_map = BlockMap(*cpu.block_map(*x[:2], case.thresholds(), *case.options()))
    out, lse = cpu.forward(*x, *block_map, *case.options())
    assert lse.dtype == torch.float32
    dout = torch.randn_like(out)
    grads = cpu.backward(dout, *x, out, lse, None, cpu.pack(*block_map), *case.options())
    assert_results_bounded(Results(out, lse, *grads), Problem(*x, block_map, *case.options(), dout, None))


@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("mask", [None, "padding", "bool"])
def test_topk_one_is_dense_attention(is_causal: bool, mask: str | None):
    if is_causal and mask:
        pytest.skip("SDPA takes one of the two")
    case = Case(batch=2, length=500, keys=500, head_size=64, is_causal=is_causal, mask=mask, topk=1.0)
    x = tuple(t.requires_grad_() for t in case.inputs(torch.float32))
    true = F.scaled_dot_product_attention(*x, attn_mask=case.attn_mask(), is_causal=is_causal)
    dout = torch.randn_like(true)
    true_grads = torch.autograd.grad(true, x, dout)
    with torch.no_grad():
        block_map = cpu.block_map(*x[:2], case.thresholds(), *case.options())
        out, lse = cpu.forward(*x, *block_map, *case.options())
        found = cpu.backward(dout, *x, out, lse, None, cpu.pack(*block_map), *case.options())
    assert error(out, true) < 1e-5
    assert all(error(g, t) < 1e-4 for g, t in zip(found, true_grads, strict=True))


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_map, options):
        out, lse = cpu.forward(q, k, v, *block_map, *options)
        ctx.save_for_backward(q, k, v, out, lse, cpu.pack(*block_map))
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *saved, bits = ctx.saved_tensors
        return *cpu.backward(dout, *saved, dlse, bits, *ctx.options), None, None


@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("mask", [None, "float heads"])
def test_gradcheck(is_causal: bool, mask: str | None):
    case = Case(group=2, key_heads=1, length=130, keys=140, head_size=2, is_causal=is_causal, mask=mask, topk=0.5)
    x = tuple(t.requires_grad_() for t in case.inputs(torch.float64))
    block_map = reference.block_map(x[0].detach(), x[1].detach(), case.thresholds(), *case.options())
    assert torch.autograd.gradcheck(lambda *x: Attention.apply(*x, block_map, case.options()), x, fast_mode=True)


# ---- corners


def random_map(case: Case, heads: int, share: float) -> BlockMap:
    n_query, n_key = ceil_div(case.length, 128), ceil_div(case.keys, KEY_BLOCK)
    return BlockMap.from_dense(torch.rand(1, heads, n_query, n_key) < share)


@pytest.mark.parametrize("heads", [1, 4], ids=["one map", "map per head"])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_any_map_of_the_user(heads: int, share: float, is_causal: bool):
    """Rows without a block, causal maps that lack the diagonal or list what no query sees, broadcast maps."""
    case = Case(batch=2, group=2, length=500, keys=400, is_causal=is_causal)
    x, block_map = case.inputs(torch.float64), random_map(case, heads, share)
    out, lse = cpu.forward(*x, *block_map, *case.options())
    whole_map = BlockMap(*(t.expand(2, 4, *t.shape[2:]) for t in block_map))
    true_out, true_lse = reference.attention(*x, whole_map, *case.options())
    assert error(out, true_out) < 1e-12 and error(lse, true_lse) < 1e-12
    grads = cpu.backward(out, *x, out, lse, None, cpu.pack(*block_map), *case.options())
    assert not any(g.isnan().any() for g in grads) and (grads[0][lse == -math.inf] == 0).all()


def test_undefined_entries_are_not_read():
    case = Case(length=500, keys=400)
    x, block_map = case.inputs(torch.float64), random_map(case, 2, 0.4)
    live = torch.arange(block_map.indices.shape[-1]) < block_map.counts.unsqueeze(-1)
    spoilt = BlockMap(block_map.counts, block_map.indices.where(live, 2**31 - 1))
    for is_causal in (False, True):
        found, true = (cpu.forward(*x, *lists, None, is_causal, 0.25) for lists in (spoilt, block_map))
        assert torch.equal(found[0], true[0]) and torch.equal(found[1], true[1])


def test_nan_stays_in_its_head():
    case = Case(batch=2, key_heads=3, topp=0.5)
    x = case.inputs(torch.float32)
    clean = cpu.forward(*x, *cpu.block_map(*x[:2], case.thresholds(), *PLAIN), *PLAIN)[0]
    x[1][1, 2, 70] = math.nan
    block_map = cpu.block_map(*x[:2], case.thresholds(), *PLAIN)
    out, lse = cpu.forward(*x, *block_map, *PLAIN)
    grads = cpu.backward(torch.ones_like(out), *x, out, lse, None, cpu.pack(*block_map), *PLAIN)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    torch.testing.assert_close(out, clean)
    for grad in grads:
        grad[1, 2] = 0.0
        assert not grad.isnan().any()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_results_do_not_depend_on_the_parts(monkeypatch, mask: str | None, is_causal: bool):
    case = Case(batch=2, group=2, length=520, keys=460, mask=mask, is_causal=is_causal, topp=0.4)
    x = case.inputs(torch.float64)

    def run() -> list[Tensor]:
        block_map = cpu.block_map(*x[:2], case.thresholds(), *case.options())
        out, lse = cpu.forward(*x, *block_map, *case.options())
        grads = cpu.backward(out, *x, out, lse, None, cpu.pack(*block_map), *case.options())
        return [block_map.to_dense(), out, lse, *grads]

    large = run()
    for module, name in ((cpu_batches, "PART_BYTES"), (cpu_batches, "GATHER_BYTES"), (cpu_attention, "SCORES_AT_ONCE")):
        monkeypatch.setattr(module, name, 1)
    for found, true in zip(run(), large, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-12)
