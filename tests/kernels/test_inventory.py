"""Which kernels run on a device, by type, capability and version, each with why it does not."""

from __future__ import annotations

import pytest
import torch

from sparge_compile.kernels import inventory, launch

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
        monkeypatch.setattr(torch.version, "hip", None)

    return pretend


def names(device: torch.device) -> dict[str, str]:
    return {kernel.name: kernel.refusal for kernel in inventory.kernels_on(device)}


def test_a_cpu_has_its_own():
    assert names(torch.device("cpu")) == {"torch on the CPU": ""}
    assert inventory.summary(torch.device("cpu")) == "torch on the CPU"


def test_a_device_without_kernels_says_so():
    assert "kernels exist for" in names(torch.device("meta"))["portable Triton"]


def test_an_old_gpu_has_none(gpu):
    pytest.importorskip("triton")
    gpu(7, 5)
    assert names(CUDA) == {"portable Triton": "compute capability 7.5 is below 8.0"}
    assert "none; no portable Triton" in inventory.summary(CUDA)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_run_the_portable_kernels(gpu, capability):
    pytest.importorskip("triton")
    gpu(*capability)
    assert names(CUDA) == {"portable Triton": "", "Hopper attention in Gluon": "not a Hopper GPU"}
    assert "launches not measured: portable Triton; no Hopper" in inventory.summary(CUDA)


def test_hopper_runs_both(gpu, monkeypatch):
    pytest.importorskip("triton")
    from sparge_compile.kernels.triton import trial

    gpu(9, 0)
    monkeypatch.setattr(trial, "version", lambda: trial.TRIED[0])
    trial.hopper_refusal.cache_clear()
    try:
        assert set(names(CUDA).values()) == {""} and launch.measured(CUDA)
        assert inventory.summary(CUDA) == "Some GPU, launches measured: portable Triton, Hopper attention in Gluon"
    finally:
        trial.hopper_refusal.cache_clear()
