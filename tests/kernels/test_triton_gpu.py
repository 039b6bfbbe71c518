"""The Triton kernels on a GPU against the float64 reference: dtypes, head sizes, masks and lengths that the interpreter
cannot reach; CUDA graphs; determinism."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from helpers import (
    Case,
    Problem,
    assert_error_bounded,
    assert_map_matches,
    assert_same_map,
    block_constant,
    check_attention,
    plain_attention,
    poisoned_memory,
    random_map,
    random_mask,
    random_qkv,
    scale_of,
    summed_terms,
)
from torch import Tensor

from sparge_compile.kernels import reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
THRESHOLDS = [[0.34, 0.55], [0.12, 0.81]]


def thresholds(heads: int, topk: float | None = None, topp: float = 0.0) -> Tensor:
    if topk is not None:
        return torch.tensor([[topk, topp]] * heads)
    return torch.tensor((THRESHOLDS * heads)[:heads])


def triton_map(
    q: Tensor, k: Tensor, limits: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float = 0.25
) -> BlockMap:
    from sparge_compile.kernels import triton

    with poisoned_memory():
        return BlockMap(*triton.block_map(q, k, limits, mask, is_causal, scale))


# Each pair of (dtype, head size, mask, causal, grouping, layout) values of interest meets in some case.
CASES = [
    Case(1000, 1000, 16, dtype=BF16, mask="none", is_causal=True, layout="blhd"),
    Case(1, 777, 32, dtype=BF16, mask="key", key_heads=1, batch=2),
    Case(513, 513, 40, dtype=BF16, mask="full", is_causal=True, layout="fused"),
    Case(300, 1111, 64, dtype=BF16, mask="add", key_heads=1, layout="blhd"),
    Case(999, 999, 72, dtype=BF16, mask="none", is_causal=True, key_heads=1, batch=2),
    Case(640, 333, 80, dtype=BF16, mask="key", layout="blhd", is_causal=True),
    Case(257, 769, 96, dtype=BF16, mask="add_key", layout="fused", heads=6, key_heads=2),
    Case(1025, 1025, 128, dtype=BF16, mask="none", is_causal=True, layout="blhd", heads=4, key_heads=1),
    Case(1025, 1300, 128, dtype=BF16, mask="none", batch=2),
    Case(511, 640, 128, dtype=BF16, mask="full", layout="blhd"),
    Case(511, 640, 128, dtype=BF16, mask="add", is_causal=True, key_heads=1),
    Case(500, 900, 160, dtype=BF16, mask="none", key_heads=1, layout="fused"),
    Case(700, 700, 256, dtype=BF16, mask="none", is_causal=True, layout="blhd"),
    Case(300, 500, 256, dtype=BF16, mask="key", key_heads=1),
    Case(130, 130, 256, dtype=BF16, mask="add", layout="bhdl"),
    Case(777, 1, 16, dtype=FP16, mask="add_key", layout="fused"),
    Case(640, 640, 32, dtype=FP16, mask="none", is_causal=True, key_heads=1, layout="bhdl"),
    Case(333, 640, 64, dtype=FP16, mask="full", batch=2, layout="blhd"),
    Case(900, 900, 64, dtype=FP16, mask="none", is_causal=True),
    Case(400, 700, 72, dtype=FP16, mask="add", is_causal=True, layout="blhd"),
    Case(640, 1000, 128, dtype=FP16, mask="key", is_causal=True, layout="fused"),
    Case(385, 900, 128, dtype=FP16, mask="none", layout="bhdl", scale=-0.05),
    Case(500, 500, 160, dtype=FP16, mask="full", key_heads=1),
    Case(257, 300, 256, dtype=FP16, mask="none", layout="fused"),
    Case(300, 300, 17, dtype=FP32, mask="none", is_causal=True, layout="fused"),
    Case(400, 500, 40, dtype=FP32, mask="key", key_heads=1),
    Case(257, 257, 64, dtype=FP32, mask="add", is_causal=True, layout="blhd"),
    Case(500, 333, 80, dtype=FP32, mask="none", layout="bhdl"),
    Case(300, 400, 128, dtype=FP32, mask="full", batch=2),
    Case(200, 300, 256, dtype=FP32, mask="none", is_causal=True, key_heads=1, layout="blhd"),
    Case(1025, 1025, 192, dtype=BF16, is_causal=True, layout="blhd", heads=4, key_heads=4, value_size=128),  # MLA
    Case(700, 900, 192, dtype=BF16, mask="key", batch=2, key_heads=1, value_size=128),
    Case(511, 640, 192, dtype=FP16, mask="full", layout="blhd", value_size=128),
    Case(640, 640, 64, dtype=BF16, is_causal=True, layout="fused", value_size=128),
    Case(500, 777, 128, dtype=FP16, mask="add", value_size=64),
    Case(400, 400, 48, dtype=BF16, layout="blhd", value_size=256),
    Case(300, 400, 256, dtype=BF16, is_causal=True, value_size=24),
    Case(257, 300, 192, dtype=FP32, is_causal=True, value_size=128),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    check_attention(case, random_map(case), with_dlse=case.keys % 2 == 0)


HOPPER_CASES = [  # one to three pairs of key blocks, tails of queries and keys, every padded head size
    Case(1, 1, 128, dtype=BF16),
    Case(64, 65, 40, dtype=BF16, layout="blhd"),
    Case(129, 128, 64, dtype=FP16, key_heads=1),
    Case(200, 300, 72, dtype=BF16, heads=6, key_heads=2, batch=2),
    Case(1000, 1000, 96, dtype=BF16, is_causal=True, layout="blhd"),
    Case(1100, 700, 128, dtype=FP16, is_causal=True, layout="fused", heads=4, key_heads=2),
    Case(700, 1500, 64, dtype=BF16, is_causal=True, batch=2, scale=0.5),
    Case(3000, 5000, 128, dtype=BF16, heads=12, key_heads=12),
    Case(700, 700, 128, dtype=BF16, scale=80.0),  # q and k thirty times as large: rows of P have one entry that counts
    Case(700, 700, 64, dtype=BF16, scale=110.0, layout="blhd"),
]


def needs_hopper() -> None:
    from sparge_compile.kernels.triton.trial import hopper_refusal

    if refusal := hopper_refusal(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(refusal)


def watch_hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls that Hopper's kernels take, as they come."""
    from sparge_compile.kernels.triton import backward_key_hopper, backward_query_hopper, forward_hopper

    calls: list[str] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or real(*args))

    watch(forward_hopper, "forward")
    watch(backward_query_hopper, "query_gradient")
    watch(backward_key_hopper, "key_gradients")
    return calls


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_attention_on_hopper(case: Case, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of no block, one, an odd and an even number, all; causal lists that go on beyond the diagonal."""
    needs_hopper()
    from sparge_compile.kernels.triton.trial import TRIED_BACKWARD, hopper_refusal

    if refusal := hopper_refusal(torch.device("cuda", torch.cuda.current_device()), TRIED_BACKWARD):
        pytest.skip(refusal)
    calls = watch_hopper(monkeypatch)
    check_attention(case, random_map(case, density), with_dlse=case.keys % 2 == 0)
    wanted = {"forward", "key_gradients"} | ({"query_gradient"} if case.head_size > 64 else set())
    assert wanted <= set(calls), "a portable kernel ran"


@pytest.mark.parametrize(
    "case",
    [Case(300, 300, 128, dtype=BF16, mask="key"), Case(300, 300, 128, dtype=BF16, scale=-0.1), Case(300, 300, 128)]
    + [Case(300, 300, d, dtype=BF16) for d in (32, 160)]
    + [Case(300, 300, 64, dtype=BF16, layout="bhdl"), Case(300, 300, 44, dtype=BF16, layout="blhd")]
    + [Case(300, 300, 128, dtype=BF16, value_size=64), Case(300, 300, 64, dtype=BF16, value_size=128)],
    ids=str,
)
def test_what_the_hopper_kernel_leaves_to_the_portable_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_hopper()
    calls = watch_hopper(monkeypatch)
    check_attention(case, random_map(case))
    others = {"key_gradients"} if case.scale else set()  # to which a negative scale is no matter
    assert set(calls) <= others, "a Hopper kernel ran"


@pytest.mark.parametrize("head_size", [64, 128])
def test_the_portable_backward_on_hopper(head_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other GPUs run, for calls that Hopper's kernels take."""
    module = import_module("sparge_compile.kernels.triton.backward")  # whose name the package gives to its function
    calls = watch_hopper(monkeypatch)
    monkeypatch.setattr(module, "hopper_refusal", lambda *device: "left out")
    case = Case(700, 900, head_size, dtype=BF16, is_causal=True, layout="blhd", heads=4, key_heads=2)
    check_attention(case, random_map(case), with_dlse=True)
    assert not {"query_gradient", "key_gradients"} & set(calls)


def test_gradients_from_a_gradient_of_any_strides() -> None:
    """One that no descriptor describes: the portable kernels take the call."""
    from sparge_compile.kernels import triton

    case = Case(600, 500, 128, dtype=BF16)
    (q, k, v), block_map = random_qkv(case), random_map(case)
    out, lse = triton.forward(q, k, v, *block_map, None, False, 0.1)
    dout = torch.randn(*out.shape[:2], 128, 600, dtype=BF16).mT
    found = [
        triton.backward(given, q, k, v, out, lse, None, triton.pack(*block_map), None, False, 0.1)
        for given in (dout, dout.contiguous())
    ]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2**-7 * y.abs().max().item())


