"""What the model's output feels of an error of each head, and thresholds that take it into account."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparge_compile
from sparge_compile import Calibration, Options, head_influence
from sparge_compile.calibrate import influence
from sparge_compile.notices import forget_warnings

HEADS, SIZE, LENGTH = 3, 16, 1024
OPTIONS = {"min_seq_len": 0}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = (nn.Linear(HEADS * SIZE, n * HEADS * SIZE) for n in (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(4 * q, 4 * k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers; of the first one, the second head is not used, and the third one ten times as much as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        with torch.no_grad():
            by_head = self.layers[0].out.weight.unflatten(1, (HEADS, SIZE))
            by_head[:, 1] = 0
            by_head[:, 2] *= 10

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"hidden": x, "length": torch.tensor(x.shape[1])}


@pytest.fixture(scope="module")
def measured() -> tuple[Model, list[Tensor], Calibration]:
    torch.manual_seed(0)
    model = Model().eval()
    batches = [torch.randn(1, LENGTH, HEADS * SIZE) for _ in range(2)]
    return model, batches, sparge_compile.calibrate(model, batches, target_sparsity=0.7, options=OPTIONS)


@torch.no_grad()
def test_a_weight_is_what_the_output_feels_of_one_sparse_head(measured) -> None:
    """Against the same by hand: dense attention in all heads but one."""
    model, (x, *_), calibration = measured
    weights = head_influence(model, calibration, [x])
    assert {name: len(each) for name, each in weights.items()} == {"layers.0": HEADS, "layers.1": HEADS}
    head, front = 2, calibration.origin.curves["layers.0"].phases[0].heads[2]
    point = min((p for p in front if p.density < 1), key=lambda p: abs(p.density - 0.2))
    dense = F.scaled_dot_product_attention
    first = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = dense(q, k, v)
        if not first:
            first.append(0)
            q, k, v = (y[:, head : head + 1] for y in (q, k, v))
            out[:, head : head + 1] = sparge_compile.attention(q, k, v, topk=point.topk, topp=point.topp)
        return out

    exact = model(x)["hidden"]
    F.scaled_dot_product_attention = attend
    try:
        changed = model(x)["hidden"]
    finally:
        F.scaled_dot_product_attention = dense
    error = ((changed - exact).square().sum() / exact.square().sum()).item()
    assert weights["layers.0"][head] == pytest.approx(error / point.mean**2, rel=1e-3)


def test_an_unused_head_weighs_nothing_and_a_loud_one_much(measured) -> None:
    model, batches, calibration = measured
    first, unused, loud = head_influence(model, calibration, batches)["layers.0"]
    assert unused == 0 < first and loud > 20 * first


def test_the_model_and_its_compiled_code_are_left_as_they_were(measured) -> None:
    model, batches, calibration = measured
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = torch.compile(model, backend="eager")
    exact = compiled(batches[0])["hidden"]
    weights = head_influence(compiled, calibration, batches[:1])
    assert weights == head_influence(model, calibration, batches[:1])
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(compiled(batches[0])["hidden"], exact)


def test_code_that_was_compiled_with_the_same_options_is_not_what_is_tried(measured) -> None:
    """It knows nothing of the thresholds that are attached for the trial."""
    model, (x, *_), calibration = measured
    expected = head_influence(model, calibration, [x])
    options = {"topk": 1.0, "topp": 0.0, "min_seq_len": 0, "on_unsupported": "dense", "inner": "eager"}
    with torch.no_grad():
        torch.compile(model, backend="sparge", options=Options.parse(options))(x)
    assert head_influence(model, calibration, [x]) == expected


def test_blocks_that_are_compiled_on_their_own_run_plain(measured) -> None:
    model, batches, calibration = measured
    expected = head_influence(model, calibration, batches[:1])
    for layer in model.layers:
        layer.compile(backend="eager")
    try:
        assert head_influence(model, calibration, batches[:1]) == expected
    finally:
        for layer in model.layers:
            layer._compiled_call_impl = None


def test_thresholds_follow_the_influence(measured) -> None:
    """A head that counts for nothing keeps least, one that counts for all keeps more; the sum is as asked."""
    _, _, calibration = measured
    alike = calibration.at(target_sparsity=0.7, influence=False)
    weights = {name: [1.0] * HEADS for name in calibration.sites}
    assert calibration.at(target_sparsity=0.7, influence=weights).sites == alike.sites
    weights["layers.0"] = [1.0, 0.0, 1e6]
    chosen = calibration.at(target_sparsity=0.7, influence=weights)
    assert chosen.summary().sparsity == pytest.approx(0.7, abs=0.02)

    def kept(of: Calibration) -> list[float]:
        return [point.density for name, _, points, _ in of.points() if name == "layers.0" for point in points]

    assert (
        kept(chosen)[1] == min(kept(chosen)) and kept(chosen)[1] < kept(alike)[1] and kept(chosen)[2] > kept(alike)[2]
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"target_error": 0.1, "target_sparsity": None}, "with target_error"),
        ({"influence": {"layers.0": [1.0] * HEADS}}, "other sites"),
        ({"influence": {name: [1.0] for name in ("layers.0", "layers.1")}}, "other numbers of heads"),
        ({"influence": {"layers.0": [1.0] * HEADS, "layers.1": [1.0, -1.0, 1.0]}}, "negative"),
        ({"influence": {"layers.0": [1.0] * HEADS, "layers.1": [1.0, float("nan"), 1.0]}}, "not finite"),
        ({"influence": 3}, "int of other things"),
        ({"influence": {"layers.0": 1.0, "layers.1": 1.0}}, "dict of other things"),
        ({"influence": {"layers.0": [True] * HEADS, "layers.1": [1.0] * HEADS}}, "no number"),
        ({"influence": {name: [0.0] * HEADS for name in ("layers.0", "layers.1")}}, "all 0"),
        ({"by": "worst"}, "worst"),
    ],
)
def test_an_influence_that_does_not_fit_is_an_error(measured, changes, problem) -> None:
    aim = {"target_sparsity": 0.5, "influence": {name: [1.0] * HEADS for name in ("layers.0", "layers.1")}} | changes
    with pytest.raises(ValueError, match=problem):
        measured[2].at(**{name: value for name, value in aim.items() if value is not None})


def test_what_cannot_be_measured_is_an_error(measured) -> None:
    model, batches, calibration = measured
    with pytest.raises(ValueError, match="without measurements"):
        head_influence(model, Calibration({"layers.*": [(0.5, 0.5)]}), batches)
    with pytest.raises(ValueError, match="batches"):
        head_influence(model, calibration, [])
    with pytest.raises(TypeError, match="taken to pieces"):
        head_influence(model, calibration, batches[0])
    with pytest.raises(ValueError, match="add up to nan"):
        head_influence(model, calibration, [torch.full_like(batches[0], float("nan"))])
    assert not any("sparge" in name for name in model.state_dict()), "thresholds were left on it"
    with pytest.raises(TypeError, match=r"Calibration\.load"):
        head_influence(model, "model.json", batches)
    phases = sparge_compile.calibrate(
        model,
        [batches],
        target_sparsity=0.5,
        options=OPTIONS,
        phases=[0.5],
        call=lambda *given: [model(x) for x in given],
    )
    with pytest.raises(ValueError, match="phases"):
        head_influence(model, phases, batches)
    unlike = phases.at(target_sparsity=0.5, influence={name: [1.0, 0.0, 1.0] for name in phases.sites})
    for name, _, points, _ in unlike.points():
        assert points[1].density == min(point.density for point in points), f"{name}: in every phase"


def test_a_sparsity_is_aimed_at_by_influence_unless_told_otherwise(measured, tmp_path) -> None:
    """The file has the weights, and aims with them, without another pass over the model."""
    model, batches, calibration = measured
    said = calibration.origin.output
    assert said.density == 0.2 and said.influence["layers.0"][1] == 0
    assert said.influence["layers.0"] == pytest.approx(
        head_influence(model, calibration, batches)["layers.0"], rel=1e-3
    )
    calibration.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded == calibration and loaded.to_dict()["format_version"] == 4
    assert loaded.at(target_sparsity=0.7).sites == calibration.sites
    plain = sparge_compile.calibrate(model, batches, target_sparsity=0.7, options=OPTIONS, influence=False)
    assert plain.origin.output is None and plain.to_dict()["format_version"] == 2
    again = loaded.at(target_sparsity=0.7, influence=False)
    assert again.origin.output is None and calibration.sites not in (plain.sites, again.sites)
    assert again.summary().mean_error == pytest.approx(plain.summary().mean_error, rel=0.1)
    by_worst = sparge_compile.calibrate(model, batches[:1], target_sparsity=0.7, options=OPTIONS, by="worst")
    assert by_worst.origin.output is None
    assert loaded.at(target_error=0.3).origin.output.influence == said.influence


@pytest.mark.parametrize("arguments", [{"target_error": 0.1, "influence": True, "by": "worst"}, {"influence": 3}])
def test_an_influence_without_a_use_is_refused(measured, arguments) -> None:
    with pytest.raises(ValueError, match="influence"):
        sparge_compile.calibrate(*measured[:2], **arguments)


def test_many_heads_are_tried_together(measured, monkeypatch) -> None:
    """At most so many forwards as are allowed; heads that are tried together share a weight."""
    model, batches, _ = measured
    monkeypatch.setattr(influence, "FORWARDS", 4)
    found = sparge_compile.calibrate(model, batches, target_sparsity=0.7, options=OPTIONS)
    for first, second, _ in found.origin.output.influence.values():
        assert first == second > 0


def test_weights_are_means_over_batches(measured) -> None:
    model, batches, calibration = measured
    each = [head_influence(model, calibration, [x]) for x in batches]
    both = head_influence(model, calibration, batches)
    for name, weights in both.items():
        assert weights == pytest.approx([sum(pair) / 2 for pair in zip(*(one[name] for one in each), strict=True)])


class Unsteady(Model):
    """``how`` it is not the same from one call to the next."""

    how = ""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        if self.how == "noise":
            found["hidden"] = found["hidden"] + torch.randn_like(found["hidden"])
        if self.how == "in place":
            x.mul_(2)
        if self.how == "buffer":
            if not hasattr(self, "kept"):
                self.kept = torch.empty_like(found["hidden"])
            self.kept.copy_(found["hidden"])
            found["hidden"] = self.kept
        return found


@pytest.mark.parametrize("how", ["noise", "in place", "buffer"])
def test_models_that_do_not_repeat_themselves(measured, how) -> None:
    """Noise is refused, or warned of; changed inputs, and an output that is always the same tensor, do no harm."""
    model, batches, calibration = measured
    unsteady = Unsteady().eval()
    unsteady.load_state_dict(model.state_dict())
    unsteady.how = how
    before = batches[0].clone()
    if how == "noise":
        with pytest.raises(ValueError, match="differ by"):
            head_influence(unsteady, calibration, batches)
        forget_warnings()
        with pytest.warns(UserWarning, match="differ by"):
            found = sparge_compile.calibrate(unsteady, batches[:1], target_sparsity=0.7, options=OPTIONS)
        assert found.origin.output is None
        with pytest.raises(ValueError, match="differ by"):
            sparge_compile.calibrate(unsteady, batches[:1], target_sparsity=0.7, options=OPTIONS, influence=True)
    else:
        expected = head_influence(model, calibration, batches[:1])
        found = head_influence(unsteady, calibration, batches[:1])
        assert found == {name: pytest.approx(weights, rel=1e-4) for name, weights in expected.items()}
    assert torch.equal(batches[0], before)


class Shorter(Model):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.layers[0](x)}


def test_a_site_that_is_not_sparse_is_no_head_without_influence(measured) -> None:
    model, batches, calibration = measured
    shorter = Shorter().eval()
    shorter.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1: not replaced or not run"):
        head_influence(shorter, calibration, batches)
    with pytest.raises(ValueError, match="training mode"):
        head_influence(Model(), calibration, batches)
    with sparge_compile.attach(model, Calibration({"layers.1": [(0.3, 0.0)]})) as attached:
        with pytest.raises(ValueError, match="thresholds attached"):
            head_influence(model, calibration, batches)
        assert attached.get().sites["layers.1"][0][0] == pytest.approx(0.3)


class TwoInOne(nn.Module):
    """Grouped queries, and two attentions in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(64, 64), nn.Linear(64, 2 * 32)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(4 * q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        return x


def test_grouped_queries_and_two_attentions_of_one_module() -> None:
    model, x = TwoInOne().eval(), torch.randn(1, LENGTH, 64)
    calibration = sparge_compile.calibrate(model, [x], target_sparsity=0.5, options=OPTIONS)
    weights = head_influence(model, calibration, [x])
    assert {name: len(each) for name, each in weights.items()} == {"(root)": 4, "(root)#1": 4}
    assert all(weight > 0 for each in weights.values() for weight in each)
