"""Measures dense and sparse attention on this device and fits the tables of sparge_compile/cost_table.py.

    dense  = dense_base  + dense_pair · pairs · D
    sparse = sparse_base + pool · B (H L + Hk S) D + select · B H Nq Nk + sparse_pair · idle · density · pairs · D

in seconds of one forward, and of one forward with its backward, with pairs = B H L S, half of it when causal, and idle
as cost.py has it. A GPU's times are its own, of calls queued in a CUDA graph. Relative errors are fitted. The host's
times are those of host.py. What the table copied from other entries (cost_table.ESTIMATED) is measured first.

    python benchmarks/fit_cost_model.py                               # a GPU: under five minutes; prints entries
    python benchmarks/fit_cost_model.py --write cost_table.py         # and writes the table with them to this file
    python benchmarks/fit_cost_model.py --seconds 0 --write table.py  # the host's times alone: a minute
    python benchmarks/fit_cost_model.py --estimated                   # what was not measured so far
    python benchmarks/fit_cost_model.py --device cpu --tiny           # that everything runs
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import host
import numpy as np
import rivals
import torch

from sparge_compile import cost, cost_table
from sparge_compile.cost import device_class, idle
from sparge_compile.cost_table import Six
from sparge_compile.host import time_dense_call
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div, visible_blocks
from sparge_compile.passes.decide import MARGIN

Host = tuple[tuple[float, float], tuple[float, float]]  # a row of cost_table.HOST

# What is measured for each entry of a table, the most wanted first: dtype, head sizes, and whether all shapes are.
KINDS = {
    "cuda": {
        ("half", 128): (torch.bfloat16, (128,), True),
        ("half", 64): (torch.bfloat16, (64,), True),
        ("half", 256): (torch.bfloat16, (256,), False),
        ("float32", 64): (torch.float32, (64,), False),
        ("float32", 128): (torch.float32, (128,), False),
    },
    "cpu": {("float32", 128): (torch.float32, (64, 128), True)},
}
LENGTHS = {"cuda": (1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768), "cpu": (1024, 2048, 4096)}
HEADS = {"cuda": (10, 24), "cpu": (1, 4)}
MOST_FLOPS = {  # of one dense forward: some 25 ms of a GPU, 0.4 s of a CPU
    ("cuda", "half"): 1.4e13,
    ("cuda", "float32"): 1e12,
    ("cpu", "float32"): 2e10,
}
DENSITIES = {"forward": (0.05, 0.25, 0.5, 0.8), "step": (0.1, 0.3, 0.8)}
TITLES = {"forward": "forward", "step": "forward + backward"}


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    length: int
    keys: int
    head_size: int
    is_causal: bool = False

    @property
    def pairs(self) -> float:
        return self.heads * self.length * self.keys / (2 if self.is_causal else 1)

    @property
    def pool(self) -> float:
        return (self.heads * self.length + self.kv_heads * self.keys) * self.head_size

    @property
    def select(self) -> float:
        return self.heads * (self.length / QUERY_BLOCK) * (self.keys / KEY_BLOCK)


class Sample(NamedTuple):
    shape: Shape
    what: str  # "forward" or "step"
    density: float
    dense: float  # seconds
    sparse: float
    idle: float = 1.0  # how many times as long the kernels take since some multiprocessors have no program


def shapes(device: str, head_size: int, is_whole: bool) -> Iterator[Shape]:
    """Self-attention; where all shapes are wanted, causal, grouped and cross-attention too."""
    for length, heads in itertools.product(LENGTHS[device], HEADS[device]):
        if is_whole or (length >= 2048 and heads > 10):
            yield Shape(heads, heads, length, length, head_size)
    for length in LENGTHS[device][::2] if is_whole else ():
        heads = HEADS[device][-1]
        yield Shape(heads, max(1, heads // 4), length, length, head_size, is_causal=True)
        if length >= 4096:
            yield Shape(heads, heads, length, length // 4, head_size)


def samples(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """The fastest dense attention, and sparse attention at each density: forward, then forward and backward."""
    ours = harness.kernels(device)
    sizes = [(shape.heads, shape.length), *[(shape.kv_heads, shape.keys)] * 2]
    q, k, v = (rivals.projected(harness.smooth(1, *size, shape.head_size, dtype, device)) for size in sizes)
    n_query, n_key = ceil_div(shape.length, QUERY_BLOCK), ceil_div(shape.keys, KEY_BLOCK)
    visible = int(visible_blocks(n_query, n_key, shape.length, shape.is_causal, torch.device("cpu")).sum())
    for what, densities in DENSITIES.items():
        dense = rivals.dense_calls(q, k, v, shape.is_causal, what)
        calls: dict[str, Callable[[], object]] = {**dense}
        reached = {}
        for density in densities:
            thresholds = torch.tensor([[density, 0.0]] * shape.heads, device=device)
            block_map = ours.block_map(q, k, thresholds, None, shape.is_causal, shape.head_size**-0.5)
            reached[f"{density}"] = harness.density(block_map, visible)
            calls[f"{density}"] = rivals.sparse_call(q, k, v, thresholds, shape.is_causal, what)
        times = seconds_each(calls, device)
        best = min(times[name] for name in dense)
        forward, backward = idle(device_class(device), cost.Shape(1, *shape[:5], shape.head_size))
        for name, density in reached.items():
            yield Sample(
                shape, what, density, best, times[name], forward if what == "forward" else max(forward, backward)
            )


def seconds_each(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {name: rivals.queued_seconds(call, device) for name, call in calls.items()}
    # A fit compares times of different minutes: on a CPU, the least of the runs is the least disturbed.
    return harness.seconds_each(calls, device, budget=0.05, pick=min)


def fit(columns: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Non-negative coefficients with the least squared relative error: exact, every set of non-zero ones is tried."""
    relative = columns / times[:, None]
    size = np.abs(relative).max(0)
    best, least = np.zeros(columns.shape[1]), np.inf
    for used in itertools.product((False, True), repeat=columns.shape[1]):
        if not any(used):
            continue
        chosen = np.flatnonzero(used)
        found, *_ = np.linalg.lstsq(relative[:, chosen] / size[chosen], np.ones(len(times)), rcond=None)
        loss = np.square(relative[:, chosen] / size[chosen] @ found - 1).sum()
        if (found >= 0).all() and loss < least:
            best, least = np.zeros(columns.shape[1]), loss
            best[chosen] = found / size[chosen]
    return best


