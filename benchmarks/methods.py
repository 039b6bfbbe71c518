"""What the attention benchmarks compare: our map, forward and backward, dense SDPA, FlexAttention, on the same tensors.

A method is a row of a table. It is checked (see gate.py) before it is timed; one that fails gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import gate
import harness
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import sparge_compile.ops  # noqa: F401
from sparge_compile.kernels import eight_bits, rule
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div, visible_blocks
from sparge_compile.kernels.how import How

TOPK = 0.03  # the paper's; topp is found for the wanted density
FLEX_BLOCK = 128
PRODUCTS = {"map": 0, "forward": 2, "backward": 5}  # of two flops for each pair and channel

DENSE = {"cuda": "dense cuDNN", "cpu": "dense SDPA"}
FLASH = "dense FlashAttention-2"
FLEX = "FlexAttention 128x128, map given"
FLEX_BUILT = "FlexAttention 128x128, map built"
MAP = "ours: map"
FORWARD = "ours: forward, map given"
WHOLE = "ours: map + forward"
BACKWARD = "ours: backward"
CODES = "ours: codes in 8 bits, with pooling"
FORWARD_8 = "ours: forward in 8 bits, map and codes given"
WHOLE_8 = "ours: codes + map + forward in 8 bits"


class Problem(NamedTuple):
    """Sizes of one comparison; keys are as many as queries."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_size: int
    is_causal: bool = False

    @property
    def visible(self) -> int:
        """Key blocks that one head may read."""
        n_query, n_key = ceil_div(self.length, QUERY_BLOCK), ceil_div(self.length, KEY_BLOCK)
        return int(visible_blocks(n_query, n_key, self.length, self.is_causal, torch.device("cpu")).sum())

    @property
    def pairs(self) -> float:
        """Of queries and keys that attend to each other, over all heads."""
        per_head = self.length * (self.length + 1) / 2 if self.is_causal else self.length**2
        return self.batch * self.heads * per_head


class Inputs(NamedTuple):
    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hk, L, D]
    v: Tensor
    dout: Tensor  # [B, H, L, D]
    problem: Problem

    @staticmethod
    def of(problem: Problem, dtype: torch.dtype, device: torch.device) -> Inputs:
        batch, heads, kv_heads, length, head_size, _ = problem
        q, k, v = (harness.smooth(batch, h, length, head_size, dtype, device) for h in (heads, kv_heads, kv_heads))
        return Inputs(q, k, v, torch.randn(q.shape, device=device).to(dtype), problem)

    @property
    def options(self) -> tuple[None, bool, float]:
        """Mask, is_causal, scale: the last arguments of our kernels."""
        return None, self.problem.is_causal, self.problem.head_size**-0.5


class Method(NamedTuple):
    """A row of a table: what is timed, and what raises WrongResult when it is not right."""

    name: str
    direction: str  # forward, backward or map
    call: Callable[[], object]
    kept: bool = True  # whether it computes the kept blocks alone
    check: Callable[[], None] = lambda: None


class Measured(NamedTuple):
    method: Method
    seconds: float | None  # None where the result is wrong or the method did not run
    extra_mib: float | None = None
    trouble: str | None = None
    kernels: str = ""


# ---- ours


def thresholds_for(density: float, inputs: Inputs) -> Tensor:
    """[H, 2], different in each head, of about the wanted density over all heads: bisection on topp. 1 is topk = 1."""
    heads, device = inputs.problem.heads, inputs.q.device
    if density == 1:
        return torch.tensor([[1.0, 0.0]] * heads, device=device)
    block_map = harness.kernels(device).block_map
    spread = torch.linspace(0.8, 1.2, heads, device=device)
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        thresholds = torch.stack([spread * min(TOPK, 0.8 * density), (spread * middle).clamp(max=1.0)], 1)
        found = harness.density(block_map(inputs.q, inputs.k, thresholds, *inputs.options), inputs.problem.visible)
        low, high = (middle, high) if found < density else (low, middle)
    return thresholds


