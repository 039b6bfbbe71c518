"""An attention with packed sequences, and one aligned to the bottom right, become the op, and are tapped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder

from sparge_compile import varlen_attention
from sparge_compile.calibrate.measuring import longest_sequence
from sparge_compile.options import Options
from sparge_compile.passes.decide import decide, sizes_of
from sparge_compile.passes.find import Match, find
from sparge_compile.passes.match.attention import Packing
from sparge_compile.passes.substitute import substitute_match
from sparge_compile.passes.write.taps import listening, put_taps
from sparge_compile.report import Reason

H, T, D = 2, 331, 16
STARTS = torch.tensor([0, 200, 331], dtype=torch.int32)


def packed_match(dtype=torch.int32, **changes):
    """SDPA over a buffer, said to be attention of two sequences in it: what a matcher of varlen calls finds."""
    b = Builder()
    q, k, v = b.qkv(1, H, T, T, D)
    starts = b.input("starts", 3, dtype=dtype)
    thresholds = b.input("thresholds", H, 2)
    owner = b.module(b.call(F.scaled_dot_product_attention, q, k, v))
    (match,) = find(owner)
    packing = Packing(starts, starts, 200, 200)
    attention = dataclasses.replace(match.attention, packing=packing, is_causal=True, bottom_right=True, **changes)
    return owner, thresholds, dataclasses.replace(match, attention=attention)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_it_becomes_the_op(dtype):
    owner, thresholds, match = packed_match(dtype)
    new = substitute_match(match, thresholds, {})
    assert new.kwargs["bottom_right"] is True and new.kwargs["max_seqlen_k"] == 200
    owner.graph.lint()
    owner.recompile()
    q, k, v = (torch.randn(1, H, T, D) for _ in range(3))
    found = owner(q, k, v, STARTS.to(dtype), torch.tensor([[0.3, 0.0]] * H))
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    want = varlen_attention(*rows, STARTS, STARTS, 200, 200, topk=0.3, causal="bottom_right")
    torch.testing.assert_close(found[0][0].transpose(0, 1), want)


def test_its_sizes_are_all_rows_and_the_longest_keys():
    _, _, match = packed_match()
    assert sizes_of(match.attention) == (1, H, H, T, 200, D, D)
    assert decide(match, Options(min_seq_len=201)).reason is Reason.TOO_SHORT
    assert decide(match, Options(min_seq_len=200)).reason is Reason.LONG_ENOUGH


def test_a_mask_beside_it_is_refused():
    b = Builder()
    q, k, v = b.qkv(1, H, T, T, D)
    mask = b.input("mask", 1, 1, 1, T, dtype=torch.bool)
    owner = b.module(b.call(F.scaled_dot_product_attention, q, k, v, b.method("expand", mask, 1, 1, T, T)))
    (match,) = find(owner)
    packing = Packing(mask, mask, T, T)
    match: Match = dataclasses.replace(match, attention=dataclasses.replace(match.attention, packing=packing))
    assert decide(match, Options(min_seq_len=0)).reason is Reason.MASK_SHAPE


def test_a_tap_hands_over_where_sequences_begin():
    owner, _, match = packed_match()
    put_taps(owner, [(0, match)])
    heard = []
    q, k, v = (torch.randn(1, H, T, D) for _ in range(3))
    with listening(lambda *given: heard.append(given)):
        owner(q, k, v, STARTS, torch.ones(H, 2))
    (number, *operands, mask, starts_q, starts_k) = heard[0]
    assert number == 0 and mask is None and starts_q is starts_k is STARTS
    longest = longest_sequence(*operands, starts_q, starts_k)
    assert all(torch.equal(x, y[:, :, :200]) for x, y in zip(longest, (q, k, v), strict=True))


def test_the_longest_sequence_may_have_more_pairs_than_32_bits_count():
    x = torch.empty(1, 1, 50_100, 1, device="meta")
    starts = torch.tensor([0, 100, 50_100], dtype=torch.int32)
    assert longest_sequence(x, x, x, starts, starts)[0].shape[2] == 50_000
