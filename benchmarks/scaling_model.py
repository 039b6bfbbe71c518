"""What a video transformer should take on several GPUs that share a sequence, on paper: compute, exchange, imbalance.

    python benchmarks/scaling_model.py                             # 1 to 64 GPUs, 75,600 and 262,144 tokens
    python benchmarks/scaling_model.py --measured scaling.csv      # with the rows of scaling.py beside

A step of one rank, layer by layer:

    tokens     what is done token by token, at a rate fitted to one GPU: work / (P · rate)
    attention  the cost model of the package for a rank's share, times the imbalance of its heads
    exchange   bytes that leave a rank / bandwidth + latency, for heads, where nothing hides it; of a ring, what
               attention does not hide

Heads are exchanged among as many ranks of one host as divide them; what is left forms a ring. Training has the forward
twice, for activation checkpointing, and the backward.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import harness
import torch

from sparge_compile.cost import CostModel, Shape, class_costs, idle
from sparge_compile.passes.write.turns import LEAST_BYTES

TEXT, HEAD_SIZE, BYTES = 512, 128, 2


@dataclass(frozen=True)
class Model:
    """A diffusion transformer of Wan's kind."""

    layers: int
    heads: int
    ffn: int

    @property
    def width(self) -> int:
        return self.heads * HEAD_SIZE

    @property
    def token_work(self) -> float:
        """Floating-point operations of a token in a layer, attention apart: projections of both, and the FFN."""
        return 2 * (6 * self.width**2 + 2 * self.width * self.ffn)


MODELS = {"1.3B": Model(30, 12, 8960), "14B": Model(40, 40, 13824)}


@dataclass(frozen=True)
class Machine:
    """GPUs in hosts. The defaults are an H200's: the rate that Wan-1.3B's 32,760 tokens show (benchmarks/wan.py), and
    bandwidths of one GPU in one direction, as links are sold, times what collectives usually get of them."""

    rate: float = 510e12  # operations a second, token by token
    inside: float = 450e9 * 0.6  # bytes a second in a host; this and the latency as NCCL's kernels took on two H200
    between: float = 50e9 * 0.8
    latency: float = 50e-6  # of a collective, with the wait for the slower rank
    gpus: int = 8  # in a host


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and the bytes that leave a rank."""

    tokens: float
    attention: float
    exchange: float
    bytes: float

    @property
    def total(self) -> float:
        return self.tokens + self.attention + self.exchange


def split(ranks: int, heads: int, machine: Machine, ring_alone: bool = False) -> tuple[int, int]:
    """(how many ranks exchange heads, how many steps the ring has)."""
    exchanging = 1 if ring_alone else gcd(gcd(ranks, heads), machine.gpus)
    return exchanging, ranks // exchanging


def bare(heads: int, overlap: str, queries: float = LEAST_BYTES) -> tuple[float, int]:
    """What nothing hides of an exchange of so many heads a rank: a share of its bytes, and collectives.

    ``off``: all of it, values, keys with queries, and the result. ``whole``: values go while keys and queries are
    projected. ``on``, ``engines``: so do keys and queries of the second turn, and the result of the first; ``thirds``:
    of three; where a rank's ``queries``, in bytes, are too few for turns, as ``whole``.
    """
    if overlap == "off":
        return 1.0, 3
    wanted = {"whole": 1, "thirds": 3}.get(overlap.removeprefix("engines-"), 2)
    turns = min(heads, wanted) if queries >= LEAST_BYTES else 1
    first, last = heads // turns / heads, -(-heads // turns) / heads
    return (2 * first + last) / 4, 2


def attention_seconds(model: Model, rows: float, keys: float, heads: int, density: float | None, trains: bool) -> float:
    """One layer's attention of a rank to video and text; ``density`` None: dense."""
    costs = class_costs("sm90", 0.0, torch.bfloat16, HEAD_SIZE, HEAD_SIZE, "graph")
    video = Shape(1, heads, heads, int(rows), int(keys), HEAD_SIZE, HEAD_SIZE)
    text = Shape(1, heads, heads, int(rows), TEXT, HEAD_SIZE, HEAD_SIZE)

    def seconds(costs: CostModel, slower: float) -> float:
        sparse = replace(costs, sparse_pair=costs.sparse_pair * slower)
        own = costs.dense(video) if density is None else sparse.sparse(video, density)
        return float(own + costs.dense(text))

    forward, backward = idle("sm90", video)
    return seconds(costs, forward) + (seconds(costs.of(True), max(forward, backward)) if trains else 0.0)


