"""One process of several, as scaling.py needs it: a model that shares its sequence, how it is compiled, timed and seen.

All processes are started once. Of these, groups of 1, 2 and 4 measure at the same time, each on GPUs of its own.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor import list_mode_options
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from wan_stand_in import CHANNELS, TEXT, Wan

from sparge_compile import Calibration, Ranks
from sparge_compile.inner import sound
from sparge_compile.parallel.heads import balanced
from sparge_compile.passes.write import turns

LEAST_BYTES, TURNS = turns.LEAST_BYTES, turns.TURNS
# What is under way while something is computed, and who gets a GPU's processors first.
OVERLAPS = {
    "on": "exchanges, heads in two turns where that pays",
    "first": "as on, but exchanges go before kernels that compute, in a stream of high priority",
    "thirds": "as on, but heads take three turns, not two",
    "whole": "as on, but heads do not take turns",
    "off": "nothing: exchanges are waited for at once",
    "engines": "as on, by copy engines",
    "engines-whole": "as whole, by copy engines",
    "engines-thirds": "as thirds, by copy engines",
}


class Timed(NamedTuple):
    """Seconds of a call: until the slowest GPU is done, and until its host has launched everything."""

    all: float
    host: float


def groups_of(world: int, wanted: list[tuple[int, str]], device: torch.device) -> dict[tuple[int, str], Any]:
    """This process's group of each size, and what is under way how; all processes call this alike."""
    found = {}
    for size, overlap in wanted:
        options: Any = None
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options.is_high_priority_stream = overlap == "first"
        for first in range(0, world, size):
            members = list(range(first, first + size))
            group = dist.new_group(members, pg_options=options)
            if dist.get_rank() in members:
                found[size, overlap] = group
    return found


class Run:
    """One process of a group, or alone."""

    def __init__(self, args: argparse.Namespace, device: torch.device, group: Any = None, overlap: str = "on") -> None:
        self.args, self.device, self.group, self.overlap = args, device, group, overlap
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.costs = shares_of(args)

    def model(self, checkpointed: bool, way: str, ordered: bool = True, shared: bool = True) -> Wan:
        """The same weights in every process; attention over all of them, where there are several and they share."""
        torch.manual_seed(0)
        args = self.args
        with self.device:
            model = Wan(args.layers, args.heads * args.head_size, args.ffn, checkpointed, args.head_size)
        model = model.to(self.dtype)
        if self.world > 1 and shared:
            model.group, ranks = self.group, Ranks.of(self.group, self.overlap.startswith("engines"))
            best = balanced(self.costs, self.world)
            order = torch.tensor(best, device=self.device) if ordered and best != sorted(best) else None
            for block in model.blocks:
                block.attn1.shared = {"heads": ranks, "order": order} if way == "heads" else {"ring": ranks}
        return model

    def inputs(self, seed: int = 1, batch: int = 1) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        width = self.args.heads * self.args.head_size
        latents = torch.randn(batch, CHANNELS, *self.args.latents, generator=generator)
        text = torch.randn(batch, TEXT, width, generator=generator)
        moved = (x.to(self.device, self.dtype) for x in (latents, text))
        return *moved, torch.full((batch,), 500.0, device=self.device)

    def compiled(self, model: nn.Module, attention: str, launch: str = "kernels") -> nn.Module:
        """Its blocks compiled, one graph for all; sparse, or by the inner backend alone, without its unsound fusion.
        ``launch``: ``reduce-overhead`` has each block as a CUDA graph."""
        torch._dynamo.reset()
        how: dict[str, Any] = {"backend": self.args.inner, "fullgraph": True}
        mode = launch if launch == "reduce-overhead" else None
        if attention == "sparse":
            calibration = Calibration({"blocks.*.attn1": [(share, 0.0) for share in self.costs]})
            options = {"calibration": calibration, "min_seq_len": 1024, "inner": self.args.inner, "inductor_mode": mode}
            overlap = self.overlap
            turns.TURNS = 3 if overlap.endswith("thirds") else TURNS
            turns.LEAST_BYTES = math.inf if overlap.endswith("whole") or overlap == "off" else LEAST_BYTES
            if overlap == "off" and self.args.inner == "inductor":
                options["inductor"] = {"reorder_for_compute_comm_overlap": False}
            how |= {"backend": "sparge", "options": options}
        elif self.args.inner == "inductor":
            how["options"] = {**list_mode_options(mode or "default"), **sound()}
        for block in model.blocks:
            block.compile(**how)
        return model

    def sharded(self, model: nn.Module) -> None:
        """Under FSDP2, block by block, over the same GPUs."""
        mesh = DeviceMesh.from_group(self.group, self.device.type)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def step(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """A forward. What blocks that are CUDA graphs have given lives until the next one."""
        torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = model(*inputs)
        return out

    def captured(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The call as one CUDA graph: the host launches it whole."""
        for _ in range(2):
            call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks events meanwhile
            out = call()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def seconds(self, call: Callable[[], object], number: int) -> Timed:
        """The medians of some calls, each from the moment when all ranks are ready."""
        found = []
        for _ in range(number + 2):
            self.wait()
            start = time.perf_counter()
            call()
            launched = time.perf_counter()
            self.wait(alone=True)
            found.append((time.perf_counter() - start, launched - start))
        by_call = zip(*self.of_all(found[2:]), strict=True)
        slowest = [Timed(*map(max, zip(*ranks, strict=True))) for ranks in by_call]
        return Timed(*map(statistics.median, zip(*slowest, strict=True)))

    def exchange_rate(self) -> str:
        """How long an exchange of one layer's keys takes, by itself."""
        width = self.args.heads * self.args.head_size
        mine = torch.randn(self.world, tokens_of(self.args) // self.world**2 * width, device=self.device).to(self.dtype)
        came = torch.empty_like(mine)
        seconds = self.seconds(lambda: dist.all_to_all_single(came, mine, group=self.group), 5).all
        sent = mine.nbytes * (self.world - 1) / self.world
        return f"{sent / 1e6:.3g} MB to others in {1000 * seconds:.3g} ms, {sent / seconds / 1e9:.3g} GB/s"

    def of_all(self, value: Any) -> list[Any]:
        """What each rank has."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self, alone: bool = False) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world > 1 and not alone:
            dist.barrier(self.group)

    def peak(self) -> float | None:
        """GiB of memory at the most since the last time; None on a CPU."""
        if self.device.type != "cuda":
            return None
        found = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return found

    def kernels_of(self, call: Callable[[], object]) -> dict[str, float]:
        """ms of this process's GPU by kernel, in a call that all ranks begin together; nothing on a CPU."""
        self.wait()
        return {name: 1000 * seconds for name, seconds in harness.kernel_seconds(call).items()}


def shares_of(args: argparse.Namespace) -> list[float]:
    """The share of key blocks that each head keeps: alike, or evenly between two numbers, the dearest heads first."""
    low, high = args.shares or (1 - args.sparsity,) * 2
    return [high + (low - high) * h / max(1, args.heads - 1) for h in range(args.heads)]


def tokens_of(args: argparse.Namespace) -> int:
    frames, height, width = args.latents
    return int(frames * height * width // 4)
