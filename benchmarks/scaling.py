"""A Wan-shaped transformer on 1, 2 and 4 GPUs that share its sequence: dense and sparse, a forward and a training step.

    python benchmarks/scaling.py                                        # as many GPUs as there are: 480p × 81 frames
    python benchmarks/scaling.py --heads 40 --ffn 13824 --layers 4 --latents 21 90 160 --ways heads ring
    python benchmarks/scaling.py --shares 0.01 0.2                      # unequal heads, as they come and balanced
    python benchmarks/scaling.py --losses 20 --layers 4  # of one GPU, FSDP2, and a shared sequence
    python benchmarks/scaling.py --device cpu --tiny --gpus 1 2         # two processes over gloo
    python benchmarks/scaling.py … + … + …                              # several of these, in the same processes

One table: time (of the slowest GPU, and until a host has launched everything), times one GPU, peak memory, bytes that
leave a GPU, the time of a GPU's kernels that compute and of those that exchange (waiting for others included), and how
far outputs are from one GPU's. Weights are random. In training they are sharded by FSDP2 over the same GPUs, and each
block is checkpointed. With ``--shares`` also the time that attention takes, and that of the dearest GPU over the mean.

Rows of fewer GPUs than there are run at the same time, on GPUs of their own: first all of one GPU, then forwards, then
training, then forwards as CUDA graphs (``--launches``). ``--csv`` keeps the table, for scaling_model.py, and the
kernels of each row.
With ``--rows`` each row is kept in a folder as soon as it is there, and what is there is not measured again; with
``--gpus 0`` nothing is.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scaling_ranks import OVERLAPS, Run, groups_of, shares_of, tokens_of
from wan_stand_in import HEAD

from sparge_compile import DistillationHook
from sparge_compile.parallel.heads import balanced, imbalance
from sparge_compile.parallel.measured import attention_seconds_by_rank

STEPS = {"forward": 5, "training": 3, "distillation": 3}  # that are timed, after two


LAUNCHES = {"kernels": "", "graph": "as a graph", "reduce-overhead": "by reduce-overhead"}  # who is in a CUDA graph


class Job(NamedTuple):
    """What makes a row."""

    gpus: int
    step: str
    attention: str = "sparse"
    way: str = ""
    heads: str = ""
    overlap: str = ""
    launch: str = "kernels"

    def __str__(self) -> str:
        said = [self.step, self.attention, self.way, self.heads, self.overlap, LAUNCHES[self.launch]]
        return f"{self.gpus} GPUs, {', '.join(filter(None, said))}"


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """All rows, in the order in which they are measured."""
    found = []
    if args.losses:
        for n in args.gpus:
            ways = ("FSDP2", "heads", "ring") if n > 1 else ("",)
            found += [Job(n, "losses", "sparse", way, overlap=args.overlap[0] * (way == "heads")) for way in ways]
        return found
    for launch, step, n, attention in product(args.launches, args.steps, args.gpus, args.attention):
        if (launch != "kernels" and step != "forward") or (step == "distillation" and attention == "dense"):
            continue
        ways = args.ways if n > 1 else [""]
        overlaps = args.overlap if n > 1 and attention == "sparse" else [""]
        for way, overlap in product(ways, overlaps):
            unequal = args.shares and (way, attention) == ("heads", "sparse") and n > 1
            for heads in ("as they come", "balanced") if unequal else ("",):
                found.append(Job(n, step, attention, way, heads, overlap, launch))
    return sorted(found, key=lambda job: turn_of(job, args))  # stable


def turn_of(job: Job, args: argparse.Namespace) -> tuple[int, ...]:
    """When jobs are done; those of one turn are shared among the groups."""
    if args.losses:
        return (args.gpus.index(job.gpus),)
    step = 0 if job.gpus == 1 else 1 + args.steps.index(job.step)
    overlap = args.overlap.index(job.overlap or args.overlap[0])
    return args.launches.index(job.launch), step, overlap, args.gpus.index(job.gpus)


def sent(args: argparse.Namespace, world: int, way: str, trains: bool) -> float:
    """GB that leave a GPU in a step, for attention."""
    whole = args.layers * tokens_of(args) * args.heads * args.head_size * (2 if args.device == "cuda" else 4) / 1e9
    if way == "ring":
        return whole * 2 * (world - 1) / world * (5 if trains else 1)  # sums of gradients are twice as wide
    return whole * 4 * (world - 1) / world**2 * (3 if trains else 1)


def measure(run: Run, job: Job) -> dict[str, Any]:
    """One row: a step with one kind of attention on so many GPUs."""
    args, trains = run.args, job.step != "forward"
    row: dict[str, Any] = {"attention": job.attention, "step": job.step, "way": job.way, "GPUs": job.gpus}
    row |= {"tokens": tokens_of(args), "layers": args.layers, "heads": args.heads, "ffn": args.ffn}
    row |= {"sparsity": args.sparsity, "GB sent": sent(args, run.world, job.way, trains)}
    row |= {"heads are": job.heads, "overlap": job.overlap, "launched": job.launch}
    inputs = run.inputs()
    model = run.model(trains, job.way, job.heads != "as they come")
    run.compiled(model if trains else model.requires_grad_(False).eval(), job.attention, job.launch)
    run.peak()
    if not trains:
        call = torch.no_grad()(partial(run.step, model, inputs))
        if job.launch == "graph":
            call = run.captured(call)
        took = run.seconds(call, STEPS[job.step])
        row |= {"ms": 1000 * took.all, "host ms": 1000 * took.host, "GiB": run.peak(), "out": call().float().cpu()}
        row |= {"kernels": run.kernels_of(call)}
        if args.shares and run.world > 1 and job.attention == "sparse":
            seconds = attention_seconds_by_rank(call, run.group)
            mean = sum(seconds) / run.world
            row |= {"attention ms": 1000 * mean, "dearest ÷ mean": max(seconds) / mean}
        return row
    teacher = run.model(False, job.way) if job.step == "distillation" else None
    for one in (model, teacher) if run.world > 1 else ():
        if one is not None:
            run.sharded(one)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=run.device.type == "cuda")

    def train() -> None:
        out = model(*inputs)
        loss = F.mse_loss(out.float(), inputs[0].float()) if hook is None else hook.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with nullcontext() if teacher is None else DistillationHook(model, teacher) as hook:
        took = run.seconds(train, STEPS[job.step])
    return row | {"ms": 1000 * took.all, "host ms": 1000 * took.host, "GiB": run.peak()}


def losses(run: Run, job: Job) -> dict[str, Any]:
    """Losses of a distillation in float32: of one GPU with the whole batch, of FSDP2, or of a shared sequence."""
    run.dtype = torch.float32
    batch, shares = run.inputs(batch=run.args.batch), job.way in ("heads", "ring")
    mine = tuple(x.chunk(run.world)[run.rank] for x in batch) if job.way == "FSDP2" else batch
    teacher, student = (run.model(False, job.way, shared=shares) for _ in range(2))
    run.compiled(student, "sparse")
    for model in (student, teacher) if run.world > 1 else ():
        run.sharded(model)
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
    return {"GPUs": run.world, "way": job.way, "losses": curve, "GiB": run.peak()}


def work(rank: int, world: int, plans: list[tuple[argparse.Namespace, list[Job]]], rendezvous: str) -> None:
    """One process: its part of what is to be measured."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.set_num_threads(1)
    kind = plans[0][0].device
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    groups = {}
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        how = {"backend": "nccl", "device_id": device} if kind == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**how, init_method=f"file://{rendezvous}/processes", rank=rank, world_size=world)
        wanted = {(job.gpus, job.overlap) for _, jobs in plans for job in jobs if job.gpus > 1}
        groups = groups_of(world, sorted(wanted), device)
        rate = Run(plans[0][0], device, dist.group.WORLD).exchange_rate()
        if rank == 0:
            print(f"{world} GPUs, an exchange: {rate}", flush=True)
    for args, jobs in plans:
        for _, turn in groupby(jobs, partial(turn_of, args=args)):
            for i, job in enumerate(turn):
                if i % (world // job.gpus) == rank // job.gpus:
                    gc.collect()  # models of before
                    run = Run(args, device, groups.get((job.gpus, job.overlap)), job.overlap)
                    row = (losses if args.losses else measure)(run, job)
                    if run.rank == 0:
                        keep(args, job, row)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def keep(args: argparse.Namespace, job: Job, row: dict[str, Any]) -> None:
    """Write a row into the folder, and say it."""
    torch.save(row | {"job": tuple(job)}, Path(args.rows) / f"{time.time_ns()}.pt")
    took = f": {row['ms']:.4g} ms, launched in {row['host ms']:.4g}" if "ms" in row else ""
    print(f"{job}{took} ({time.time() - args.begin:.0f} s so far)", flush=True)


def finish(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what one GPU is needed for: times its time, and how far outputs are apart."""

    def like(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["attention"], row["step"], row["launched"]

    one = {like(row): row for row in rows if row["GPUs"] == 1}
    for row in rows:
        if times := row.get("kernels"):
            row["exchange ms"] = sum(ms for name, ms in times.items() if "nccl" in name.lower())
            row["computing ms"] = sum(times.values()) - row["exchange ms"]
        alone, out = one.get(like(row)), row.get("out")
        if alone is not None:
            row["× one GPU"] = alone["ms"] / row["ms"]
            if out is not None and row is not alone:
                row["apart"] = ((out - alone["out"]).norm() / alone["out"].norm()).item()
    return [{name: value for name, value in row.items() if name != "out"} for row in rows]


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """One setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=("cuda", "cpu"), help=f"({here})")
    parser.add_argument("--gpus", type=int, nargs="+", help="(1, 2, 4, as many as there are), in this order")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=HEAD)
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--latents", type=int, nargs=3, default=[21, 60, 104], help="frames, height, width (21 60 104)")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--shares", type=float, nargs=2, help="of the sparsest head and of the densest")
    parser.add_argument("--attention", nargs="+", default=["sparse", "dense"], choices=("dense", "sparse"))
    parser.add_argument("--ways", nargs="+", default=["heads"], choices=("heads", "ring"))
    parser.add_argument("--steps", nargs="+", default=["forward", "training"], choices=STEPS)
    parser.add_argument(
        "--losses", type=int, default=0, help="steps of a distillation whose losses are compared, instead"
    )
    parser.add_argument("--batch", type=int, default=4, help="of these (4)")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--csv", help="write the table to this file as well, and kernels to another beside it")
    parser.add_argument("--rows", help="a folder where rows are kept, and others may be")
    parser.add_argument(
        "--launches",
        nargs="+",
        default=["kernels"],
        choices=LAUNCHES,
        help="of forwards: kernel by kernel, the model as one CUDA graph, each block as one by torch.compile's mode",
    )
    under_way = "; ".join(f"{name}: {said}" for name, said in OVERLAPS.items())
    parser.add_argument("--overlap", nargs="+", default=["on"], choices=OVERLAPS, help=f"under way: {under_way}")
    args = parser.parse_args(given)
    args.begin = time.time()
    if args.tiny:
        args.layers, args.heads, args.head_size, args.ffn, args.latents, args.inner = 2, 4, 16, 64, [4, 32, 32], "eager"
    counts = args.gpus if args.gpus is not None else [n for n in (1, 2, 4) if n <= max(1, torch.cuda.device_count())]
    args.gpus = [n for n in counts if n]
    if args.launches != ["kernels"] and args.device == "cpu":
        parser.error("--launches: there are no CUDA graphs on a CPU")
    return args


