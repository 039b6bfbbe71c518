"""Is what the cost model calls sparse ever slower than dense attention? Asked of real shapes (real_shapes.py).

    python benchmarks/never_slower.py --csv one.csv                  # a GPU: what is short first, for 500 seconds
    python benchmarks/never_slower.py --after one.csv --csv two.csv  # what one.csv has not, and both together
    python benchmarks/never_slower.py --all                          # what is decided dense is measured as well
    python benchmarks/never_slower.py --eager                        # of eager code, by replace_attention
    python benchmarks/never_slower.py --compiled 12                  # and twelve cases by torch.compile itself
    python benchmarks/never_slower.py --device cpu --tiny            # that everything runs

Each shape is decided as in a graph that Inductor compiles, for inference and for training, in batches of one and two,
with the default thresholds and with 25 % and 10 % of the blocks kept. What is decided sparse is measured in a queue of
calls: wall time, so the host counts. The rival is SDPA by the fastest of its kernels. Ours are the ops as Inductor's
code calls them, in training a forward and a backward. The inputs have flat pooled scores, so the default thresholds
keep their most, 80 %. A case that looks slower is measured again, longer, before it is listed.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import host
import rivals
import torch
import torch.nn.functional as F
from real_shapes import ROWS, Row
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from sparge_compile.options import DEFAULT_TOPK, DEFAULT_TOPP, Options
from sparge_compile.passes.decide import decide
from sparge_compile.passes.find import find
from sparge_compile.report import Decision

PAIRS = {"default": (DEFAULT_TOPK, DEFAULT_TOPP), "75 %": (0.25, 0.0), "90 %": (0.1, 0.0)}
SLOWER, MISSED = 0.95, 1.2  # speed-ups: what a sparse case must not fall below, what a dense one should not have had
WHAT = {False: "forward", True: "step"}
LONGER = (0.2, 100)  # seconds and calls where a case looks bad


class Case(NamedTuple):
    row: Row
    batch: int
    trains: bool

    @property
    def name(self) -> str:
        r = self.row
        heads = f"{r.heads}" if r.heads == r.kv_heads else f"{r.heads}/{r.kv_heads}"
        size = f"{r.head_size}" if r.head_size == r.value_head_size else f"{r.head_size}/{r.value_head_size}"
        causal = " causal" if r.is_causal else ""
        return f"{r.model}, {r.at}: {self.batch}×{heads}×{r.length}×{r.keys}×{size}{causal}"

    @property
    def work(self) -> float:
        r = self.row
        pairs = self.batch * r.heads * r.length * r.keys
        return pairs * (r.head_size + r.value_head_size) * (1 + 2.5 * self.trains) / (2 if r.is_causal else 1)


class Seen(NamedTuple):
    """A case under one pair of thresholds: what was decided, and its wall times where they were measured."""

    case: Case
    sparsity: str
    decision: Decision
    dense: float | None = None
    sparse: float | None = None

    @property
    def speedup(self) -> float | None:
        return self.dense / self.sparse if self.dense and self.sparse else None


def cases(rows: Sequence[Row]) -> Iterator[Case]:
    for row in rows:
        for batch in (1, 2):
            for trains in (False, True):
                yield Case(row, batch * row.times_batch, trains)


def decision(
    case: Case, pair: tuple[float, float], device: torch.device, dtype: torch.dtype, inner: str = "inductor"
) -> Decision:
    """What the backend decides of a graph with this attention in it, which ``inner`` compiles."""
    row, graph = case.row, Graph()
    sizes = (row.heads, row.length, row.head_size), (row.kv_heads, row.keys, row.head_size)
    nodes = []
    with FakeTensorMode():
        for name, size in zip("qkv", (*sizes, (*sizes[1][:2], row.value_head_size)), strict=True):
            value = torch.empty(case.batch, *size, dtype=dtype, device=device, requires_grad=case.trains)
            nodes.append(graph.placeholder(name))
            nodes[-1].meta["example_value"] = value
        shared = row.heads != row.kv_heads
        named: dict[str, Any] = {"is_causal": row.is_causal, "enable_gqa": shared}
        node = graph.call_function(F.scaled_dot_product_attention, tuple(nodes), named)
        out = torch.empty(case.batch, row.heads, row.length, row.value_head_size, dtype=dtype, device=device)
        node.meta["example_value"] = out.requires_grad_(case.trains)
    graph.output(node)
    (match,) = find(GraphModule({}, graph))
    with torch.set_grad_enabled(case.trains):
        return decide(match, Options(topk=pair[0], topp=pair[1], inner=inner))


def operands(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    row = case.row
    sizes = (row.heads, row.length, row.head_size), (row.kv_heads, row.keys, row.head_size)
    return [
        torch.randn(case.batch, length, heads, size, dtype=dtype, device=device).transpose(1, 2)
        for heads, length, size in (*sizes, (*sizes[1][:2], row.value_head_size))
    ]


def measured(seen: list[Seen], device: torch.device, dtype: torch.dtype, args: argparse.Namespace) -> list[Seen]:
    """The case of these, with wall times: of dense attention once, and of sparse attention for each that is here."""
    case, predicted = seen[0].case, seen[0].decision.prediction
    if predicted is not None and 1000 * predicted.dense > args.most_ms:
        return seen
    given = operands(case, device, dtype)
    how = case.row.is_causal, WHAT[case.trains]
    best, dense = rivals.fastest(rivals.dense_calls(*given, *how), device)

    def sparse(pair: tuple[float, float], *longer: float) -> float:
        if args.eager:
            with rivals.replaced_call(*given, pair, *how) as call:
                return rivals.wall_seconds(call, device, *longer)
        thresholds = torch.tensor([pair] * case.row.heads, device=device)
        return rivals.wall_seconds(rivals.sparse_call(*given, thresholds, *how), device, *longer)

    found = []
    for each in seen:
        found.append(each._replace(dense=dense, sparse=sparse(PAIRS[each.sparsity])))
        if is_bad(found[-1]):
            again = rivals.wall_seconds(best, device, *LONGER), sparse(PAIRS[each.sparsity], *LONGER)
            found[-1] = each._replace(dense=again[0], sparse=again[1])
    return found


def is_bad(seen: Seen) -> bool:
    """Whether it was decided wrongly, as measured."""
    if seen.speedup is None:
        return False
    return seen.speedup < SLOWER if seen.decision.status == "sparse" else seen.speedup > MISSED


def measured_before(path: str | Path) -> dict[tuple[str, ...], tuple[float, float]]:
    """Wall times of dense and sparse attention from the rows of another run, by what :func:`key_of` gives."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["x"]]
    names = ("shape", "for", "sparsity", "code")
    return {
        tuple(row[n] for n in names): (float(row["dense ms"]) / 1000, float(row["sparse ms"]) / 1000) for row in rows
    }


