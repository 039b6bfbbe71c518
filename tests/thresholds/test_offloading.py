"""Attached thresholds are where their site computes, with their values, whoever moves the model and however."""

from __future__ import annotations

import copy

import pytest
import torch
from models import wan
from test_names import FAST, NAMES, Model, by_block, calibration, expected, run

from sparge_compile import Calibration, attach
from sparge_compile.thresholds.buffers import attached_to

X = (1, 300, 32)
WAN = Calibration({"blocks.*.attn1": [(0.3, 0.0), (0.6, 0.2)]})


@pytest.fixture(autouse=True)
def many_recompilations():
    """As diffusers' documentation has it: the hooks of modules that move their weights break graphs."""
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        yield


def wan_by_block(model, inputs):
    model.compile_repeated_blocks(backend="sparge", options={**FAST, "min_seq_len": 100})
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture(scope="module")
def plain():
    """A model, its inputs, and what it gives with thresholds attached where nothing moves it."""
    torch.compiler.reset()
    model, inputs = wan()
    model = model.eval()
    other = copy.deepcopy(model)
    attach(other, WAN)
    want = wan_by_block(other, inputs)
    with torch.no_grad():
        assert (want - model(**inputs)[0]).abs().max() > 1e-4
    torch.compiler.reset()
    return model, inputs, want


@pytest.mark.parametrize(
    "first, buffers",
    [
        pytest.param(True, True, id="attached-before-with-buffers"),
        pytest.param(True, False, id="attached-before-without-buffers", marks=pytest.mark.slow),
        pytest.param(False, True, id="attached-after-with-buffers", marks=pytest.mark.slow),
        pytest.param(False, False, id="attached-after-without-buffers"),
    ],
)
def test_sequential_offloading(plain, first, buffers):
    accelerate = pytest.importorskip("accelerate")
    model, inputs, want = plain
    model = copy.deepcopy(model)
    handle = attach(model, WAN) if first else None
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    handle = handle or attach(model, WAN)
    torch.testing.assert_close(wan_by_block(model, inputs), want, atol=1e-5, rtol=1e-5)
    assert next(model.blocks[0].parameters()).is_meta, "the weights are offloaded"
    assert torch.equal(model.state_dict()["blocks.1.attn1.sparge.thresholds"], handle.buffers()["blocks.1.attn1"])
    with torch.no_grad():
        dense = copy.deepcopy(plain[0])(**inputs)[0]
        handle.set(topk=1.0)
        torch.testing.assert_close(model(**inputs)[0], dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", ["WanTransformerBlock", "WanAttention"])
def test_modules_that_are_brought_as_a_whole(plain, whole):
    accelerate = pytest.importorskip("accelerate")
    model, inputs, want = plain
    for first in (True, False):
        other = copy.deepcopy(model)
        for step in (attach, accelerate.cpu_offload)[:: 1 if first else -1]:
            if step is attach:
                handle = attach(other, WAN)
            else:
                step(other, torch.device("cpu"), offload_buffers=first, preload_module_classes=[whole])
        torch.testing.assert_close(wan_by_block(other, inputs), want, atol=1e-5, rtol=1e-5)
        handle.remove()


def test_models_spread_over_devices(plain):
    accelerate = pytest.importorskip("accelerate")
    model, inputs, want = plain
    model = copy.deepcopy(model)
    attach(model, WAN)
    places = {name: "cpu" for name, _ in model.named_children()}
    places = {**places, **{f"blocks.{i}": "cpu" for i in range(len(model.blocks))}}
    del places["blocks"]
    places["scale_shift_table"] = "cpu"
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    torch.testing.assert_close(wan_by_block(model, inputs), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
@pytest.mark.parametrize("first", [True, False], ids=["attached-before", "attached-after"])
def test_group_offloading(plain, first, settings):
    model, inputs, want = plain
    model = copy.deepcopy(model)
    handle = attach(model, WAN) if first else None
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **settings)
    handle = handle or attach(model, WAN)
    torch.testing.assert_close(wan_by_block(model, inputs), want, atol=1e-5, rtol=1e-5)


def buffers_of(model):
    return {name: attached_to(model.get_submodule(name))._buffers for name in NAMES[:2]}


@pytest.mark.parametrize(
    "compile", [by_block, lambda model, options: torch.compile(model, backend="sparge", options=options)]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_buffer_that_someone_puts_on_the_meta_device_keeps_its_values(compile, when):
    model, x = Model(2), torch.randn(X)
    handle = attach(model, calibration(NAMES[:2]))
    want = expected(model, x, names=NAMES[:2])
    compiled = compile(model, FAST)
    if when == "after":
        run(compiled, x)
    for buffers in buffers_of(model).values():
        buffers["thresholds"] = buffers["thresholds"].to("meta")
    torch.testing.assert_close(run(compiled, x), want)
    handle.set(topk=0.2, topp=0.0)
    torch.testing.assert_close(run(compiled, x), expected(model, x, Calibration({"*": [(0.2, 0.0)]}), NAMES[:2]))
    assert torch.equal(model.state_dict()[f"{NAMES[0]}.sparge.thresholds"], torch.tensor([[0.2, 0.0]] * 4))


def test_values_outlive_the_meta_device():
    model = Model(2)
    handle = attach(model, calibration(NAMES[:2]))
    before, weights = handle.get(), {k: v.clone() for k, v in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    assert handle.get() == before, "to_empty leaves whatever memory holds"
    handle.set(topk=0.5)
    model.to("meta")
    assert all(v.is_meta == ("sparge" not in k) for k, v in model.state_dict().items())
    model.load_state_dict(weights, assign=True)
    assert handle.get() == before


def test_models_without_weights_yet():
    with torch.device("meta"):
        model = Model(2)
        handle = attach(model, calibration(NAMES[:2]))
    assert all(name.endswith("thresholds") != buffer.is_meta for name, buffer in model.named_buffers())
    model.load_state_dict(Model(2).state_dict(), assign=True, strict=False)
    x = torch.randn(X)
    torch.testing.assert_close(run(by_block(model, FAST), x), expected(model, x, names=NAMES[:2]))
    assert handle.get().sites[NAMES[0]][1] == pytest.approx((0.9, 0.0))


def test_phases_of_models_without_weights_have_values():
    with torch.device("meta"):
        handle = attach(Model(1), Calibration({"*": [(1.0, 0.0)]}, phases={0.5: {"*": [(0.25, 0.5)]}}))
    handle.set_progress(0.6)
    assert set(handle.get().sites.values()) == {((0.25, 0.5),)}


def test_the_look_up_brings_thresholds_to_where_the_site_is():
    model = Model(1)
    attach(model, calibration(NAMES[:1]))
    held = attached_to(model.get_submodule(NAMES[0]))
    before = held.get(0).clone()
    assert held.get(0, torch.device("meta")).is_meta
    assert torch.equal(held.get(0, torch.device("cpu")), before), "the values stay"
