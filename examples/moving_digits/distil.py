"""Fine-tune the attention layers of the example for high sparsity, by distillation from the dense model, on one GPU.

    python examples/moving_digits/distil.py            # writes weights/student.safetensors and student.json

Only the attention layers train, so the file holds those alone: a third of the model. The thresholds that the student
was trained with lie beside it as a calibration file.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from digits import clips, noisy
from measures import velocity_error
from safetensors.torch import save_file
from torch import nn
from train import HELD_OUT_SEED
from transformer import WEIGHTS, VideoTransformer, load

import sparge_compile

FIRST_SEED = 30_000_000  # clips of distillation have the seeds from here on


def precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def attention_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains: of each block the projections and norms of attention."""
    return {name: each for name, each in model.named_parameters() if ".attention." in name}


def distil(
    model: VideoTransformer,
    calibration: sparge_compile.Calibration,
    steps: int,
    batch: int,
    lr: float,
    device: torch.device,
    inner: str,
) -> None:
    """Train the attention layers of a model in place, sparse by the calibration; its weights now are the teacher's."""
    model.requires_grad_(False)
    trained = attention_weights(model)
    for each in trained.values():
        each.requires_grad_(True)
    options = {"calibration": calibration, "min_seq_len": 0, "inner": inner}
    student = torch.compile(model, backend="sparge", fullgraph=True, options=options)
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    began = time.perf_counter()
    with sparge_compile.DistillationHook(student) as hook:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
            video, classes = clips(batch, FIRST_SEED + step, device)
            free = torch.rand(batch, generator=torch.Generator().manual_seed(step)) < 0.2  # as guidance asks for both
            mixed, when, _ = noisy(video, FIRST_SEED + step)
            with precision(device):
                student(mixed, when, classes * ~free[:, None].to(device))
            loss = hook.loss()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 50 == 0 or step + 1 == steps:
                rate = (step + 1) / (time.perf_counter() - began)
                print(f"step {step + 1}: loss {loss.item():.5f}, {rate:.2f} steps/s", flush=True)
    student.eval()


@torch.no_grad()
def held_out_error(
    model: nn.Module, teacher: nn.Module, device: torch.device, batches: int = 4, size: int = 8
) -> float:
    """Mean of ‖u − v‖² ÷ ‖v‖² on clips of held-out digits, u of the model and v of the teacher."""
    errors = []
    for number in range(batches):
        video, classes = clips(size, HELD_OUT_SEED + number, device, held_out=True)
        mixed, when, _ = noisy(video, HELD_OUT_SEED + number)
        with precision(device):
            errors.append(velocity_error(model(mixed, when, classes), teacher(mixed, when, classes)))
    return torch.cat(errors).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topk", type=float, default=0.05)
    parser.add_argument("--topp", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inner = "inductor" if device.type == "cuda" else "eager"
    calibration = sparge_compile.Calibration({"blocks.*.attention": [(args.topk, args.topp)]})
    model, teacher = load(device=device), load(device=device)
    distil(model, calibration, args.steps, args.batch, args.lr, device, inner)
    options = {"calibration": calibration, "min_seq_len": 0, "inner": inner}
    student = torch.compile(model, backend="sparge", fullgraph=True, options=options)
    print(f"held-out velocity error: {held_out_error(student, teacher, device):.4f}")
    weights = {name: each.detach().bfloat16().cpu() for name, each in attention_weights(model).items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "student.safetensors")
    calibration.save(args.out / "student.json")


if __name__ == "__main__":
    main()
