"""Code near attention that a rewrite once changed, or that it could not compile: each equals eager mode at topk = 1."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

L = 16
TRI = torch.ones(L, L, dtype=torch.bool).triu(1)


def att(q, k, v, change=lambda scores: scores):
    return change(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@torch.library.custom_op("sparge_test::flip", mutates_args={"x"})
def flip(x: torch.Tensor) -> None:
    x.neg_()


flip.register_fake(lambda x: None)


def copies_without_gradient(q, k, v):
    with torch.no_grad():
        kk, vv = k.clone(), v.reshape(6, L, L).view(2, 3, L, L)
    return F.scaled_dot_product_attention(q, kk, vv)


def changed_through_a_reshape(q, k, v):
    o = att(q, k, v)
    o.reshape(2, 48, L).mul_(2)
    return o + 1


def viewed_after_pointwise(q, k, v):
    return (att(q, k, v) * 2).view(6, L, L)


def changed_by_a_custom_op(q, k, v):
    v = v * 1
    vt = v.clone()
    torch.ops.sparge_test.flip(v)
    return att(q, k, vt) + v


def shifted_in_place(q, k, v):
    i = torch.arange(L)
    mask = (i[:, None] >= i).int() + 1
    alias = mask
    mask >>= 1
    return att(q, k, v, lambda s: s.masked_fill(alias == 0, -1e9))


def changed_in_a_checkpoint(q, k, v):
    k = k * 1
    before = k.clone()

    def double(k):
        k.mul_(2)
        return k.sum()

    z = checkpoint(double, k, use_reentrant=False)
    return att(q, before, v) + z * 0


def mask_before_and_after_a_change(q, k, v):
    m = torch.ones(L, L, dtype=torch.bool) & (q[0, 0] > -100)
    old = m.clone()
    m[..., ::2] = False
    return att(q, k, v, lambda s: s.masked_fill(m != old, -1e9))


def hidden_and_scaled_up_again(q, k, v):
    return att(q, k, v, lambda s: s.masked_fill(TRI, -1e9) * 1e-9)


def hidden_and_raised_again(q, k, v):
    return att(q, k, v, lambda s: (s + TRI.float() * -1e5) + TRI.float() * 1e5)


def positions_in_bfloat16(q, k, v):
    i = torch.arange(L * 20, dtype=torch.bfloat16)[-L:]
    return att(q, k, v, lambda s: s.masked_fill(~(i[:, None] >= i), -1e9))


def positions_that_wrap(q, k, v):
    i = torch.arange(L).to(torch.uint8)
    return att(q, k, v, lambda s: s.masked_fill(~((i[:, None] - i[None]) >= 0), -1e9))


def bytes_that_wrap(q, k, v):
    c = torch.ones(L, L, dtype=torch.uint8).tril()
    return att(q, k, v, lambda s: s + (c - 1) * 1e9)


def positions_that_are_rounded(q, k, v):
    i = torch.arange(64.0)[-L:]
    return att(q, k, v, lambda s: s.masked_fill(~((i / 49 * 49)[:, None] >= i), -1e9))


def numbers_that_underflow(q, k, v):
    i = torch.arange(200.0)[::13]
    return att(q, k, v, lambda s: s.masked_fill(~(torch.exp(-F.pad(i, (0, 0)))[None] > 0), -1e9))


def numbers_that_are_cut_off(q, k, v):
    half = torch.ones(L, L, dtype=torch.int64).new_full((L, L), 0.5)
    return att(q, k, v, lambda s: s.masked_fill((half == 0) & ~torch.eye(L, dtype=torch.bool), -1e9))


def indices_from_the_end(q, k, v):
    i = torch.arange(L)
    lower = torch.ones(L, L, dtype=torch.bool).tril()
    return att(q, k, v, lambda s: s.masked_fill(~lower[(i - L)[:, None], i[None]], -1e9))


def result_changed_in_place(q, k, v):
    o = att(q, k, v)
    o += q
    return o


def nan_in_a_mask(q, k, v):
    return att(q, k, v, lambda s: s + TRI.float() * -math.inf)


def infinity_in_a_mask(q, k, v):
    return att(q, k, v, lambda s: s + (1 - 1 / torch.ones(L, L).tril()))


def float8_keys(q, k, v):
    return att(q, k.to(torch.float8_e4m3fn).to(torch.float32), v)


def many_conditions(q, k, v):
    i = torch.arange(L)
    mask = i[:, None] >= i
    for step in range(20):
        mask = mask ^ ((i * 3 + step) % 5 > i[:, None])
    return att(q, k, v, lambda s: s.masked_fill(mask & (i > 0), -1e9))


def one_part_concatenated_twice(q, k, v):
    end = torch.ones(4, dtype=torch.bool)
    return att(q, k, v, lambda s: s.masked_fill(torch.cat([end, torch.zeros(L - 8, dtype=torch.bool), end]), -1e9))


TRAPS = [x for x in list(globals().values()) if getattr(x, "__module__", "") == __name__ and callable(x)]
TRAPS = [x for x in TRAPS if x.__name__ not in ("att", "flip")]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("trap", TRAPS, ids=lambda f: f.__name__)
def test_a_trap(trap, additive):
    if additive and trap is bytes_that_wrap:
        pytest.skip("scores are lost in the rounding of numbers that large")

    def run(function):
        x = [torch.randn(2, L, 3, L, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
        out = function(*(y.transpose(1, 2) for y in x))
        if out.requires_grad:
            out.nan_to_num().square().sum().backward()
        return [out.detach(), *(y.grad for y in x)]

    options = {"min_seq_len": 0, "topk": 1.0, "topp": 0.0, "inner": "aot_eager", "on_unsupported": "dense"}
    options["additive_masks"] = additive
    want = run(trap)
    got = run(torch.compile(trap, backend="sparge", options=options))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None), "a gradient appeared or vanished"
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, equal_nan=True)
