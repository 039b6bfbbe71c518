"""Dense by plan: steps and layers that run the dense model's own attention, in compiled and in eager code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from toys import Stack

import sparge_compile
from sparge_compile import Calibration, DistillationHook, attach, explain, replace_attention, set_step
from sparge_compile.kernels import cpu

EAGER = {"min_seq_len": 0, "inner": "eager"}
FEW = Calibration({"blocks.*": [(0.1, 0.0)]})
LAYERS = 3


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack(LAYERS).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 640, 32)


@pytest.fixture
def maps(monkeypatch) -> list[int]:
    """An entry for each block map that is made: for each attention that is sparse, and for none that is dense."""
    made: list[int] = []
    real = cpu.block_map
    monkeypatch.setattr(cpu, "block_map", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    return made


@torch.no_grad()
def sparse_sites(run, x: Tensor, maps: list[int]) -> int:
    """How many sites are sparse in a call."""
    maps.clear()
    run(x)
    return len(maps)


def compiled_as(how: str, model: Stack, options: dict):
    """The model, compiled whole or block by block."""
    if how == "whole":
        return torch.compile(model, backend="sparge", options=options)
    for block in model.blocks:
        block.compile(backend="sparge", options=options)
    return model


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_dense_steps_run_the_dense_model_and_nothing_is_compiled_anew(model, x, maps, opened_graphs, how) -> None:
    exact = copy.deepcopy(model)(x)
    handle = attach(model, FEW, dense_steps=2)
    run = compiled_as(how, model, EAGER)
    found, graphs = [], []
    for step in (0, 1, 2, 3, 0, 1, 2, 3):
        handle.set_step(step, 4)
        found.append(sparse_sites(run, x, maps))
        with torch.no_grad():
            assert torch.equal(run(x), exact) == (step < 2)
        graphs.append(len(opened_graphs))
    assert found == [0, 0, LAYERS, LAYERS] * 2
    assert graphs[0] == graphs[-1], "a step compiled something anew"


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("given", ["attached", "options", "calibration"])
def test_dense_layers_stay_as_they_are(model, x, maps, how, given) -> None:
    """Block by block one graph serves all, and the first block runs its own attention."""
    options = dict(EAGER, calibration=FEW)
    if given == "attached":
        attach(model, FEW, dense_layers=1)
    elif given == "options":
        options["dense_layers"] = "blocks.0"
    else:
        options["calibration"] = FEW.scheduled(dense_layers=["blocks.0"])
    run = compiled_as(how, model, options)
    assert sparse_sites(run, x, maps) == LAYERS - 1
    assert sparse_sites(run, x, maps) == LAYERS - 1


def test_the_report_says_what_is_dense_by_plan(model, x) -> None:
    report = explain(model, {**EAGER, "topk": 0.1, "topp": 0.0, "dense_layers": 2})(x)
    assert [(row.name, row.reason.value) for row in report.dense] == [
        (f"blocks.{i}", "dense by plan") for i in range(2)
    ]
    with attach(model, FEW, dense_layers=2):
        assert len(explain(model, EAGER)(x).sparse) == LAYERS - 2
    torch.compile(model, backend="sparge", options={**EAGER, "dense_layers": 2, "on_unsupported": "error"})(x)


def test_phases_that_keep_everything_are_dense(model, x, maps) -> None:
    """Those of a calibration, too, if all sites of the graph keep everything."""
    phases = Calibration({"blocks.*": [(1, 0)]}, phases={0.5: {"blocks.*": [(0.1, 0)]}})
    handle = attach(model, phases)
    run = compiled_as("whole", model, EAGER)
    assert sparse_sites(run, x, maps) == 0
    handle.set_progress(0.5)
    assert sparse_sites(run, x, maps) == LAYERS
    handle.set_progress(0.1)
    assert sparse_sites(run, x, maps) == 0


@pytest.mark.parametrize("change", ["set", "in place", "state dict", "inference mode"])
def test_thresholds_that_are_written_by_hand_hold(model, x, maps, change) -> None:
    """What was dense by plan is so until somebody writes to the buffer."""
    handle = attach(model, FEW, dense_steps=2)
    run = compiled_as("whole", model, EAGER)
    assert sparse_sites(run, x, maps) == 0
    if change == "set":
        handle.set(FEW)
        assert sparse_sites(run, x, maps) == 0, "a plan wins over thresholds"
        handle.set(topk=0.2)
        assert sparse_sites(run, x, maps) == 0
        handle.set_step(2, 4)
        assert handle.get().sites["blocks.0"][0][0] == pytest.approx(0.2)
        return
    if change == "state dict":
        state = {name: torch.full_like(value, 0.1) for name, value in model.state_dict().items() if "sparge" in name}
        model.load_state_dict(state, strict=False)
    else:
        with torch.inference_mode(change == "inference mode"):
            for buffer in handle.buffers().values():
                buffer.fill_(0.1)
    assert sparse_sites(run, x, maps) == LAYERS


def test_what_is_dense_by_plan_stays_so_when_a_model_moves_or_is_copied(model, x, maps) -> None:
    attach(model, FEW, dense_steps=2)
    run = compiled_as("whole", model.double().float(), EAGER)
    assert sparse_sites(run, x, maps) == 0
    twin = copy.deepcopy(model)
    other = torch.compile(twin, backend="sparge", options=EAGER)
    torch.testing.assert_close(other(x), run(x))


def test_gradients_of_a_dense_step_are_dense(model, x) -> None:
    handle = attach(model, FEW, dense_steps=1)
    run = torch.compile(model, backend="sparge", options={"min_seq_len": 0, "inner": "aot_eager"})
    grads = []
    for step in (0, 1):
        handle.set_step(step, 2)
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append(model.blocks[0].qkv.weight.grad.clone())
    handle.remove()
    model.zero_grad()
    model(x).square().mean().backward()
    torch.testing.assert_close(grads[0], model.blocks[0].qkv.weight.grad)
    assert (grads[1] - grads[0]).abs().max() > 1e-6


def test_eager_code_is_dense_by_plan_too(model, x, maps) -> None:
    handle = attach(model, FEW, dense_steps=1, dense_layers="blocks.2")
    with replace_attention(model, min_seq_len=0):
        for step, expected in ((0, 0), (1, LAYERS - 1), (0, 0)):
            handle.set_step(step, 2)
            assert sparse_sites(model, x, maps) == expected


def test_steps_are_told_by_number(model) -> None:
    handle = attach(model, FEW, dense_steps=-1)
    assert handle.get().sites["blocks.0"][0][0] == pytest.approx(0.1), "how long the run is, is not known yet"
    handle.set_step(3, 4)
    assert handle.get().sites["blocks.0"] == ((1.0, 0.0),)
    with pytest.raises(ValueError, match="set_step"):
        handle.set_progress(0.5)
    for bad in ((4, 4), (-1, 4), (0, 0), (0.5, 1)):
        with pytest.raises(ValueError, match="no step"):
            handle.set_step(*bad)
    with pytest.raises(ValueError, match="other dense layers"):
        handle.set(FEW.scheduled(dense_layers=1))


def test_sites_without_new_thresholds_come_back_after_dense_steps(model) -> None:
    for step in (0, 1):
        with attach(model, FEW, dense_steps=1) as handle:
            handle.set_step(step, 3)
            handle.set(Calibration({"blocks.0": [(0.3, 0.0)]}))
            found = []
            for now in (0, 1, 2):
                handle.set_step(now, 3)
                sites = handle.get().sites
                found.append([sites[f"blocks.{i}"][0][0] for i in range(LAYERS)])
        assert found[0] == [1.0] * LAYERS
        assert found[1] == found[2] == pytest.approx([0.3, 0.1, 0.1])


def test_sparsities_by_step(model, x) -> None:
    found = sparge_compile.calibrate(model, [x], target_sparsity=0.5, options={"min_seq_len": 0}, influence=False)
    handle = attach(model, found, sparsities=[0, 0, 0.3, 0.6], dense_layers=[])
    expected = {step: found.at(target_sparsity=sparsity) for step, sparsity in ((0, 0.0), (2, 0.3), (3, 0.6))}
    for step, calibration in expected.items():
        handle.set_step(step, 4)
        for name, pairs in handle.get().sites.items():
            torch.testing.assert_close(torch.tensor(pairs), torch.tensor(calibration.sites[name]))


def test_layers_that_a_calibration_was_told_of_stay_dense(model, x, maps) -> None:
    options = {"min_seq_len": 0, "dense_layers": 1}
    found = sparge_compile.calibrate(model, [x], target_sparsity=0.5, options=options, influence=False)
    assert found.schedule.dense_layers == 1 and found.at(target_sparsity=0.4).schedule == found.schedule
    with attach(model, found):
        run = compiled_as("whole", model, EAGER)
        assert sparse_sites(run, x, maps) == LAYERS - 1


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_dense_steps_as_an_option(model, x, maps, how) -> None:
    """No thresholds are attached, so the model's step is told by itself."""
    run = compiled_as(how, model, {**EAGER, "calibration": FEW, "dense_steps": [1, 3]})
    with pytest.raises(Exception, match="nothing says which step"):
        run(x)
    for step, expected in ((0, LAYERS), (1, 0), (2, 0), (3, LAYERS), (1, 0)):
        set_step(run, step)
        assert sparse_sites(run, x, maps) == expected
    with pytest.raises(ValueError, match="no step"):
        set_step(model, 4, 4)


