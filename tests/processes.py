"""Functions that run in two processes or more: over NCCL where there are as many GPUs, else over gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 300  # seconds, against a process that waits for the other for ever


def run_in_processes(function: Callable[[torch.device], Any], folder: Path, ranks: int = 2) -> list[Any]:
    """What a function of the process's device gives in each of the processes, a text with the trace where it failed.

    The processes are forks of this one, which has imported what they need; on GPUs, where CUDA forbids that, they are
    started anew.
    """
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    on_gpus = torch.cuda.device_count() >= ranks
    folder.mkdir(exist_ok=True)
    context = torch.multiprocessing.start_processes(
        _run,
        (function, folder, ranks, on_gpus),
        nprocs=ranks,
        start_method="spawn" if on_gpus else "fork",
        join=False,
    )
    end = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=end - time.monotonic()):  # which returns at the end of each
            assert time.monotonic() < end, f"the processes did not end within {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()
    found = [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(ranks)]
    for each in found:
        assert not (isinstance(each, str) and each.startswith("Traceback")), each
    return found


def torchrun(folder: Path, *arguments: object, ranks: int = 2) -> None:
    """Run a program under torchrun in a folder, as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def _run(rank: int, function: Callable[[torch.device], Any], folder: Path, ranks: int, on_gpus: bool) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    where = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=where, rank=rank, world_size=ranks)
    try:
        found = function(device)
    except Exception:
        found = traceback.format_exc()
    torch.save(found, folder / f"found_{rank}.pt")
    if not isinstance(found, str):  # the others wait in vain for one that failed
        dist.barrier()
    dist.destroy_process_group()
