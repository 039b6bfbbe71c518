"""A version of Triton that nobody has tried: the Hopper kernel is tried once, elsewhere, and trusted only if right."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

pytest.importorskip("triton")

from sparge_compile.kernels import launch
from sparge_compile.kernels.triton import trial

HOPPER = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """A Hopper GPU with a Triton from the future."""
    monkeypatch.setattr(launch, "architecture", lambda device: 9)
    monkeypatch.setattr(trial, "version", lambda: (99, 0))
    trial.hopper_refusal.cache_clear(), trial._outcome.cache_clear()
    yield
    trial.hopper_refusal.cache_clear(), trial._outcome.cache_clear()


def test_versions_on_record_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(trial, "_try", lambda device: pytest.fail("tried"))
    monkeypatch.setattr(trial, "version", lambda: trial.TRIED[0])
    assert trial.hopper_refusal(HOPPER) == ""


def test_the_backward_has_a_record_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "_try", lambda device: calls.append(device) or "")
    monkeypatch.setattr(trial, "TRIED", ((9, 8), (9, 9)))
    for version, expected in (((9, 8), 0), ((9, 9), 1)):
        monkeypatch.setattr(trial, "version", lambda version=version: version)
        trial.hopper_refusal.cache_clear()
        assert trial.hopper_refusal(HOPPER, trial.TRIED) == "" and not calls
        with warnings.catch_warnings():
            warnings.simplefilter("error" if not expected else "ignore")
            assert trial.hopper_refusal(HOPPER, ((9, 8),)) == ""
        assert len(calls) == expected


def test_another_gpu_tries_nothing(monkeypatch):
    monkeypatch.setattr(trial, "_try", lambda device: pytest.fail("tried"))
    monkeypatch.setattr(launch, "architecture", lambda device: 8)
    assert trial.hopper_refusal(HOPPER) == "not a Hopper GPU"


@pytest.mark.parametrize("fault", ["", "out is off by 1.0"], ids=["right", "wrong"])
def test_a_new_version_is_tried_once_and_said_once(monkeypatch, fault):
    calls = []
    monkeypatch.setattr(trial, "_try", lambda device: calls.append(device) or fault)
    with pytest.warns(UserWarning, match="are new to Triton") as caught:
        refusals = [trial.hopper_refusal(HOPPER) for _ in range(3)]
    assert calls == [HOPPER] and len(caught) == 1
    assert ("portable kernels" in str(caught[0].message)) == bool(fault)
    assert all((fault in refusal) if fault else refusal == "" for refusal in refusals)


def process(monkeypatch, code: str) -> None:
    """The trial's process runs ``code`` instead."""
    real = trial.subprocess.run
    monkeypatch.setattr(
        trial.subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options)
    )


@pytest.mark.parametrize(
    "code, fault",
    [
        ("print('noise')", ""),
        ("print('out is off'); import sys; print('leaks', file=sys.stderr); sys.exit(1)", "out is off"),
        ("import os; os.abort()", "the check ended with status -6"),
        ("import time; time.sleep(60)", "did not end"),
    ],
    ids=["right", "wrong", "crash", "hang"],
)
def test_a_crash_or_a_hang_is_a_fault_and_no_more(monkeypatch, code, fault):
    monkeypatch.setattr(trial, "SECONDS", 2 if "sleep" in code else 60)
    process(monkeypatch, code)
    found = trial._try(HOPPER)
    assert fault in found and bool(found) == bool(fault)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernel runs")
def test_the_real_process_imports_this_package_and_says_what_failed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fault = trial._try(HOPPER)
    assert "CUDA" in fault or "NVIDIA" in fault


def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch, capsys):
    def broken(device):
        raise NotImplementedError("no such\n   instruction")

    monkeypatch.setattr(trial, "_fault", broken)
    with pytest.raises(SystemExit) as ended:
        trial.main(0)
    assert ended.value.code == 1 and capsys.readouterr().out == "NotImplementedError: no such instruction\n"


@pytest.mark.gpu
def test_on_a_gpu_the_process_tells_right_from_wrong(monkeypatch):
    monkeypatch.undo()
    device = torch.device("cuda", torch.cuda.current_device())
    if launch.architecture(device) != 9:
        pytest.skip("not a Hopper GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trial._try(device) == ""
