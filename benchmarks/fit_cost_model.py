"""Measures dense and sparse attention on this device and fits the coefficients of sparge_compile/cost.py.

    dense  = dense_base  + dense_pair · pairs · D
    sparse = sparse_base + pool · B (H L + Hk S) D + select · B H Nq Nk + sparse_pair · density · pairs · D

in seconds of one forward, with pairs = B H L S, half of it when causal. The map and the attention are measured and
fitted apart and then added, so that the small map does not drown in the attention's noise. Relative errors are fitted.

    python benchmarks/fit_cost_model.py --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import harness
import numpy as np
import torch
import torch.nn.functional as F

from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, ceil_div, visible_blocks
from sparge_compile.passes.decide import MARGIN

LENGTHS = {"cuda": (1024, 2048, 4096, 8192, 16384, 32768, 65536), "cpu": (512, 1024, 2048, 4096, 8192)}
HEADS = {"cuda": (1, 8, 32), "cpu": (1, 4, 8)}
MOST_FLOPS = {"cuda": 6e13, "cpu": 4e10}  # of one dense call: some 0.1 s and 0.4 s
DENSITIES = (0.05, 0.2, 0.5)


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
    density: float
    dense: float  # seconds
    map: float
    forward: float


def shapes(device: str) -> Iterator[Shape]:
    for length, heads, head_size in itertools.product(LENGTHS[device], HEADS[device], (64, 128)):
        yield Shape(heads, heads, length, length, head_size)
        if heads > 1 and head_size == 64:
            yield Shape(heads, heads, length, length, head_size, is_causal=True)
            yield Shape(heads, heads // 4, length, length // 4, head_size)
            yield Shape(heads, heads, length // 4, length, head_size)


def samples(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Sample]:
    ours, scale = harness.kernels(device), shape.head_size**-0.5
    q = harness.smooth(1, shape.heads, shape.length, shape.head_size, dtype, device)
    k, v = (harness.smooth(1, shape.kv_heads, shape.keys, shape.head_size, dtype, device) for _ in range(2))
    gqa = shape.heads != shape.kv_heads
    calls = {"dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=shape.is_causal, enable_gqa=gqa)}
    n_query, n_key = ceil_div(shape.length, QUERY_BLOCK), ceil_div(shape.keys, KEY_BLOCK)
    visible = int(visible_blocks(n_query, n_key, shape.length, shape.is_causal, torch.device("cpu")).sum())
    options, reached = (None, shape.is_causal, scale), {}
    for density in DENSITIES:
        thresholds = torch.tensor([[density, 0.0]] * shape.heads, device=device)
        block_map = ours.block_map(q, k, thresholds, *options)
        reached[density] = harness.density(block_map, visible)
        calls["map"] = lambda thresholds=thresholds: ours.block_map(q, k, thresholds, *options)
        calls[f"{density}"] = lambda block_map=block_map: ours.forward(q, k, v, *block_map, *options)
    if device.type == "cuda":
        calls = {name: captured(call) for name, call in calls.items()}
    # A fit compares times of different minutes: on a CPU, the least of the runs is the least disturbed.
    times = harness.seconds_each(calls, device, budget=0.05 if device.type == "cuda" else 0.15, pick=min)
    return [Sample(shape, reached[d], times["dense"], times["map"], times[f"{d}"]) for d in DENSITIES]


def captured(call):
    """The call's kernels as a CUDA graph, so that the host's launch cost is not in the time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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


def fit_all(found: list[Sample]) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Coefficients by name, and what the form predicts for dense and for map + forward."""
    one = np.ones(len(found))
    pair = np.array([s.shape.pairs * s.shape.head_size for s in found])
    pool, select = (np.array([getattr(s.shape, name) for s in found], float) for name in ("pool", "select"))
    share = np.array([s.density for s in found])
    dense, maps, forward = (np.array([getattr(s, name) for s in found]) for name in ("dense", "map", "forward"))

    columns_dense = np.stack([one, pair], 1)
    columns_map = np.stack([one, pool, select], 1)
    columns_forward = np.stack([one, pool, share * pair], 1)
    d, m, f = fit(columns_dense, dense), fit(columns_map, maps), fit(columns_forward, forward)
    named = {"dense_base": d[0], "dense_pair": d[1], "sparse_base": m[0] + f[0], "pool": m[1] + f[1]}
    named |= {"select": m[2], "sparse_pair": f[2]}
    return {k: float(f"{v:.4g}") for k, v in named.items()}, columns_dense @ d, columns_map @ m + columns_forward @ f


def report(found: list[Sample]) -> None:
    coefficients, dense, sparse = fit_all(found)
    print(coefficients)
    for name, predicted, measured in (
        ("dense", dense, [s.dense for s in found]),
        ("map + forward", sparse, [s.map + s.forward for s in found]),
    ):
        errors = [abs(p / t - 1) for p, t in zip(predicted, measured, strict=True)]
        worst = found[int(np.argmax(errors))]
        print(
            f"{name}: relative error median {statistics.median(errors):.1%}, worst {max(errors):.0%} at {worst.shape}"
        )
    gain = [s.dense / (s.map + s.forward) for s in found]
    wrong = sorted(g for g, d, s in zip(gain, dense, sparse, strict=True) if (d >= MARGIN * s) != (g >= 1))
    gains = ", ".join(f"{g:.2f}x" for g in wrong)
    print(f"decided wrongly: {len(wrong)} of {len(found)} (their speed-ups over dense: {gains or '–'})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--csv", help="write the samples to this file")
    args = parser.parse_args()
    device, dtype = harness.start(args)
    torch.manual_seed(0)
    found: list[Sample] = []
    for shape in shapes(device.type):
        if 4 * shape.pairs * shape.head_size <= MOST_FLOPS[device.type]:
            found += samples(shape, device, dtype)
    print(f"{len(found)} samples of {dtype}")
    report(found)
    if args.csv:
        harness.write_csv(args.csv, [s.shape._asdict() | s._replace(shape=None)._asdict() for s in found])


if __name__ == "__main__":
    main()