def test_dense_steps_as_an_option_in_eager_code(model, x, maps) -> None:
    with replace_attention(model, min_seq_len=0, dense_steps=1, calibration=FEW):
        set_step(model, 0, 2)
        assert sparse_sites(model, x, maps) == 0
        set_step(model, 1, 2)
        assert sparse_sites(model, x, maps) == LAYERS


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_distillation_by_layers_leaves_the_plan_as_it_is(model, x, maps, how) -> None:
    """Its graphs, the dense one too, return what attention gives, and a layer that is dense for good has no loss."""
    exact = copy.deepcopy(model)(x)
    run = compiled_as(how, model, {**EAGER, "calibration": FEW, "dense_steps": 1, "dense_layers": "blocks.0"})
    with DistillationHook(run, layers=1.0) as hook:
        for step, expected in ((0, 0), (1, LAYERS - 1), (0, 0)):
            set_step(run, step)
            maps.clear()
            out = run.train()(x)
            assert len(maps) == expected and torch.equal(out, exact) == (step == 0)
            hook.loss().backward()
            assert list(hook.parts) == ["output", "blocks.1", "blocks.2"]
            assert (max(hook.parts.values()) == 0) == (step == 0)


def test_a_distillation_of_another_model_leaves_dense_steps_as_they_are(model, x, maps) -> None:
    run = compiled_as("whole", model, {**EAGER, "calibration": FEW, "dense_steps": 1})
    with DistillationHook(compiled_as("whole", Stack(1), {**EAGER, "topk": 0.5}), layers=1.0):
        set_step(run, 0)
        assert torch.equal(run(x), model(x)) and not maps


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_inductor_compiles_both_graphs(model, x, how) -> None:
    exact = torch.compile(copy.deepcopy(model))(x)
    handle = attach(model, FEW, dense_steps=1)
    run = compiled_as(how, model, {"min_seq_len": 0})
    for step in (0, 1, 0):
        handle.set_step(step, 2)
        assert torch.equal(run(x), exact) == (step == 0)
