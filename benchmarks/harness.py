"""What the benchmarks share: who runs (devices, versions), inputs, timing, the gate before a speed-up, tables.

Times are seconds inside and milliseconds in print. On CUDA a time is the median that ``triton.testing.do_bench`` gives;
on a CPU it is the median of calls that take turns with those of the rivals, since other work disturbs it for seconds.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from tabulate import tabulate
from torch import Tensor

from sparge_compile.kernels import reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div, pack

ERROR_FACTOR = 4  # a result may err this many times as much as dense attention of the same dtype over the same keys
ERROR_FLOOR = 1e-6  # where dense attention errs by nearly nothing, as over one key
TOKENS_OF_A_SCENE = 256  # rows over which the slow part of an input stays alike


class WrongResult(Exception):
    """A kernel's result differs from the definition: its time means nothing."""


# ---- who runs


def require(device: str) -> torch.device:
    """The device, or an exit with what is missing."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SystemExit("This benchmark was asked for CUDA, and torch sees no CUDA device. Try --device cpu.")
        if find_spec("triton") is None:
            raise SystemExit("The GPU kernels and their timing need Triton (pip install triton). Try --device cpu.")
    return torch.device(device)


def header(device: torch.device) -> str:
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if device.type == "cuda":
        triton = import_module("triton").__version__
        cudnn = torch.backends.cudnn.version()
        parts = [torch.cuda.get_device_name(device), *parts, f"Triton {triton}", f"cuDNN {cudnn}"]
    else:
        parts = [f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", *parts]
    return " | ".join(parts)


def kernels(device: torch.device) -> SimpleNamespace:
    """block_map, forward, backward and pack of the device, with equal signatures."""
    if device.type == "cuda":
        names = ("select", "forward", "backward", "lists")
        select, forward, backward, lists = (import_module(f"sparge_compile.kernels.{name}") for name in names)
        return SimpleNamespace(
            block_map=select.block_map, forward=forward.forward, backward=backward.backward, pack=lists.pack
        )
    cpu = import_module("sparge_compile.kernels.cpu")
    return SimpleNamespace(
        block_map=cpu.block_map,
        forward=cpu.forward,
        backward=cpu.backward,
        pack=lambda block_map, n_key: pack(block_map.to_dense()),
    )


# ---- inputs


def smooth(batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, H, L, D] whose rows change slowly, so that block means differ and scores have a standard deviation near 1."""
    scenes = max(2, length // TOKENS_OF_A_SCENE)
    slow = torch.randn(batch * heads, head_size, scenes, device=device)
    slow = torch.nn.functional.interpolate(slow, size=length, mode="linear", align_corners=True)
    slow = slow.mT.contiguous() * 1.2  # interpolation takes some of the deviation away
    # Contiguous: interpolation leaves memory that no fused kernel of torch takes.
    return (slow + 0.5 * torch.randn_like(slow)).to(dtype).contiguous().view(batch, heads, length, head_size)


def density(block_map: BlockMap, visible: int | None = None) -> float:
    """Kept over visible key blocks; ``visible`` of one head, or all of them."""
    counts, n_key = block_map.counts, block_map.indices.shape[-1]
    visible = counts.shape[-1] * n_key if visible is None else visible
    return counts.sum(dtype=torch.float64).item() / (counts.shape[0] * counts.shape[1] * visible)


# ---- timing


def seconds_each(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: float = 0.3,
    pick: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, float]:
    """The median time of each call, with about ``budget`` seconds spent on each, three runs at least.

    ``pick`` may take another one than the median of the runs on a CPU.
    """
    if device.type == "cuda":
        do_bench = import_module("triton").testing.do_bench
        rep = int(1000 * budget)
        options = {"warmup": rep // 10, "rep": rep, "return_mode": "median"}
        return {name: do_bench(call, **options) / 1000 for name, call in calls.items()}
    first = {name: seconds(call) for name, call in calls.items()}  # also warms up
    repeats = {name: max(3, min(50, round(budget / max(t, 1e-6)))) for name, t in first.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(repeats.values(), default=0)):
        for name, call in calls.items():
            if turn < repeats[name]:
                times[name].append(seconds(call))
    return {name: pick(t) for name, t in times.items()}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def extra_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB above what is held before the call at its peak, results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return (peak - before) / 2**20


# ---- the gate


def check_forward(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, out: Tensor, lse: Tensor) -> None:
    """Compare some query blocks with the definition in float64; raise :class:`WrongResult`.

    Without a mask and with as many key as query heads, which is what the benchmarks use.
    """
    for head, i in samples(q, ceil_div(q.shape[2], QUERY_BLOCK)):
        rows = slice(i * QUERY_BLOCK, (i + 1) * QUERY_BLOCK)
        some_q, some_k, some_v = q[:1, head, rows][:, None], k[:1, head][:, None], v[:1, head][:, None]
        lists = BlockMap(block_map.counts[:1, head, i].view(1, 1, 1), block_map.indices[:1, head, i][:, None, None])
        keep = lists.to_dense().view(-1).repeat_interleave(KEY_BLOCK)[: k.shape[2]]
        some_k, some_v = some_k[:, :, keep], some_v[:, :, keep]
        exact = (x.double() for x in (some_q, some_k, some_v))
        true, true_lse = reference.attention(*exact, all_blocks(some_q, some_k.shape[2]))
        dense = torch.nn.functional.scaled_dot_product_attention(some_q, some_k, some_v)
        compare("forward", out[:1, head, rows], dense[:, 0], true[:, 0])
        if not torch.allclose(lse[:1, head, rows].double(), true_lse[:, 0], atol=1e-3, rtol=1e-4):
            raise WrongResult(f"lse of head {head}, query block {i} is not the definition's")


def check_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    block_map: BlockMap,
    grads: Sequence[Tensor],
) -> None:
    """Compare dq of some query blocks, dk and dv of some key blocks, with the formulas in float64."""
    for head, i in samples(q, min(ceil_div(q.shape[2], QUERY_BLOCK), ceil_div(k.shape[2], KEY_BLOCK))):
        kept = BlockMap(block_map.counts[:1, head], block_map.indices[:1, head]).to_dense()[0]  # [Nq, Nk]
        rows, keys = (slice(i * b, (i + 1) * b) for b in (QUERY_BLOCK, KEY_BLOCK))
        one_q, one_k, one_v, one_out, one_dout = (x[0, head].double() for x in (q, k, v, out, dout))
        whole = (one_q, one_out, one_dout, lse[0, head].double().unsqueeze(-1))

        allowed = kept[i].repeat_interleave(KEY_BLOCK)[: k.shape[2]].double()
        _, ds, size = score_gradients(*(x[rows] for x in whole), one_k, one_v, allowed)
        compare_sum("dq", grads[0][0, head, rows], ds, one_k, size)
        allowed = kept[:, i].repeat_interleave(QUERY_BLOCK)[: q.shape[2]].double().unsqueeze(-1)
        p, ds, size = score_gradients(*whole, one_k[keys], one_v[keys], allowed)
        compare_sum("dk", grads[1][0, head, keys], ds.mT, one_q, size.mT)
        compare_sum("dv", grads[2][0, head, keys], p.mT, one_dout, p.mT)


def score_gradients(
    q: Tensor, out: Tensor, dout: Tensor, lse: Tensor, k: Tensor, v: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights p [rows, keys], the gradients ds of the scores, and the size of what ds is a difference of."""
    scale = q.shape[-1] ** -0.5
    p = (q @ k.mT * scale - lse).exp() * allowed
    dp, delta = dout @ v.mT, (dout * out).sum(-1, keepdim=True)
    return p, p * (dp - delta) * scale, p * (dp.abs() + delta.abs()) * scale


def samples(q: Tensor, blocks: int) -> list[tuple[int, int]]:
    """(head, block): the first, one in the middle, the last."""
    return [(0, 0), (q.shape[1] // 2, blocks // 2), (q.shape[1] - 1, blocks - 1)]


def all_blocks(q: Tensor, keys: int) -> BlockMap:
    shape = (1, 1, ceil_div(q.shape[2], QUERY_BLOCK), ceil_div(keys, KEY_BLOCK))
    return BlockMap.from_dense(torch.ones(shape, dtype=torch.bool, device=q.device))


def compare(what: str, found: Tensor, dense: Tensor, true: Tensor) -> None:
    error, allowed = ((x.double() - true).abs().amax().item() for x in (found, dense))
    if not error <= ERROR_FACTOR * allowed + ERROR_FLOOR:
        raise WrongResult(f"{what}: error {error:.1e}, dense attention over the same keys {allowed:.1e}")


def compare_sum(what: str, found: Tensor, left: Tensor, right: Tensor, size: Tensor) -> None:
    """found should be left @ right, where each entry of left was rounded at the magnitude ``size``, independently.

    Products and sums are in float32, whose scores are near 10: an exponential then errs by near 10 float32 roundings.
    """
    rounding = 2 * torch.finfo(found.dtype).eps + 16 * torch.finfo(torch.float32).eps
    error, true = (found.double() - left @ right).norm().item(), (left @ right).norm().item()
    allowed = ERROR_FACTOR * rounding * (size.square() @ right.square()).sum().sqrt().item() + ERROR_FLOOR
    if not error <= allowed:
        raise WrongResult(f"{what}: error {error:.1e} of {true:.1e}, rounding explains {allowed:.1e}")


# ---- print


def table(rows: Sequence[Mapping[str, object]]) -> str:
    return tabulate(rows, headers="keys", floatfmt=".4g", missingval="–", tablefmt="github")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
