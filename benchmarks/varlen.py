"""Packed sequences: one call over all of them, beside the padded batch under a key mask and torch's own varlen_attn.

    python benchmarks/varlen.py                                    # 8 sequences of 1K to 16K, H 24, D 128, bfloat16
    python benchmarks/varlen.py --lengths 300,200 --heads 2 --head-size 32 --device cpu

Time and peak memory above the operands, forward and forward with backward, in one run. Before a time is printed, the
packed result is compared with that of each sequence by itself. All sparse rows keep the same share of blocks.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor

from sparge_compile import attention, varlen_attention

LENGTHS = (1024, 2048, 3072, 5120, 7168, 9216, 12288, 16384)


class Batch:
    """The sequences of one call, packed and padded."""

    def __init__(
        self, lengths: list[int], heads: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.lengths, self.longest = lengths, max(lengths)
        self.starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        sequences = [
            [harness.smooth(1, heads, n, head_size, dtype, device)[0].transpose(0, 1) for n in lengths]
            for _ in range(3)
        ]
        self.packed = [torch.cat(x).requires_grad_() for x in sequences]  # [T, H, D]
        padded = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True).transpose(1, 2) for x in sequences)
        self.padded = [x.detach().requires_grad_() for x in padded]  # [N, H, L, D]
        self.mask = (torch.arange(self.longest, device=device) < torch.tensor(lengths, device=device)[:, None])[
            :, None, None
        ]

    @property
    def packing(self) -> tuple[Tensor, Tensor, int, int]:
        """What follows the operands in a packed call."""
        return self.starts, self.starts, self.longest, self.longest

    def check(self, causal: bool, topk: float) -> float:
        """The sparsity of the packed call, once its result is that of each sequence by itself."""
        how = {"causal": "top_left" if causal else "", "topk": topk, "topp": 0.0}
        with torch.no_grad():
            found, sparsity = varlen_attention(*self.packed, *self.packing, **how, return_sparsity=True)
            parts = zip(*(x.split(self.lengths) for x in (found, *self.packed)), strict=True)
            for out, *operands in parts:
                one = attention(*(x.transpose(0, 1)[None] for x in operands), is_causal=causal, topk=topk, topp=0.0)
                tolerance = 8 * torch.finfo(out.dtype).eps
                torch.testing.assert_close(out, one[0].transpose(0, 1), atol=tolerance, rtol=tolerance)
        return float(sparsity)


def calls_of(batch: Batch, causal: bool, topk: float) -> dict[str, tuple[list[Tensor], Callable[[], Any]]]:
    """Operands and forward of each way to attend."""
    alignment = "top_left" if causal else ""
    found: dict[str, tuple[list[Tensor], Callable[[], Any]]] = {}
    for name, share in (("packed, sparse", topk), ("packed, all blocks", 1.0)):
        call = partial(varlen_attention, *batch.packed, *batch.packing, causal=alignment, topk=share, topp=0.0)
        found[name] = batch.packed, call
    padded = partial(attention, *batch.padded, batch.mask, is_causal=causal, topk=topk, topp=0.0)
    found["padded with a key mask, sparse"] = batch.padded, padded
    own = torchs_own(causal)
    if own is not None and batch.starts.device.type == "cuda":
        found["torch's varlen_attn, dense"] = batch.packed, partial(own, *batch.packed, *batch.packing)
    return found


def torchs_own(causal: bool) -> Callable[..., Any] | None:
    """torch.nn.attention.varlen.varlen_attn with its word for causality; None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not causal:
        return varlen_attn
    names = inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, **({"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}))


def measured(batch: Batch, causal: bool, topk: float, device: torch.device, budget: float) -> list[dict[str, object]]:
    """A row for each way to attend: milliseconds and MiB, forward and with the backward."""
    rows: dict[str, dict[str, object]] = {}
    calls: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward and backward": {}}
    for name, (operands, forward) in calls_of(batch, causal, topk).items():
        dout = torch.randn_like(operands[0])

        def inference(forward: Callable[[], Any] = forward) -> Any:
            with torch.no_grad():
                return forward()

        def training(forward: Callable[[], Any] = forward, operands: Any = operands, dout: Tensor = dout) -> Any:
            return torch.autograd.grad(forward(), operands, dout)

        calls["forward"][name], calls["forward and backward"][name] = inference, training
        rows[name] = {"": name}
    for what, each in calls.items():
        times = harness.seconds_each(each, device, budget)
        for name, call in each.items():
            memory = harness.extra_memory(call, device)
            rows[name] |= {f"{what}, ms": 1000 * times[name], f"{what}, MiB": memory}
    return list(rows.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="of the sequences")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--topk", type=float, default=0.05, help="share of the key blocks that the sparse rows keep")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each time")
    args = parser.parse_args(arguments)
    device, dtype = harness.start(args)
    torch.manual_seed(0)
    lengths = [int(n) for n in args.lengths.split(",")]
    batch = Batch(lengths, args.heads, args.head_size, dtype, device)
    sparsity = batch.check(args.causal, args.topk)
    share = sum(lengths) / (len(lengths) * max(lengths))
    print(f"{len(lengths)} sequences, {sum(lengths)} rows, {share:.0%} of the padded batch; sparsity {sparsity:.1%}\n")
    print(harness.table(measured(batch, args.causal, args.topk, device, args.budget)))


if __name__ == "__main__":
    main()
