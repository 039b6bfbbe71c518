"""The fine-tuning recipe on tiny random weights: it goes on where it stopped, and what it leaves behind is sparse."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from processes import torchrun

import sparge_compile

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_video_transformer.py"


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[tuple[int, float]]:
    """Run the recipe; gives what log.csv has: each step and its loss."""
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--smoke", "--out", str(out), *arguments])
    module.main()
    return list(losses(out).items())


def losses(out: Path) -> dict[int, float]:
    """The loss of each step of a run."""
    with (out / "log.csv").open() as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    "extra",
    [pytest.param(("--anneal", "5"), id="anneal"), pytest.param(("--lora", "2"), id="lora", marks=pytest.mark.slow)],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(monkeypatch, tmp_path, extra):
    for package in ("diffusers", "accelerate", "peft"):
        pytest.importorskip(package)
    whole = run(monkeypatch, tmp_path / "whole", *extra)
    stopped = run(monkeypatch, tmp_path / "parts", "--stop-after", "3", *extra)
    assert [step for step, _ in stopped] == [1, 2, 3] and not (tmp_path / "parts" / "sparge.json").exists()
    assert run(monkeypatch, tmp_path / "parts", *extra) == whole and len(whole) == 6
    if "--lora" not in extra:
        check_what_is_left(tmp_path / "parts")
        assert run(monkeypatch, tmp_path / "raster", "--order", "raster", *extra)[-1] != whole[-1]  # other blocks


@pytest.mark.slow
@pytest.mark.multigpu
def test_two_processes_have_the_losses_of_one_with_as_many_clips(monkeypatch, tmp_path):
    for package in ("diffusers", "accelerate"):
        pytest.importorskip(package)
    on_gpus = ["--smoke-on-gpus"] if torch.cuda.device_count() > 1 else []
    torchrun(tmp_path, EXAMPLE, "--smoke", *on_gpus, "--out", tmp_path / "two")
    want = run(monkeypatch, tmp_path / "one", "--accumulate", "2", *on_gpus)
    assert losses(tmp_path / "two") == pytest.approx(dict(want), rel=1e-4)


def test_it_says_how_to_use_what_is_left(monkeypatch, tmp_path, capsys):
    for package in ("diffusers", "accelerate"):
        pytest.importorskip(package)
    run(monkeypatch, tmp_path / "student")
    said = capsys.readouterr().out
    assert "need not fall" in said and f'options={{"calibration": "{tmp_path / "student" / "sparge.json"}"}}' in said


def check_what_is_left(folder: Path) -> None:
    """A model and its thresholds, for one line of inference."""
    import diffusers

    model = diffusers.WanTransformer3DModel.from_pretrained(folder)
    inputs = (torch.randn(1, 4, 4, 16, 16), torch.tensor([500]), torch.randn(1, 12, 16))
    options = {"calibration": folder / "sparge.json", "min_seq_len": 64, "inner": "eager"}
    report = sparge_compile.explain(model, options)(*inputs)
    assert [row.name for row in report.sparse] == ["blocks.0.attn1", "blocks.1.attn1"]
    with torch.no_grad():
        dense = model(*inputs, return_dict=False)[0]
        sparse = torch.compile(model, backend="sparge", options=options)(*inputs, return_dict=False)[0]
    assert sparse.shape == dense.shape and (sparse - dense).abs().max() > 1e-4
