"""A Wan-shaped transformer on 1, 2 and 4 GPUs that share its sequence: dense and sparse, a forward and a training step.

    python benchmarks/scaling.py                                        # as many GPUs as there are: 480p × 81 frames
    python benchmarks/scaling.py --heads 40 --ffn 13824 --layers 4 --latents 21 90 160 --ways heads ring
    python benchmarks/scaling.py --shares 0.01 0.2                      # unequal heads, as they come and balanced
    python benchmarks/scaling.py --losses 20 --layers 4  # of one GPU, FSDP2, and a shared sequence
    python benchmarks/scaling.py --device cpu --tiny --gpus 1 2         # two processes over gloo

One table: time (of the slowest GPU), times one GPU, peak memory, bytes that leave a GPU, the time of a GPU's kernels
that compute and of those that exchange (waiting for others included), and how far outputs are from one GPU's. Weights
are random. In training they are sharded by FSDP2 over the same GPUs, and each block is checkpointed.
With ``--shares`` also the time that attention takes, and that of the dearest GPU over the mean.
``--csv`` keeps the table, for scaling_model.py. With ``--rows`` each row is kept in a folder as soon as it is there,
and the table has those of earlier runs as well; with ``--gpus 0`` nothing else is done.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from wan_stand_in import CHANNELS, HEAD, TEXT, Wan

from sparge_compile import Calibration, DistillationHook, Ranks
from sparge_compile.parallel.heads import balanced, imbalance
from sparge_compile.parallel.measured import attention_seconds_by_rank
from sparge_compile.passes.write import turns

LEAST_BYTES = turns.LEAST_BYTES
STEPS = {"forward": 5, "training": 3}  # that are timed, after two


class Run:
    """One process of several, with a model of its own."""

    def __init__(self, rank: int, world: int, args: argparse.Namespace) -> None:
        self.rank, self.world, self.args = rank, world, args
        self.device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
        self.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        costs = shares_of(args)
        self.pairs = [(share, 0.0) for share in costs]
        self.costs = costs

    def model(self, checkpointed: bool, way: str, ordered: bool = True, shared: bool = True) -> Wan:
        """The same weights in every process; attention over all of them, where there are several and they share."""
        torch.manual_seed(0)
        args = self.args
        with self.device:
            model = Wan(args.layers, args.heads * args.head_size, args.ffn, checkpointed, args.head_size)
        model = model.to(self.dtype)
        if self.world > 1 and shared:
            model.group, ranks = dist.group.WORLD, Ranks.of()
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

    def compiled(self, model: nn.Module, attention: str, overlap: str = "on") -> nn.Module:
        """Its blocks compiled, sparse or by the inner backend alone."""
        torch._dynamo.reset()
        how: dict[str, Any] = {"backend": self.args.inner, "fullgraph": True}
        if attention == "sparse":
            calibration = Calibration({"blocks.*.attn1": self.pairs})
            options = {"calibration": calibration, "min_seq_len": 1024, "inner": self.args.inner}
            turns.LEAST_BYTES = LEAST_BYTES if overlap == "on" else math.inf
            if overlap == "off" and self.args.inner == "inductor":
                options["inductor"] = {"reorder_for_compute_comm_overlap": False}
            how |= {"backend": "sparge", "options": options}
        for block in model.blocks:
            block.compile(**how)
        return model

    def seconds(self, call: Callable[[], object], number: int) -> float:
        """The median of some calls, each from the moment when all ranks are ready until the last one is done."""
        found = []
        for _ in range(number + 2):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait(alone=True)
            found.append(time.perf_counter() - start)
        return statistics.median(max(times) for times in zip(*self.of_all(found[2:]), strict=True))

    def exchange_rate(self) -> str:
        """How long an exchange of one layer's keys takes, by itself."""
        width = self.args.heads * self.args.head_size
        mine = torch.randn(self.world, tokens_of(self.args) // self.world**2 * width, device=self.device).to(self.dtype)
        came = torch.empty_like(mine)
        seconds = self.seconds(lambda: dist.all_to_all_single(came, mine), 5)
        sent = mine.nbytes * (self.world - 1) / self.world
        return f"{sent / 1e6:.3g} MB to others in {1000 * seconds:.3g} ms, {sent / seconds / 1e9:.3g} GB/s"

    def of_all(self, value: Any) -> list[Any]:
        """What each rank has."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self, alone: bool = False) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world > 1 and not alone:
            dist.barrier()

    def peak(self) -> float | None:
        """GiB of memory at the most since the last time; None on a CPU."""
        if self.device.type != "cuda":
            return None
        found = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


def shares_of(args: argparse.Namespace) -> list[float]:
    """The share of key blocks that each head keeps: alike, or evenly between two numbers, the dearest heads first."""
    low, high = args.shares or (1 - args.sparsity,) * 2
    return [high + (low - high) * h / max(1, args.heads - 1) for h in range(args.heads)]


def sent(args: argparse.Namespace, world: int, way: str, trains: bool) -> float:
    """GB that leave a GPU in a step, for attention."""
    whole = args.layers * tokens_of(args) * args.heads * args.head_size * (2 if args.device == "cuda" else 4) / 1e9
    if way == "heads":
        return whole * 4 * (world - 1) / world**2 * (3 if trains else 1)
    return whole * 2 * (world - 1) / world * (5 if trains else 1)  # sums of gradients are twice as wide


def tokens_of(args: argparse.Namespace) -> int:
    frames, height, width = args.latents
    return frames * height * width // 4


def measure(run: Run, step: str, attention: str, way: str, ordered: bool, overlap: str) -> dict[str, Any]:
    """One row: a step with one kind of attention on so many GPUs."""
    args = run.args
    row = {"attention": attention, "step": step, "way": way if run.world > 1 else "", "GPUs": run.world}
    row |= {"tokens": tokens_of(args), "layers": args.layers, "heads": args.heads, "ffn": args.ffn}
    row |= {"sparsity": args.sparsity, "GB sent": sent(args, run.world, way, step == "training")}
    row |= {"heads are": ("balanced" if ordered else "as they come") if run.world > 1 and way == "heads" else ""}
    row |= {"overlap": overlap if run.world > 1 and attention == "sparse" else ""}
    inputs = run.inputs()
    gc.collect()  # models of before
    if step == "forward":
        model = run.compiled(run.model(False, way, ordered).requires_grad_(False).eval(), attention, overlap)
        call = torch.no_grad()(lambda: model(*inputs))
        run.peak()
        row |= {"ms": 1000 * run.seconds(call, STEPS[step]), "GiB": run.peak(), "out": call().float().cpu()}
        row |= {"kernels": kernels_of(run, call)}
        if args.shares and run.world > 1 and attention == "sparse":
            seconds = attention_seconds_by_rank(call)
            mean = sum(seconds) / run.world
            row |= {"attention ms": 1000 * mean, "dearest ÷ mean": max(seconds) / mean}
        return row
    model = run.compiled(run.model(True, way, ordered), attention, overlap)
    if run.world > 1:
        sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=run.device.type == "cuda")

    def train() -> None:
        F.mse_loss(model(*inputs).float(), inputs[0].float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run.peak()
    row |= {"ms": 1000 * run.seconds(train, STEPS[step]), "GiB": run.peak()}
    return row | {"kernels": kernels_of(run, train)}


def kernels_of(run: Run, call: Callable[[], object]) -> dict[str, float]:
    """ms of this process's GPU by kernel, in a call that all ranks begin together; nothing on a CPU."""
    run.wait()
    return {name: 1000 * seconds for name, seconds in harness.kernel_seconds(call).items()}


def sharded(model: nn.Module) -> None:
    """Under FSDP2, block by block."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def measure_all(run: Run, keep: Callable[[dict[str, Any]], None]) -> None:
    """Every row of one number of GPUs, forwards first, since these are over soon."""
    args = run.args
    ways = args.ways if run.world > 1 else args.ways[:1]
    for step, way, attention, overlap in product(args.steps, ways, args.attention, args.overlap):
        if overlap != args.overlap[0] and (run.world == 1 or attention == "dense"):
            continue
        both = args.shares and run.world > 1 and (way, attention) == ("heads", "sparse")
        for ordered in (False, True) if both else (True,):
            row = measure(run, step, attention, way, ordered, overlap)
            keep(row)
            if run.rank == 0:
                said = ", ".join(x for x in (attention, row["way"], row["heads are"], row["overlap"]) if x)
                past = time.time() - args.begin
                print(f"{run.world} GPUs, {step}, {said}: {row['ms']:.4g} ms ({past:.0f} s so far)", flush=True)


def losses(run: Run, keep: Callable[[dict[str, Any]], None]) -> None:
    """Losses of a distillation in float32: of one GPU with the whole batch, of FSDP2, and of a shared sequence."""
    run.dtype = torch.float32
    batch = run.inputs(batch=run.args.batch)
    for way in ("FSDP2", "heads", "ring") if run.world > 1 else ("",):
        shares = way in ("heads", "ring")
        mine = tuple(x.chunk(run.world)[run.rank] for x in batch) if way == "FSDP2" else batch
        gc.collect()
        teacher, student = (run.model(False, way, shared=shares) for _ in range(2))
        student = run.compiled(student, "sparse")
        for model in (student, teacher) if run.world > 1 else ():
            sharded(model)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        curve = []
        run.peak()
        with DistillationHook(student, teacher) as hook:
            for _ in range(run.args.losses):
                student(*mine)
                loss = hook.loss()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                curve.append(sum(run.of_all(loss.item())) / run.world)
        keep({"GPUs": run.world, "way": way, "losses": curve, "GiB": run.peak()})


def work(rank: int, world: int, args: argparse.Namespace, rows: Path) -> None:
    """One process: everything that is to be measured on so many GPUs."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.set_num_threads(1)
    run = Run(rank, world, args)
    if args.device == "cuda":
        torch.cuda.set_device(run.device)
    if world > 1:
        how = {"backend": "nccl", "device_id": run.device} if args.device == "cuda" else {"backend": "gloo"}
        where = f"file://{args.rendezvous}/{world}"
        dist.init_process_group(**how, init_method=where, rank=rank, world_size=world)

    def keep(row: dict[str, Any]) -> None:
        if rank == 0:
            torch.save(row, rows / f"{time.time_ns()}.pt")

    if world > 1:
        rate = run.exchange_rate()
        if rank == 0:
            print(f"{world} GPUs, an exchange: {rate}", flush=True)
    (losses if args.losses else measure_all)(run, keep)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def finish(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what one GPU is needed for: times its time, and how far outputs are apart."""
    one = {(row["attention"], row["step"]): row for row in rows if row["GPUs"] == 1}
    for row in rows:
        times = row.pop("kernels", {})
        if times:
            row["exchange ms"] = sum(ms for name, ms in times.items() if "nccl" in name.lower())
            row["computing ms"] = sum(times.values()) - row["exchange ms"]
        alone, out = one.get((row["attention"], row["step"])), row.get("out")
        if alone is not None:
            row["× one GPU"] = alone["ms"] / row["ms"]
            if out is not None and row is not alone:
                row["apart"] = ((out - alone["out"]).norm() / alone["out"].norm()).item()
    return [{name: value for name, value in row.items() if name != "out"} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=("cuda", "cpu"), help=f"({here})")
    parser.add_argument("--gpus", type=int, nargs="+", help="(1, 2, 4, as many as there are)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=HEAD)
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--latents", type=int, nargs=3, default=[21, 60, 104], help="frames, height, width (21 60 104)")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--shares", type=float, nargs=2, help="of the sparsest head and of the densest")
    parser.add_argument("--attention", nargs="+", default=["dense", "sparse"], choices=("dense", "sparse"))
    parser.add_argument("--ways", nargs="+", default=["heads"], choices=("heads", "ring"))
    parser.add_argument("--steps", nargs="+", default=["forward", "training"], choices=("forward", "training"))
    parser.add_argument(
        "--losses", type=int, default=0, help="steps of a distillation whose losses are compared, instead"
    )
    parser.add_argument("--batch", type=int, default=4, help="of these (4)")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--csv", help="write the table to this file as well")
    parser.add_argument("--rows", help="a folder where rows are kept, and others may be")
    overlaps = {"nargs": "+", "default": ["on"], "choices": ("on", "whole", "off")}
    parser.add_argument("--overlap", **overlaps, help="whole: heads not in turns; off: exchanges waited for at once")
    args = parser.parse_args()
    args.begin = time.time()
    if args.tiny:
        args.layers, args.heads, args.head_size, args.ffn, args.latents, args.inner = 2, 4, 16, 64, [4, 32, 32], "eager"
    counts = args.gpus if args.gpus is not None else [n for n in (1, 2, 4) if n <= max(1, torch.cuda.device_count())]
    print(harness.header(torch.device(args.device)), flush=True)
    if args.shares:
        costs = shares_of(args)
        for n in counts:
            if n and args.heads % n == 0:
                come, best = (imbalance(costs, order, n) for order in (range(args.heads), balanced(costs, n)))
                print(f"{n} GPUs: expected, the dearest over the mean: {come:.2f} as heads come, {best:.2f} balanced")
    with tempfile.TemporaryDirectory() as args.rendezvous:
        folder = Path(args.rows or args.rendezvous)
        folder.mkdir(parents=True, exist_ok=True)
        failed = None
        for n in filter(None, counts):
            try:
                torch.multiprocessing.spawn(work, (n, args, folder), nprocs=n)
            except Exception as error:  # told behind what there is
                failed = error
        rows = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]
    rows.sort(key=lambda row: row["GPUs"])
    if args.losses:
        show_losses([row for row in rows if "losses" in row])
    else:
        show(args, finish([row for row in rows if "ms" in row]))
    if failed is not None:
        raise failed


def show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    shown = ["attention", "step", "way", "heads are", "overlap", "GPUs", "ms", "× one GPU", "GiB", "GB sent"]
    shown += ["computing ms", "exchange ms", "apart"]
    shown += ["attention ms", "dearest ÷ mean"] if args.shares else []
    rows.sort(key=lambda row: (row["step"], row["attention"], row["way"] == "ring"))
    print(harness.table([{name: row.get(name) for name in shown} for row in rows]))
    if args.csv:
        harness.write_csv(args.csv, rows)


def show_losses(rows: list[dict[str, Any]]) -> None:
    """First and last loss of each curve, and how far it is from the first row's at the most."""
    if not rows:
        return
    want = torch.tensor(rows[0]["losses"])
    for row in rows:
        curve = torch.tensor(row["losses"])
        apart = ((curve - want).abs() / want).max().item()
        row |= {"first": curve[0].item(), "last": curve[-1].item(), "apart at most": apart}
        row.pop("losses")
    print(harness.table(rows))


if __name__ == "__main__":
    main()
