"""Our kernels beside their rivals in one run: the table of DESIGN section 10, or its CPU counterpart.

    python benchmarks/attention.py                      # CUDA: shapes A and B
    python benchmarks/attention.py --device cpu         # L = 16384, then lengths and densities against dense
    python benchmarks/attention.py --device cpu --quick

Every result is checked against the definition before its time is printed; one that fails gets "wrong" and no speed-up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.kernels import reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div

SHAPES = {  # (B, H, L, D); S = L
    "A": (1, 12, 32760, 128),
    "B": (1, 40, 75600, 128),
    "cpu": (1, 4, 16384, 64),
    "quick": (1, 2, 1100, 64),
}
TOPK = 0.03  # the paper's; topp is found for the wanted density
FLEX_BLOCK = 128


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def of(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Inputs:
        return Inputs(*(harness.smooth(*shape, dtype, device) for _ in range(3)), torch.randn(shape, device=device).to(dtype))

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


class Method(NamedTuple):
    """A row of the table: what is timed, and what raises WrongResult when it is not right."""

    name: str
    direction: str  # forward, backward or map
    call: Callable[[], object]
    check: Callable[[], None] = lambda: None


# ---- ours


def thresholds_for(density: float, inputs: Inputs, block_map: Callable[..., BlockMap]) -> Tensor:
    """[H, 2], different in each head, of about the wanted density over all heads: bisection on topp."""
    heads, device = inputs.q.shape[1], inputs.q.device
    spread = torch.linspace(0.8, 1.2, heads, device=device)
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        thresholds = torch.stack([spread * min(TOPK, 0.8 * density), (spread * middle).clamp(max=1.0)], 1)
        found = harness.density(block_map(inputs.q, inputs.k, thresholds, None, False, inputs.scale))
        low, high = (middle, high) if found < density else (low, middle)
    return thresholds


def our_methods(inputs: Inputs, thresholds: Tensor) -> tuple[list[Method], BlockMap]:
    ours = harness.kernels(inputs.q.device)
    q, k, v, dout = inputs
    options = (None, False, inputs.scale)
    block_map = ours.block_map(q, k, thresholds, *options)
    out, lse = ours.forward(q, k, v, block_map, *options)
    bits = ours.pack(block_map, ceil_div(k.shape[2], KEY_BLOCK))

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        return ours.backward(dout, q, k, v, out, lse, None, bits, *options)

    def check_map() -> None:
        some = slice(0, min(q.shape[1], 2))
        true = reference.block_map(q[:, some], k[:, some], thresholds[some], *options).to_dense()
        differ = (true != BlockMap(*(x[:, some] for x in block_map)).to_dense()).float().mean().item()
        if differ > 1e-3:  # scores that tie to rounding may change places
            raise harness.WrongResult(f"the map differs from the definition in {differ:.1%} of its blocks")

    forward = lambda: ours.forward(q, k, v, block_map, *options)  # noqa: E731
    check = lambda: harness.check_forward(q, k, v, block_map, out, lse)  # noqa: E731
    return [
        Method("ours: map", "map", lambda: ours.block_map(q, k, thresholds, *options), check_map),
        Method("ours: forward, map given", "forward", forward, check),
        Method(
            "ours: map + forward",
            "forward",
            lambda: ours.forward(q, k, v, ours.block_map(q, k, thresholds, *options), *options),
            check,
        ),
        Method(
            "ours: backward",
            "backward",
            backward,
            lambda: harness.check_backward(q, k, v, out, lse, dout, block_map, backward()),
        ),
    ], block_map


# ---- rivals


def dense_methods(name: str, inputs: Inputs, backend: torch.nn.attention.SDPBackend | None) -> Iterator[Method]:
    def attend(*x: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(*x)
        with torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*x)

    yield from autograd_methods(name, attend, inputs)


def flex_methods(inputs: Inputs, density: float) -> Iterator[Method]:
    """FlexAttention, compiled, over a 128 x 128 map of the same density made from the same pooled scores."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, length = inputs.q, inputs.k, inputs.q.shape[2]
    scores = reference.pool(q, FLEX_BLOCK) @ reference.pool(k, FLEX_BLOCK).mT
    n_keep = max(1, round(density * scores.shape[-1]))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(n_keep, -1).indices, True)
    counts, indices = BlockMap.from_dense(kept)
    # As full blocks: no element mask is computed in them.
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), indices, counts, indices, BLOCK_SIZE=FLEX_BLOCK, seq_lengths=(length, length)
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    yield from autograd_methods("FlexAttention 128x128, map given", lambda *x: compiled(*x, block_mask=mask), inputs)


