"""Attention in eight bits: the codes, the forward beside the oracle that rounds the same, and what rounding costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Case, poisoned_memory, random_map, random_qkv
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparge_compile.kernels import allocate, eight_bits, reference, rule
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap
from sparge_compile.kernels.how import How

CASES = [
    Case(200, 150, 32),
    Case(130, 300, 48, key_heads=1, layout="blhd", value_size=16),
    Case(300, 200, 64, is_causal=True, layout="fused"),
    Case(130, 190, 16, is_causal=True, scale=-0.3),
    Case(130, 150, 16, scale=0.0),
    Case(1, 1, 16, dtype=torch.float16),
    Case(129, 65, 32, dtype=torch.float16, batch=2),
]


@pytest.fixture(autouse=True)
def _right_casts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter loses a carry where it rounds to e4m3."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def right(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if str(target) != "fp8e4nv" or str(source) != "fp32":
            return convert(x, source, target, mode)
        return torch.from_numpy(x.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", right)
    yield


def how_of(case: Case) -> How:
    scale = case.head_size**-0.5 if case.scale is None else case.scale
    return How(None, case.is_causal, scale, eight_bits=True)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Student's t of three degrees of freedom, and a bias in four channels, as keys of trained models have."""
    generator = torch.Generator().manual_seed(seed)
    normal, square = torch.randn(shape, generator=generator), torch.randn(3, *shape, generator=generator).square()
    x = normal / square.mean(0).sqrt()
    x[..., :4] += 20
    return x


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_stand_for_what_the_oracle_rounds_to(case: Case) -> None:
    q, k, v = random_qkv(case)
    wanted = reference.to_eight_bits(q, k, v, case.is_causal)
    for x, want in zip(eight_bits.rounded(q.float(), k.float(), v.float(), how_of(case)), wanted, strict=False):
        assert relative(x, want) < 1e-3  # a number in the middle of two may go either way


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.interpreter
def test_the_pass_that_pools_makes_the_codes(case: Case) -> None:
    from sparge_compile.kernels.triton import codes

    q, k, v = random_qkv(case)
    how = how_of(case)
    with poisoned_memory():
        got, means = codes.code(q, k, v, how, permuted=False)
        permuted = codes.code(q, k, v, how, permuted=True)[0].v
    want = eight_bits.code(q, k, v, how)
    for name in ("q", "q_scale", "lift", "k", "k_scale", "v_scale"):
        if case.keys == 1 and name in ("k", "k_scale"):  # the constant itself: what is left of it is how sums round
            assert (got.k * got.k_scale[..., 0, :1]).abs().max() < 1e-6 * k.abs().max()
            continue
        assert relative(getattr(got, name), getattr(want, name)) < (1e-3 if name in "qk" else 1e-5), name
    rows = want.v.float()
    padded = torch.zeros(*rows.shape[:2], got.v.shape[2] * KEY_BLOCK, rows.shape[3])
    padded[:, :, : rows.shape[2]] = rows
    blocks = padded.unflatten(2, (-1, KEY_BLOCK)).mT
    torch.testing.assert_close(got.v.float(), blocks, rtol=0, atol=0)
    slots = [
        32 * g + 16 * a + 8 * b + 2 * t + c
        for g, a, t, b, c in itertools.product(range(2), range(2), range(4), range(2), range(2))
    ]
    torch.testing.assert_close(permuted.float(), blocks[..., slots], rtol=0, atol=0)
    seen = eight_bits.seen_keys(how, case.length, case.keys)
    torch.testing.assert_close(means[0], rule.pool(q.float(), QUERY_BLOCK))
    torch.testing.assert_close(means[1][:, :, : -(-seen // 64)], rule.pool(k[:, :, :seen].float(), KEY_BLOCK))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.interpreter
def test_what_a_backward_computes_with(case: Case) -> None:
    check_operands_of_a_backward(case)


def check_operands_of_a_backward(case: Case) -> None:
    from sparge_compile.kernels import triton as face

    q, k, v = random_qkv(case)
    lse = torch.randn(q.shape[:3], dtype=torch.float32)
    with poisoned_memory():
        *got, lower = face.centred(q, k, v, lse, how_of(case))
    want = eight_bits.centred(q, k, v, how_of(case))
    for x, y, whole in zip(got, want[:3], (q, k, v), strict=True):  # of keys a constant is taken away: one has no rest
        assert x.dtype == y.dtype and x.stride() == allocate.dense_like(whole).stride()
        assert (x.double() - y.double()).norm() < 1e-3 * whole.double().norm()  # in the middle of two: either way
    apart = (lower - (lse - want.lift)).abs()  # an entry of a query that rounds otherwise moves its row's
    assert (apart > 2e-4).float().mean() < 1e-2 and not (apart > 0.05).any()


GPU_CASES = [  # on Hopper the first and the fourth by the kernel specialised by warp
    Case(700, 830, 128, batch=2, heads=4, key_heads=2, dtype=torch.bfloat16),
    Case(700, 700, 64, is_causal=True, dtype=torch.bfloat16, layout="blhd"),
    Case(300, 500, 128, is_causal=True, dtype=torch.float16, key_heads=1),
    Case(130, 64, 64, dtype=torch.float16, scale=-0.2),
    Case(200, 150, 64, dtype=torch.float16, scale=0.0),
    Case(200, 300, 96, dtype=torch.bfloat16, value_size=64),
    Case(200, 300, 128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_the_kernels_of_a_gpu_beside_the_oracle(case: Case, on_the_gpu: None) -> None:
    if torch.cuda.get_device_capability() < eight_bits.LEAST_CAPABILITY:
        pytest.skip("no products of e4m3")
    check_beside_the_oracle(case)
    check_operands_of_a_backward(case)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_nothing_is_lost_in_long_lists(head_size: int, on_the_gpu: None) -> None:
    """Tensor cores add up e4m3 products with fourteen bits: a sum over 8,192 keys that ran on would lose a tenth."""
    from sparge_compile.kernels import triton as face

    if torch.cuda.get_device_capability() < eight_bits.LEAST_CAPABILITY:
        pytest.skip("no products of e4m3")
    q, k = (torch.randn(1, 8, n, head_size, dtype=torch.bfloat16) for n in (1100, 8192))
    v = torch.full_like(k, 1.5)
    block_map = BlockMap.from_dense(torch.ones(1, 8, 9, 128, dtype=torch.bool))
    out, _ = face.forward(q, k, v, *block_map, *How(None, False, head_size**-0.5, eight_bits=True))
    torch.testing.assert_close(out, torch.full_like(out, 1.5), rtol=2**-8, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_beside_the_oracle(case: Case) -> None:
    check_beside_the_oracle(case)


def check_beside_the_oracle(case: Case) -> None:
    from sparge_compile.kernels import triton as face

    q, k, v = random_qkv(case)
    block_map = random_map(case, 0.7)
    with poisoned_memory():
        out, lse = face.forward(q, k, v, *block_map, *how_of(case))
    want, want_lse = reference.attention_in_eight_bits(q, k, v, block_map, case.is_causal, how_of(case).scale)
    hidden = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, hidden) and not out[hidden].any()
    # Where a score rounds otherwise in float32, a weight may fall to the next of its sixteen steps: over few keys that
    # is a part of the sum.
    on_hopper = q.is_cuda and case.dtype != torch.float32
    few = 1 / 32 if on_hopper and case.keys <= 64 else 0
    assert relative(out, want) < max(few, 2e-3 if case.dtype == torch.float32 else 5e-3)
    # Where an entry of a query rounds otherwise, by one of 127 steps, the scores of a row move by so much of a key's.
    apart = (lse[~hidden].double() - want_lse[~hidden]).abs()
    if on_hopper:
        assert apart.mean() < 1e-2 and not (apart > 1 / 16).any()
    else:
        assert (apart > 2e-3).float().mean() < 1e-3 and not (apart > 0.05).any()


def test_what_rounding_costs_where_numbers_have_heavy_tails() -> None:
    """Student's t of three degrees of freedom, and keys with a bias in four channels."""
    q, k, v = (heavy_tailed(1, 1, n, 128, seed=n) for n in (256, 513, 512))
    k = k[:, :, :512]
    q[..., :4] -= 20
    block_map = BlockMap.from_dense(torch.rand(1, 1, 2, 8) < 0.8)
    out, lse = reference.attention_in_eight_bits(q, k, v, block_map)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), block_map)
    assert relative(out, exact) < 3e-2
    assert relative(lse, exact_lse) < 1e-2


def test_equal_values_give_themselves_and_what_is_broken_stays_broken() -> None:
    q, k = torch.randn(2, 1, 1, 130, 32).unbind(0)
    v = torch.full((1, 1, 130, 32), 3.0)
    block_map = BlockMap.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool))
    out, _ = reference.attention_in_eight_bits(q, k, v, block_map)
    torch.testing.assert_close(out, v.double())
    how = How(None, False, 0.2, eight_bits=True)
    for broken in (q.clone(), k.clone()):
        broken[0, 0, 7, 3] = torch.nan
        given = (broken, k) if broken[0, 0, 8, 0] == q[0, 0, 8, 0] else (q, broken)
        codes = eight_bits.code(*given, v, how)
        assert codes.q_scale.isnan().any() or codes.k_scale.isnan().any()


@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from([16, 32, 48]),
    st.booleans(),
    st.sampled_from([1e-6, 1, 1e6]),
)
def test_rounded_operands_are_near_whatever_their_size(
    length: int, keys: int, size: int, is_causal: bool, factor: float
) -> None:
    generator = torch.Generator().manual_seed(length * 1000 + keys)
    q, k, v = (factor * torch.randn(1, 2, n, size, generator=generator) for n in (length, keys, keys))
    how = How(None, is_causal, 0.2, eight_bits=True)
    seen = eight_bits.seen_keys(how, length, keys)
    rounded = eight_bits.rounded(q, k, v, how)
    assert relative(rounded[0], q) < 0.02 and relative(rounded[1][:, :, :seen], k[:, :, :seen]) < 0.02
    assert relative(rounded[2], v) < 0.04
