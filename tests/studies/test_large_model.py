"""The large model's data, and its whole study at toy size: training, arms, taking apart, times, tables."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import arms
import blind
import by_step
import case
import digits
import distil
import lessons
import measures
import pytest
import reproduce
import setups
import tabular
import torch
import train
import transformer
from processes import torchrun
from setups import LARGE, Stage

STAGES = (Stage(1, 2, 1e-3, frames=2), Stage(2, 2, 1e-3, frames=4, keep=0.5))
TOY = replace(LARGE, name="toy", frames=4, side=32, reader=(8, 8), batch=2, rounds=2, blind=(0, 1, 1))  # 256 tokens
TOY = replace(TOY, stages=STAGES, begins="", sizes=(64, 2, 2))


@pytest.mark.parametrize("shifted", [False, True])
def test_deep_clips_depend_on_their_arguments_alone(shifted: bool) -> None:
    video, classes = digits.clips(2, 5, setup=LARGE, shifted=shifted, frames=2)
    again, _ = digits.clips(2, 5, setup=LARGE, shifted=shifted, frames=2)
    other, _ = digits.clips(2, 6, setup=LARGE, shifted=shifted, frames=2)
    assert video.shape == (2, 2, 112, 112) and video.abs().max() <= 1
    assert torch.equal(video, again) and not torch.equal(video, other)
    assert classes.sum(1).tolist() == [3, 3]


def test_the_large_model_has_as_many_tokens_as_asked_for_in_whole_blocks() -> None:
    frames, rows, columns = LARGE.grid()
    assert frames * rows * columns >= 24_576 and frames * rows * columns % 128 == 0


def test_digits_come_near_and_the_ground_moves() -> None:
    """Ink changes within a clip by more than what overlap does on a flat one; no pixel of the ground stays as it is."""
    video, _ = digits.clips(4, 1, setup=LARGE, frames=32)
    bright = (video > 0.2).float().sum((2, 3))  # the ground is darker
    assert (bright.amax(1) > 1.3 * bright.amin(1)).any()
    assert ((video[:, 8] - video[:, 0]).abs() > 1e-4).float().mean() > 0.99


def test_the_learning_rate_rises_stays_and_falls() -> None:
    stage = Stage(1000, 1, 1.0, 1)
    rates = [train.learning_rate(stage, step, step, is_last=True) for step in range(1000)]
    assert rates[0] < rates[train.RISE] == rates[799] == 1.0 > rates[900] > rates[999] > 0
    assert train.learning_rate(stage, 999, 999, is_last=False) == 1.0
    assert train.learning_rate(stage, 500, 0, is_last=True) < 0.1  # with a fresh optimizer


def test_a_step_is_in_its_stage() -> None:
    stages = [train.stage_of(TOY, step) for step in range(3)]
    assert stages == [(STAGES[0], 0), (STAGES[1], 0), (STAGES[1], 1)]


def test_arms_are_listed_once_and_known_by_their_names() -> None:
    listed = arms.arms()
    assert len({arm.name for arm in listed}) == len(listed) == len({case.key_of(arm, 0) for arm in listed})
    assert {(arm.rule, arm.order, arm.target) for arm in listed} >= {
        (rule, order, target) for rule in arms.RULES for order in arms.ORDERS for target in arms.TARGETS
    }


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the study's, with a toy of the large setup that can be named."""
    monkeypatch.setattr(setups, "HERE", tmp_path)
    monkeypatch.setattr(setups, "DOCS", tmp_path)
    monkeypatch.setitem(setups.SETUPS, "toy", TOY)
    return tmp_path


def run(main, monkeypatch: pytest.MonkeyPatch, *command: object) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--setup", "toy", *map(str, command)])
    main()