def fit_six(found: Sequence[Sample]) -> tuple[Six, np.ndarray, np.ndarray]:
    """The coefficients in the table's order, and what the forms predict for dense and for sparse attention."""
    one = np.ones(len(found))
    pair = np.array([s.shape.pairs * s.shape.head_size for s in found])
    pool, select = (np.array([getattr(s.shape, name) for s in found], float) for name in ("pool", "select"))
    share = np.array([s.density * s.idle for s in found])
    dense, sparse = (np.array([getattr(s, name) for s in found]) for name in ("dense", "sparse"))
    columns, more = np.stack([one, pair], 1), np.stack([one, pool, select, share * pair], 1)
    d, s = fit(columns, dense), fit(more, sparse)
    return tuple(float(f"{x:.3e}") for x in (*d, *s)), columns @ d, more @ s  # type: ignore[return-value]


def report(kind: tuple[str, int], found: Sequence[Sample]) -> list[Six]:
    """Print an entry of the table, and how well it predicts and decides what was measured; give the entry."""
    sixes = []
    for what, title in TITLES.items():
        some = [s for s in found if s.what == what]
        six, *predicted = fit_six(some)
        sixes.append(six)
        for name, guess, measured in zip(
            ("dense", "sparse"), predicted, ([s.dense for s in some], [s.sparse for s in some]), strict=True
        ):
            errors = [abs(p / t - 1) for p, t in zip(guess, measured, strict=True)]
            worst = some[int(np.argmax(errors))]
            print(
                f"# {title}, {name}: relative error median {statistics.median(errors):.1%}, worst {max(errors):.0%} at "
                f"{tuple(worst.shape)}, density {worst.density:.2f}"
            )
        chosen = [d >= MARGIN * s for d, s in zip(*predicted, strict=True)]
        lost = sorted(
            s.dense / s.sparse for s, is_sparse in zip(some, chosen, strict=True) if is_sparse and s.dense < s.sparse
        )
        missed = sorted(
            s.dense / s.sparse
            for s, is_sparse in zip(some, chosen, strict=True)
            if not is_sparse and s.dense > 1.2 * s.sparse
        )
        for title_of, gains in (("sparse, and slower", lost), ("dense, though more than 1.2x", missed)):
            print(f"#   decided {title_of}: {len(gains)} of {len(some)} {[f'{g:.2f}' for g in gains]}")
    print(entry_text(kind, sixes), flush=True)
    return sixes


def entry_text(kind: tuple[str, int], sixes: Sequence[Six]) -> str:
    rows = (f"            ({', '.join(f'{x:g}' for x in six)}),\n" for six in sixes)
    return f'        ("{kind[0]}", {kind[1]}): (\n{"".join(rows)}        ),'


def measured_hosts(device: torch.device) -> tuple[dict[str, Host], tuple[float, float]]:
    """The host's seconds, dense and sparse, by who launches; and what a mask adds to a sparse call.

    Of a forward, and of a forward with its backward.
    """
    rows = {name: (dense / 1e6, sparse / 1e6) for name, dense, sparse in host.host_rows(device.type)}
    rows |= {name: (dense / 1e6, sparse / 1e6) for name, dense, sparse in host.replaced_rows(device.type)}
    names = {"compiled": "compiled", "eager": "replaced"}
    hosts = {who: (rows[f"{name}, inference"], rows[f"{name}, training"]) for who, name in names.items()}
    return hosts, (seconds_of_a_mask(device.type, "forward"), seconds_of_a_mask(device.type, "step"))