def autograd_methods(name: str, attend: Callable[..., Tensor], inputs: Inputs) -> Iterator[Method]:
    with torch.no_grad():
        attend(*inputs[:3])  # a rival that cannot run says so here
    yield Method(name, "forward", torch.no_grad()(lambda: attend(*inputs[:3])))
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    yield Method(name, "backward", lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True))


def rivals(inputs: Inputs, density: float) -> Iterator[tuple[str, Callable[[], Iterator[Method]]]]:
    """Names and makers; the first is what ratios refer to."""
    from torch.nn.attention import SDPBackend

    if inputs.q.device.type != "cuda":
        yield "dense", lambda: dense_methods("dense SDPA", inputs, None)
        return
    yield "dense", lambda: dense_methods("dense cuDNN", inputs, SDPBackend.CUDNN_ATTENTION)
    yield "FA2", lambda: dense_methods("dense FlashAttention-2", inputs, SDPBackend.FLASH_ATTENTION)
    yield "flex", lambda: flex_methods(inputs, density)


# ---- the table


def compare(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, wanted: float) -> list[dict]:
    """Rows of one shape: ms, TFLOP/s over the pairs that are computed, and how many times faster than the rivals."""
    torch.manual_seed(0)
    inputs = Inputs.of(shape, dtype, device)
    thresholds = thresholds_for(wanted, inputs, harness.kernels(device).block_map)
    ours, block_map = our_methods(inputs, thresholds)
    reached, head_size = harness.density(block_map), shape[3]
    flops = {
        True: 4 * head_size * QUERY_BLOCK * KEY_BLOCK * block_map.counts.sum(dtype=torch.float64).item(),
        False: 4 * head_size * shape[0] * shape[1] * shape[2] ** 2,
    }
    print(f"\n{name}: B{shape[0]} H{shape[1]} L{shape[2]} D{head_size} {dtype}, sparsity reached {1 - reached:.2%}", flush=True)
    rows, times = [], {}

    def measure(group: str, methods: list[Method]) -> None:
        right = [m for m in methods if passes(m, rows)]
        found = harness.seconds_each({f"{m.name} {m.direction}": m.call for m in right}, device)
        for m in right:
            time = found[f"{m.name} {m.direction}"]
            times.setdefault((group, m.direction), time)
            work = flops[group not in ("dense", "FA2")] * {"forward": 1.0, "backward": 2.5, "map": 0.0}[m.direction]
            row = {"method": m.name, "direction": m.direction, "ms": 1000 * time, "TFLOP/s": work / time / 1e12 or None}
            for rival, label in (("dense", "x dense"), ("flex", "x flex")):
                if (rival, m.direction) in times:
                    row[label] = times[rival, m.direction] / time
            rows.append(row | {"extra MiB": harness.extra_memory(m.call, device)})

    if device.type == "cpu":  # all take turns, since a CPU is disturbed for seconds
        measure("all", [m for _, make in rivals(inputs, reached) for m in make()] + ours)
        return fix_cpu_rows(rows, flops)
    for group, make in rivals(inputs, reached):
        try:
            measure(group, list(make()))
        except RuntimeError as error:  # no such backend for this device or shape
            rows.append({"method": group, "direction": f"not run: {str(error).splitlines()[0][:60]}"})
    measure("ours", ours)
    return rows


def passes(method: Method, rows: list[dict]) -> bool:
    try:
        method.check()
    except harness.WrongResult as error:
        rows.append({"method": method.name, "direction": method.direction, "ms": f"wrong ({error})"})
        return False
    return True