def test_the_study_of_the_large_model_at_toy_size(toy: Path, monkeypatch, capsys) -> None:
    training = ("--every", 1, "--sample-steps", 1, "--state", toy / "state.pt")
    run(train.main, monkeypatch, *training, "--minutes", 1e-6)
    assert "stopped after 1 of 3 steps" in capsys.readouterr().out
    run(train.main, monkeypatch, *training, "--minutes", 1e-6)  # from the state, into the second stage
    (toy / "state.pt").unlink()
    run(train.main, monkeypatch, *training, "--reader", 2)  # from the weights
    log = capsys.readouterr().out
    assert [f"step {n}:" in log for n in (1, 2, 3)] == [False, True, True] and "classifier on frames" in log
    with pytest.raises(SystemExit, match="of another run"):
        run(train.main, monkeypatch, *training, "--seed", 1)

    found = toy / "found"
    study = ("--seeds", 0, "--sample-steps", 2, "--scale", 0.002, "--out", found, "--arms", "hybrid*tiles, 0.9, *")
    run(reproduce.main, monkeypatch, *study, "--parts", "floor", "arms", "--minutes", 0)
    assert "would take" in capsys.readouterr().out
    run(reproduce.main, monkeypatch, *study, "--parts", "floor", "arms", "spread", "apart", "timing")
    printed = capsys.readouterr().out
    rows = tabular.where(tabular.read(found / "quality.csv"), part="arms")
    assert [row["steps"] for row in rows] == ["0", "1", "4"] and all(float(row["velocity error"]) > 0 for row in rows)
    for name in ("arms", "apart", "timing", "floor", "settings"):
        assert f"\n{name}\n" in printed and "nan" not in printed.split(f"\n{name}\n")[1].split("\n\n")[0]
    run(reproduce.main, monkeypatch, "--parts", "--add", found, "--out", toy / "again")
    assert (toy / "again" / "quality.csv").read_text() == (found / "quality.csv").read_text()

    study = (*study[:-1], "*guided*")
    run(reproduce.main, monkeypatch, *study, "--parts", "arms", "ship", "apart")  # now of the student that ships
    printed = capsys.readouterr().out
    assert "seed 0, distilled: by head" in printed and f"seed 0, {arms.LATE}, evener: by time, half" in printed
    assert f"{arms.LATE}: by head" not in printed
    assert len(list((found / "pictures").glob("*.jpg"))) == 3
    assert {path.name for path in found.glob("*.jpg")} == {f"samples_{x}.jpg" for x in (*arms.shipped(), "trained-on")}
    run(blind.main, monkeypatch, "--clips", found / "clips-0.951-0.safetensors", "--out", toy / "blind")
    assert sorted(row["kind"] for row in tabular.read(toy / "blind" / "key.csv")) == ["distilled", "not trained"]
    run(blind.main, monkeypatch, "--clips", found / "clips-trained-on-0.safetensors", "--out", toy / "others")
    assert sorted(row["kind"] for row in tabular.read(toy / "others" / "key.csv")) == ["not trained", "trained on"]
    kinds = {kind for kind, *_ in blind.kept_clips(found / "clips-0.5-untrained-0.safetensors")}
    assert kinds == {"not trained", "dense weights"}
    for row in tabular.where(tabular.read(found / "quality.csv"), order="moved", loss="none"):
        assert float(row["sparsity"]) == pytest.approx(float(row["target"]), abs=0.13)  # of four blocks
    capsys.readouterr()
    run(blind.main, monkeypatch, "--clips", found / "clips-0.9-0.safetensors", "--measure")
    assert "distilled    seams" in capsys.readouterr().out
    run(reproduce.main, monkeypatch, *study[:-1], "*mixed*", "--parts", "arms")
    assert {row["order"] for row in tabular.read(found / "quality.csv")} >= {"mixed", "tiles"}