def predict(
    model: Model,
    length: int,
    ranks: int,
    density: float | None,
    trains: bool = False,
    imbalance: float = 1.0,
    machine: Machine = Machine(),
    ring_alone: bool = False,
    overlap: str = "",
) -> Step:
    """A step of one rank of so many; ``overlap`` as in :func:`bare`, "": on for sparse attention, off for dense."""
    heads_among, ring = split(ranks, model.heads, machine, ring_alone)
    passes = 3 if trains else 1  # over the links: forward, forward anew, backward
    rounds = 5 if trains else 1  # of keys and values; sums of gradients are twice as wide
    rows = length / ranks
    tokens = model.layers * rows * model.token_work / machine.rate * (4 if trains else 1)
    heads = model.heads // heads_among
    attention = attention_seconds(model, length / ring, length, heads, density, trains) * imbalance

    sent = passes * 4 * rows * model.width * BYTES * (heads_among - 1) / heads_among
    share, collectives = bare(heads, overlap or ("off" if density is None else "on"), rows * model.width * BYTES)
    exchange = sent * share / machine.inside + collectives * passes * machine.latency if heads_among > 1 else 0.0
    if ring > 1:
        part = 2 * rows * heads_among * heads * HEAD_SIZE * BYTES  # keys and values of the rows that a step has
        link = machine.inside if ranks <= machine.gpus else machine.between
        step = rounds * (part / link + machine.latency)
        exchange += (ring - 1) * max(0.0, step - attention / ring)
        sent += rounds * (ring - 1) * part
    return Step(tokens, *(model.layers * x for x in (attention, exchange, sent)))


def rows_of(name: str, lengths: list[int], ranks: list[int], sparsity: float, trains: bool, machine: Machine) -> list:
    """The rows of the table."""
    found = []
    for length in lengths:
        for kind, density in (("dense", None), ("sparse", 1 - sparsity)):
            one = predict(MODELS[name], length, 1, density, trains, machine=machine).total
            for n in ranks:
                step = predict(MODELS[name], length, n, density, trains, machine=machine)
                heads_among, ring = split(n, MODELS[name].heads, machine)
                row = {"model": name, "tokens": length, "attention is": kind, "GPUs": n}
                row |= {"heads × ring": f"{heads_among} × {ring}", "ms": 1000 * step.total}
                row |= {"token by token": 1000 * step.tokens, "attention": 1000 * step.attention}
                row |= {"exchange": 1000 * step.exchange, "× one GPU": one / step.total, "GB sent": step.bytes / 1e9}
                found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="(1.3B 14B)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[75_600, 262_144])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 64])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--training", action="store_true", help="a training step instead of a forward")
    parser.add_argument("--measured", type=Path, help="a file that scaling.py wrote: its rows beside the prediction")
    for name in ("rate", "inside", "between", "latency"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Machine(), name))
    args = parser.parse_args()
    machine = Machine(args.rate, args.inside, args.between, args.latency)
    for name in args.models:
        rows = rows_of(name, args.tokens, args.gpus, args.sparsity, args.training, machine)
        print(harness.table(rows), end="\n\n")
    if args.measured:
        print(harness.table(beside(args.measured, machine)))


def beside(path: Path, machine: Machine) -> list[dict[str, object]]:
    """Measured rows with what the model says of them."""
    with path.open() as file:
        measured = [row for row in csv.DictReader(file) if row["ms"]]
    found = []
    for row in measured:
        model = Model(int(row["layers"]), int(row["heads"]), int(row["ffn"]))
        density = None if row["attention"] == "dense" else 1 - float(row["sparsity"])
        trains = row["step"] == "training"
        alone = row["way"] == "ring"
        overlap, sizes = row.get("overlap") or "off", (int(row["tokens"]), int(row["GPUs"]))
        step = predict(model, *sizes, density, trains, machine=machine, ring_alone=alone, overlap=overlap)
        keys = ("step", "attention", "way", "overlap", "tokens", "layers", "GPUs", "ms")
        found.append({**{key: row.get(key) for key in keys}, "predicted ms": 1000 * step.total})
    return found


if __name__ == "__main__":
    main()
