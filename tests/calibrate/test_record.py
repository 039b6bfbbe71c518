"""Recording: the model computes what it computes anyway, and its attention is measured where it is found."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Stack

import sparge_compile
from sparge_compile import attention
from sparge_compile.calibrate.curves import TOPK, TOPP
from sparge_compile.calibrate.record import Recorder
from sparge_compile.options import Options

HEADS, LENGTH, WIDTH = 2, 700, 32


class Fused(nn.Module):
    """One attention in the spelling of a subclass."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = (2 * self.qkv(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.attend(q, k, v).transpose(1, 2).flatten(2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Causal(Fused):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Written(Fused):
    def attend(self, q, k, v):
        return torch.einsum("bhij,bhjd->bhid", torch.softmax(q @ k.mT / 4, -1), v)


class Rewritten(Fused):
    """What attention has read is written to afterwards."""

    def attend(self, q, k, v):
        q, k, v = q.clone(), k.clone(), v.clone()
        out = F.scaled_dot_product_attention(q, k, v)
        for x in (q, k, v):
            x.zero_()
        return out + q


class Masked(Fused):
    def attend(self, q, k, v):
        scores = (q @ k.mT / 4).masked_fill(torch.arange(k.shape[2]) > 600, torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v


class Checkpointed(Fused):
    def attend(self, q, k, v):
        return checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)


class Broken(Fused):
    def attend(self, q, k, v):
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, k, v)