def hosts_text(hosts: Mapping[str, Host]) -> str:
    rows = (
        f'    "{who}": ({", ".join("({:.1e}, {:.1e})".format(*pair) for pair in pairs)}),\n'
        for who, pairs in hosts.items()
    )
    return "".join(rows)


def table_text(
    text: str,
    name: str,
    entries: Mapping[tuple[str, int], Sequence[Six]],
    reference: float = 0.0,
    hosts: Mapping[str, Host] | None = None,
    mask: tuple[float, float] = (0.0, 0.0),
) -> str:
    """The source of cost_table.py, ``text``, with these entries of a class of devices and these times of the host."""
    hosts = hosts or {}
    before, header, rest = text.partition(f'    "{name}": {{')
    for kind, sixes in entries.items():
        pattern, new = rf'        \("{kind[0]}", {kind[1]}\): \(\n.*?\n        \),', entry_text(kind, sixes)
        rest = rest.replace(re.search(pattern, rest, re.DOTALL)[0], new, 1)  # type: ignore[index]
    measured = {*((name, kind) for kind in entries), *(("host", who) for who in (*hosts, "masked") if hosts)}
    left = sorted(cost_table.ESTIMATED - measured, key=str)
    lines = {"ESTIMATED": f"{{{', '.join(map(repr, left))}}}".replace("'", '"') if left else "set()"}
    if hosts:
        lines |= {"REFERENCE": f"{reference:.2e}", "MASKED": "({:.1e}, {:.1e})".format(*mask)}
        head, between, tail = rest.partition("HOST: ")
        first, last = tail.index("{\n") + 2, tail.index("\n}") + 1
        rest = head + between + tail[:first] + hosts_text(hosts) + tail[last:]
    for variable, value in lines.items():
        rest = re.sub(rf"^({variable}\b.*?) = .*$", rf"\1 = {value}", rest, flags=re.MULTILINE)
    return before + header + rest


def seconds_of_a_mask(device: str, what: str) -> float:
    """How much longer the host takes for our ops, called as Inductor's code calls them, under a mask."""
    q, k, v = host.operands(host.SMALL, device)
    mask = torch.arange(k.shape[2], device=device).view(1, 1, 1, -1) < k.shape[2] - 7
    thresholds = torch.tensor([[host.KEPT, 0.0]] * q.shape[1], device=device)
    plain, masked = (
        host.host_time(rivals.sparse_call(q, k, v, thresholds, False, what, each), device, calls=20)
        for each in (None, mask)
    )
    return max(0.0, masked - plain) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--tiny", action="store_true", help="the shortest sequences alone, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=210, help="no other kind is begun after this time (210)")
    parser.add_argument("--estimated", action="store_true", help="measure only what the table has no measurement of")
    parser.add_argument("--no-host", action="store_true", help="leave the host's times out")
    parser.add_argument("--write", help="write the table, with what was measured, to this file")
    parser.add_argument("--csv", help="write the samples to this file")
    args = parser.parse_args()
    start = time.perf_counter()
    device, _ = harness.start(args)
    torch.manual_seed(0)
    hosts: tuple[Any, ...] = ()
    if device.type == "cuda" and not args.no_host:
        hosts = time_dense_call(device), *measured_hosts(device)
        print(f"REFERENCE = {hosts[0]:.2e}\n{hosts_text(hosts[1])}MASKED = {hosts[2]}", flush=True)
    name = device_class(device)
    entries: dict[tuple[str, int], list[Six]] = {}
    kinds = sorted(KINDS[device.type].items(), key=lambda item: (name, item[0]) not in cost_table.ESTIMATED)
    rows: list[dict[str, object]] = []
    for kind, (dtype, head_sizes, is_whole) in kinds:
        if args.estimated and (name, kind) not in cost_table.ESTIMATED:
            continue
        if time.perf_counter() - start > args.seconds:
            print(f"# {kind}: not measured, since {args.seconds:.0f} s are over")
            continue
        found: list[Sample] = []
        for shape in itertools.chain(*(shapes(device.type, size, is_whole) for size in head_sizes)):
            small = 4 * shape.pairs * shape.head_size <= MOST_FLOPS[device.type, kind[0]]
            if small and not (args.tiny and shape.length > 2048):
                found += samples(shape, device, dtype)
        print(f"# {kind}: {len(found)} samples, at {time.perf_counter() - start:.0f} s")
        entries[kind] = report(kind, found)
        rows += [{"dtype": str(dtype), **s.shape._asdict(), **s._replace(shape=None)._asdict()} for s in found]
        if args.csv:
            harness.write_csv(args.csv, rows)
    if args.write:
        Path(args.write).write_text(table_text(Path(cost_table.__file__).read_text(), name, entries, *hosts))
    print(f"# {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
