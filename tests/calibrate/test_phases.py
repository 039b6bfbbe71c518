"""Phases: attached thresholds follow the progress of a denoising run, and nothing is compiled anew."""

from __future__ import annotations

import pytest
import torch
from test_cli import tiny_wan
from test_record import Fused, Model

import sparge_compile
from sparge_compile import Calibration, attach, diffusers_callback

DENSE, HALF, FEW = (1.0, 0.0), (0.5, 0.0), (0.1, 0.0)
PHASES = Calibration({"blocks.0": [DENSE], "blocks.1": [DENSE]}, phases={
    0.25: {"blocks.0": [HALF] * 2, "blocks.1": [HALF]}, 0.5: {"blocks.0": [FEW] * 2, "blocks.1": [HALF]},
})  # fmt: skip
EAGER = {"min_seq_len": 0, "inner": "eager"}


def test_progress_switches_thresholds_in_place(opened_graphs):
    model, x = Model(Fused).eval(), torch.randn(1, 1500, 32)
    handle = attach(model, PHASES)
    compiled = torch.compile(model, backend="sparge", options=EAGER)
    buffers = [b.data_ptr() for name, b in model.named_buffers() if "sparge" in name]

    def run(**thresholds):
        with torch.no_grad():
            return compiled(x)

    outs = {}
    for progress in (0.0, 0.1, 0.25, 0.49, 0.5, 1.0, 0.0):
        handle.set_progress(progress)
        outs.setdefault(progress, run())
        wanted = PHASES.at_progress(progress).sites["blocks.0"]
        assert set(handle.get().sites["blocks.0"]) == {tuple(torch.tensor(pair).tolist()) for pair in wanted}
    for one, same in ((0.0, 0.1), (0.25, 0.49), (0.5, 1.0)):
        assert torch.equal(outs[one], outs[same])
    assert not torch.equal(outs[0.0], outs[0.25]) and not torch.equal(outs[0.25], outs[0.5])
    assert torch.equal(run(), outs[0.0]), "progress may go back"
    assert len(opened_graphs) == 1
    assert buffers == [b.data_ptr() for name, b in model.named_buffers() if "sparge" in name]


def test_new_thresholds_take_the_place_of_the_phases():
    model = Model(Fused).eval()
    handle = attach(model, PHASES)
    handle.set_progress(0.9)
    handle.set(Calibration({"blocks.0": [HALF]}))
    assert handle.get().sites["blocks.0"] == (HALF,) * 2 and handle.get().sites["blocks.1"] == (HALF,)
    handle.set_progress(0.0)
    assert handle.get().sites["blocks.0"] == (HALF,) * 2
    handle.set(PHASES)
    assert handle.get().sites["blocks.1"] == (DENSE,)
    handle.set(topp=0.5)
    handle.set_progress(0.3)
    assert handle.get().sites["blocks.1"] == ((0.5, 0.5),)
    for bad in (-0.1, 1.1, float("nan"), "0.5", True):
        with pytest.raises(ValueError, match="progress"):
            handle.set_progress(bad)


def test_a_wan_pipeline_is_dense_at_first_and_sparse_later(monkeypatch):
    """A real pipeline with random weights; what its transformer's thresholds are is seen at each of its calls."""
    pipe = tiny_wan()
    handle = attach(pipe.transformer, Calibration({"blocks.*.attn1": [DENSE]}, phases={0.5: {"blocks.*.attn1": [FEW]}}))
    pipe.transformer.compile(backend="sparge", options={**EAGER, "on_unsupported": "dense"})
    seen, real = [], type(pipe.transformer).__call__

    def spy(self, *args, **kwargs):
        seen.append(handle.get().sites["blocks.0.attn1"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "__call__", spy)
    small = {"height": 256, "width": 256, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
    given = {"prompt_embeds": torch.randn(1, 8, 16), "guidance_scale": 1.0, **small}

    def frames(**more):
        return pipe(**given, generator=torch.Generator().manual_seed(0), **more).frames

    out = frames(callback_on_step_end=diffusers_callback(handle))
    assert seen == [(DENSE,)] * 2 + [(pytest.approx(FEW),)] * 2
    assert handle.get().sites["blocks.0.attn1"] == (DENSE,), "the next run begins at its beginning"
    assert not torch.equal(frames(), out) and torch.equal(frames(callback_on_step_end=diffusers_callback(handle)), out)


def test_calibrated_phases_are_those_of_the_calls():
    class Denoiser(Model):
        """Attention that gets sharper from call to call."""

        def forward(self, x, step):
            return super().forward(x * (0.2 if step < 2 else 4.0))

    model, x = Denoiser(Fused, 1).eval(), torch.randn(1, 1500, 32)
    found = sparge_compile.calibrate(
        model,
        forward_loop=lambda m: [m(x, torch.tensor(step)) for step in range(8)],
        target_sparsity=0.4,
        phases=(0.25,),
        options={"min_seq_len": 0},
        by="mean",
    )
    curves = found.origin.curves["blocks.0"]
    assert curves.samples == 8 and curves.phases[1].cost == 3 * curves.phases[0].cost
    with attach(model, found) as handle:
        first = handle.get().sites["blocks.0"]
        handle.set_progress(0.25)
        assert handle.get().sites["blocks.0"] != first
