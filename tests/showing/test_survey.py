"""What a survey says is what the op does: block maps, sparsity and errors of each site and call, and of the output."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import pytest
import torch
from PIL import Image
from test_record import Causal, Fused, Model, Written
from torch.nn import functional as F

import sparge_compile
from sparge_compile import Calibration, survey
from sparge_compile.kernels import reference

LENGTH = 700
OPTIONS = {"min_seq_len": 0}
PAIRS = [(0.3, 0.2), (0.6, 0.1)]


def built(block=Fused):
    torch.manual_seed(0)
    return Model(block, 2).eval()


def inputs():
    return torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(1))


def heads_of(model, x):
    q, k, v = (2 * model.blocks[0].qkv(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


@pytest.mark.parametrize("block", [Fused, Causal, Written])
@torch.no_grad()
def test_a_site_is_what_the_op_does_on_its_operands(block):
    model, x = built(block), inputs()
    calibration = Calibration({"blocks.*": PAIRS})
    seen = survey(model, x, {**OPTIONS, "calibration": calibration})
    assert [site.name for site in seen.sites] == ["blocks.0", "blocks.1"] and seen.calls == seen.steps == 1
    site = seen.sites[0]
    q, k, v = heads_of(model, x)
    causal = block is Causal
    expected = reference.block_map(q, k, torch.tensor(PAIRS), is_causal=causal).to_dense()[0]
    assert torch.equal(site.block_map, expected) and site.shape == (1, 2, LENGTH, LENGTH, 16)
    topk, topp = torch.tensor(PAIRS).unbind(1)
    out, skipped = sparge_compile.attention(q, k, v, is_causal=causal, topk=topk, topp=topp, return_sparsity=True)
    assert site.sparsity == pytest.approx(skipped.item(), abs=1e-6)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    errors = (out - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    assert site.errors == pytest.approx(errors.tolist(), rel=1e-4)
    assert all(took > 0 for took in site.seconds) and seen.report.sparse[0].name == "blocks.0"
    compiled = torch.compile(model, backend="sparge", options={**OPTIONS, "calibration": calibration, "inner": "eager"})
    changed, exact = compiled(x), model(x)
    assert seen.output_error == pytest.approx(((changed - exact).norm() / exact.norm()).item(), rel=1e-4)
    torch.testing.assert_close(seen.dense, exact)
    assert seen.call_error == seen.output_error
    assert "blocks.1" in str(seen) and f"{seen.sparsity:.1%} of the blocks skipped" in str(seen)


@torch.no_grad()
def test_phases_and_plans_are_followed_call_by_call():
    model, x = built(), inputs()
    start = {"blocks.0": [(1.0, 0.0)] * 2, "blocks.1": [(0.8, 0.0)] * 2}
    later = {"blocks.0": [(0.2, 0.0)] * 2, "blocks.1": [(0.2, 0.0)] * 2}
    calibration = Calibration(start, {0.5: later}).scheduled(dense_steps=(3, None))

    def call(value, times):
        return [model(value) for _ in range(times)]

    seen = survey(model, (x, 4), {**OPTIONS, "calibration": calibration}, call=call, timed=False)
    first, second = (site.by_call() for site in seen.sites)
    assert seen.calls == 4 and first[0] == first[1] == first[3] == 0 and first[2] > 0.7
    assert second[0] == second[1] and 0 < second[0] < second[2] and second[3] == 0
    expected = Calibration(start)
    first_call = torch.compile(model, backend="sparge", options={**OPTIONS, "calibration": expected, "inner": "eager"})(
        x
    )
    assert seen.call_error == pytest.approx(((first_call - model(x)).norm() / model(x).norm()).item(), rel=1e-4)
    assert seen.output_error != seen.call_error and "of the whole run" in str(seen)
    assert seen.sites[0].mapped == 2 and seen.sites[0].seconds is None
    exact = model(x)
    assert torch.equal(seen.sparse[3], exact), "a dense step"
    assert not torch.equal(seen.sparse[2], exact) and not torch.equal(seen.sparse[0], exact)
    assert torch.equal(model(x), exact) and not list(model.buffers()), "it is left as it was"
    some = survey(model, (x, 4), {**OPTIONS, "calibration": calibration}, call=call, timed=False, every=2)
    assert some.sites[0].calls == [0, 2] and some.sites[0].by_call() == [first[0], first[2]]


def test_what_cannot_be_looked_at_is_said():
    with pytest.raises(TypeError, match="survey: model"):
        survey(lambda x: x, inputs())
    with pytest.raises(ValueError, match="every"):
        survey(built(), inputs(), OPTIONS, every=0)
    with pytest.raises(ValueError, match="too few keys"):
        survey(built(), inputs())
    with pytest.raises(ValueError, match="never reaches"):
        survey(built(), inputs(), OPTIONS, call=lambda x: x)


class Made(NamedTuple):
    frames: torch.Tensor
    pictures: list


@torch.no_grad()
def test_a_pipeline_says_where_its_steps_end_and_its_clips_are_seen():
    """Two calls in each step, as guidance has it; what it gives has frames."""
    model, x = built(), inputs()
    late = Calibration({"blocks.*": [(1.0, 0.0)]}, {0.5: {"blocks.*": [(0.2, 0.0)]}})

    def pipe(value, steps, callback_on_step_end=None):
        for step in range(steps):
            model(value)
            value = model(value)
            if callback_on_step_end is not None:
                callback_on_step_end(pipe, step, 0, {})
        pictures = [Image.new("L", (8, 8)), numpy.ones(4, numpy.float32), numpy.array(["a"])]
        return Made(value[:, :32].sigmoid().view(1, 4, 1, 8, 32), pictures)

    seen = survey(model, (x, 2), {**OPTIONS, "calibration": late}, call=pipe, timed=False)
    assert (seen.calls, seen.steps) == (4, 2)
    by_call = seen.sites[0].by_call()
    assert by_call[:2] == [0, 0] and min(by_call[2:]) > 0.7
    assert seen.call_error == 0 and seen.output_error > 0
    assert list(seen.clips) == ["dense", "sparse"] and seen.clips["dense"].shape == (4, 8, 32, 1)