def test_many_lists_of_very_different_lengths() -> None:
    """More query blocks than programs, taken from the counter in any order: every one is done once."""
    case = Case(20_000, 20_000, 64, heads=8, key_heads=8, dtype=BF16)
    q, k, v = random_qkv(case)
    kept = torch.rand(1, 8, 157, 313) < torch.rand(1, 8, 157, 1) ** 4
    block_map = BlockMap.from_dense(kept)
    from sparge_compile.kernels import triton

    with poisoned_memory():
        out, lse = triton.forward(q, k, v, *block_map, None, False, 0.125)
    exact, exact_lse = reference.attention(q.float(), k.float(), v.float(), block_map, None, False, 0.125)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("is_causal", [False, True], ids=["dense", "causal"])
def test_a_quarter_of_a_million_tokens(is_causal: bool) -> None:
    """L = 262,144, 8 heads: of each pair of blocks no more than 4 bytes, the index, are held. Backward too."""
    from sparge_compile.kernels import triton

    length, heads = 262_144, 8
    case = Case(length, length, 128, heads=heads, key_heads=heads, dtype=BF16)
    if torch.cuda.mem_get_info()[0] < 20 * heads * length * 128 * 2:
        pytest.skip("needs 11 GB")
    q, k, v = random_qkv(case)
    limits, scale = thresholds(heads, 0.02, 0.02), scale_of(case)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    block_map = triton.block_map(q, k, limits, None, is_causal, scale * 30)
    indices = 4 * heads * ceil_div(length, QUERY_BLOCK) * ceil_div(length, KEY_BLOCK)
    assert torch.cuda.max_memory_allocated() - before < 1.2 * indices + 2**26
    out, lse = triton.forward(q, k, v, *block_map, None, is_causal, scale)
    bits = triton.pack(*block_map)
    dq, dk, dv = triton.backward(out, q, k, v, out, lse, None, bits, None, is_causal, scale)
    assert all(x.isfinite().all() for x in (out, lse, dq, dk, dv))
    head, i = heads - 1, length // QUERY_BLOCK - 1
    rows = slice(i * QUERY_BLOCK, length)
    part = BlockMap.from_dense(block_map.to_dense()[:, head : head + 1, i:])
    blocks = part.to_dense()[0, 0, 0].repeat_interleave(KEY_BLOCK)
    allowed = blocks.expand(length - i * QUERY_BLOCK, length)
    if is_causal:
        allowed = allowed & (torch.arange(length) <= torch.arange(i * QUERY_BLOCK, length).unsqueeze(-1))
    scores = (q[0, head, rows].double() @ k[0, head].double().T * scale).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(lse[0, head, rows].double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        out[0, head, rows].double(), scores.softmax(-1) @ v[0, head].double(), rtol=2e-2, atol=2e-3
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == BF16], ids=str)
def test_map(case: Case) -> None:
    q, k, _ = random_qkv(case)
    mask, limits = random_mask(case), thresholds(case.heads)
    got = triton_map(q, k, limits, mask, case.is_causal, scale_of(case) * 5)
    assert_map_matches(got, q, k, limits, mask, case.is_causal, scale_of(case) * 5)