def settings(given: Sequence[str]) -> Iterator[argparse.Namespace]:
    """Those between pluses, one or more."""
    for is_plus, some in groupby(given, "+".__eq__):
        if not is_plus:
            yield arguments(list(some))


def main() -> None:
    every = list(settings(sys.argv[1:])) or [arguments([])]
    counts = [n for args in every for n in args.gpus]
    world = max(counts, default=1)
    if any(world % n for n in counts):
        raise SystemExit(f"--gpus {counts}: the largest is to be a multiple of each")
    print(harness.header(torch.device(every[0].device)), flush=True)
    with tempfile.TemporaryDirectory() as place:
        plans = []
        for i, args in enumerate(every):
            args.rows = args.rows or f"{place}/{i}"
            Path(args.rows).mkdir(parents=True, exist_ok=True)
            there = {row["job"] for row in rows_in(args)}
            plans.append((args, [job for job in jobs_of(args) if job not in there]))
        failed = None
        if any(jobs for _, jobs in plans):
            try:
                torch.multiprocessing.spawn(work, (world, plans, place), nprocs=world)
            except Exception as error:  # told behind what there is
                failed = error
        for args in every:
            (show_losses if args.losses else show)(args, rows_in(args))
    if failed is not None:
        raise failed


def rows_in(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [torch.load(path, weights_only=False) for path in sorted(Path(args.rows).glob("*.pt"))]
    return sorted(rows, key=lambda row: row["GPUs"])


def show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The table; before it, what heads that are unequal should cost."""
    costs = shares_of(args)
    for n in args.gpus if args.shares else ():
        if args.heads % n == 0:
            come, best = (imbalance(costs, order, n) for order in (range(args.heads), balanced(costs, n)))
            print(f"{n} GPUs: expected, the dearest over the mean: {come:.2f} as heads come, {best:.2f} balanced")
    rows = finish(rows)
    shown = [
        "attention",
        "step",
        "way",
        "heads are",
        "overlap",
        "launched",
        "GPUs",
        "ms",
        "× one GPU",
        "GiB",
        "GB sent",
    ]
    shown += ["host ms", "computing ms", "exchange ms", "apart", "attention ms", "dearest ÷ mean"]
    shown = [name for name in shown if any(row.get(name) not in (None, "") for row in rows)]
    launches = list(LAUNCHES)
    rows.sort(key=lambda row: (launches.index(row["launched"]), row["step"], row["attention"], row["way"] == "ring"))
    print(harness.table([{name: row.get(name) for name in shown} for row in rows]), flush=True)
    if args.csv:
        kernels = [(row["job"], name, ms) for row in rows for name, ms in row.get("kernels", {}).items()]
        said = [{"row": str(Job(*job)), "kernel": name, "ms": ms} for job, name, ms in kernels]
        harness.write_csv(Path(args.csv).with_suffix(".kernels.csv"), said)
        harness.write_csv(args.csv, [{k: v for k, v in row.items() if k not in ("kernels", "job")} for row in rows])


def show_losses(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """First and last loss of each curve, and how far it is from the first row's at the most."""
    if not rows:
        return
    want = torch.tensor(rows[0]["losses"])
    shown = []
    for row in rows:
        curve = torch.tensor(row["losses"])
        apart = ((curve - want).abs() / want).max().item()
        shown.append({"GPUs": row["GPUs"], "way": row["way"], "GiB": row["GiB"], "steps": len(curve)})
        shown[-1] |= {"first": curve[0].item(), "last": curve[-1].item(), "apart at most": apart}
    print(harness.table(shown), flush=True)


if __name__ == "__main__":
    main()
