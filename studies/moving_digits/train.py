"""Train the video transformer and the classifier of the example, on one GPU; a run that was stopped goes on.

    python studies/moving_digits/train.py --steps 4000          # writes weights/teacher.safetensors, classifier, log

The state is in --state; the same command again goes on from there. Equal seeds give the same data, whatever was
interrupted.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from digits import SHIFT, clips, noisy
from measures import Classifier, accuracy, train_classifier
from safetensors.torch import load_file, save_file
from torch import nn
from transformer import WEIGHTS, VideoTransformer

SETTINGS = ("steps", "batch", "lr", "ema", "shift", "init", "seed")  # which a run that goes on must repeat
HELD_OUT_SEED = 20_000_000  # clips of training have the seeds below


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short rise, then a cosine to a hundredth."""
    rise = min(1.0, (step + 1) / 200)
    return peak * rise * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def batch_of(number: int, size: int, device: torch.device, shift: float) -> tuple[torch.Tensor, ...]:
    """Noisy clips, times, velocities, classes; of one clip in ten the classes are left out, for guidance."""
    video, classes = clips(size, number, device)
    # The same random numbers as those of the first clip's classes: not meant so, but the weights were made with it.
    free = torch.rand(size, generator=torch.Generator().manual_seed(number)) < 0.1
    classes = classes * ~free[:, None].to(device)
    return *noisy(video, number, shift), classes


@torch.no_grad()
def held_out_loss(model: nn.Module, device: torch.device, batches: int = 8, size: int = 16) -> float:
    """Flow-matching loss on clips of held-out digits."""
    total = 0.0
    for number in range(batches):
        video, classes = clips(size, HELD_OUT_SEED + number, device, held_out=True)
        mixed, when, velocity = noisy(video, HELD_OUT_SEED + number)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total += (model(mixed, when, classes).float() - velocity).square().mean().item() / batches
    return total


def train_teacher(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)
    model = VideoTransformer().to(device)
    if args.init:
        model.load_state_dict({name: each.float() for name, each in load_file(args.init).items()})
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start, settings = 0, {name: str(getattr(args, name)) for name in SETTINGS}
    if args.state.exists():
        state = torch.load(args.state, map_location=device)
        if state["settings"] != settings:
            raise SystemExit(f"{args.state} is of a run with {state['settings']}; remove it or repeat those")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    compiled = torch.compile(model, fullgraph=True) if device.type == "cuda" else model
    began, losses = time.perf_counter(), []
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        mixed, when, velocity, classes = batch_of(args.seed * 1_000_000 + step, args.batch, device, args.shift)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = compiled(mixed, when, classes)
        loss = (predicted.float() - velocity).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.detach())
        done = step + 1
        if done % 100 == 0 or done == args.steps:
            rate = (done - start) / (time.perf_counter() - began)
            args.say(f"step {done}: loss {torch.stack(losses).mean().item():.4f}, {rate:.2f} steps/s")
            losses.clear()
        spent = time.perf_counter() - began
        if done % 500 == 0 or done == args.steps or spent > args.seconds:
            state = {"model": model, "average": average, "optimizer": optimizer}
            state = {name: each.state_dict() for name, each in state.items()}
            torch.save({**state, "step": done, "settings": settings}, args.state)
        if spent > args.seconds:
            args.say(f"stopped after {done} of {args.steps} steps; the same command goes on")
            break
    args.say(f"held-out loss of the averaged weights: {held_out_loss(average, device):.4f}")
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="the learning rate falls over so many (4000)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many; go on later (no limit)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--shift", type=float, default=SHIFT, help=f"of times towards noise ({SHIFT:g})")
    parser.add_argument("--init", type=Path, help="begin with these weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classifier-steps", type=int, default=3000)
    parser.add_argument("--state", type=Path, default=Path("moving_digits.pt"), help="where a run goes on from")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log = (args.out / "train.log").open("a")

    def say(text: str) -> None:
        print(text, flush=True)
        print(text, file=log, flush=True)

    args.say = say
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(
        f"torch {torch.__version__}, {where}; steps {args.steps}, "
        f"batch {args.batch}, lr {args.lr}, shift {args.shift:g}, seed {args.seed}, init {args.init}"
    )
    teacher = train_teacher(args, device)
    weights = {name: each.to(torch.bfloat16).contiguous().cpu() for name, each in teacher.state_dict().items()}
    save_file(weights, args.out / "teacher.safetensors")
    if args.classifier_steps:
        classifier: Classifier = train_classifier(device, args.classifier_steps)
        for shifted in (False, True):
            video, classes = clips(64, HELD_OUT_SEED, device, held_out=True, shifted=shifted)
            found = accuracy(classifier, video, classes).mean().item()
            say(f"classifier on frames of held-out digits{', shifted' if shifted else ''}: {found:.1%}")
        save_file(classifier.state_dict(), args.out / "classifier.safetensors")


if __name__ == "__main__":
    main()
