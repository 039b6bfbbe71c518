"""``sparge doctor`` says what is there, what is wrong, how fast it is, and ends with a verdict."""

from __future__ import annotations

import json

import pytest
import torch

from sparge_compile import CostModel, doctor
from sparge_compile.cli import main
from sparge_compile.kernels import cpu
from sparge_compile.kernels.inventory import Kernel

SHAPE = ["--device", "cpu", "--shape", "1,2,600,32", "--sparsity", "0.5"]


@pytest.fixture(autouse=True)
def compiled_only(monkeypatch):
    """Triton's interpreter is not asked, unless a test does."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_healthy_cpu(capsys):
    assert main(["doctor", *SHAPE, "--dtype", "bfloat16", "--causal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for word in ("sparge-compile", "python", torch.__version__, "diffusers", "torch on the CPU", "1×2×600×32"):
        assert word in text
    assert "bfloat16, causal" in text and "dense SDPA" in text
    assert sum(line.endswith("right") for line in lines) == 18, "3 kernels, 3 dtypes, 2 problems"
    assert lines[-1].startswith("All is well") and "sparsity attention" in lines[-1]


def test_the_same_as_json(capsys):
    assert main(["doctor", *SHAPE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and found["versions"]["torch"] == torch.__version__
    assert found["timing"]["shape"] == [1, 2, 600, 32] and 0.4 < found["timing"]["sparsity"] < 0.6
    assert {each["kernel"] for each in found["checks"]} == {"map", "forward", "backward"}


@pytest.mark.parametrize(
    "dense, words",
    [
        (3e-3, "and at 50% sparsity attention is 3.0 times faster than dense."),
        (5e-4, "At 50% sparsity attention of this shape takes 2.0 times as long as dense: try a longer one"),
    ],
)
def test_the_verdict_says_whether_it_pays(dense, words):
    found = doctor.Examination({}, "a device", [Kernel("a kernel", "")], "need no table")
    found.timing = doctor.Timing((1, 2, 600, 32), "float32", False, 0.5, dense, 1e-3)
    assert found.healthy and words in found.verdict


def test_a_wrong_kernel_and_one_that_fails(capsys, monkeypatch):
    real = cpu.forward

    def nonsense(*args):
        out, lse = real(*args)
        return out * 1.5, lse

    def fails(*args):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(cpu, "forward", nonsense)
    monkeypatch.setattr(cpu, "block_map", fails)
    assert main(["doctor", *SHAPE]) == 1
    text = capsys.readouterr().out
    assert "out is off by" in text and "RuntimeError in fails: no such instruction" in text
    assert "forward, map is wrong" in text.splitlines()[-1] and "report" in text.splitlines()[-1]


def test_the_host_of_a_gpu(monkeypatch):
    """It is timed, and what the cost model makes of it is said; a CPU has none beside itself."""
    found = doctor.examine(torch.device("cpu"), (1, 1, 300, 16))
    assert found.host is None and "\nhost\n" not in str(found) and found.to_dict()["host"] is None
    monkeypatch.setattr(doctor, "time_dense_call", lambda device: 21e-6)
    monkeypatch.setattr(doctor, "slowness", lambda device: 2**0.5)
    monkeypatch.setattr(doctor, "cost_model", lambda device: CostModel(0, 0, 0, 0, 0, 0, 32e-6, 64e-6))
    found.host = doctor._host(torch.device("cuda"))
    assert "host\n  21.0 us for an eager call of SDPA, 1.4 times the reference" in str(found)
    assert "32 us for a compiled call, 64 us for a sparse one" in str(found)
    assert found.to_dict()["host"]["sparse"] == 64e-6


def test_where_no_kernel_runs_nothing_is_tried(capsys, monkeypatch):
    monkeypatch.setattr(doctor.inventory, "kernels_on", lambda device: [Kernel("portable Triton", "too old")])
    monkeypatch.setattr(doctor, "_checks", lambda device: pytest.fail("checked"))
    assert main(["doctor", *SHAPE]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("No kernel runs on cpu")


def test_what_cannot_be_timed_is_said(capsys):
    assert main(["doctor", "--device", "cpu", "--shape", "1,2,600,512"]) == 0
    assert "nothing was timed (head size" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, words",
    [(["--shape", "1,2,3"], "is not B,H,L,D"), (["--shape", "a,b,c,d"], "shape"), (["--dtype", "x"], "dtype")],
)
def test_wrong_arguments(capsys, given, words):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *given])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_sparsity_out_of_range(capsys):
    assert main(["doctor", "--sparsity", "1"]) == 2 and "sparsity is out of range" in capsys.readouterr().err


@pytest.mark.interpreter
def test_the_interpreter_is_checked_where_it_is_on(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    checks = doctor._checks(torch.device("cpu"))
    assert [c.fault for c in checks if c.kernel.startswith("interpreted")] == ["", "", ""]
