"""Phases: attached thresholds follow the progress of a denoising run, and nothing is compiled anew."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_cli import tiny_wan
from test_record import Fused, Model

import sparge_compile
from sparge_compile import Calibration, Options, attach, diffusers_callback
from sparge_compile.calibrate.record import Recorder
from sparge_compile.calibrate.steps import with_step_ends
from sparge_compile.thresholds.steps import step_of

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


def two_experts(scheduler="FlowMatchEulerDiscreteScheduler", boundary=0.7):
    """A pipeline like Wan 2.2's: the second expert takes over where the timesteps fall below the boundary."""
    import diffusers
    from models import wan

    pipe = tiny_wan(transformer_2=wan()[0].eval(), boundary_ratio=boundary)
    pipe.scheduler = getattr(diffusers, scheduler)(shift=3.0)
    return pipe


def run_pipe(pipe, callback_on_step_end=None, seed=0, **more):
    embeds = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(seed))
    size = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "guidance_scale": 1.0, **size, **more}
    return pipe(**given, generator=torch.Generator().manual_seed(seed), callback_on_step_end=callback_on_step_end)


HEUN = "FlowMatchHeunDiscreteScheduler"


@pytest.mark.parametrize(
    "build, more",
    [
        (tiny_wan, {"num_inference_steps": 5, "guidance_scale": 3.0}),
        (two_experts, {"num_inference_steps": 6}),
        (lambda: two_experts(HEUN), {"num_inference_steps": 5, "guidance_scale": 3.0, "guidance_scale_2": 1.0}),
        (lambda: two_experts(boundary=0.999), {"num_inference_steps": 4}),
    ],
    ids=["one-guided", "two", "two-heun-guided", "one-step-for-the-first"],
)
def test_the_phase_in_force_is_the_phase_that_was_measured(build, more):
    """Call by call, for one expert and for two that share the steps of a run."""
    starts = (0.3, 0.5)
    pipe = build()
    models = [m for m in (pipe.transformer, pipe.transformer_2) if m is not None]
    settings = {"query_blocks": 1, "every": 1000, "memory": 1 << 20, "seed": 0, "options": Options(min_seq_len=0)}
    measured, handles, in_force = [], [], []
    for model in models:
        recorder = Recorder(model, **settings)
        batch = recorder.record(0, partial(with_step_ends(partial(run_pipe, pipe), recorder.end_step), **more))
        measured.append([sum(batch.progress(call) >= start for start in starts) for call in range(len(batch.steps))])
    for model in models:
        sites = {"blocks.*.attn1": [DENSE]}
        later = {0.3: {"blocks.*.attn1": [HALF]}, 0.5: {"blocks.*.attn1": [FEW]}}
        handles.append(attach(model, Calibration(sites, phases=later)))
        in_force.append([])
        model.register_forward_pre_hook(
            lambda *_, handle=handles[-1], seen=in_force[-1]: seen.append(
                [1.0, 0.5, 0.1].index(round(handle.get().sites["blocks.0.attn1"][0][0], 3))
            )
        )
    run_pipe(pipe, diffusers_callback(*handles), **more)
    assert in_force == measured and all(measured)
    run_pipe(pipe, diffusers_callback(*handles), **more)
    assert in_force == [[*phases, *phases] for phases in measured], "a second run is as the first"


def test_a_run_that_begins_late_has_all_of_its_phases():
    """A video to change skips the first steps; the scheduler keeps their timesteps."""
    from diffusers import WanVideoToVideoPipeline

    parts = tiny_wan().components
    parts = {name: parts[name] for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")}
    pipe = WanVideoToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    handle = attach(pipe.transformer, Calibration({"blocks.*.attn1": [DENSE]}, phases={0.5: {"blocks.*.attn1": [FEW]}}))
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(handle.get().sites["blocks.0.attn1"][0][0] == 1))
    embeds = torch.randn(1, 8, 16)
    pipe(
        latents=torch.randn(1, 4, 2, 4, 4), prompt_embeds=embeds, guidance_scale=1.0, height=32, width=32,
        num_inference_steps=8, strength=0.5, output_type="latent", callback_on_step_end=diffusers_callback(handle),
    )  # fmt: skip
    assert seen == [True] * 2 + [False] * 2


def test_calibration_asks_a_pipeline_where_its_steps_end():
    """With guidance in the first half alone: phases by calls would have given the first one a step too few."""
    model, x = Model(Fused, 1).eval(), torch.randn(1, 300, 32)
    ends, settings = [], {"phases": (0.5,), "target_sparsity": 0.4, "by": "mean", "options": {"min_seq_len": 0}}

    def pipe(steps, callback_on_step_end=None):
        for step in range(steps):
            for _ in range(2 if step < steps / 2 else 1):
                model(x)
            if callback_on_step_end is not None:
                callback_on_step_end(None, step, None, {})

    def loop(steps):
        pipe(steps)

    told = sparge_compile.calibrate(model, [4], call=pipe, **settings).origin.curves["blocks.0"]
    given = {"steps": 4, "callback_on_step_end": lambda *given: ends.append(given[1])}
    assert sparge_compile.calibrate(model, [given], call=pipe, **settings).origin.curves["blocks.0"] == told
    untold = sparge_compile.calibrate(model, [4], call=loop, **settings).origin.curves["blocks.0"]
    assert [round(curves.phases[0].cost / curves.phases[1].cost, 2) for curves in (told, untold)] == [2.0, 1.0]
    assert ends == [0, 1, 2, 3]


def test_the_callback_takes_handles():
    for bad in ((), ("transformer",)):
        with pytest.raises(TypeError, match="attach"):
            diffusers_callback(*bad)


def test_the_callback_tells_models_their_step():
    """For the option dense_steps; behind the last step the next run begins."""
    model = Model(Fused)
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.arange(3)), config={})
    callback = diffusers_callback(torch.compile(model))
    said = [step_of(model)]
    for step in range(3):
        assert callback(pipe, step, None, {"latents": 1}) == {"latents": 1}
        said.append(step_of(model))
    assert said == [(0, None), (1, 3), (2, 3), (0, 3)]