@pytest.mark.parametrize("keys", [830, 20_000, 70_000, 140_000, 300_000])
@pytest.mark.parametrize("is_causal", [False, True], ids=["dense", "causal"])
def test_map_is_the_references_where_scores_tie(keys: int, is_causal: bool) -> None:
    """From one part of scores to four, and past what a program holds (the torch path)."""
    length = min(keys, 3000)
    q, k = block_constant(1, 2, length, 16, QUERY_BLOCK), block_constant(1, 1, keys, 16, KEY_BLOCK)
    # Top-p stays 0: sums of thousands of masses round differently, and may cross topp one block apart.
    limits = torch.tensor([[0.034, 0.0], [0.5, 0.0]])
    want = reference.block_map(q, k, limits, None, is_causal, 0.25)
    assert_same_map(triton_map(q, k, limits, None, is_causal), want)


@pytest.mark.parametrize("length, heads", [(32_760, 12), (75_600, 2)])
def test_video_lengths(length: int, heads: int) -> None:
    """Wan's lengths, forward and backward; a sample of query blocks, and of key blocks, in float64."""
    from sparge_compile.kernels import triton

    case = Case(length, length, 128, heads=heads, key_heads=heads, dtype=BF16, layout="blhd")
    q, k, v = random_qkv(case)
    limits, scale = thresholds(heads, 0.03, 0.05), scale_of(case)
    # Random inputs have means near 0; a sharper scale makes the masses uneven, so that Top-p has work to do.
    block_map = triton_map(q, k, limits, None, False, scale * 30)
    assert_map_matches(block_map, q, k, limits, None, False, scale * 30)
    with poisoned_memory():
        out, lse = triton.forward(q, k, v, *block_map, None, False, scale)
    n_query, n_key = block_map.indices.shape[-2:]
    dense = block_map.to_dense()

    head = heads - 1
    for i in (0, 1, n_query // 2, n_query - 1):
        rows = slice(i * QUERY_BLOCK, min((i + 1) * QUERY_BLOCK, length))
        sample = q[:, head : head + 1, rows], k[:, head : head + 1], v[:, head : head + 1]
        part = BlockMap.from_dense(dense[:, head : head + 1, i : i + 1])
        problem = Problem(*sample, part, None, False, scale, torch.zeros_like(sample[0]), None)
        exact, exact_lse = reference.attention(*(x.double() for x in sample), part, None, False, scale)
        plain, plain_lse = plain_attention(*sample, problem.allowed(), None, scale)
        terms, lse_terms = summed_terms(problem)[:2]
        assert_error_bounded(out[:, head : head + 1, rows], exact, plain, terms, f"out of query block {i}")
        assert_error_bounded(lse[:, head : head + 1, rows], exact_lse, plain_lse, lse_terms, f"lse of query block {i}")

    # dq of a query block and dv of a key block, from their formulas in float64 with the kernel's own out and lse.
    dout = torch.randn_like(out)
    bits = triton.pack(*block_map)
    with poisoned_memory():
        dq, dk, dv = triton.backward(dout, q, k, v, out, lse, None, bits, None, False, scale)
    for x in (dq, dk, dv):
        assert x.isfinite().all()
    qd, kd, vd, dd, od = (x[0, head].double() for x in (q, k, v, dout, out))
    delta, delta_terms = (dd * od).sum(-1, keepdim=True), (dd * od).abs().sum(-1, keepdim=True)

    def score_gradients(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P, dS, and the sum of the absolute values of what dS is the difference of."""
        p = torch.exp(qd[rows] @ kd[keys].T * scale - lse[0, head, rows].double().unsqueeze(-1))
        terms = p * (dd[rows].abs() @ vd[keys].abs().T + delta_terms[rows])
        return p, p * (dd[rows] @ vd[keys].T - delta[rows]), terms

    for i, j in ((0, 0), (n_query // 2, n_key // 2), (n_query - 1, n_key - 1)):
        rows = torch.arange(i * QUERY_BLOCK, min((i + 1) * QUERY_BLOCK, length))
        keys = dense[0, head, i].repeat_interleave(KEY_BLOCK)[:length].nonzero().squeeze(-1)
        _, ds, ds_terms = score_gradients(rows, keys)
        exact, terms = ds @ kd[keys] * scale, ds_terms @ kd[keys].abs() * scale
        plain = (ds.to(BF16) @ k[0, head, keys]) * scale
        assert_error_bounded(dq[0, head, rows], exact, plain, terms, f"dq of query block {i}", factor=6.0)

        keys = torch.arange(j * KEY_BLOCK, min((j + 1) * KEY_BLOCK, length))
        rows = dense[0, head, :, j].repeat_interleave(QUERY_BLOCK)[:length].nonzero().squeeze(-1)
        p, ds, ds_terms = score_gradients(rows, keys)
        exact, plain, terms = p.T @ dd[rows], p.to(BF16).T @ dout[0, head, rows], p.T @ dd[rows].abs()
        assert_error_bounded(dv[0, head, keys], exact, plain, terms, f"dv of key block {j}", factor=6.0)
        exact, terms = ds.T @ qd[rows] * scale, ds_terms.T @ qd[rows].abs() * scale
        plain = (ds.to(BF16).T @ q[0, head, rows]) * scale
        assert_error_bounded(dk[0, head, keys], exact, plain, terms, f"dk of key block {j}", factor=6.0)


def test_cuda_graph() -> None:
    """Captured once, replayed with other inputs and other thresholds: nothing was read on the host."""
    from sparge_compile.kernels import triton

    case = Case(1000, 1000, 64, dtype=BF16)
    q, k, v = random_qkv(case)
    limits = thresholds(2)

    def run() -> tuple[BlockMap, Tensor]:
        block_map = triton.block_map(q, k, limits, None, True, 1.0)
        return block_map, triton.forward(q, k, v, *block_map, None, True, 0.125)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_map, captured_out = run()
    for topk in (0.1, 0.9):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        limits.copy_(thresholds(2, topk, 0.2))
        graph.replay()
        want_map, want_out = run()
        assert_same_map(captured_map, want_map)
        assert torch.equal(captured_out, want_out)


def test_equal_inputs_give_equal_bits() -> None:
    from sparge_compile.kernels import triton

    case = Case(1500, 1500, 128, dtype=BF16, heads=4, key_heads=2)
    q, k, v = random_qkv(case)
    block_map = random_map(case)
    runs = []
    for _ in range(2):
        out, lse = triton.forward(q, k, v, *block_map, None, False, 0.1)
        bits = triton.pack(*block_map)
        runs.append((out, lse, *triton.backward(out, q, k, v, out, lse, None, bits, None, False, 0.1)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_key_blocks_that_nobody_reads_get_zero_gradients() -> None:
    from sparge_compile.kernels import triton

    case = Case(300, 640, 64, dtype=BF16)
    q, k, v = random_qkv(case)
    kept = torch.zeros(1, 2, 3, 10, dtype=torch.bool)
    kept[..., 3] = True
    block_map = BlockMap.from_dense(kept)
    with poisoned_memory():
        out, lse = triton.forward(q, k, v, *block_map, None, False, 0.125)
        bits = triton.pack(*block_map)
        _, dk, dv = triton.backward(out, q, k, v, out, lse, None, bits, None, False, 0.125)
    for x in (dk, dv):
        assert (x[:, :, :192] == 0).all() and (x[:, :, 256:] == 0).all() and (x[:, :, 192:256] != 0).any()


def test_offsets_beyond_32_bits() -> None:
    """A stride so large that 32-bit offsets wrap, even inside one tile: a wrapped offset reads other memory."""
    from sparge_compile.kernels import triton

    case = Case(200, 200, 16, dtype=FP16)
    step = 2**31 // 100
    if torch.cuda.mem_get_info()[0] < 2.2 * 200 * step:
        pytest.skip("needs 10 GB")
    q, k, v = random_qkv(case)
    far = torch.empty_strided(k.shape, (16, 32, step, 1), dtype=FP16)
    far.copy_(k)
    limits = thresholds(2)
    want_map, got_map = triton_map(q, k, limits), triton.block_map(q, far, limits, None, False, 0.25)
    assert_same_map(got_map, want_map)
    want = triton.forward(q, k, v, *want_map, None, False, 0.25)
    got = triton.forward(q, far, v, *want_map, None, False, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
