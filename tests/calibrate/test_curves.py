"""Curves: what they predict for a pair of thresholds is what the op does with it."""

from __future__ import annotations

import itertools
import weakref
from functools import partial

import pytest
import torch
from helpers import Case, random_mask, random_qkv, scale_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparge_compile import attention, varlen_attention
from sparge_compile.calibrate import curves
from sparge_compile.calibrate.curves import TOPK, TOPP, Sums, ladder, measure
from sparge_compile.kernels import capability, reference
from sparge_compile.kernels.block_map import QUERY_BLOCK, ceil_div

MEMORY = 1 << 28
CASES = [
    Case(700, 900, 32),
    Case(700, 700, 32, is_causal=True),
    Case(500, 900, 32, batch=2, heads=4, key_heads=2, mask="key", layout="blhd"),
    Case(500, 900, 16, mask="full"),
    Case(500, 900, 16, mask="add", dtype=torch.bfloat16),
    Case(600, 600, 16, mask="key", is_causal=True),
    Case(130, 1500, 24, heads=1, key_heads=1, scale=0.3),
    Case(300, 500, 16, is_causal=True, value_size=40),
]


def problem(case: Case):
    q, k, v = random_qkv(case)
    return q * 2, k, v, random_mask(case)


def every_block(case: Case):
    n = ceil_div(case.length, QUERY_BLOCK)
    return torch.arange(n).expand(case.batch, case.heads, n)


def measured(case: Case, q, k, v, mask, sample=None, memory=MEMORY) -> Sums:
    normal = None if mask is None else capability.normal_mask(mask, case.keys)
    sample = every_block(case) if sample is None else sample
    return measure(q, k, v, normal, case.is_causal, scale_of(case), sample, memory)


def op(case: Case, q, k, v, mask, topk, topp):
    """(error sum [H], sparsity) of the op, in float32 on the same numbers."""
    q, k, v = q.float(), k.float(), v.float()
    how = {"attn_mask": mask, "is_causal": case.is_causal, "scale": case.scale, "enable_gqa": True}
    dense = attention(q, k, v, **how)
    out, sparsity = attention(q, k, v, **how, topk=topk, topp=topp, return_sparsity=True)
    return (out - dense).abs().sum((0, 2, 3)), dense.abs().sum((0, 2, 3)), sparsity


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_predicted_error_and_density_are_those_of_the_op(case):
    q, k, v, mask = problem(case)
    sums = measured(case, q, k, v, mask)
    distinct = set()
    for i in (0, 8, 15, 20, 25, len(TOPK) - 1):
        for j in (0, 6, 12, 20, 26, len(TOPP) - 1):
            error, norm, sparsity = op(case, q, k, v, mask, TOPK[i], TOPP[j])
            torch.testing.assert_close(sums.error[:, i, j] / sums.norm, error / norm, atol=2e-6, rtol=1e-5)
            kept = sums.kept[:, i, j].sum() / sums.visible.sum()
            torch.testing.assert_close(1 - kept, sparsity, atol=1e-6, rtol=0)
            distinct.add(round(float(sparsity), 4))
    assert len(distinct) > 3 or case.mask == "full", "a grid on which all pairs are alike shows nothing"


def test_causality_aligned_to_the_bottom_right():
    """As the op computes it for one packed sequence."""
    case = Case(500, 740, 16, is_causal=True)
    q, k, v, _ = problem(case)
    sums = measure(q, k, v, None, True, scale_of(case), every_block(case), MEMORY, bottom_right=True)
    starts = (torch.tensor([0, n], dtype=torch.int32) for n in (500, 740))
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    call = partial(varlen_attention, *rows, *starts, 500, 740, causal="bottom_right")
    dense = call()
    for i, j in ((8, 0), (0, 20), (20, 12)):
        out, sparsity = call(topk=TOPK[i], topp=TOPP[j], return_sparsity=True)
        error, norm = (x.abs().sum((0, 2)) for x in (out - dense, dense))
        torch.testing.assert_close(sums.error[:, i, j] / sums.norm, error / norm, atol=2e-6, rtol=1e-5)
        kept = sums.kept[:, i, j].sum() / sums.visible.sum()
        torch.testing.assert_close(1 - kept, sparsity, atol=1e-6, rtol=0)


