"""Taps hand an attention's operands to whoever listens and change nothing else."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, targets, written_out

from sparge_compile.passes.find import find
from sparge_compile.passes.write.taps import hand_over, listening, put_taps

B, H, L, D = 2, 3, 6, 4


def tapped(make, numbers=None):
    """A graph with a tap at its matches, what it gave before, and inputs."""
    b = Builder()
    q, k, v = b.qkv(B, H, L, L, D)
    owner = b.module(make(b, q, k, v))
    before = targets(owner)
    given = [torch.randn(B, H, L, D) for _ in range(3)]
    want = owner(*given)[0]
    matches = list(enumerate(find(owner)))
    put_taps(owner, matches if numbers is None else [matches[n] for n in numbers])
    return owner, before, want, given


def heard(owner, given):
    calls = []
    with listening(lambda *args: calls.append(args)):
        result = owner(*given)[0]
    return calls, result


def fused(b, q, k, v):
    return b.call(F.scaled_dot_product_attention, q, k, v, is_causal=True)


def padded(b, q, k, v):
    mask = b.call(torch.lt, b.call(torch.arange, L), 4)
    return b.call(F.scaled_dot_product_attention, q, k, v, b.method("expand", mask, L, L))


def two(b, q, k, v):
    return written_out(b, b.call(F.scaled_dot_product_attention, q, k, v), k, v)


@pytest.mark.parametrize("make", [fused, written_out], ids=lambda f: f.__name__)
def test_a_tap_hands_over_the_operands_and_keeps_the_result(make):
    owner, before, want, given = tapped(make)
    ((number, q, k, v, mask),), result = heard(owner, given)
    assert number == 0 and mask is None
    for got, operand in zip((q, k, v), given, strict=True):
        assert torch.equal(got, operand)
    assert torch.equal(result, want)
    kept = [target for target in targets(owner) if target is not hand_over]
    assert kept == before


def test_a_tap_hands_over_the_mask():
    owner, _, want, given = tapped(padded)
    ((*_, mask),), result = heard(owner, given)
    assert mask.shape == (1, 1, 1, L) and mask.tolist()[0][0][0] == [True] * 4 + [False] * 2
    assert torch.equal(result, want)


def test_taps_are_numbered_as_they_were_asked_for():
    owner, _, want, given = tapped(two)
    calls, result = heard(owner, given)
    assert [call[0] for call in calls] == [0, 1] and torch.equal(result, want)
    owner, _, _, given = tapped(two, numbers=[1])
    calls, _ = heard(owner, given)
    assert [call[0] for call in calls] == [1] and torch.equal(calls[0][2], given[1])


def test_of_an_opened_call_only_the_operands_are_computed_again():
    b = Builder()
    x = b.input("x", L, B, 8)
    shapes = (24, 8), (24,), (8, 8), (8,)
    in_w, in_b, out_w, out_b = (b.input(f"w{i}", *shape) for i, shape in enumerate(shapes))
    arguments = (x, x, x, 8, 2, in_w, in_b, None, None, False, 0.0, out_w, out_b)
    call = b.call(F.multi_head_attention_forward, *arguments, training=False)
    owner = b.module(b.call(operator.getitem, call, 0))
    given = [torch.randn(L, B, 8), *(torch.randn(shape) for shape in shapes)]
    want = owner(*given)[0]
    put_taps(owner, [(7, match) for match in find(owner)])
    assert torch.ops.aten.scaled_dot_product_attention.default not in targets(owner)
    ((number, q, k, _, mask),), result = heard(owner, given)
    assert (number, q.shape, k.shape, mask) == (7, (B, 2, L, 4), (B, 2, L, 4), None)
    assert torch.equal(result, want)


def test_who_listens_is_told_apart_by_nesting():
    owner, _, _, given = tapped(fused)
    outer, inner = [], []
    with listening(lambda *args: outer.append(args)):
        with listening(lambda *args: inner.append(args)):
            owner(*given)
        assert (len(outer), len(inner)) == (0, 1)
        owner(*given)
    assert (len(outer), len(inner)) == (1, 1)
    with pytest.raises(LookupError):
        owner(*given)  # nobody listens


def test_without_matches_no_tap_is_put():
    owner, before, want, given = tapped(fused, numbers=[])
    assert targets(owner) == before and torch.equal(owner(*given)[0], want)
