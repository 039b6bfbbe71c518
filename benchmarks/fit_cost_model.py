"""Measures dense and sparse attention on this device and fits the tables of sparge_compile/cost_table.py.

    dense  = dense_base  + dense_pair · pairs · D
    sparse = sparse_base + pool · B (H L + Hk S) D + select · B H Nq Nk + sparse_pair · density · pairs · D

in seconds of one forward, and of one forward with its backward, with pairs = B H L S, half of it when causal. A GPU's
times are its own, of calls queued in a CUDA graph. Relative errors are fitted. The host's times are those of host.py.

    python benchmarks/fit_cost_model.py                         # a GPU: under five minutes; prints what to paste
    python benchmarks/fit_cost_model.py --device cpu --tiny     # that everything runs
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import harness
import host
import numpy as np
import rivals
import torch

from sparge_compile.cost_table import Six
from sparge_compile.host import time_dense_call
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div, visible_blocks
from sparge_compile.passes.decide import MARGIN

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
        for name, density in reached.items():
            yield Sample(shape, what, density, best, times[name])


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
    share = np.array([s.density for s in found])
    dense, sparse = (np.array([getattr(s, name) for s in found]) for name in ("dense", "sparse"))
    columns, more = np.stack([one, pair], 1), np.stack([one, pool, select, share * pair], 1)
    d, s = fit(columns, dense), fit(more, sparse)
    return tuple(float(f"{x:.3e}") for x in (*d, *s)), columns @ d, more @ s  # type: ignore[return-value]


def report(kind: tuple[str, int], found: Sequence[Sample]) -> None:
    """Print an entry of the table, and how well it predicts and decides what was measured."""
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
    print(f'        ("{kind[0]}", {kind[1]}): (')
    for six in sixes:
        print(f"            ({', '.join(f'{x:g}' for x in six)}),")
    print("        ),", flush=True)


def report_host(device: torch.device) -> None:
    """Print the host's times: eager and compiled, a forward and a forward with its backward, dense and sparse."""
    print(f"REFERENCE = {time_dense_call(device):.2e}")
    timed = host.host_rows(device.type) + host.replaced_rows(device.type) + masked_rows(device.type)
    rows = {name: (dense / 1e6, sparse / 1e6) for name, dense, sparse in timed}
    for launched, name in {"compiled": "compiled", "eager": "replaced", "masked": "masked"}.items():
        pairs = (rows[f"{name}, inference"], rows[f"{name}, training"])
        print(f'    "{launched}": ({", ".join("({:.1e}, {:.1e})".format(*pair) for pair in pairs)}),', flush=True)


def masked_rows(device: str) -> list[list[Any]]:
    """The host's microseconds for a call under a mask: eager SDPA, and our ops as Inductor's code calls them."""
    rows: list[list[Any]] = []
    for what, title in (("forward", "inference"), ("step", "training")):
        q, k, v = host.operands(host.SMALL, device)
        mask = torch.arange(k.shape[2], device=device).view(1, 1, 1, -1) < k.shape[2] - 7
        thresholds = torch.tensor([[host.KEPT, 0.0]] * q.shape[1], device=device)
        dense = next(iter(rivals.dense_calls(q, k, v, False, what, mask).values()))
        sparse = rivals.sparse_call(q, k, v, thresholds, False, what, mask)
        rows.append([f"masked, {title}", *(host.host_time(call, device, calls=20) for call in (dense, sparse))])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--tiny", action="store_true", help="the shortest sequences alone, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=210, help="no other kind is begun after this time (210)")
    parser.add_argument("--no-host", action="store_true", help="leave the host's times out")
    parser.add_argument("--csv", help="write the samples to this file")
    args = parser.parse_args()
    start = time.perf_counter()
    device, _ = harness.start(args)
    torch.manual_seed(0)
    if device.type == "cuda" and not args.no_host:
        report_host(device)
    rows: list[dict[str, object]] = []
    for kind, (dtype, head_sizes, is_whole) in KINDS[device.type].items():
        if time.perf_counter() - start > args.seconds:
            print(f"# {kind}: not measured, since {args.seconds:.0f} s are over")
            continue
        found: list[Sample] = []
        for shape in itertools.chain(*(shapes(device.type, size, is_whole) for size in head_sizes)):
            small = 4 * shape.pairs * shape.head_size <= MOST_FLOPS[device.type, kind[0]]
            if small and not (args.tiny and shape.length > 2048):
                found += samples(shape, device, dtype)
        print(f"# {kind}: {len(found)} samples, at {time.perf_counter() - start:.0f} s")
        report(kind, found)
        rows += [{"dtype": str(dtype), **s.shape._asdict(), **s._replace(shape=None)._asdict()} for s in found]
        if args.csv:
            harness.write_csv(args.csv, rows)
    print(f"# {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
