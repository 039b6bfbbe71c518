"""One training step of a Wan-1.3B-shaped transformer, dense under Inductor and sparse, in one run: time and memory.

    python benchmarks/training_step.py   # an H200: L = 32,760, about 95 % sparsity
    python benchmarks/training_step.py --tiles --topk 0.25   # raster order beside tiles of space and time
    python benchmarks/training_step.py --device cpu --inner eager --layers 2 --width 128 --ffn 256 --frames 2

A step is student forward, teacher forward, backward and AdamW, in bf16 with activation checkpointing of each block.
Both models are compiled block by block (--whole: as one graph), and so are their teachers, the dense one too without
the fusion of Inductor's that computes wrong gradients before torch 2.15 (``sparge_compile.inner.sound``). The model is
a stand-in with Wan's shapes and attention calls in plain torch; its weights are random, so the sparsity that the
thresholds reach is measured and printed. Gradients are compared first with those of the same model in which all blocks
are kept.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import sparge_compile
from sparge_compile.inner import sound
from sparge_compile.running.listeners import heard_by

sys.path.append(str(Path(__file__).parent))
import harness
from wan_stand_in import CHANNELS, TEXT, Wan


class Sites:
    """Hears how many sites of a model ran sparse."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def ran(self, options: object, names: list[str], outputs: object) -> None:
        self.names |= set(names)


def compiled(model: nn.Module, whole: bool, backend: str, **options: object) -> nn.Module:
    """The model, compiled block by block or as one graph."""
    given = {"backend": backend, "fullgraph": True, **({"options": options} if options else {})}
    if whole:
        return torch.compile(model, **given)
    for block in model.blocks:
        block.compile(**given)
    return model


class Clock:
    """Seconds of each part of a step, and the peak of memory over it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[float]] = {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, name: str, call: Callable[[], object]) -> object:
        self.wait()
        start = time.perf_counter()
        result = call()
        self.wait()
        self.times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])


def measure(
    student: nn.Module, inputs: tuple[Tensor, ...], teacher: nn.Module, steps: int, clock: Clock
) -> float | None:
    """Times the parts of some steps; gives the peak of memory in GiB, weights and optimizer included."""
    gc.collect()  # compiled models stand in cycles
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.01, fused=clock.device.type == "cuda")
    for number in range(steps + 2):
        if number == 2:  # after two steps everything is compiled, and the optimizer has its state
            clock.times.clear()
            if clock.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(clock.device)
        out = clock("student forward", lambda: student(*inputs))
        with torch.no_grad():
            target = clock("teacher forward", lambda: teacher(*inputs))
        loss = F.mse_loss(out.float(), target.float())
        clock("backward", loss.backward)
        clock("AdamW", optimizer.step)
        optimizer.zero_grad(set_to_none=True)
        del out, target, loss
    return torch.cuda.max_memory_allocated(clock.device) / 2**30 if clock.device.type == "cuda" else None


def hooked_step(student: nn.Module, inputs: tuple[Tensor, ...], steps: int, clock: Clock) -> float | None:
    """The same with the hook, as a user writes it: only the whole step has a time."""
    gc.collect()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.01, fused=clock.device.type == "cuda")

    def step() -> None:
        student(*inputs)
        hook.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with sparge_compile.DistillationHook(student) as hook:
        for number in range(steps + 2):
            if number == 2:
                clock.times.pop("whole step", None)
                if clock.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(clock.device)
            clock("whole step", step)
        return torch.cuda.max_memory_allocated(clock.device) / 2**30 if clock.device.type == "cuda" else None


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The gradient of the blocks' parameters as one vector."""
    model.zero_grad(set_to_none=True)
    model(*inputs).float().square().mean().backward()
    found = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def finite(found: Tensor, name: str) -> bool:
    """Whether gradients are numbers; says of whom they are not, which is not always the sparse model."""
    bad = int((~found.isfinite()).sum())
    if bad:
        print(f"FAULT: {bad:,} of {found.numel():,} gradients of the {name} model are not finite")
    return not bad


