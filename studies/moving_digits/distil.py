"""Fine-tune a dense model of the study for high sparsity, by distillation from itself, on one GPU.

    python studies/moving_digits/distil.py   # weights/student.safetensors, student.json, distil.log
    python studies/moving_digits/distil.py --topk 0.03 --topp 0.2 --train attention --out other   # the paper's pair
    python studies/moving_digits/distil.py --setup large --order tiles --topk 0.03 --topp 0.2 --batch 4 --steps 2000

The file holds the weights that trained: all, or those of the attention layers, a third. The thresholds that the student
was trained with lie beside it as a calibration file.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from case import ALL, ATTENTION, RATES
from digits import FINE_TUNE_SEED, HELD_OUT_SEED, batch
from journal import journal
from lessons import Batch, made_ahead
from measures import measured_sparsity, velocity_error
from safetensors.torch import save_file
from setups import SMALL, Setup, add_setup
from torch import Tensor, nn
from train import precision
from transformer import GUIDANCE, compiled, load

import sparge_compile
from sparge_compile import Calibration
from sparge_compile.kernels.order import TILE, Tile

DROPPED = 0.2  # of the clips the classes are left out, as sampling with guidance asks for both


# Of one layer after another, so that the borders of their blocks lie in different places.
MIXED: tuple[Tile, ...] = ((4, 4, 4), (2, 4, 8), (4, 8, 2), (1, 8, 8), (4, 4, 4), (2, 8, 4), (8, 4, 2), (2, 4, 8))

# The same, in the second half of the layers with other borders besides.
MOVED: tuple[Tile, ...] = (*MIXED[:4], *((*tile, 2, 2, 2) for tile in MIXED[4:]))
IN_LAYERS = {"mixed": MIXED, "moved": MOVED}


def everywhere(pair: tuple[float, float], order: str = "raster", layers: int = len(MIXED)) -> Calibration:
    """One pair for all heads of the model, whose blocks are of this order: raster, tiles, or others in each layer."""
    if order in IN_LAYERS:
        tiles = {f"blocks.{number}.attention": tile for number, tile in enumerate(IN_LAYERS[order][:layers])}
        return Calibration({name: [pair] for name in tiles}, tiles=tiles)
    return Calibration({"*": [pair]}, tiles={"*": TILE} if order == "tiles" else {})


def tiles_of(setup: Setup, calibration: Calibration) -> tuple[Tile | None, ...]:
    """The tile of each layer, None for raster order."""
    names = (f"blocks.{number}.attention" for number in range(setup.sizes[1]))
    return tuple(calibration.tile_of(name) for name in names)


class Student:
    """A sparse model that is compiled once, for a tile in each layer, and takes other weights and thresholds."""

    def __init__(
        self, setup: Setup, device: torch.device, tiles: Sequence[Tile | None], frames: int | None = None
    ) -> None:
        self.setup, self.device = setup, device
        self.model = load(device=device, setup=setup).requires_grad_(False)
        self.teacher = self.model.state_dict()
        self.teacher = {name: each.clone() for name, each in self.teacher.items()}
        ordered = {f"blocks.{number}.attention": tile for number, tile in enumerate(tiles)}
        start = {name: [(0.1, 0.1)] * setup.sizes[2] for name in ordered}  # pairs of heads may differ later
        start_tiles = {name: tile for name, tile in ordered.items() if tile is not None}
        self.attached = sparge_compile.attach(self.model, Calibration(start, tiles=start_tiles))
        options = {"min_seq_len": 0, "inner": inner(device), "grid": setup.grid(frames)}
        compiled(self.model, backend="sparge", options=options)

    def set(self, calibration: Calibration, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """The model with these thresholds, and the teacher's weights but for those that are given."""
        self.model.load_state_dict(self.teacher | (weights or {}), strict=False)  # the thresholds are buffers
        self.attached.set(calibration)
        return self.model.eval()


def inner(device: torch.device) -> str:
    return "inductor" if device.type == "cuda" else "eager"


def weights_of(model: nn.Module, trained: str) -> dict[str, nn.Parameter]:
    """What trains: all weights, or of each block the projections and norms of attention."""
    named = dict(model.named_parameters())
    return named if trained == ALL else {name: each for name, each in named.items() if ".attention." in name}


def batches(
    steps: int,
    size: int,
    device: torch.device,
    seed: int = 0,
    setup: Setup = SMALL,
    first: int = 0,
    within: tuple[float, float] = (0.0, 1.0),
    **kind: int | bool,
) -> Iterator[Batch]:
    """Noisy clips, times ``within`` these, velocities and classes of the steps from ``first`` on; ``kind`` goes to
    ``clips``."""
    begin = FINE_TUNE_SEED + 100_000 * seed

    def make(number: int) -> Batch:
        return batch(number, size, device, setup, free=DROPPED, within=within, **kind)

    yield from made_ahead(make, range(begin + first, begin + steps), device)