def test_what_a_step_keeps_follows_its_time() -> None:
    """Each clip of a batch has the thresholds of its own time, and a batch of one time is asked once."""
    asked: list[float] = []

    class Attached:
        def set_progress(self, fraction: float) -> None:
            asked.append(fraction)

    class Model(torch.nn.Module):
        def forward(self, mixed: torch.Tensor, when: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            return torch.full_like(mixed, asked[-1])

    model = by_step.ByStep(Model(), Attached(), LARGE.shift)  # type: ignore[arg-type]
    first, second, *_, last = by_step.STARTS
    end = by_step.time_at(second, LARGE.shift)
    when = torch.tensor([0.0, 1.0, end + 1e-4, end - 1e-4])
    found = model(torch.zeros(4, 2, 2, 2), when, torch.zeros(4, 10))
    assert found[:, 0, 0, 0].tolist() == [pytest.approx(x) for x in (last, first, first, second)]
    asked.clear()
    model(torch.zeros(2, 2, 2, 2), torch.ones(2), torch.zeros(2, 10))
    assert asked == [first]


@pytest.mark.parametrize("kind", by_step.KEPT)
def test_steps_keep_as_many_blocks_over_a_run_as_the_student_that_keeps_the_same_in_all(kind: str) -> None:
    of = dict(zip(by_step.STARTS, by_step.KEPT[kind], strict=True))
    kept = [of[start] for start in by_step.in_each(25)]
    assert kept == sorted(kept) and 19 <= sum(kept) / 25 <= 19.6
    phases = by_step.in_phases(LARGE, kind, "moved").all_phases()
    pairs = {start: sites["blocks.0.attention"][0] for start, sites in phases.items()}
    assert pairs == {start: (blocks / 392, 0.0) for start, blocks in of.items()}
    twice = by_step.in_phases(LARGE, kind, "moved", 0.9).all_phases()
    assert {start: sites["blocks.0.attention"][0][0] for start, sites in twice.items()} == {
        start: 2 * blocks / 392 for start, blocks in of.items()
    }


@pytest.mark.parametrize("within", by_step.times(LARGE.shift))
def test_lessons_of_a_phase_have_its_times(within: tuple[float, float]) -> None:
    video = torch.zeros(8, 1, 4, 4)
    _, time, _ = digits.noisy(video, 3, 5.0, within)
    assert ((time >= within[0]) & (time <= within[1])).all() and len(time.unique()) == 8
    _, free, _ = digits.noisy(video, 3, 5.0)
    inside = (free >= within[0]) & (free <= within[1])
    assert torch.equal(time[inside], free[inside])


def test_a_teacher_is_asked_once_and_batches_come_in_their_order() -> None:
    asked = []

    class Teacher(torch.nn.Module):
        def forward(self, mixed: torch.Tensor, when: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            asked.append(mixed[0].item())
            return mixed + 1

    teacher = lessons.Recalling(Teacher())
    made = list(lessons.made_ahead(lambda number: (torch.tensor([number]),) * 3, range(5), torch.device("cpu")))
    said = [teacher(*batch).item() for batch in made + made]
    assert said == [1, 2, 3, 4, 5] * 2 and asked == [0, 1, 2, 3, 4]
    teacher.forget()
    assert teacher(*made[3]).item() == 4 and asked[-1] == 3


def test_the_guided_loss_is_of_what_sampling_does() -> None:
    """A batch in pairs: the same clips with classes and without; guidance makes one velocity of both answers."""
    video, when = torch.randn(4, 2, 8, 8), torch.rand(4)
    mixed, times, _, classes = distil.in_pairs((video, when, -video, torch.ones(4, 10)))
    assert torch.equal(mixed, torch.cat((video[:2], video[:2]))) and torch.equal(times[:2], times[2:])
    assert classes[:2].eq(1).all() and classes[2:].eq(0).all()
    said, taught = torch.randn(2, *mixed.shape).unbind()

    def drawn(answer: torch.Tensor) -> torch.Tensor:
        step = transformer.sample(lambda *_: answer, torch.zeros(2, 2, 8, 8), classes[:2], 1, shift=1.0)
        return -step  # one step of sampling from nothing; 0.05 keeps it within the pixels' range

    guided = (drawn(0.05 * said) - drawn(0.05 * taught)) / 0.05
    wanted = (said - taught).square().mean() + guided.square().mean()
    torch.testing.assert_close(distil.guided_loss(said, taught), wanted, rtol=1e-4, atol=1e-4)


def test_seams_and_grain_are_what_they_say() -> None:
    """Nothing shows in noise; a step at each border of a tile does; a smooth ground has no grain."""
    video = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.01 - 0.5
    torch.testing.assert_close(measures.seams(video), torch.ones(2), rtol=0.1, atol=0)
    tiles = (torch.arange(64) // 16 % 2).float() * 0.05
    assert (measures.seams(video + tiles + tiles[:, None]) > 3).all()
    ramp = torch.linspace(-1, -0.5, 64).expand(1, 2, 64, 64)
    assert measures.grain(ramp).item() < 1e-5 < 1e-3 < measures.grain(video).min().item()


def test_what_differs_in_pairs_is_counted() -> None:
    smooth = torch.full((4, 2, 32, 32), -0.5)
    rough = smooth + 0.01 * torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = blind.measured([("distilled", a, b) for a, b in zip(rough, smooth, strict=True)])
    kind, name, dense, sparse, more, chance = rows[1]
    assert (kind, name, more) == ("distilled", "grain", "0 of 4") and dense > sparse and chance == 0.125


def test_mixed_tiles_differ_from_layer_to_layer() -> None:
    found = distil.everywhere((0.05, 0.0), "mixed", layers=3)
    tiles = distil.tiles_of(replace(LARGE, sizes=(64, 3, 2)), found)
    assert tiles == distil.MIXED[:3] and len(set(tiles)) == 3


TOY_RUN = """
import sys
sys.path[:0] = {paths}
import setups, train
from test_large_model import TOY
setups.SETUPS["toy"] = TOY
train.main()
"""


@pytest.mark.slow
def test_processes_take_the_same_steps_as_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(TOY_RUN.format(paths=[str(Path(train.__file__).parent), str(Path(__file__).parent)]))
    losses = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        training = ("--every", 1, "--sample-steps", 1, "--out", out, "--state", tmp_path / f"{ranks}.pt")
        torchrun(tmp_path, script, "--setup", "toy", *training, ranks=ranks)
        losses.append([float(x) for x in re.findall(r"step \d+: loss ([\d.]+)", (out / "train.log").read_text())])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_one_graph_serves_all_blocks_under_autocast() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = transformer.compiled(transformer.VideoTransformer(64, 3, 2).eval(), backend=backend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 2, 16, 16), torch.tensor([0.5]), torch.zeros(1, 10))
    assert len(graphs) == 1
