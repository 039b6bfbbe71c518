"""The small examples run as they are, and show what they say that they show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.utils import counters

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs an example in this process; gives the names that it leaves."""
    monkeypatch.syspath_prepend(EXAMPLES)
    counters.clear()

    def run(name: str) -> dict[str, Any]:
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_one_layer(run, capsys):
    left = run("01_one_layer.py")
    assert [site.status for site in left["report"]] == ["sparse"]
    assert 0 < left["error"] < 0.05
    assert "1 of 1 attention sites sparse" in capsys.readouterr().out


def test_model_report(run, capsys):
    left = run("02_model_report.py")
    assert [site.name for site in left["report"].sparse] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert "2 of 4 attention sites sparse" in capsys.readouterr().out
    errors = {(topk, topp): error for topk, topp, error in left["rows"]}
    for column in ([pair for pair in errors if pair[1] == 0], [pair for pair in errors if pair[0] == 0.05]):
        falling = [errors[pair] for pair in sorted(column)]
        assert falling == sorted(falling, reverse=True) and falling[-1] > 0


def test_calibrate(run, capsys):
    left = run("03_calibrate.py")
    assert "blocks.1.attn1" in capsys.readouterr().out
    assert all(len(set(pairs)) > 1 for pairs in left["calibration"].sites.values()), "heads do not differ"
    assert left["calibration"].summary().sparsity > 0.5 and 0 < left["error"] < 0.05
    wanted, reached, errors = zip(*left["rows"], strict=True)
    assert reached == pytest.approx(wanted, abs=0.01)
    assert 0 < errors[0] < errors[1] < errors[2]


def test_block_by_block(run, capsys):
    left = run("04_block_by_block.py")
    assert left["graphs"] == 1
    assert "4 blocks, compiled graphs: 1" in capsys.readouterr().out
    few, more, first = left["errors"].values()
    assert few > more > first > 0


def test_distill(run, capsys):
    left = run("05_distill.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.6 * losses[0]
    assert left["errors"][-1] < 0.8 * left["errors"][0]


def test_eager(run, capsys):
    left = run("06_eager.py")
    assert [row.name for row in left["report"].sparse] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert "in eager code" in capsys.readouterr().out
    assert left["calibration"].summary().sparsity > 0.5 and 0 < left["error"] < 0.1


def test_the_readme_lists_them():
    text = (EXAMPLES / "README.md").read_text()
    named = set(re.findall(r"\[(\w+\.py)\]", text))
    assert named == {path.name for path in EXAMPLES.glob("*.py")}
