"""Functions that run in two processes or more: over NCCL where there are as many GPUs, else over gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 300  # seconds, against a process that waits for the other for ever


def run_in_processes(function: Callable[[torch.device], Any], folder: Path, ranks: int = 2) -> list[Any]:
    """What a function of the process's device gives in each of the processes.

    They are forks of this one, which has imported what they need; with a torch for GPUs, where CUDA and autograd's
    threads forbid that, they are started anew, and find the function in its file. Where one fails, the others are
    ended, and the error has its trace.
    """
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    on_gpus = torch.cuda.device_count() >= ranks
    folder.mkdir(exist_ok=True)
    context = torch.multiprocessing.start_processes(
        _run,
        (Path(function.__code__.co_filename), function.__name__, folder, ranks, on_gpus),
        nprocs=ranks,
        start_method="fork" if torch.version.cuda is None else "spawn",
        join=False,
    )
    end = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=end - time.monotonic()):  # which returns at the end of each
            assert time.monotonic() < end, f"the processes did not end within {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(ranks)]


def torchrun(folder: Path, *arguments: object, ranks: int = 2) -> None:
    """Run a program under torchrun in a folder, as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def _run(rank: int, file: Path, name: str, folder: Path, ranks: int, on_gpus: bool) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    how: dict[str, Any] = {"backend": "gloo"}
    if on_gpus:
        torch.cuda.set_device(device)
        how = {"backend": "nccl", "device_id": device}
    dist.init_process_group(**how, init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=ranks)
    spec = spec_from_file_location(file.stem, file)
    sys.modules[file.stem] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.save(getattr(module, name)(device), folder / f"found_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