def in_pairs(lesson: Batch) -> Batch:
    """The first half of a batch, with classes and then without: as sampling with guidance asks for them."""
    *both, classes = (each[: len(each) // 2] for each in lesson)
    return *(torch.cat((each, each)) for each in both), torch.cat((classes, torch.zeros_like(classes)))


def guided_loss(predicted: Tensor, taught: Tensor) -> Tensor:
    """Mean square errors of pairs, and of the velocity that sampling makes of a pair."""
    error = predicted.float() - taught.float()
    given, free = error.chunk(2)
    return error.square().mean() + (free + GUIDANCE * (given - free)).square().mean()


def fine_tune(
    student: nn.Module,
    trained: Iterable[nn.Parameter],
    data: Iterable[tuple[Tensor, ...]],
    steps: int,
    lr: float,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    every: int = 50,
    say: Callable[[str], None] = print,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with a short rise and a cosine. ``loss_of`` gets prediction and true velocity; every so many steps a line
    is said; ``after`` is called after each with how many are done."""
    trained = list(trained)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    began = time.perf_counter()
    for step, (mixed, when, velocity, classes) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        with precision(mixed.device):
            predicted = student(mixed, when, classes)
        loss = loss_of(predicted, velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after(step + 1)
        if (step + 1) % every == 0 or step + 1 == steps:
            rate = (step + 1) / (time.perf_counter() - began)
            say(f"step {step + 1}: loss {loss.item():.5f}, {rate:.2f} steps/s")
    student.eval()


@torch.no_grad()
def held_out_error(model: nn.Module, teacher: nn.Module, data: Iterable[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Means over clips of ‖u − v‖² ÷ ‖v‖², u of the model and v of the teacher, and of the flow-matching loss."""
    errors, losses = [], []
    for mixed, when, velocity, classes in data:
        with precision(mixed.device):
            predicted = model(mixed, when, classes)
            errors.append(velocity_error(predicted, teacher(mixed, when, classes)))
        losses.append((predicted.float() - velocity).square().mean())
    return torch.cat(errors).mean().item(), torch.stack(losses).mean().item()


def held_out(
    count: int, size: int, device: torch.device, seed: int = 0, setup: Setup = SMALL, **kind: int
) -> Iterator[tuple[Tensor, ...]]:
    """Noisy clips of held-out digits, times, velocities and classes."""
    for number in range(HELD_OUT_SEED + 1_000 * seed, HELD_OUT_SEED + 1_000 * seed + count):
        yield batch(number, size, device, setup, held_out=True, **kind)


def save_student(weights: Mapping[str, Tensor], calibration: Calibration, path: Path) -> None:
    """Write weights in bfloat16, and the thresholds beside them."""
    save_file({name: each.detach().bfloat16().cpu() for name, each in weights.items()}, path)
    calibration.save(path.with_suffix(".json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup(parser)
    parser.add_argument("--topk", type=float, default=0.06, help="(0.06)")
    parser.add_argument("--topp", type=float, default=0.28, help="(0.28: with it 92 %% sparsity of the small model)")
    parser.add_argument("--order", choices=("raster", "tiles", *IN_LAYERS), default="raster")
    parser.add_argument("--steps", type=int, default=4000, help="(4000)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, help="of a clip (those of the setup)")
    parser.add_argument("--train", choices=("all", "attention"), default="all", help="which weights (all)")
    parser.add_argument("--lr", type=float, help="({}; of the attention layers {})".format(*RATES.values()))
    parser.add_argument("--out", type=Path, help="a folder (the one that the setup's weights are read from)")
    args = parser.parse_args()
    trained = ALL if args.train == "all" else ATTENTION
    args.lr, args.out = args.lr or RATES[trained], args.out or args.setup.weights
    device, frames = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {"frames": args.frames}
    say = journal(args.out / "distil.log", device)
    names = ("setup", "train", "topk", "topp", "order", "steps", "batch", "lr")
    say(", ".join(f"{name} {getattr(args, name)}" for name in names))
    calibration = everywhere((args.topk, args.topp), args.order, args.setup.sizes[1])
    torch._dynamo.config.recompile_limit = 64  # one class, compiled dense and sparse, to train and to run
    dense = load(device=device, setup=args.setup).requires_grad_(False)
    plain, teacher = load(device=device, setup=args.setup), compiled(dense, backend=inner(device))
    student = Student(args.setup, device, tiles_of(args.setup, calibration), args.frames)
    model = student.set(calibration)

    def judge(what: str) -> None:
        error, loss = held_out_error(model, teacher, held_out(4, args.batch, device, setup=args.setup, **frames))
        say(f"held-out clips, {what}: velocity error {error:.4f}, flow-matching loss {loss:.4f}")

    mixed, when, _, classes = next(held_out(1, args.batch, device, setup=args.setup, **frames))
    with precision(device):
        say(f"sparsity {measured_sparsity(plain, calibration, (mixed, when, classes)):.2%}")
    judge("not trained")
    weights = weights_of(model, trained)
    for each in weights.values():
        each.requires_grad_(True)
    with sparge_compile.DistillationHook(model, teacher, compile=False) as hook:  # it is compiled
        data = batches(args.steps, args.batch, device, setup=args.setup, **frames)
        fine_tune(model, weights.values(), data, args.steps, args.lr, lambda *_: hook.loss(), say=say)
    judge("distilled")
    save_student(weights, calibration, args.out / "student.safetensors")


if __name__ == "__main__":
    main()
