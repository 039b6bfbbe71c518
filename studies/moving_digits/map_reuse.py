"""Whether a block map of an earlier denoising step would do for this one: the trained model along its sampler.

    python studies/moving_digits/map_reuse.py --steps 25 50 --topk 0.1
    python studies/moving_digits/map_reuse.py --frames 4 --steps 4 --clips 1

At each step of a dense run the model also runs with sparse attention (Top-k, one share for all heads): with the maps of
this step, of the step before, and of the one before that. All read as many blocks. The velocity error is ‖u − v‖² ÷
‖v‖² against the dense model, a mean over steps; so is how far q and k have moved (a relative L2 distance, a mean over
layers) and how many blocks the old map shares with the new one. Then whole sparse runs that make their maps anew in
every step, and in every second, and their PSNR against the dense run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from digits import noise_of
from measures import psnr, velocity_error
from setups import SMALL
from tabulate import tabulate
from torch import Tensor, nn
from transformer import load

import sparge_compile
from sparge_compile import BlockMap, Grid, ops
from sparge_compile.kernels.how import How
from sparge_compile.kernels.order import TILE, make_order

GUIDANCE = 3.0
EVERY = (1, 2)  # steps in which whole runs make their maps


class Maps:
    """Attention by the maps of some step, and those of this step if they are made.

    ``held``: for each layer the map that is read; None: it is made. ``made``: what was made, by layer.
    """

    def __init__(self, topk: float, grid: Grid | None) -> None:
        self._topk = topk
        order = None if grid is None else make_order(grid, TILE, torch.device("cpu"))
        self._slots = None if order is None else order.slots.long()
        self._places = None if order is None else order.places.long()
        self.held: list[BlockMap] | None = None
        self.made: list[BlockMap] = []
        self.operands: list[tuple[Tensor, Tensor]] = []
        self._layer = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What stands in for SDPA; grids have whole tiles, so an order is a permutation."""
        if self._slots is not None:
            query, key, value = (x[:, :, self._slots.to(x.device)] for x in (query, key, value))
        if self.held is None:
            how = How(None, False, query.shape[-1] ** -0.5)
            pairs = torch.tensor([[self._topk, 0.0]], device=query.device).expand(query.shape[1], 2)
            self.made.append(ops.build_map(query, key, value, pairs, how))
            self.operands.append((query, key))
        read = self.made[-1] if self.held is None else self.held[self._layer]
        self._layer += 1
        out = sparge_compile.attention(query, key, value, block_map=read)
        return out if self._places is None else out[:, :, self._places.to(out.device)]

    @contextmanager
    def used(self, held: list[BlockMap] | None) -> Iterator[None]:
        """Have the model attend by these maps, or make its own."""
        dense, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self
        self.held, self.made, self.operands, self._layer = held, [], [], 0
        try:
            yield
        finally:
            F.scaled_dot_product_attention = dense


def walk(steps: int, noise: Tensor, velocity: Callable[[int, Tensor, float], Tensor]) -> Tensor:
    """Euler's method as ``transformer.sample`` has it; ``velocity`` is asked at each step."""
    times = torch.linspace(1, 0, steps + 1)
    times = SMALL.shift * times / (1 + (SMALL.shift - 1) * times)
    video = noise
    for number, (time, following) in enumerate(itertools.pairwise(times.tolist())):
        video = video + (following - time) * velocity(number, video, time)
    return video.clamp(-1, 1)


def guided(model: nn.Module, video: Tensor, time: float, classes: Tensor) -> Tensor:
    """The velocity with classifier-free guidance."""
    both = torch.cat((classes, torch.zeros_like(classes)))
    given, free = model(torch.cat((video, video)), torch.full((len(both),), time, device=video.device), both).chunk(2)
    return free + GUIDANCE * (given - free)


def shared(one: BlockMap, other: BlockMap) -> float:
    """The share of the blocks of a map that another has, too."""
    a, b = (x.to_dense() for x in (one, other))
    return ((a & b).sum() / a.sum()).item()


def moved(now: list[tuple[Tensor, Tensor]], before: list[tuple[Tensor, Tensor]], which: int) -> float:
    """‖x − x'‖ ÷ ‖x‖ of queries (0) or keys (1), a mean over layers."""
    pairs = zip(now, before, strict=True)
    return statistics.fmean(((a[which] - b[which]).norm() / a[which].norm()).item() for a, b in pairs)


@torch.no_grad()
def along(model: nn.Module, steps: int, maps: Maps, noise: Tensor, classes: Tensor) -> tuple[Tensor, dict[str, list]]:
    """The dense run, and what was found at its steps."""
    found: dict[str, list] = defaultdict(list)
    old: list[tuple[list[BlockMap], list[tuple[Tensor, Tensor]]]] = []  # the last two steps, the later first

    def velocity(number: int, video: Tensor, time: float) -> Tensor:
        dense = guided(model, video, time, classes)
        with maps.used(None):
            fresh = guided(model, video, time, classes)
            made, operands = maps.made, maps.operands
        if len(old) == 2:
            found["fresh"].append(velocity_error(fresh, dense).mean().item())
            for age, (held, before) in enumerate(old, 1):
                with maps.used(held):
                    reused = guided(model, video, time, classes)
                found[f"age {age}"].append(velocity_error(reused, dense).mean().item())
                found[f"shared {age}"].append(statistics.fmean(shared(a, b) for a, b in zip(made, held, strict=True)))
                found[f"moved {age}"].append((moved(operands, before, 0) + moved(operands, before, 1)) / 2)
        old.insert(0, (made, operands))
        del old[2:]
        return dense

    return walk(steps, noise, velocity), found


@torch.no_grad()
def whole(model: nn.Module, steps: int, maps: Maps, noise: Tensor, classes: Tensor, every: int) -> Tensor:
    """A sparse run that makes its maps in every so manieth step."""
    held: list[BlockMap] = []

    def velocity(number: int, video: Tensor, time: float) -> Tensor:
        nonlocal held
        anew = number % every == 0
        with maps.used(None if anew else held):
            out = guided(model, video, time, classes)
            held = maps.made if anew else held
        return out

    return walk(steps, noise, velocity)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50])
    parser.add_argument("--topk", type=float, nargs="+", default=[0.1])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--orders", nargs="+", choices=("raster", "tiles"), default=["raster", "tiles"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = load("teacher", args.device)
    noise, classes = noise_of(SMALL, 0, args.clips, args.device, args.frames)
    rows = []
    for steps, topk, order in itertools.product(args.steps, args.topk, args.orders):
        maps = Maps(topk, Grid(0, *SMALL.grid(args.frames)) if order == "tiles" else None)
        dense, found = along(model, steps, maps, noise, classes)
        mean = {name: statistics.fmean(values) for name, values in found.items()}
        runs = [psnr(whole(model, steps, maps, noise, classes, every), dense).mean().item() for every in EVERY]
        columns = ("fresh", "age 1", "age 2", "shared 1", "shared 2", "moved 1", "moved 2")
        rows.append(
            [steps, f"{topk:.0%}", order, *(f"{mean[name]:.4f}" for name in columns), *(f"{x:.1f}" for x in runs)]
        )
        print(*rows[-1], flush=True)
    headers = ["steps", "kept", "order", "fresh", "1 old", "2 old", "shared 1", "shared 2", "moved 1", "moved 2"]
    headers += [f"PSNR, every {every}" for every in EVERY]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