def key_of(each: Seen, code: str) -> tuple[str, ...]:
    return each.case.name, "training" if each.case.trains else "inference", each.sparsity, code


def rows_of(seen: Sequence[Seen], code: str = "") -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for each in seen:
        ms = [None if x is None else 1000 * x for x in (each.dense, each.sparse)]
        predicted = each.decision.prediction
        rows.append(
            {
                "shape": each.case.name,
                "for": "training" if each.case.trains else "inference",
                "sparsity": each.sparsity,
                "code": code,
                "decided": each.decision.status,
                "reason": each.decision.reason.value,
                "predicted x": predicted.speedup if predicted else None,
                "dense ms": ms[0],
                "sparse ms": ms[1],
                "x": each.speedup,
            }
        )
    return rows


def summary(seen: Sequence[Seen]) -> list[dict[str, object]]:
    """One row for each case: what was decided at each sparsity, with the speed-up where it was measured."""
    by_case: dict[Case, dict[str, object]] = {}
    for each in seen:
        row = by_case.setdefault(
            each.case, {"shape": each.case.name, "for": "training" if each.case.trains else "inference"}
        )
        row[each.sparsity] = each.decision.status + (f" {each.speedup:.2f}x" if each.speedup else "")
    return list(by_case.values())


def compiled_row(seen: Seen, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Wall times of one attention of ten in a function that torch.compile compiles: by Inductor, and by the backend."""
    inputs = [x.requires_grad_(seen.case.trains) for x in operands(seen.case, device, dtype)]
    causal, shared = seen.case.row.is_causal, seen.case.row.heads != seen.case.row.kv_heads

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(host.LAYERS):
            q = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
        return q

    grad_out = rivals.ones_for(inputs[0], inputs[2])

    def call(function: Callable[..., Tensor]) -> None:
        with torch.set_grad_enabled(seen.case.trains):
            out = function(*inputs)
            if seen.case.trains:
                torch.autograd.grad(out, inputs, grad_out)

    topk, topp = PAIRS[seen.sparsity]
    times = []
    for backend, options in (("inductor", None), ("sparge", {"topk": topk, "topp": topp})):
        torch._dynamo.reset()
        function = torch.compile(layers, backend=backend, options=options)
        times.append(1000 * rivals.wall_seconds(partial(call, function), device, 0.1) / host.LAYERS)
    what = "training" if seen.case.trains else "inference"
    names = ("shape", "for", "sparsity", "Inductor ms", "sparge ms", "x")
    return dict(zip(names, (seen.case.name, what, seen.sparsity, *times, times[0] / times[1]), strict=True))


def tiny() -> list[Row]:
    """A few of the table, shortened."""
    return [
        row._replace(heads=2, kv_heads=2, length=row.length // 4, keys=row.keys // 4)
        for row in ROWS
        if row.model in ("FLUX.1 dev", "LTX-Video", "Llama 3 8B") and 4096 < row.keys < 9000
    ]


def measure_all(
    decided: dict[Case, list[Seen]], device: torch.device, dtype: torch.dtype, args: Any, start: float
) -> None:
    """Measure what was decided sparse, or all, until the time is over; what is short first, since it might lose."""
    for case in sorted(decided, key=lambda case: case.work):
        wanted = [x for x in decided[case] if x.speedup is None and (args.all or x.decision.status == "sparse")]
        if not wanted or time.perf_counter() - start > args.seconds:
            continue
        try:
            found = {x.sparsity: x for x in measured(wanted, device, dtype, args)}
        except RuntimeError as error:  # as of memory
            print(f"{case.name}: {str(error).splitlines()[0]}")
            continue
        decided[case] = [found.get(x.sparsity, x) for x in decided[case]]


def judge(seen: Sequence[Seen], with_dense: bool) -> None:
    """Print how many were measured, and those that were decided wrongly."""
    sparse = [x for x in seen if x.decision.status == "sparse"]
    left = [x.decision.prediction.speedup for x in sparse if x.speedup is None and x.decision.prediction]
    least = f", predicted at least {min(left):.2f}x" if left else ""
    print(f"{len({x.case for x in seen})} cases, {len(seen)} decisions, {len(sparse)} of them sparse")
    print(f"measured: {sum(x.speedup is not None for x in seen)}; decided sparse and not measured: {len(left)}{least}")
    titles = {"sparse": "decided sparse, and slower by more than 5 %", "dense": "decided dense, and 20 % missed"}
    for status, title in titles.items():
        bad = [x for x in seen if x.decision.status == status and is_bad(x)]
        print(f"{title}: {len(bad)}" + ("" if status == "sparse" or with_dense else " (not measured; --all does)"))
        if bad:
            print(harness.table(rows_of(bad)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--tiny", action="store_true", help="a few short shapes, to see that everything runs")
    parser.add_argument("--all", action="store_true", help="measure what is decided dense as well")
    parser.add_argument("--eager", action="store_true", help="decide and measure eager code (replace_attention)")
    parser.add_argument("--compiled", type=int, default=0, help="measure so many cases by torch.compile itself (0)")
    parser.add_argument("--only", default="", help="shapes whose name has this in it")
    parser.add_argument(
        "--most-ms", type=float, default=3000, help="longer dense calls, as predicted, are left out (3000)"
    )
    parser.add_argument("--seconds", type=float, default=500, help="nothing more is measured then (500)")
    parser.add_argument("--after", nargs="*", default=[], help="rows of earlier runs: what they have is not measured")
    parser.add_argument("--quiet", action="store_true", help="print no row for each shape")
    parser.add_argument("--csv", help="write the rows to this file as well")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    device, dtype = harness.start(args)
    how = device, dtype, "eager" if args.eager else "inductor"
    known = {key: times for path in args.after for key, times in measured_before(path).items()}
    decided = {
        case: [
            each._replace(**dict(zip(("dense", "sparse"), known.get(key_of(each, how[2]), ()), strict=False)))
            for each in (Seen(case, name, decision(case, pair, *how)) for name, pair in PAIRS.items())
        ]
        for case in cases(tiny() if args.tiny else ROWS)
        if args.only in case.name
    }
    measure_all(decided, device, dtype, args, start)
    seen = [x for each in decided.values() for x in each]
    if not args.quiet:
        print(harness.table(summary(seen)))
    judge(seen, args.all)
    if args.csv:
        harness.write_csv(args.csv, rows_of(seen, how[2]))
    some = [x for x in seen if x.speedup and x.decision.status == "sparse"]
    some = [x for x in some if x.case.row.head_size == x.case.row.value_head_size]
    if args.compiled and some:
        picked = some[:: max(1, len(some) // args.compiled)][: args.compiled]
        print(harness.table([compiled_row(x, device, dtype) for x in picked]))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
