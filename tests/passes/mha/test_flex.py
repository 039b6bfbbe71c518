"""flex_attention: what its functions and its block lists say, together and against one another."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)

import sparge_compile
from sparge_compile.passes import decide
from sparge_compile.report import Reason

B, H, L, S, D = 2, 2, 150, 200, 16
OPTIONS = {"min_seq_len": 0, "topk": 1.0, "topp": 0.0, "inner": "eager", "on_unsupported": "dense"}


@pytest.fixture(autouse=True)
def flex_attention_trains_on_a_cpu(monkeypatch):
    monkeypatch.setattr(flex_module, "_validate_device", lambda query, key, value: None)


def qkv(length=L, keys=S, **how):
    return tuple(torch.randn(B, H, n, D, **how) for n in (length, keys, keys))


def explained(function, *inputs, **options):
    report = sparge_compile.explain(function, {**OPTIONS, **options})(*inputs)
    (row,) = (row for row in report if row.kind != "softmax")
    return row


def compiled(function, **options):
    return torch.compile(function, backend="sparge", fullgraph=True, options={**OPTIONS, **options})


def assert_replaced(function, visible, *inputs, **options):
    """The call becomes sparse, and is SDPA under the mask, rows that see nothing being zero."""
    assert explained(function, *inputs, **options).status == "sparse"
    got = compiled(function, **options)(*inputs)
    want = F.scaled_dot_product_attention(*inputs[:3], attn_mask=visible).nan_to_num(0.0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def block_mask(mask_mod, length=L, keys=S, **how):
    return create_block_mask(mask_mod, None, None, length, keys, device="cpu", **how)


def causal(b, h, i, j):
    return i >= j


# ---- block lists and mask_mod


def lists(dense):
    """counts and indices of a boolean block matrix [B or 1, H or 1, Nq, Nk], as torch writes them."""
    return dense.sum(-1, dtype=torch.int32), torch.argsort(dense.int(), dim=-1, descending=True, stable=True).int()


def spread(blocks, query_size, key_size):
    """What a block matrix says of each pair."""
    return blocks.repeat_interleave(query_size, 2)[:, :, :L].repeat_interleave(key_size, 3)[..., :S]


@pytest.mark.parametrize(
    "mask_mod, with_full, size, heads",
    [
        (None, False, (128, 128), H),
        (None, True, (64, 32), 1),
        (causal, False, (64, 32), H),
        (causal, True, (128, 128), 1),
    ],
)
def test_block_lists_that_say_other_things_than_the_mask_mod_are_obeyed(mask_mod, with_full, size, heads):
    """What is not listed is hidden; in a full block nothing is, whatever mask_mod says: as in the compiled kernel."""
    shape = (B, heads, -(-L // size[0]), -(-S // size[1]))
    partial, full = torch.rand(shape) < 0.5, torch.rand(shape) < 0.3
    partial &= ~full
    mask = BlockMask.from_kv_blocks(
        *lists(partial), *(lists(full) if with_full else ()), BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=(L, S)
    )
    by_element = mask_mod(0, 0, torch.arange(L)[:, None], torch.arange(S)) if mask_mod is not None else True
    visible = spread(partial, *size) & by_element
    visible = visible | spread(full, *size) if with_full else visible
    assert_replaced(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), visible, *qkv())


def test_a_block_mask_that_is_an_argument_may_be_another_one_at_each_call():
    """Nothing guards what the lists hold."""
    call = compiled(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask))
    inputs, hears = qkv(), []
    for _ in range(3):
        blocks = torch.rand(1, 1, 2, 2) < 0.6
        hears.append(blocks)
        mask = BlockMask.from_kv_blocks(*lists(blocks), seq_lengths=(L, S))
        with torch.compiler.set_stance("default" if len(hears) == 1 else "fail_on_recompile"):
            got = call(*inputs, mask)
        want = F.scaled_dot_product_attention(*inputs, attn_mask=spread(blocks, 128, 128)).nan_to_num(0.0)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# ---- mask_mods of atoms

IDS = torch.randint(0, 3, (S,)).sort().values


def later(offset):
    return lambda b, h, i, j: i + offset >= j


def near(width):
    return lambda b, h, i, j: (i - j).abs() <= width


def first(keys):
    return lambda b, h, i, j: j < keys


def same_document(b, h, i, j):
    return IDS[i] == IDS[j]


def of_one_head(b, h, i, j):
    return h == 0


atoms = st.one_of(
    st.integers(-20, 60).map(later),
    st.integers(0, 80).map(near),
    st.integers(0, S).map(first),
    st.sampled_from([same_document, of_one_head]),
)
mask_mods = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda x: and_masks(*x)),
        st.lists(inner, min_size=1, max_size=3).map(lambda x: or_masks(*x)),
    ),
    max_leaves=4,
)


@given(mask_mod=mask_mods, as_score_mod=st.booleans())
@settings(max_examples=8, deadline=None)
def test_any_mask_mod_is_what_it_computes(mask_mod, as_score_mod):
    """Given in a block mask, or as a score_mod that hides."""

    def attend(q, k, v, mask):
        def score_mod(score, b, h, i, j):
            return torch.where(mask_mod(b, h, i, j), score, -math.inf)

        return flex_attention(q, k, v, score_mod if as_score_mod else None, block_mask=mask)

    torch.compiler.reset()
    mask = None if as_score_mod else create_block_mask(mask_mod, B, H, L, S, device="cpu")
    inputs = qkv()
    index = torch.meshgrid(*map(torch.arange, (B, H, L, S)), indexing="ij")
    want = F.scaled_dot_product_attention(*inputs, attn_mask=mask_mod(*index)).nan_to_num(0.0)
    torch.testing.assert_close(compiled(attend)(*inputs, mask), want, atol=1e-5, rtol=1e-5)


# ---- what is read


def test_a_mask_mod_without_lists_is_read_as_causality():
    """Score_mods have no lists; so causality costs no mask, and what is beside it no more than it says."""
    lengths = torch.tensor([S, 77])

    def attend(q, k, v):
        def score_mod(score, b, h, i, j):
            return torch.where((j <= i) & (j < lengths[b]), score, -math.inf)

        return flex_attention(q, k, v, score_mod)

    row = explained(attend, *qkv())
    assert (row.status, row.site.mask, row.site.is_causal) == ("sparse", "bool", True)
    visible = torch.ones(L, S, dtype=torch.bool).tril() & (torch.arange(S) < lengths[:, None, None, None])
    assert_replaced(attend, visible, *qkv())


def test_gradients_flow_through_query_key_and_value():
    mask = block_mask(causal)
    leaves = qkv(requires_grad=True)
    got = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), inner="aot_eager")(*leaves)
    want = F.scaled_dot_product_attention(*leaves, is_causal=True)
    projection = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, projection), torch.autograd.grad(want, leaves, projection), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_keys_of_one_batch_are_those_of_all():
    q, k, v = qkv()
    mask = create_block_mask(causal, B, None, L, S, device="cpu")
    call = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    want = F.scaled_dot_product_attention(q, k[:1].expand_as(k), v[:1].expand_as(v), is_causal=True)
    torch.testing.assert_close(call(q, k[:1], v[:1]), want, atol=1e-5, rtol=1e-5)


def test_kernel_options_change_nothing():
    attend = compiled(lambda q, k, v: flex_attention(q, k, v, kernel_options={"PRESCALE_QK": True}))
    inputs = qkv()
    torch.testing.assert_close(attend(*inputs), F.scaled_dot_product_attention(*inputs), atol=1e-5, rtol=1e-5)


def test_one_graph_serves_all_lengths_and_offsets():
    """The offset of a mask_mod is a number of Python, a symbol in the graph once it changes."""

    def attend(q, k, v, offset):
        def score_mod(score, b, h, i, j):
            return torch.where(i + offset >= j, score, -math.inf)

        return flex_attention(q, k, v, score_mod)

    call = torch.compile(attend, backend="sparge", fullgraph=True, options=OPTIONS, dynamic=True)
    for n, (length, keys, offset) in enumerate([(150, 200, 7), (90, 300, 20), (260, 130, 33)]):
        inputs = qkv(length, keys)
        visible = torch.arange(length)[:, None] + offset >= torch.arange(keys)
        with torch.compiler.set_stance("default" if n == 0 else "fail_on_recompile"):
            got = call(*inputs, offset)
        want = F.scaled_dot_product_attention(*inputs, attn_mask=visible)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    (row,) = sparge_compile.explain(attend, OPTIONS)(*inputs, offset)
    assert row.status == "sparse"


def test_an_exported_program_is_rewritten():
    class Model(nn.Module):
        def forward(self, q, k, v):
            return flex_attention(q, k, v, lambda score, b, h, i, j: torch.where(i >= j, score, -math.inf))

    inputs = qkv()
    program = torch.export.export(Model(), inputs)
    rewritten = sparge_compile.rewrite(program, {k: v for k, v in OPTIONS.items() if k != "inner"})
    assert any(n.target is torch.ops.sparge.attention.default for n in rewritten.graph.nodes)
    want = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(rewritten.module()(*inputs), want, atol=1e-5, rtol=1e-5)


# ---- what is refused

SLOPES, BIAS = torch.rand(H), torch.randn(H, L, S)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(H, L, S))

    def forward(self, q, k, v):
        return flex_attention(q, k, v, lambda score, b, h, i, j: score + self.bias[h, i, j])


def calls(score_mod):
    return lambda q, k, v: flex_attention(q, k, v, score_mod)


def with_lse(q, k, v):
    return flex_attention(q, k, v, return_lse=True)


REFUSED = {
    "alibi": (calls(lambda s, b, h, i, j: s + SLOPES[h] * (j - i)), Reason.ADDITIVE_MASK, ""),
    "bias": (calls(lambda s, b, h, i, j: s + BIAS[h, i, j]), Reason.ADDITIVE_MASK, ""),
    "relative": (calls(lambda s, b, h, i, j: s + (i - j)), Reason.ADDITIVE_MASK, ""),
    "softcap": (calls(lambda s, b, h, i, j: 20 * torch.tanh(s / 20)), Reason.SCORES_CHANGED, "tanh"),
    "squares": (calls(lambda s, b, h, i, j: s * s), Reason.SCORES_CHANGED, "mul"),
    "faint": (calls(lambda s, b, h, i, j: torch.where(i >= j, s, -1.0)), Reason.SCORES_CHANGED, "where"),
    "none": (calls(lambda s, b, h, i, j: torch.zeros_like(s)), Reason.SCORES_CHANGED, "zeros_like"),
    "learned": (Learned(), Reason.LEARNED_BIAS, "score_mod"),
    "log-sum-exp": (with_lse, Reason.OUTPUTS_USED, "log-sum-exp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_and_stays(name):
    function, reason, detail = REFUSED[name]
    inputs = qkv()
    row = explained(function, *inputs)
    assert (row.kind, row.status, row.reason) == ("flex", "dense", reason) and detail in row.detail
    assert [row.shapes[x] for x in ("batch", "heads", "length", "keys", "head_size")] == [B, H, L, S, D]
    torch.testing.assert_close(compiled(function)(*inputs), function(*inputs))


def test_added_numbers_are_a_mask_if_that_is_allowed():
    function, _, _ = REFUSED["alibi"]
    inputs = qkv()
    assert explained(function, *inputs, additive_masks=True).site.mask == "additive"
    got = compiled(function, additive_masks=True)(*inputs)
    torch.testing.assert_close(got, function(*inputs), atol=1e-5, rtol=1e-5)


def test_a_mask_that_would_be_too_large_is_not_made(monkeypatch):
    monkeypatch.setattr(decide, "LARGEST_MASK", L * S - 1)
    mask = block_mask(causal)
    row = explained(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *qkv())
    assert row.reason is Reason.LARGE_MASK and row.detail == f"{L * S} elements of at most {L * S - 1}"
    assert explained(lambda q, k, v: flex_attention(q, k, v), *qkv()).status == "sparse"


def test_what_cannot_be_traced_is_named(monkeypatch):
    def fails(*arguments, **named):
        raise RuntimeError("not today")

    monkeypatch.setattr("sparge_compile.passes.mha.flex._over_all", fails)
    row = explained(calls(None), *qkv())
    assert (row.reason, row.detail) == (Reason.FLEX, "it could not be traced")


# ---- calls as models make them


class Nabla(nn.Module):
    """As Kandinsky 5: blocks are chosen from pooled scores in the forward, and listed without a mask_mod."""

    BLOCK, SHARE = 32, 0.5

    def visible(self, q, k):
        """bool [B, H, Nq, Nk]"""
        q, k = (x.unflatten(2, (-1, self.BLOCK)).mean(3) for x in (q, k))
        weights = (q @ k.mT / D**0.5).softmax(-1)
        values, order = weights.sort(-1)
        return (values.cumsum(-1) >= 1 - self.SHARE).gather(-1, order.argsort(-1))

    def forward(self, x):
        q, k, v = x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        none = torch.zeros(*q.shape[:2], q.shape[2] // self.BLOCK, dtype=torch.int32)
        some = lists(self.visible(q, k))
        mask = BlockMask.from_kv_blocks(none, torch.zeros_like(some[1]), *some, BLOCK_SIZE=self.BLOCK, mask_mod=None)
        return flex_attention(q, k, v, block_mask=mask)


def test_blocks_that_a_model_chooses_for_itself_stay_chosen():
    model, x = Nabla(), torch.randn(B, 160, 3 * H * D)
    q, k, v = x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    blocks = model.visible(q, k)
    assert 0.2 < blocks.float().mean() < 0.9
    pairs = blocks.repeat_interleave(model.BLOCK, 2).repeat_interleave(model.BLOCK, 3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs)
    torch.testing.assert_close(compiled(model)(x), want, atol=1e-5, rtol=1e-5)
    assert explained(model, x).status == "sparse"


class FrameByFrame(nn.Module):
    """As Self-Forcing: a frame sees itself and earlier ones, by a buffer with the end of what each token sees."""

    def __init__(self, frames, tokens):
        super().__init__()
        ends = (torch.arange(frames * tokens) // tokens + 1) * tokens

        def mask_mod(b, h, i, j):
            return (j < ends[i]) | (i == j)

        self.tokens, self.mask = tokens, block_mask(mask_mod, frames * tokens, frames * tokens)
        self.qkv = nn.Linear(D, 3 * H * D)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        return flex_attention(q, k, v, block_mask=self.mask)


def test_frames_that_are_generated_one_after_the_other():
    model, x = FrameByFrame(3, 60), torch.randn(B, 180, D)
    assert explained(model, x).status == "sparse"
    got = compiled(model, inner="aot_eager")(x)
    q, k, v = model.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    frame = torch.arange(180) // model.tokens
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=frame[:, None] >= frame)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    weights = list(model.parameters())
    projection = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, weights, projection), torch.autograd.grad(want, weights, projection), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def never(b, h, i, j):
    """The first rows see nothing."""
    return i > j + 4


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask = block_mask(never, L, L)
        self.qkv = nn.Linear(D, 3 * H * D)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        return flex_attention(q, k, v, block_mask=self.mask)


def test_it_is_calibrated():
    model, x = Masked().requires_grad_(False), torch.randn(B, L, D)
    calibration = sparge_compile.calibrate(model, [(x,)], options={"min_seq_len": 0})
    assert "(root)" in calibration.table()


def test_a_teacher_gives_what_flex_attention_gives():
    """Rows that see nothing are 0 in the teacher, too, whose attention is written out."""
    student = torch.compile(Masked(), backend="sparge", options={**OPTIONS, "inner": "aot_eager"})
    with sparge_compile.DistillationHook(student, layers=1.0) as hook:
        student(torch.randn(B, L, D))
        loss = hook.loss()
    assert loss.item() < 1e-9
