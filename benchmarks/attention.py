"""Our kernels beside their rivals in one run: the table of DESIGN section 10, or its CPU counterpart.

    python benchmarks/attention.py                      # this machine's device; CUDA: shapes A and B
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
SWEEP_DENSITIES = (0.05, 0.25, 0.5, 1.0)
PRODUCTS = {"map": 0, "forward": 2, "backward": 5}  # of two flops for each pair and channel

DENSE = {"cuda": "dense cuDNN", "cpu": "dense SDPA"}
FLEX = "FlexAttention 128x128, map given"
WHOLE = "ours: map + forward"


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def of(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Inputs:
        dout = torch.randn(shape, device=device).to(dtype)
        return Inputs(*(harness.smooth(*shape, dtype, device) for _ in range(3)), dout)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


class Method(NamedTuple):
    """A row of the table: what is timed, and what raises WrongResult when it is not right."""

    name: str
    direction: str  # forward, backward or map
    call: Callable[[], object]
    kept: bool = True  # whether it computes the kept blocks alone
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
        Method("ours: map", "map", lambda: ours.block_map(q, k, thresholds, *options), check=check_map),
        Method("ours: forward, map given", "forward", forward, check=check),
        Method(
            WHOLE,
            "forward",
            lambda: ours.forward(q, k, v, ours.block_map(q, k, thresholds, *options), *options),
            check=check,
        ),
        Method(
            "ours: backward",
            "backward",
            backward,
            check=lambda: harness.check_backward(q, k, v, out, lse, dout, block_map, backward()),
        ),
    ], block_map


# ---- rivals


def dense_methods(name: str, inputs: Inputs, backend: torch.nn.attention.SDPBackend | None) -> Iterator[Method]:
    def attend(*x: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(*x)
        with torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*x)

    yield from autograd_methods(name, attend, inputs, kept=False)


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
    yield from autograd_methods(FLEX, lambda *x: compiled(*x, block_mask=mask), inputs, kept=True)


def autograd_methods(name: str, attend: Callable[..., Tensor], inputs: Inputs, kept: bool) -> Iterator[Method]:
    with torch.no_grad():
        attend(*inputs[:3])  # a rival that cannot run says so here
    yield Method(name, "forward", torch.no_grad()(lambda: attend(*inputs[:3])), kept)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    yield Method(name, "backward", lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True), kept)


def rivals(inputs: Inputs, density: float) -> list[tuple[str, Callable[[], Iterator[Method]]]]:
    """Names and makers; the first is the dense rival that ratios refer to."""
    from torch.nn.attention import SDPBackend

    if inputs.q.device.type != "cuda":
        return [(DENSE["cpu"], lambda: dense_methods(DENSE["cpu"], inputs, None))]
    return [
        (DENSE["cuda"], lambda: dense_methods(DENSE["cuda"], inputs, SDPBackend.CUDNN_ATTENTION)),
        ("dense FlashAttention-2", lambda: dense_methods("dense FlashAttention-2", inputs, SDPBackend.FLASH_ATTENTION)),
        (FLEX, lambda: flex_methods(inputs, density)),
    ]


# ---- the table


class Measured(NamedTuple):
    method: Method
    seconds: float | None  # None where the result is wrong or the method did not run
    extra_mib: float | None = None
    trouble: str | None = None


def measure(methods: list[Method], device: torch.device) -> list[Measured]:
    """Check, then time what is right; on a CPU all of them take turns."""
    right, found = [], []
    for method in methods:
        try:
            method.check()
            right.append(method)
        except harness.WrongResult as error:
            found.append(Measured(method, None, trouble=f"WRONG: {error}"))
    times = harness.seconds_each({str(i): m.call for i, m in enumerate(right)}, device)
    return [Measured(m, times[str(i)], harness.extra_memory(m.call, device)) for i, m in enumerate(right)] + found


def measure_all(inputs: Inputs, ours: list[Method], density: float) -> list[Measured]:
    device = inputs.q.device
    if device.type == "cpu":
        return measure([m for _, make in rivals(inputs, density) for m in make()] + ours, device)
    found = []
    for name, make in rivals(inputs, density):  # one after the other: each holds its output for the backward
        try:
            found += measure(list(make()), device)
        except RuntimeError as error:  # no such backend for this device or shape
            trouble = f"not run: {error}".splitlines()[0][:90]
            found.append(Measured(Method(name, "", lambda: None), None, trouble=trouble))
        torch.cuda.empty_cache()
    return found + measure(ours, device)


def rows_of(measured: list[Measured], inputs: Inputs, block_map: BlockMap) -> list[dict[str, object]]:
    """ms, TFLOP/s over the pairs that a method computes, and the speed-up over dense and over FlexAttention."""
    batch, heads, length, head_size = inputs.q.shape
    kept_pairs = QUERY_BLOCK * KEY_BLOCK * block_map.counts.sum(dtype=torch.float64).item()
    time_of = {(m.method.name, m.method.direction): m.seconds for m in measured}
    dense_name, rows = DENSE[inputs.q.device.type], []
    for (name, direction, _, kept, _), seconds, extra_mib, trouble in measured:
        row: dict[str, object] = {"method": name, "direction": direction}
        if seconds is None:
            rows.append(row | {"trouble": trouble})
            continue
        flops = PRODUCTS[direction] * 2 * head_size * (kept_pairs if kept else batch * heads * length**2)
        dense, flex = time_of.get((dense_name, direction)), time_of.get((FLEX, direction))
        row |= {"ms": 1000 * seconds, "TFLOP/s": flops / seconds / 1e12 if flops else None}
        row |= {"x dense": dense and dense / seconds, "x flex": flex and flex / seconds, "extra MiB": extra_mib}
        rows.append(row)
    return rows


def compare(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, wanted: float
) -> list[dict[str, object]]:
    """Print and return the table of one shape."""
    torch.manual_seed(0)
    inputs = Inputs.of(shape, dtype, device)
    thresholds = thresholds_for(wanted, inputs, harness.kernels(device).block_map)
    ours, block_map = our_methods(inputs, thresholds)
    sparsity = 1 - harness.density(block_map)
    rows = rows_of(measure_all(inputs, ours, 1 - sparsity), inputs, block_map)
    print(
        f"\n{name}: B, H, L, D = {shape}, {dtype}, sparsity reached {sparsity:.2%}\n{harness.table(rows)}", flush=True
    )
    return [{"shape": name, "sparsity": sparsity, **row} for row in rows]


def sweep(lengths: list[int], device: torch.device, dtype: torch.dtype) -> list[dict[str, object]]:
    """Where map + forward breaks even with dense, over lengths and densities (topk alone)."""
    rows = []
    for length in lengths:
        inputs = Inputs.of((1, 4, length, 64), dtype, device)
        row: dict[str, object] = {"length": length}
        for density in SWEEP_DENSITIES:
            ours, _ = our_methods(inputs, torch.tensor([[density, 0.0]] * 4, device=device))
            whole = next(m for m in ours if m.name == WHOLE)
            whole.check()
            dense = next(dense_methods(DENSE["cpu"], inputs, None))
            times = harness.seconds_each({"dense": dense.call, "ours": whole.call}, device)
            row |= {"dense ms": 1000 * times["dense"], f"x dense at {density:.0%}": times["dense"] / times["ours"]}
        rows.append(row)
    print(
        f"\nmap + forward against dense, B1 H4 D64 {dtype}, by share of blocks kept\n{harness.table(rows)}", flush=True
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=["cuda", "cpu"], help=f"({here})")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), help="default: A B on CUDA, cpu on a CPU")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16; float32 on a CPU"
    )
    parser.add_argument("--density", type=float, default=0.05, help="share of key blocks to keep (default 0.05)")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that everything runs")
    parser.add_argument("--threads", type=int, help="CPU threads; one is steadier on a shared machine")
    parser.add_argument("--csv", help="write all rows to this file as well")
    args = parser.parse_args()
    device = harness.require(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    names = args.shapes or (["quick"] if args.quick else ["A", "B"] if on_gpu else ["cpu"])

    print(harness.header(device))
    rows = [row for name in names for row in compare(name, SHAPES[name], dtype, device, args.density)]
    if not on_gpu:
        rows += sweep([512, 1024] if args.quick else [1024, 2048, 4096, 8192, 16384], device, dtype)
    if args.csv:
        harness.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
