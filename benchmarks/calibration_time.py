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
from tabulate import tabulate
from torch import Tensor, nn
from wan_stand_in import TEXT, Block, positions

import sparge_compile

WIDEN = 35 / 6  # of the feed-forward layer: 1,536 to 8,960


class StandIn(nn.Module):
    """Wan's blocks between tokens and tokens; the cross-attention to TEXT keys stays dense."""

    def __init__(self, layers: int, heads: int, head_size: int, length: int) -> None:
        super().__init__()
        width = heads * head_size
        self.blocks = nn.ModuleList(Block(width, int(width * WIDEN), head_size) for _ in range(layers))
        cos, sin = positions(length, head_size, torch.get_default_device())
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.register_buffer("time", torch.zeros(1, 6, width))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text, self.time, self.cos, self.sin)
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