def our_methods(inputs: Inputs, thresholds: Tensor) -> tuple[list[Method], BlockMap]:
    ours = harness.kernels(inputs.q.device)
    q, k, v, dout, problem = inputs
    options, causal = inputs.options, problem.is_causal
    block_map = ours.block_map(q, k, thresholds, *options)
    out, lse = ours.forward(q, k, v, *block_map, *options)
    bits = ours.pack(*block_map)

    def find() -> BlockMap:
        return ours.block_map(q, k, thresholds, *options)

    def attend() -> tuple[Tensor, Tensor]:
        return ours.forward(q, k, v, *block_map, *options)

    def whole() -> Tensor:
        """The op that compiled graphs call."""
        return torch.ops.sparge.attend(q, k, v, thresholds, *options)

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        return ours.backward(dout, q, k, v, out, lse, None, bits, *options)

    def check_map() -> None:
        gate.check_map(q, k, thresholds, causal, block_map)

    def check_forward() -> None:
        gate.check_forward(q, k, v, block_map, causal, out, lse)

    def check_whole() -> None:
        gate.check_forward(q, k, v, block_map, causal, whole(), lse)

    def check_backward() -> None:
        gate.check_backward(q, k, v, out, lse, dout, block_map, causal, backward())

    return [
        Method(MAP, "map", find, check=check_map),
        Method(FORWARD, "forward", attend, check=check_forward),
        Method(WHOLE, "forward", whole, check=check_whole),
        Method(BACKWARD, "backward", backward, check=check_backward),
    ], block_map


def eight_bit_methods(inputs: Inputs, thresholds: Tensor, block_map: BlockMap) -> list[Method]:
    """The forward in 8 bits; none where this device has no kernels for it."""
    ours, (q, k, v, _, problem) = harness.kernels(inputs.q.device), inputs
    if eight_bits.refusal(q.device, problem.head_size, problem.head_size):
        return []
    how = How(*inputs.options, eight_bits=True)
    codes, _ = ours.code(q, k, v, how)

    def attend() -> tuple[Tensor, Tensor]:
        return ours.forward(q, k, v, *block_map, *how, codes=codes)

    def whole() -> Tensor:
        return torch.ops.sparge.attend(q, k, v, thresholds, *inputs.options, eight_bits=True)

    def check() -> None:
        error = gate.check_in_eight_bits(q, k, v, block_map, how, *attend())
        print(f"forward in 8 bits: relative error {error:.1e} beside the definition over the same blocks")

    def check_whole() -> None:
        gate.check_in_eight_bits(q, k, v, block_map, how, whole(), attend()[1])

    return [
        Method(CODES, "map", lambda: ours.code(q, k, v, how)),
        Method(FORWARD_8, "forward", attend, check=check),
        Method(WHOLE_8, "forward", whole, check=check_whole),
    ]


# ---- rivals


def dense_methods(name: str, inputs: Inputs, backend: SDPBackend | None) -> Iterator[Method]:
    """SDPA. Keys of grouped queries are repeated beforehand, out of its time: not every backend groups."""
    group = inputs.problem.heads // inputs.problem.kv_heads
    repeated = inputs._replace(k=inputs.k.repeat_interleave(group, 1), v=inputs.v.repeat_interleave(group, 1))

    def attend(*x: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(*x, is_causal=inputs.problem.is_causal)
        with torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*x, is_causal=inputs.problem.is_causal)

    yield from autograd_methods(name, attend, repeated if group > 1 else inputs, kept=False)


def flex_map(inputs: Inputs, density: float):
    """A BlockMask of squares, for each query block the best ones by pooled scores; if causal, the diagonal as well."""
    from torch.nn.attention.flex_attention import BlockMask

    q, k, _, _, (_, heads, kv_heads, length, _, is_causal) = inputs
    k_mean = rule.pool(k, FLEX_BLOCK).repeat_interleave(heads // kv_heads, 1)
    scores = rule.pool(q, FLEX_BLOCK) @ k_mean.mT  # [B, H, N, N]
    number = torch.arange(scores.shape[-1], device=q.device)
    seen = number + 1 if is_causal else torch.full_like(number, len(number))
    n_keep = (density * seen).round().clamp(min=1)
    if is_causal:
        scores = scores.masked_fill(number > number[:, None], -torch.inf)
    order = scores.argsort(-1, descending=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, (number < n_keep[:, None]).expand_as(order))
    diagonal = torch.eye(len(number), dtype=torch.bool, device=q.device).expand_as(kept) & is_causal
    # Whole blocks need no mask inside; on the causal diagonal every block does.
    part, whole = BlockMap.from_dense(diagonal), BlockMap.from_dense(kept & ~diagonal)
    return BlockMask.from_kv_blocks(
        *part, *whole, FLEX_BLOCK, mask_mod=_causal if is_causal else None, seq_lengths=(length, length)
    )


def _causal(b, h, row, key):
    return key <= row


def flex_methods(inputs: Inputs, density: float) -> Iterator[Method]:
    """FlexAttention, compiled, over a map of the same density from the same pooled scores."""
    from torch.nn.attention.flex_attention import flex_attention

    mask, gqa = flex_map(inputs, density), inputs.problem.heads != inputs.problem.kv_heads
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(*x: Tensor) -> Tensor:
        return compiled(*x, block_mask=mask, enable_gqa=gqa)

    def build() -> Tensor:
        return compiled(*inputs[:3], block_mask=flex_map(inputs, density), enable_gqa=gqa)

    yield from autograd_methods(FLEX, attend, inputs, kept=True)
    yield Method(FLEX_BUILT, "forward", torch.no_grad()(build))


def autograd_methods(name: str, attend: Callable[..., Tensor], inputs: Inputs, kept: bool) -> Iterator[Method]:
    with torch.no_grad():
        attend(*inputs[:3])  # a rival that cannot run says so here
    yield Method(name, "forward", torch.no_grad()(lambda: attend(*inputs[:3])), kept)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    yield Method(name, "backward", lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True), kept)


