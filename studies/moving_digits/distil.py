"""Fine-tune the example for high sparsity, by distillation from the dense model, on one GPU.

    python studies/moving_digits/distil.py   # weights/student.safetensors, student.json, distil.log
    python studies/moving_digits/distil.py --topk 0.03 --topp 0.2 --train attention --out other   # the paper's pair

The file holds the weights that trained: all, or those of the attention layers, a third. The thresholds that the student
was trained with lie beside it as a calibration file.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from digits import clips, noisy
from measures import measured_sparsity, velocity_error
from safetensors.torch import save_file
from torch import Tensor, nn
from train import HELD_OUT_SEED
from transformer import WEIGHTS, load

import sparge_compile

FIRST_SEED = 30_000_000  # clips of fine-tuning have the seeds from here on
OTHER = 500_000_000  # further on in the seeds: other numbers than those that the clip was drawn with
LR, LR_ATTENTION = 2e-3, 4e-3  # of all weights, and of the attention layers alone: docs/fidelity.md, "Learning rates"
DROPPED = 0.2  # of the clips the classes are left out, as sampling with guidance asks for both


def precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def attention_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Of each block the projections and norms of attention."""
    return {name: each for name, each in model.named_parameters() if ".attention." in name}


def batches(
    steps: int, size: int, device: torch.device, seed: int = 0, **kind: int | bool
) -> Iterator[tuple[Tensor, ...]]:
    """Noisy clips, times, velocities and classes; ``kind`` goes to ``clips``."""
    for number in range(FIRST_SEED + 100_000 * seed, FIRST_SEED + 100_000 * seed + steps):
        video, classes = clips(size, number, device, **kind)
        free = torch.rand(size, generator=torch.Generator().manual_seed(OTHER + number)) < DROPPED
        yield *noisy(video, number), classes * ~free[:, None].to(device)


def fine_tune(
    student: nn.Module,
    trained: Iterable[nn.Parameter],
    data: Iterable[tuple[Tensor, ...]],
    steps: int,
    lr: float,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    every: int = 50,
    say: Callable[[str], None] = print,
) -> None:
    """AdamW with a short rise and a cosine. ``loss_of`` gets prediction and true velocity; every so many steps a line
    is said."""
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


def held_out(count: int, size: int, device: torch.device, seed: int = 0, **kind: int) -> Iterator[tuple[Tensor, ...]]:
    """Noisy clips of held-out digits, times, velocities and classes."""
    for number in range(HELD_OUT_SEED + 1_000 * seed, HELD_OUT_SEED + 1_000 * seed + count):
        video, classes = clips(size, number, device, held_out=True, **kind)
        yield *noisy(video, number), classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topk", type=float, default=0.06, help="(0.06)")
    parser.add_argument("--topp", type=float, default=0.28, help="(0.28: with it 92 %% sparsity)")
    parser.add_argument("--steps", type=int, default=4000, help="(4000)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--train", choices=("all", "attention"), default="all", help="which weights (all)")
    parser.add_argument("--lr", type=float, help=f"({LR:g}; of the attention layers {LR_ATTENTION:g})")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if args.lr is None:
        args.lr = LR if args.train == "all" else LR_ATTENTION
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inner = "inductor" if device.type == "cuda" else "eager"
    log = (args.out / "distil.log").open("w")

    def say(text: str) -> None:
        print(text, flush=True)
        print(text, file=log, flush=True)

    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"torch {torch.__version__}, {where}, sparge_compile {sparge_compile.__version__}")
    say(", ".join(f"{name} {getattr(args, name)}" for name in ("train", "topk", "topp", "steps", "batch", "lr")))
    calibration = sparge_compile.Calibration({"blocks.*.attention": [(args.topk, args.topp)]})
    model, teacher = (load(device=device).requires_grad_(False) for _ in range(2))
    options = {"calibration": calibration, "min_seq_len": 0, "inner": inner}
    student = torch.compile(model, backend="sparge", fullgraph=True, dynamic=False, options=options)

    def judge(what: str) -> None:
        error, loss = held_out_error(student, teacher, held_out(4, args.batch, device))
        say(f"held-out clips, {what}: velocity error {error:.4f}, flow-matching loss {loss:.4f}")

    mixed, when, _, classes = next(held_out(1, args.batch, device))
    with precision(device):
        say(f"sparsity {measured_sparsity(model, calibration, (mixed, when, classes)):.2%}")
    judge("not trained")
    trained = dict(model.named_parameters()) if args.train == "all" else attention_weights(model)
    for each in trained.values():
        each.requires_grad_(True)
    with sparge_compile.DistillationHook(student) as hook:
        data = batches(args.steps, args.batch, device)
        fine_tune(student, trained.values(), data, args.steps, args.lr, lambda *_: hook.loss(), say=say)
    judge("distilled")
    weights = {name: each.detach().bfloat16().cpu() for name, each in trained.items()}
    save_file(weights, args.out / "student.safetensors")
    calibration.save(args.out / "student.json")


if __name__ == "__main__":
    main()