@torch.no_grad()
def sparsity_of(model: Wan, inputs: tuple[Tensor, ...], topk: float, topp: float) -> float:
    """The mean sparsity of self-attention over the layers, of the uncompiled model with sparse attention put in."""
    dense, found = F.scaled_dot_product_attention, []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] <= TEXT:
            return dense(q, k, v)
        out, sparsity = sparge_compile.attention(q, k, v, topk=topk, topp=topp, return_sparsity=True)
        found.append(sparsity.item())
        return out

    F.scaled_dot_product_attention = attention
    try:
        model(*inputs)
    finally:
        F.scaled_dot_product_attention = dense
    return statistics.mean(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--frames", type=int, default=21, help="of the latents (21)")
    parser.add_argument("--height", type=int, default=60, help="of the latents (60)")
    parser.add_argument("--columns", type=int, default=104, help="of the latents (104)")
    parser.add_argument("--topk", type=float, default=0.05)
    parser.add_argument("--topp", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts (5)")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--whole", action="store_true", help="compile each model as one graph, which takes minutes")
    parser.add_argument("--no-checkpoint", action="store_true", help="keep all activations")
    parser.add_argument("--min-seq-len", type=int, default=1024)
    parser.add_argument("--tiles", action="store_true", help="measure a student in tiles of space and time as well")
    args = parser.parse_args()
    device = harness.require(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(harness.header(device), flush=True)
    torch.manual_seed(0)
    base = Wan(args.layers, args.width, args.ffn, not args.no_checkpoint).to(device, dtype)
    inputs = (
        torch.randn(1, CHANNELS, args.frames, args.height, args.columns, device=device, dtype=dtype),
        torch.randn(1, TEXT, args.width, device=device, dtype=dtype),
        torch.tensor([500.0], device=device),
    )
    length = args.frames * args.height * args.columns // 4
    millions = sum(p.numel() for p in base.parameters()) / 1e6
    print(
        f"{millions:.0f} M parameters, L = {length:,}, {dtype}, checkpointing {'off' if args.no_checkpoint else 'on'}"
    )
    options = {"topk": args.topk, "topp": args.topp, "min_seq_len": args.min_seq_len, "inner": args.inner}
    dense_backend = args.inner

    # The gate: with all blocks kept, the sparse model is the dense one.
    all_kept = {**options, "topk": 1.0, "topp": 0.0}
    dense = gradients(compiled(copy.deepcopy(base), args.whole, dense_backend), inputs)
    sites = Sites()
    with heard_by(sites):
        kept = gradients(compiled(copy.deepcopy(base), args.whole, "sparge", **all_kept), inputs)
    if len(sites.names) != args.layers:
        print(f"FAULT: {len(sites.names)} of {args.layers} self-attentions are sparse")
        return 1
    if not (finite(dense, "dense") & finite(kept, "rewritten")):
        return 1
    error = ((kept - dense).norm() / dense.norm()).item()
    bound = 0.05 if dtype == torch.bfloat16 else 1e-3
    print(f"gradients with all blocks kept against dense: relative error {error:.1e} (bound {bound:g})", flush=True)
    if not error <= bound:
        return 1
    del dense, kept
    print(f"sparsity at topk {args.topk}, topp {args.topp}: {sparsity_of(base, inputs, args.topk, args.topp):.1%}")

    teacher = compiled(copy.deepcopy(base), args.whole, dense_backend).requires_grad_(False).eval()
    clocks, peaks = {}, {}
    in_tiles = {**options, "token_order": "tiles", "grid": (args.frames, args.height // 2, args.columns // 2)}
    arms = [("dense", dense_backend, {}), ("sparse", "sparge", options)]
    arms += [("tiles", "sparge", in_tiles)] * args.tiles
    for name, backend, given in arms:
        student = compiled(copy.deepcopy(base), args.whole, backend, **given)
        clocks[name] = Clock(device)
        peaks[name] = measure(student, inputs, teacher, args.steps, clocks[name])
        del student
        print(f"{name}: measured", flush=True)
    del teacher
    student = compiled(copy.deepcopy(base), args.whole, "sparge", **options)
    clocks["hook"] = Clock(device)
    peaks["hook"] = hooked_step(student, inputs, args.steps, clocks["hook"])

    rows = []
    for part in ("student forward", "backward", "teacher forward", "AdamW"):
        times = [clocks[name].median(part) for name in ("dense", "sparse")]
        rows.append((part, *(1000 * t for t in times), times[0] / times[1]))
    both = [sum(row[i] for row in rows[:2]) for i in (1, 2)]
    whole = [sum(row[i] for row in rows) for i in (1, 2)]
    rows.append(("student forward + backward", *both, both[0] / both[1]))
    rows.append(("whole step", *whole, whole[0] / whole[1]))
    with_hook = 1000 * clocks["hook"].median("whole step")
    rows.append(("whole step with DistillationHook", whole[0], with_hook, whole[0] / with_hook))
    if args.tiles:
        raster, tiles = (
            sum(clocks[n].median(part) for part in ("student forward", "backward")) for n in ("sparse", "tiles")
        )
        print(f"\nstudent forward + backward in tiles: {1000 * tiles:.1f} ms, {tiles / raster:.3f} of raster order")
    print(
        "\n"
        + tabulate(
            rows, headers=("ms", f"dense, {args.inner}", "sparse", "ratio"), floatfmt=(".0f", ".1f", ".1f", ".2f")
        )
    )
    if peaks["dense"] is not None:
        memory = ", ".join(f"{name} {peak:.1f}" for name, peak in peaks.items())
        print(f"\npeak memory of a step in GiB, weights, optimizer and teacher included: {memory}")
    return 0


if __name__ == "__main__":
    with torch._inductor.config.patch(sound()):
        sys.exit(main())