class Opened(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return x + self.mha(x, x, x, need_weights=False)[0]


SPELLINGS = [Fused, Causal, Written, Rewritten, Masked, Checkpointed, Broken, Opened]


class Model(Stack):
    def __init__(self, spelling, layers=2):
        super().__init__(layers, spelling)


def recorder(model, **changes):
    given = {"options": Options(min_seq_len=0), "query_blocks": 32, "every": 1, "memory": 1 << 28, "seed": 0}
    return Recorder(model, **{**given, **changes})


def what_sdpa_gets(model, x, monkeypatch):
    """(q, k, v, is_causal) of each attention of a model whose attention is an SDPA call."""
    got, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        got.append((q, k, v, bool(kwargs.get("is_causal"))))
        return real(q, k, v, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", spy)
        model(x)
    return got


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
def test_the_model_computes_the_same_bits_and_every_site_is_measured(spelling, monkeypatch):
    # Under Dynamo, torch.nn takes its written-out path instead of its inference kernel.
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    model, x, out = Model(spelling).eval(), torch.randn(1, LENGTH, WIDTH), []
    with torch.no_grad():
        want = model(x)
    batch = recorder(model).record(0, lambda: out.append(model(x)))
    assert torch.equal(out[0], want)
    child = ".mha" if spelling is Opened else ""
    assert [sample.site for sample in batch.samples] == [f"blocks.{i}{child}" for i in range(2)]
    for sample in batch.samples:
        assert sample.head_size == WIDTH // HEADS and sample.sums.norm.shape == (HEADS,)
        assert (sample.sums.error[:, 0, 0] > 0.01 * sample.sums.norm).all(), "one block cannot be the whole"
        assert (sample.sums.error[:, -1, -1] == 0).all()
    assert model._compiled_call_impl is None and torch.equal(model(x).detach(), want)


@pytest.mark.parametrize("spelling", [Fused, Causal, Broken])
def test_what_is_measured_is_what_the_op_does_to_these_operands(spelling, monkeypatch):
    model, x = Model(spelling).eval(), torch.randn(2, LENGTH, WIDTH)
    batch = recorder(model).record(0, lambda: model(x))
    for sample, (q, k, v, is_causal) in zip(batch.samples, what_sdpa_gets(model, x, monkeypatch), strict=True):
        dense = attention(q, k, v, is_causal=is_causal)
        for i, j in ((0, 0), (15, 0), (0, 12), (20, 20)):
            sparse = attention(q, k, v, is_causal=is_causal, topk=TOPK[i], topp=TOPP[j])
            torch.testing.assert_close(
                sample.sums.error[:, i, j], (sparse - dense).abs().sum((0, 2, 3)), rtol=1e-4, atol=1e-3
            )


def test_spellings_of_one_attention_are_measured_alike():
    """The operands of written-out attention are found in another way than those of a call."""
    fused, x = Model(Fused).eval(), torch.randn(1, LENGTH, WIDTH)
    samples = []
    for spelling in (Fused, Written, Rewritten, Checkpointed, Broken):
        model = Model(spelling).eval()
        model.load_state_dict(fused.state_dict())
        samples.append(recorder(model).record(0, lambda model=model: model(x)).samples[0])
    for other in samples[1:]:
        for got, want in zip(other.sums, samples[0].sums, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


def test_samples_depend_on_seed_site_and_batch_and_on_nothing_that_ran_before():
    model, x = Model(Fused).eval(), torch.randn(1, 2000, WIDTH)

    def samples(number, *, after=(), seed=0):
        one = recorder(model, query_blocks=3, seed=seed)
        for earlier in after:
            one.record(earlier, lambda: model(x))
        return [s.sums.error for s in one.record(number, lambda: model(x)).samples]

    fresh = samples(4)
    torch.testing.assert_close(samples(4, after=(0, 7)), fresh, rtol=0, atol=0)
    assert not torch.equal(fresh[0], samples(5)[0]) and not torch.equal(fresh[0], samples(4, seed=1)[0])


def test_all_calls_count_and_every_nth_is_measured():
    model, x = Model(Fused, 1).eval(), torch.randn(1, LENGTH, WIDTH)
    batch = recorder(model, every=3).record(0, lambda: [model(x) for _ in range(7)])
    assert batch.steps == list(range(7)) and [sample.call for sample in batch.samples] == [0, 3, 6]


def test_a_module_that_runs_twice_gives_two_samples():
    class Twice(Model):
        def forward(self, x):
            return self.blocks[0](self.blocks[0](x))

    model, x = Twice(Fused, 1).eval(), torch.randn(1, LENGTH, WIDTH)
    names = [s.site for s in recorder(model).record(0, lambda: model(x)).samples]
    assert names == ["blocks.0", "blocks.0#1"] == [row.name for row in sparge_compile.explain(model)(x)]


def test_whoever_calls_the_model_compiled_or_not():
    model, x = Model(Fused).eval(), torch.randn(1, LENGTH, WIDTH)
    want = recorder(model).record(0, lambda: model(x)).samples
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    blocks = copy.deepcopy(model)
    for block in blocks.blocks:
        block.compile(backend="eager")
    for other in (compiled, blocks):
        got = recorder(other).record(0, lambda other=other: other(x)).samples
        assert [s.site for s in got] == [s.site for s in want]
        torch.testing.assert_close(got[1].sums.error, want[1].sums.error)
        with torch.no_grad():
            other(x)


def test_under_autocast_operands_are_those_of_the_op():
    model, x = Model(Fused, 1).eval(), torch.randn(1, LENGTH, WIDTH)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            model(x)

    sums = recorder(model).record(0, run).samples[0].sums
    plain = recorder(model).record(0, lambda: model(x)).samples[0].sums
    assert sums.error.dtype == torch.float32
    torch.testing.assert_close(sums.error, plain.error, rtol=0.1, atol=0.1 * float(plain.norm.max()))


def test_what_stays_dense_is_not_measured():
    model, x = Model(Fused).eval(), torch.randn(1, LENGTH, WIDTH)
    assert recorder(model, options=Options()).record(0, lambda: model(x)).samples == []
    with pytest.raises(ValueError, match="no attention that may become sparse"):
        sparge_compile.calibrate(model, [x])


class Ring(Fused):
    def forward(self, x):
        return torch.ops.sparge.ring(x, x, x, None, None, 0, 1, "of one process")


def test_a_part_of_an_attention_is_not_measured():
    model, x = Model(Ring).eval(), torch.randn(1, 2, LENGTH, WIDTH)
    with pytest.raises(ValueError, match=r"'blocks.0' cannot be measured in parts: got a sequence that several"):
        recorder(model).record(0, lambda: model(x))


def test_numbers_that_are_none_are_an_error_with_the_name_of_the_site():
    model, x = Model(Fused).eval(), torch.randn(1, LENGTH, WIDTH)
    with pytest.raises(ValueError, match=r"blocks\.1"), torch.no_grad():
        model.blocks[1].qkv.weight[0, 0] = torch.inf
        recorder(model).record(0, lambda: model(x))
    assert model._compiled_call_impl is None
