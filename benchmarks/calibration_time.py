"""What calibration costs beside the model's own forwards, on a transformer of Wan2.1-1.3B's sizes.

    python benchmarks/calibration_time.py                                   # the whole shape; a GPU with 8 GiB free
    python benchmarks/calibration_time.py --layers 2 --length 2048 --device cpu

The model is a stand-in in plain torch with Wan's attention calls, widths and dtype, and random weights: time hangs on
sizes alone, so neither weights nor diffusers are needed. It runs eagerly, once for each sample, as calibration runs it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator

import harness
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import sparge_compile

TEXT = 512  # keys of the cross-attention, which stays dense
WIDEN = 35 / 6  # of the feed-forward layer: 1,536 to 8,960


class Attention(nn.Module):
    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        width, self.heads = heads * head_size, heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor, context: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        split = (self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in split)  # [B, L, H, D]
        if turn is not None:
            q, k = rotated(q, *turn), rotated(k, *turn)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(out.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position: x [B, L, H, D], cos and sin [L, 1, D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Block(nn.Module):
    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        width = heads * head_size
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(heads, head_size), Attention(heads, head_size)
        wide = int(width * WIDEN)
        self.ffn = nn.Sequential(nn.Linear(width, wide), nn.GELU("tanh"), nn.Linear(wide, width))

    def forward(self, x: Tensor, text: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attn1(y, y, turn)
        x = x + self.attn2(self.norms[1](x), text, None)
        return x + self.ffn(self.norms[2](x))


class StandIn(nn.Module):
    def __init__(self, layers: int, heads: int, head_size: int, length: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(heads, head_size) for _ in range(layers))
        rates = 1e4 ** -torch.linspace(0, 1, head_size // 2)
        angles = torch.arange(length).view(-1, 1, 1) * rates
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text, (self.cos, self.sin))
        return x


def peak_gib(device: torch.device) -> float | None:
    """GiB at the peak since the last call; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 30), ("heads", 12), ("head-size", 128), ("length", 32760), ("samples", 4)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--query-blocks", type=int, default=32, help="as in sparge calibrate (32)")
    parser.add_argument("--memory", type=int, default=1024, help="as in sparge calibrate (1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device = harness.require(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(harness.header(device))

    torch.manual_seed(0)
    width = given.heads * given.head_size
    with device:
        model = StandIn(given.layers, given.heads, given.head_size, given.length).to(dtype).eval()
    samples = [
        (harness.smooth(1, 1, given.length, width, dtype, device)[0], torch.randn(1, TEXT, width).to(device, dtype))
        for _ in range(given.samples)
    ]

    def forward(x: Tensor, text: Tensor) -> None:
        model(x, text).flatten()[0].item()  # waits for a GPU

    with torch.no_grad():
        forward(*samples[0])
        peak_gib(device)
        forwards = statistics.median(harness.seconds(lambda sample=sample: forward(*sample)) for sample in samples)
    forward_peak = peak_gib(device)

    asked: list[float] = []  # when calibration asked for a sample: whatever came before is measured and on the host

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for sample in samples:
            asked.append(time.perf_counter())
            yield sample
        asked.append(time.perf_counter())

    found = sparge_compile.calibrate(
        model, batches(), query_blocks=given.query_blocks, memory=given.memory, options={"min_seq_len": TEXT + 1}
    )
    search = time.perf_counter() - asked[-1]
    assert len(found.sites) == given.layers
    first, *later = (end - begin for begin, end in itertools.pairwise(asked))
    added = [x - forwards for x in (first, *later)]
    beyond = sum(added) + search
    rows = [
        ("the model's own forward, each", forwards, forward_peak),
        ("recording beside it, first sample (Dynamo traces)", added[0], peak_gib(device)),
        *([("recording beside it, each later sample", statistics.median(added[1:]), None)] if later else []),
        ("recording, a site call", statistics.median(added[1:] or added) / given.layers, None),
        ("search", search, None),
        (f"beyond the forwards, {given.samples} samples", beyond, None),
    ]
    shape = f"{given.layers} layers, H {given.heads}, L {given.length}, D {given.head_size}, {dtype}"
    print(f"{shape}; {given.query_blocks} query blocks, {given.memory} MiB of scratch memory\n")
    print(tabulate(rows, headers=("", "seconds", "peak GiB"), floatfmt=(".0f", ".3f", ".2f")))


if __name__ == "__main__":
    main()
