"""Distillation in two processes (gloo): every way to share the work gives the losses of one process.

What the processes do is in parallel.py. They run once, for all tests, because each takes seconds to start.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TIMEOUT = 300  # seconds, against a process that waits for the other for ever


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each process found, by scenario."""
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    folder = tmp_path_factory.mktemp("parallel")
    script = Path(__file__).parent / "parallel.py"
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-3000:] for output in outputs)
    return [torch.load(folder / f"found_{rank}.pt") for rank in range(2)]


def given(found: list[dict[str, object]], name: str) -> object:
    """What a scenario gave, the same in both processes."""
    first, second = (ranks[name] for ranks in found)
    for value in (first, second):
        assert not (isinstance(value, str) and value.startswith("Traceback")), value
    assert first == second
    return first


@pytest.mark.parametrize(
    "name, alone",
    [
        ("ddp", "single, layers"),
        ("fsdp", "single, layers"),
        ("resumed", "single, layers"),
        ("accelerate", "single"),
        ("ulysses", "single"),
        ("lora", "single, lora"),
        ("annealed, resumed", "annealed"),
    ],
)
def test_the_losses_are_those_of_one_process(found, name, alone):
    losses, want = given(found, name), given(found, alone)
    assert want[-1] < want[0] * 0.99 or alone == "annealed", "training that changes nothing shows nothing"
    assert losses == pytest.approx(want, rel=1e-4)


def test_a_sharded_student_needs_a_teacher(found):
    assert "before fully_shard" in given(found, "fsdp without a teacher")


def test_heads_may_be_sharded(found):
    assert max(given(found, "dtensor")) < 1e-5


def test_context_parallelism_of_diffusers(found):
    assert given(found, "wan") < 1e-5