def test_memory_changes_nothing_but_the_number_of_pieces(monkeypatch):
    case = Case(700, 900, 32, heads=4, key_heads=2, is_causal=True)
    inputs, pieces, real = problem(case), [], curves._curves
    monkeypatch.setattr(curves, "_curves", lambda *a: pieces.append(len(a[1])) or real(*a))
    for got, want in zip(measured(case, *inputs, memory=1), measured(case, *inputs), strict=True):
        torch.testing.assert_close(got, want)
    blocks = every_block(case).numel()
    assert pieces == [1] * blocks + [blocks]


def test_a_sample_of_query_blocks_is_the_error_of_those_rows():
    case = Case(1000, 900, 16)
    q, k, v, mask = problem(case)
    sample = torch.tensor([[[1, 7], [0, 3]]])
    sums = measured(case, q, k, v, mask, sample)
    i, j = 15, 6
    dense, out = attention(q, k, v), attention(q, k, v, topk=TOPK[i], topp=TOPP[j])
    for head, blocks in enumerate(sample[0].tolist()):
        rows = torch.cat([torch.arange(case.length)[b * QUERY_BLOCK :][:QUERY_BLOCK] for b in blocks])
        want = (out - dense)[0, head, rows].abs().sum()
        torch.testing.assert_close(sums.error[head, i, j], want, rtol=1e-5, atol=1e-5)


def test_of_lengths_that_were_not_looked_at_no_error_is_too_small(monkeypatch):
    case = Case(200, 3000, 16)
    inputs = problem(case)
    exact = measured(case, *inputs)
    monkeypatch.setattr(curves, "EXACT", 4)
    monkeypatch.setattr(curves, "STEPS", 3)
    coarse = measured(case, *inputs)
    assert len(ladder(47)) < 15
    torch.testing.assert_close(coarse.kept, exact.kept, rtol=0, atol=0)
    # The error grows as blocks are dropped, but not strictly: another block may point the wrong way.
    assert (coarse.error >= exact.error * 0.98 - 1e-4).all() and (coarse.error > exact.error * 1.01).any()


@pytest.mark.parametrize("n", [1, 2, 128, 129, 512, 1182])
def test_the_ladder_ascends_to_the_whole_by_steps_of_a_32nd(n):
    steps = ladder(n)
    assert steps[0] == 1 and steps[-1] == n and steps == sorted(set(steps))
    assert all(b - a <= max(1, a / 32) for a, b in itertools.pairwise(steps))


def test_a_score_that_is_no_number_keeps_everything_and_shows():
    case = Case(300, 900, 16)
    q, k, v, mask = problem(case)
    q[0, 0, 5, 3] = torch.nan
    sums = measured(case, q, k, v, mask)
    assert sums.norm.isnan().tolist() == [True, False]
    assert (sums.kept[0].amin() > sums.kept[1].amin()).item()


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_meta):
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, which, size):
        self.alive.discard(which)
        self.now -= size


@pytest.mark.parametrize("mask", [None, torch.bool])
def test_at_full_size_memory_is_bounded_and_nothing_waits_for_the_device(mask):
    """On the meta device, which has sizes and no numbers: whatever asked for one would raise."""
    length, head_size, memory = 32_760, 128, 1 << 29
    q, k, v = (torch.empty(1, 2, length, head_size, dtype=torch.bfloat16, device="meta") for _ in range(3))
    mask = None if mask is None else torch.empty(1, 1, 1, length, dtype=mask, device="meta")
    with Held() as held:
        measure(q, k, v, mask, False, 0.1, torch.zeros(1, 2, 20, dtype=torch.int64, device="meta"), memory)
    padded = 2 * k.numel() * k.element_size()
    assert 0.7 * memory < held.peak < 1.1 * memory + padded


def test_the_error_of_eight_bits_is_measured_with_that_of_sparsity():
    case = Case(260, 700, 32)
    q, k, v, _ = problem(case)
    sums = measure(q, k, v, None, False, scale_of(case), every_block(case), MEMORY, in_eight_bits=True)
    plain = measured(case, q, k, v, None)
    assert torch.equal(sums.kept, plain.kept)
    torch.testing.assert_close(sums.norm, plain.norm)
    dense = attention(q, k, v)
    for pair in ((TOPK.index(1.0), 0), (TOPK.index(1.0) - 5, 0)):
        topk = TOPK[pair[0]]
        blocks = reference.block_map(q, k, torch.tensor([[topk, 0.0]] * case.heads))
        out, _ = reference.attention_in_eight_bits(q, k, v, blocks)
        error = (out - dense).abs().sum((0, 2, 3)).float()
        torch.testing.assert_close(sums.error[(slice(None), *pair)], error, rtol=0.02, atol=0)
