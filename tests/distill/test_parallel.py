"""Distillation in two processes, over gloo or NCCL: every way to share the work gives the losses of one process.

What the processes do is in parallel.py. They run once, for all tests, because each takes seconds to start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TIMEOUT = 300  # seconds, against a process that waits for the other for ever


pytestmark = pytest.mark.multigpu

FIRST = ("single, layers", "ddp", "fsdp", "resumed", "dtensor")
SLOW = ("single", "single, lora", "accelerate", "ulysses", "lora", "annealed", "annealed, resumed", "wan")
SLOW += ("fsdp without a teacher", "single, layers", "single, layers, lora")
SLOW += ("fsdp, lora, checkpointed", "fsdp, offloaded", "resumed by one")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each process found, by scenario."""
    return run_in_two(tmp_path_factory.mktemp("parallel"), FIRST)


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The same for the scenarios that are left out of the normal suite."""
    return run_in_two(tmp_path_factory.mktemp("slow"), SLOW)


def run_in_two(folder: Path, scenarios: tuple[str, ...]) -> list[dict[str, object]]:
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    script = Path(__file__).parent / "parallel.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the folders of helpers that pytest knows
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), folder, *scenarios],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
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


def check(found: list[dict[str, object]], name: str, alone: str) -> None:
    losses, want = given(found, name), given(found, alone)
    assert want[-1] < want[0] * 0.99 or alone == "annealed", "training that changes nothing shows nothing"
    assert losses == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "resumed"])
def test_the_losses_are_those_of_one_process(found, name):
    check(found, name, "single, layers")


def test_heads_may_be_sharded(found):
    assert max(given(found, "dtensor")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, alone",
    [
        ("accelerate", "single"),
        ("ulysses", "single"),
        ("lora", "single, lora"),
        ("annealed, resumed", "annealed"),
        ("fsdp, lora, checkpointed", "single, layers, lora"),
        ("fsdp, offloaded", "single, layers"),
        ("resumed by one", "single, layers"),
    ],
)
def test_so_are_those_of_other_ways(found_slowly, name, alone):
    pytest.importorskip("accelerate" if name == "accelerate" else "peft" if "lora" in name else "torch")
    check(found_slowly, name, alone)


@pytest.mark.slow
def test_a_sharded_student_needs_a_teacher(found_slowly):
    assert "before fully_shard" in given(found_slowly, "fsdp without a teacher")


@pytest.mark.slow
def test_context_parallelism_of_diffusers(found_slowly):
    pytest.importorskip("diffusers")
    assert given(found_slowly, "wan") < 1e-5
