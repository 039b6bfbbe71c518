"""What users say is dense by plan, and what it means."""

from __future__ import annotations

import pytest

from sparge_compile import Calibration
from sparge_compile.schedule import ALWAYS_SPARSE, parse_schedule


@pytest.mark.parametrize(
    ("given", "steps", "dense"),
    [
        (2, 5, {0, 1}),
        (0, 5, set()),
        (-2, 5, {3, 4}),
        ((1, 3), 5, {1, 2}),
        ((3, None), 5, {3, 4}),
        ((-4, -2), 5, {1, 2}),
        ((1, -1), 5, {1, 2, 3}),
        (9, 5, {0, 1, 2, 3, 4}),
        (None, 5, set()),
        ((1, None), None, {1, 2, 3, 4}),
        ((1, -1), None, set()),
        (-2, None, set()),
    ],
)
def test_dense_steps(given, steps, dense) -> None:
    schedule = parse_schedule(given)
    assert {step for step in range(5) if schedule.is_dense_step(step, steps)} == dense


@pytest.mark.parametrize(
    ("given", "dense"),
    [
        (2, {"blocks.0.attn1", "blocks.1.attn2#1"}),
        (0, set()),
        (None, set()),
        ("blocks.1", {"blocks.1.attn2#1"}),
        ("blocks.1.attn2", {"blocks.1.attn2#1"}),
        (["*.attn1", "mid"], {"blocks.0.attn1", "blocks.10.attn1", "mid.attention"}),
        ("blocks.1?", {"blocks.10.attn1"}),
        ("blocks", {"blocks.0.attn1", "blocks.1.attn2#1", "blocks.10.attn1"}),
    ],
)
def test_dense_layers(given, dense) -> None:
    schedule = parse_schedule(None, given)
    names = ("blocks.0.attn1", "blocks.1.attn2#1", "blocks.10.attn1", "mid.attention")
    assert {name for name in names if schedule.is_dense_layer(name)} == dense


@pytest.mark.parametrize("steps", [(3, 3), (-1, -2), 1.5, True, "all", (0, "x"), (1,)])
def test_steps_that_mean_nothing_are_refused(steps) -> None:
    with pytest.raises((ValueError, TypeError), match="dense_steps"):
        parse_schedule(steps)


@pytest.mark.parametrize("layers", [-1, 1.5, True, [1], [""], {"a": 1}])
def test_layers_that_mean_nothing_are_refused(layers) -> None:
    with pytest.raises((ValueError, TypeError), match="dense_layers"):
        parse_schedule(None, layers)


def test_a_calibration_keeps_its_schedule(tmp_path) -> None:
    plain = Calibration({"blocks.*": [(0.1, 0.2)]})
    found = plain.scheduled(dense_steps=(0, 10), dense_layers=["blocks.0"])
    found.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded == found and loaded.to_dict()["format_version"] == 4
    assert "dense by plan: steps 0:10; blocks.0" in loaded.table()
    assert plain.schedule == ALWAYS_SPARSE and "schedule" not in plain.to_dict()
    with pytest.raises(ValueError, match="dense steps"):
        loaded.lookup("blocks.0", 2)
    with pytest.raises(TypeError, match="scheduled"):
        Calibration({"a": [(0.1, 0.2)]}, schedule=5)  # type: ignore[arg-type]
    now = loaded.at_progress(0.5)
    assert now.lookup("blocks.0", 2) == ((1.0, 0.0),) * 2 and now.lookup("blocks.1", 1) == ((0.1, 0.2),)
