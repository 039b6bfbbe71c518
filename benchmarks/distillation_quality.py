"""What distillation gives back of the quality that sparsity takes: a small video model, trained here, at about 95 %.

    python benchmarks/distillation_quality.py                                   # one GPU, some minutes
    python benchmarks/distillation_quality.py --device cpu --frames 4 --teacher-steps 400 --steps 100 --batch 2

For each seed a flow-matching transformer is trained on moving textures (frames × 16 × 16 tokens, raster order). Then it
is made sparse, and measured on held-out clips: without training; after distillation; after as many steps of the plain
flow-matching loss. Both see the same clips of another distribution (finer textures, other colours and speeds), as data
for fine-tuning differ from those of pre-training. Errors are ‖u − v‖² ÷ ‖v‖²: u of the student, v of the teacher.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import sparge_compile

sys.path.append(str(Path(__file__).parent))
import harness

SIDE, CHANNELS = 16, 4
HELD_OUT = 10_000  # the seed of held-out clips; training uses those below
COLUMNS = ("seed", "student", "sparsity", "error", "error, shifted data", "flow loss", "seconds")


# ---- data


def textures(count: int, size: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth random pictures [count, C, size, size] that repeat at their borders, with a deviation near 1."""
    coarse = torch.randn(count, CHANNELS, cells, cells, generator=generator)
    coarse = F.pad(coarse, (1, 1, 1, 1), mode="circular")
    fine = F.interpolate(coarse, scale_factor=size // cells, mode="bilinear", align_corners=False)
    edge = size // cells
    fine = fine[..., edge:-edge, edge:-edge]
    return fine / fine.std((1, 2, 3), keepdim=True)


def clips(count: int, frames: int, is_shifted: bool, generator: torch.Generator) -> Tensor:
    """Clips [count, frames, 16, 16, C]: a background that pans, and two textured discs that move before it.

    A frame is known from all the others once one has seen how it moves, so attention must look across time.
    """
    size, cells = 2 * SIDE, 16 if is_shifted else 8
    back = textures(count, size, cells, generator)
    front = textures(2 * count, size, cells, generator).view(2, count, CHANNELS, size, size)
    if is_shifted:
        back, front = 1.5 * back.flip(1), -front
    speed = 3 if is_shifted else 2
    when = torch.arange(frames)
    steps = torch.arange(SIDE)

    def window(picture: Tensor, velocity: Tensor, start: Tensor) -> Tensor:
        """What is seen of pictures [count, C, size, size] that move: [count, frames, 16, 16, C]."""
        offset = start[:, None] + velocity[:, None] * when[None, :, None]  # [count, frames, 2]
        rows, columns = ((steps + offset[..., i, None]) % size for i in (0, 1))
        index = torch.arange(count)[:, None, None, None]
        return picture.permute(0, 2, 3, 1)[index, rows[..., :, None], columns[..., None, :]]

    def random(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count, 2), generator=generator)

    seen = window(back, random(-speed, speed + 1), random(0, size))
    for picture in front:
        velocity, start = random(-speed, speed + 1), random(0, SIDE)
        centre = (start[:, None] + velocity[:, None] * when[None, :, None]) % SIDE  # [count, frames, 2]
        apart = [(steps - centre[..., i, None] + SIDE // 2) % SIDE - SIDE // 2 for i in (0, 1)]
        inside = apart[0][..., :, None] ** 2 + apart[1][..., None, :] ** 2 <= 16
        seen = torch.where(inside[..., None], window(picture, -velocity, start), seen)
    return seen


class Data:
    """Batches of (noisy tokens [B, L, C], time [B], velocity [B, L, C]); the same for each student of a seed."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device

    def batch(self, number: int, is_shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        x = clips(self.args.batch, self.args.frames, is_shifted, generator).flatten(1, 3)
        noise = torch.randn(x.shape, generator=generator)
        when = torch.rand(len(x), generator=generator)
        when = self.args.shift * when / (1 + (self.args.shift - 1) * when)  # more of the noisy end, as video models do
        noisy = torch.lerp(x, noise, when[:, None, None])
        return noisy.to(self.device), when.to(self.device), (noise - x).to(self.device)

    def batches(self, seed: int, steps: int, is_shifted: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for step in range(steps):
            yield self.batch(1_000_000 * (seed + 1) + step + 500_000 * is_shifted, is_shifted)


# ---- model


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_query, self.norm_key = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(when)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.norm_query(q).to(v.dtype), self.norm_key(k).to(v.dtype), v)
        x = x + (1 + gate1) * self.out(y.transpose(1, 2).flatten(2))
        return x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Model(nn.Module):
    """Noisy tokens [B, L, C] and their time [B] to a velocity [B, L, C]."""

    def __init__(self, frames: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.places = nn.ParameterList(nn.Parameter(0.3 * torch.randn(n, width)) for n in (frames, SIDE, SIDE))
        self.enter = nn.Linear(CHANNELS, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CHANNELS))

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        frames, rows, columns = self.places
        place = (frames[:, None, None] + rows[:, None] + columns).flatten(0, 2)
        angles = when[:, None] * 2.0 ** torch.linspace(0, 10, 32, device=x.device)
        when = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        x = self.enter(x) + place
        for block in self.blocks:
            x = block(x, when)
        return self.leave(x)


# ---- training


def precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    steps: int,
    lr: float,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    is_annealed: bool,
) -> list[float]:
    """AdamW over some batches; ``loss_of`` gets a prediction and the true velocity. Returns the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (1 - step / steps if is_annealed else 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    model.train()
    for noisy, when, velocity in batches:
        with precision(noisy.device):
            predicted = model(noisy, when)
        loss = loss_of(predicted, velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def flow_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    return F.mse_loss(predicted.float(), velocity)


@torch.no_grad()
def errors(model: nn.Module, teacher: nn.Module, data: Data, batches: int) -> tuple[float, float, float]:
    """On held-out clips: error against the teacher, the same on shifted clips, and the loss of the task itself."""
    model.eval()
    found = []
    for is_shifted in (False, True):
        apart = size = task = 0.0
        for number in range(batches):
            noisy, when, velocity = data.batch(HELD_OUT + number, is_shifted)
            with precision(noisy.device):
                mine, true = model(noisy, when).float(), teacher(noisy, when).float()
            apart, size = apart + (mine - true).square().sum().item(), size + true.square().sum().item()
            task += flow_loss(mine, velocity).item() / batches
        found.append((apart / size, task))
    return found[0][0], found[1][0], found[0][1]


@torch.no_grad()
def sparsity_of(model: nn.Module, data: Data, topk: float, topp: float) -> float:
    """The mean sparsity over the layers of an uncompiled model, with sparse attention put in by hand."""
    dense, found = F.scaled_dot_product_attention, []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sparsity = sparge_compile.attention(q, k, v, topk=topk, topp=topp, return_sparsity=True)
        found.append(sparsity.item())
        return out

    noisy, when, _ = data.batch(HELD_OUT, False)
    F.scaled_dot_product_attention = attention
    try:
        with precision(noisy.device):
            model(noisy, when)
    finally:
        F.scaled_dot_product_attention = dense
    return statistics.mean(found)


def compiled(model: Model, backend: str, **options: object) -> Model:
    """The model with its blocks compiled, which takes less time than the whole."""
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True, **({"options": options} if options else {}))
    return model


def sparse(teacher: Model, args: argparse.Namespace) -> Model:
    """A copy of the teacher that is compiled sparse."""
    options = {"topk": args.topk, "topp": args.topp, "min_seq_len": 0, "inner": args.inner}
    return compiled(copy.deepcopy(teacher), "sparge", **options)


def experiment(seed: int, args: argparse.Namespace, device: torch.device) -> Iterator[tuple[object, ...]]:
    """The rows of one seed."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    data = Data(args, device)
    start = time.perf_counter()
    teacher = compiled(Model(args.frames, args.width, args.layers, args.heads).to(device), args.inner)
    losses = train(
        teacher,
        list(teacher.parameters()),
        data.batches(seed, args.teacher_steps, False),
        args.teacher_steps,
        args.teacher_lr,
        flow_loss,
        True,
    )
    teacher.requires_grad_(False).eval()
    print(f"seed {seed}: teacher's loss {losses[0]:.3f} → {statistics.mean(losses[-50:]):.3f}", flush=True)
    yield seed, "dense teacher", 0.0, *errors(teacher, teacher, data, args.held_out), time.perf_counter() - start

    def row(name: str, student: Model) -> tuple[object, ...]:
        kept = sparsity_of(copy.deepcopy(student), data, args.topk, args.topp)
        return seed, name, kept, *errors(student, teacher, data, args.held_out), time.perf_counter() - start

    start = time.perf_counter()
    yield row("training-free", sparse(teacher, args))
    for name, layers in (("distilled", 0.0), ("distilled, with layers", args.layer_weight), ("plain loss", None)):
        if layers == 0.0 and name != "distilled":
            continue
        start = time.perf_counter()
        student = sparse(teacher, args)
        parameters = list(student.requires_grad_(True).parameters())
        batches = data.batches(seed, args.steps, True)
        if layers is None:
            train(student, parameters, batches, args.steps, args.lr, flow_loss, False)
        else:
            with sparge_compile.DistillationHook(student, layers=layers) as hook:
                train(student, parameters, batches, args.steps, args.lr, lambda *_: hook.loss(), False)
        yield row(name, student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--inner", default=None, choices=("inductor", "aot_eager", "eager"), help="inductor on a GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frames", type=int, default=16, help="of 16 × 16 tokens (16)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--teacher-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=300, help="of distillation, and of the plain loss (300)")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--shift", type=float, default=3.0, help="of the times towards noise (3)")
    parser.add_argument("--topk", type=float, default=0.05)
    parser.add_argument("--topp", type=float, default=0.0)
    parser.add_argument("--layer-weight", type=float, default=0.0, help="of a run with errors of attention; 0: none")
    parser.add_argument("--held-out", type=int, default=8, help="batches to measure on (8)")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    device = harness.require(args.device)
    args.inner = args.inner or ("inductor" if device.type == "cuda" else "eager")
    print(harness.header(device))
    print(f"{args.frames * SIDE * SIDE} tokens, topk {args.topk}, topp {args.topp}, {args.steps} steps\n", flush=True)
    rows: list[tuple[object, ...]] = []
    for seed in args.seeds:
        for row in experiment(seed, args, device):
            rows.append(row)
            print("  " + ", ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row), flush=True)
            if args.csv:
                with args.csv.open("w", newline="") as file:
                    csv.writer(file).writerows([COLUMNS, *rows])
    means = []
    for name in dict.fromkeys(row[1] for row in rows):
        mine = [row[2:6] for row in rows if row[1] == name]
        columns = list(zip(*mine, strict=True))
        spread = [f"{statistics.mean(x):.4f} ({min(x):.4f} to {max(x):.4f})" for x in columns[1:]]
        means.append((name, f"{statistics.mean(columns[0]):.1%}", *spread))
    print(f"\nMean (least to greatest) over {len(args.seeds)} seeds")
    print(tabulate(means, headers=COLUMNS[1:6], disable_numparse=True))


if __name__ == "__main__":
    main()