def dense_rivals(inputs: Inputs) -> list[tuple[str, Callable[[], Iterator[Method]]]]:
    """Names and makers; the first is the one that ratios refer to."""
    if inputs.q.device.type != "cuda":
        return [(DENSE["cpu"], lambda: dense_methods(DENSE["cpu"], inputs, None))]
    return [
        (DENSE["cuda"], lambda: dense_methods(DENSE["cuda"], inputs, SDPBackend.CUDNN_ATTENTION)),
        (FLASH, lambda: dense_methods(FLASH, inputs, SDPBackend.FLASH_ATTENTION)),
    ]


# ---- measure


def measure(
    methods: Sequence[Method], device: torch.device, budget: float = 0.3, gpu_only: bool = False
) -> list[Measured]:
    """Check, then time what is right; on a CPU all of them take turns."""
    right, found = [], []
    for method in methods:
        try:
            method.check()
            right.append(method)
        except gate.WrongResult as error:
            found.append(Measured(method, None, trouble=f"WRONG: {error}"))
    times = harness.seconds_each({str(i): m.call for i, m in enumerate(right)}, device, budget, gpu_only=gpu_only)
    return [
        Measured(m, times[str(i)], harness.extra_memory(m.call, device), kernels=harness.kernels_launched(m.call))
        for i, m in enumerate(right)
    ] + found


def attempt(name: str, run: Callable[[], list[Measured]]) -> list[Measured]:
    """What ``run`` measures, or a row that says why it could not: no memory, no such kernel."""
    try:
        return run()
    except torch.OutOfMemoryError:
        trouble = "out of memory"
    except RuntimeError as error:  # no such backend for this device or shape
        trouble = f"not run: {error}".splitlines()[0][:90]
    finally:
        torch.cuda.empty_cache()
    return [Measured(Method(name, "", lambda: None), None, trouble=trouble)]


def rows_of(measured: Sequence[Measured], problem: Problem, dense: str, block_map: BlockMap) -> list[dict[str, object]]:
    """ms, TFLOP/s over the pairs that a method computes, speed-up over dense and FlexAttention, Triton kernels."""
    kept_pairs = QUERY_BLOCK * KEY_BLOCK * block_map.counts.sum(dtype=torch.float64).item()
    time_of = {(m.method.name, m.method.direction): m.seconds for m in measured}
    rows = []
    for (name, direction, _, kept, _), seconds, extra_mib, trouble, kernels in measured:
        row: dict[str, object] = {"method": name, "direction": direction}
        if seconds is None:
            rows.append(row | {"trouble": trouble})
            continue
        pairs = min(kept_pairs, problem.pairs) if kept else problem.pairs
        flops = PRODUCTS[direction] * 2 * problem.head_size * pairs
        row |= {"ms": 1000 * seconds, "TFLOP/s": flops / seconds / 1e12 if flops else None}
        for label, rival in (("x dense", dense), ("x flex", FLEX), ("x flex built", FLEX_BUILT)):
            other = time_of.get((rival, direction))
            row[label] = other and other / seconds
        rows.append(row | {"extra MiB": extra_mib} | ({"kernels": kernels} if kernels else {}))
    return rows
