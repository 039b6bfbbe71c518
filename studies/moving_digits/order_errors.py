"""The error of the trained video model by the order of its tokens: raster beside tiles, at equal shares of blocks.

    python studies/moving_digits/order_errors.py
    python studies/moving_digits/order_errors.py --frames 8 --clips 4 --shares 0.1 0.3

Through the product: the compiled model with the option ``token_order``, whose grid is found in its graph; one pair of
thresholds (Top-k) for all heads, no training. Velocity error is ‖u − v‖² ÷ ‖v‖², a mean over clips and times; the
sparsity is what the report's sites kept.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from digits import clips
from measures import velocity_error
from tabulate import tabulate
from torch import Tensor
from transformer import load

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
TIMES = (0.2, 0.5, 0.8)


def inputs(count: int, frames: int, device: str, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Noisy clips of digits that were not trained on: (input, time, classes) for each clip and time."""
    found = []
    for number in range(count):
        video, classes = clips(1, seed + number, device, held_out=True, frames=frames)
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed + number)).to(video)
        for time in TIMES:
            found.append((torch.lerp(video, noise, time), torch.full((1,), time, device=device), classes))
    return found


@torch.no_grad()
def error(model: torch.nn.Module, share: float, order: str, data: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The mean velocity error with this share of blocks and this order."""
    torch._dynamo.reset()
    options = {"topk": share, "topp": 0.0, "min_seq_len": 0, "inner": "eager", "token_order": order}
    compiled = torch.compile(model, backend="sparge", options=options)
    return statistics.fmean(float(velocity_error(compiled(*each), model(*each)).mean()) for each in data)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = load("teacher", args.device)
    data = inputs(args.clips, args.frames, args.device, args.seed)
    rows = [
        [f"{share:.0%}", *(error(model, share, order, data) for order in ("raster", "tiles"))] for share in args.shares
    ]
    print(tabulate(rows, ("blocks kept", "raster", "tiles"), floatfmt=".4f", tablefmt="github"))


if __name__ == "__main__":
    main()
