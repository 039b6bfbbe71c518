"""Thresholds that aim at the error of the model's output: reached, kept on other inputs, in the file, aimed anew."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparge_compile
from sparge_compile import Calibration, attach
from sparge_compile.calibrate import calls
from sparge_compile.calibrate.output import safety_of
from sparge_compile.thresholds.output import ModelOutput

HEADS, SIZE, LENGTH, RUNS = 4, 8, 1024, 12
OPTIONS = {"min_seq_len": 0}
SETTINGS = {"options": OPTIONS, "query_blocks": 8}
GOAL = 0.1


class Model(nn.Module):
    """Two attentions over tokens that look at those near them, the second one more sharply."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sharp) for sharp in (1.0, 3.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self, sharp: float) -> None:
        super().__init__()
        self.sharp = sharp
        self.out = nn.Linear(HEADS * SIZE, HEADS * SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        place = torch.arange(LENGTH, dtype=x.dtype) / LENGTH * 12
        turned = torch.stack((place.cos(), place.sin(), (place / 12).cos(), (place / 12).sin()) * (SIZE // 4), -1)
        q = (8 * self.sharp * turned + 0.1 * v).expand_as(v)
        return x + 3 * self.out(F.scaled_dot_product_attention(q, turned.expand_as(v), v).transpose(1, 2).flatten(2))


def batches(count: int = RUNS, first: int = 0) -> list[Tensor]:
    """Smooth noise, so that blocks have means that differ."""
    seeds = (torch.Generator().manual_seed(first + i) for i in range(count))
    noise = [torch.randn(1, HEADS * SIZE, LENGTH // 32, generator=seed) for seed in seeds]
    return [F.interpolate(x, size=LENGTH, mode="linear").transpose(1, 2) for x in noise]


@torch.no_grad()
def errors(model: nn.Module, thresholds: Calibration, inputs: list[Tensor]) -> list[float]:
    """‖u − v‖ ÷ ‖v‖ of the compiled model's output, for each input."""
    exact = [model(x) for x in inputs]
    with attach(model, thresholds):
        compiled = torch.compile(model, backend="sparge", options={**OPTIONS, "inner": "eager"})
        found = [compiled(x) for x in inputs]
    return [((u - v).norm() / v.norm()).item() for u, v in zip(found, exact, strict=True)]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def found(model) -> Calibration:
    return sparge_compile.calibrate(model, batches(), target_output_error=GOAL, **SETTINGS)


def test_the_bound_is_kept_on_other_inputs_and_nearly_used(model, found) -> None:
    fresh = errors(model, found, batches(first=1000))
    assert 0.8 * GOAL <= sum(fresh) / len(fresh) <= GOAL


def test_what_was_reached_is_what_the_model_does(model, found) -> None:
    """On the runs that were measured, and on those that had no say; the table has both."""
    said = found.origin.output.reached
    every = errors(model, found, batches())
    held = every[3::4]
    used = [error for error in every if error not in held]
    assert said["runs"] == 9 and said["held_out_runs"] == 3
    assert said["error"] == pytest.approx(sum(used) / 9, rel=1e-3)
    assert said["held_out_error"] == pytest.approx(sum(held) / 3, rel=1e-3) and said["held_out_error"] <= GOAL
    assert said["held_out_worst"] == pytest.approx(max(held), rel=1e-3)
    assert f"{said['held_out_error']:.4f} over 3 held-out ones" in found.table()
    assert found.origin.curves["layers.0"].samples == 9, "held-out runs have no part in the fronts"


def test_the_file_keeps_it_and_aims_anew(model, found, tmp_path) -> None:
    found.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded == found
    assert loaded.at(target_output_error=GOAL).summary().sparsity == pytest.approx(found.summary().sparsity, abs=0.05)
    denser = loaded.at(target_output_error=GOAL / 4)
    assert not denser.origin.output.reached and "not measured with these" in denser.table()
    fresh = errors(model, denser, batches(4, first=1000))
    assert 0.3 * GOAL / 4 <= sum(fresh) / 4 <= 1.5 * GOAL / 4
    sparse = loaded.at(target_sparsity=0.7)
    assert sparse.origin.output.influence == found.origin.output.influence and sparse.origin.margin == 1


def test_phases_have_thresholds_of_their_own(model) -> None:
    """Two calls a run, the later one with louder inputs: one error for the whole run."""

    def call(x: Tensor) -> None:
        model(x)
        model(3 * x)

    found = sparge_compile.calibrate(model, batches(6), call=call, phases=(0.5,), target_output_error=GOAL, **SETTINGS)
    fresh = batches(6, first=1000)
    every = [
        errors(model, found.at_progress(progress), inputs)
        for progress, inputs in ((0.0, fresh), (0.5, [3 * x for x in fresh]))
    ]
    assert 0.6 * GOAL <= sum(map(sum, every)) / 12 <= GOAL
    assert found.at_progress(0.0).sites != found.at_progress(0.5).sites


@pytest.mark.parametrize("count", [1, 3, 8])
def test_thresholds_that_come_in_steps_take_one(model, count) -> None:
    """A few heads with few points each: a little less of the bound may be the same thresholds."""
    few = sparge_compile.calibrate(model, batches(count), target_output_error=GOAL, **SETTINGS)
    assert few.origin.output.reached["error"] <= GOAL


def test_bounds_that_cannot_be_met_are_told_of(model) -> None:
    quiet = copy.deepcopy(model)
    with torch.no_grad():
        for layer in quiet.layers:
            layer.out.weight *= 0.1
    with pytest.warns(UserWarning, match="none comes nearer"):
        most = sparge_compile.calibrate(quiet, batches(2), target_output_error=0.9, **SETTINGS)
    assert most.origin.output.reached["error"] < 0.5
    with pytest.raises(ValueError, match=r"out of reach.*least error that was reached"):
        sparge_compile.calibrate(model, batches(2), target_output_error=1e-12, **SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "worst"}, "is a mean"),
        ({"influence": False}, "output's error needs it"),
        ({"target_output_error": 0.0}, "out of range"),
        ({"target_sparsity": 0.5}, "one aim"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        sparge_compile.calibrate(model, batches(1), **{"target_output_error": GOAL, **arguments}, **SETTINGS)


def test_a_model_that_cannot_be_asked_is_an_error(model) -> None:
    with pytest.raises(ValueError, match="training mode"):
        sparge_compile.calibrate(Model(), batches(1), target_output_error=GOAL, **SETTINGS)
    plain = sparge_compile.calibrate(model, batches(1), target_error=GOAL, **SETTINGS)
    with pytest.raises(ValueError, match="nothing of the model's output"):
        plain.at(target_output_error=GOAL)


def test_an_interrupted_run_ends_with_the_same_file(model, tmp_path) -> None:
    def some(stop_at: int | None = None):
        for number, x in enumerate(batches(5)):
            if number == stop_at:
                raise KeyboardInterrupt
            yield x

    def run(name: str, stop_at: int | None = None) -> Calibration:
        out = tmp_path / name
        return sparge_compile.calibrate(model, some(stop_at), out=out, target_output_error=GOAL, **SETTINGS)

    whole = run("whole.json")
    with pytest.raises(KeyboardInterrupt):
        run("part.json", stop_at=3)
    part = Calibration.load(tmp_path / "part.json")
    assert not part.origin.complete and part.origin.target_error is not None
    assert run("part.json") == whole
    assert (tmp_path / "part.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_single_run_leaves_a_tenth_for_what_is_not_known() -> None:
    assert safety_of([0.1]) == 0.9 and safety_of([0.1] * 4) == 1
    assert safety_of([0.1, 0.12] * 8) > safety_of([0.1, 0.12] * 2) > safety_of([0.1, 0.3]) == pytest.approx(2 / 3)


def test_a_prediction_goes_through_what_was_tried() -> None:
    said = ModelOutput({"a": (1.0,)}, trials=((0.2, 0.4), (0.1, 0.1)))
    assert [said.predicted_at(error) for error in (0.1, 0.2, 0.4)] == pytest.approx([0.1, 0.02**0.5, 0.2])
    beyond = [said.predicted_at(error) for error in (0.025, 1.6)]
    assert beyond == pytest.approx([0.1 * 4 ** (-2 / 3), 0.2 * 4 ** (2 / 3)]), "the slope goes on, nearer to one"
    assert ModelOutput({"a": (1.0,)}).predicted_at(0.3) == 0.3
    assert ModelOutput({"a": (1.0,)}, trials=((0.2, 0.4),)).predicted_at(0.1) == pytest.approx(0.05)
    flat = ModelOutput({"a": (1.0,)}, trials=((0.1, 0.1), (1.0, 0.11)))
    assert flat.predicted_at(0.05) == pytest.approx(0.1 / 8), "no steeper than three"


def test_few_calls_are_kept_and_of_each_batch_the_same() -> None:
    noted = calls.NotedCalls()
    for batch in range(5):
        for number in range(50):
            noted.note(batch, number, (torch.zeros(1),), {})
    kept = noted.calls()
    assert len(kept) <= calls.MOST
    of_batch = [[call.number for call in kept if call.batch == batch] for batch in range(5)]
    assert all(numbers == of_batch[0] for numbers in of_batch) and len(of_batch[0]) >= 5
    for batch in range(5, 200):
        noted.note(batch, 0, (torch.zeros(1),), {})
    assert calls.MOST // 4 < len(noted.calls()) <= calls.MOST


def test_a_noted_call_is_made_again_as_it_was() -> None:
    x = torch.zeros(2)
    with torch.autocast("cpu", torch.bfloat16):
        call = calls.ModelCall.of(0, 0, (x,), {"more": [torch.ones(1), "text"]})
    x.fill_(9)

    def model(y: Tensor, more: list) -> tuple:
        y.add_(1)
        return y, more, torch.is_autocast_enabled("cpu")

    for _ in range(2):
        y, more, autocast = call.run(model)
        assert y.tolist() == [1, 1] and more[0] == 1 and more[1] == "text" and autocast
