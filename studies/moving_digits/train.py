"""Train a video transformer of the study, on one GPU or some; a run that was stopped goes on.

    python studies/moving_digits/train.py                                     # the small model
    python studies/moving_digits/train.py --setup large --minutes 9           # a piece of the large one's training
    python studies/moving_digits/train.py --setup large --minutes 0 --reader 3000   # the network that reads digits
    torchrun --nproc-per-node 4 studies/moving_digits/train.py --setup large        # the same steps, shared by 4 GPUs

A setup says the stages of its training. The weights, averages over steps, are written in bfloat16 whenever a run stops,
with a sheet of what they draw. The same command goes on: from --state, or where that is not, from the weights, with a
fresh optimizer. Equal seeds give the same data, whatever was interrupted. (The small model's weights that ship were
trained with a cosine instead of a plateau.)
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import HELD_OUT_SEED, batch, clips, noise_of
from journal import journal
from measures import accuracy, train_classifier
from pictures import sheet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from setups import SETUPS, Setup, Stage, add_setup
from torch import Tensor, nn
from transformer import VideoTransformer, compiled, sample

EMA = 0.999
FREE = 0.1  # of the clips the classes are left out
RISE = 50  # steps in which the learning rate rises, where the optimizer or the stage is new
DRAWN = 4  # clips of the sheet
LOOKS = 10  # steps between two looks at the clock, of some processes
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def stage_of(setup: Setup, step: int) -> tuple[Stage, int]:
    """The stage that a step is in, and how many steps of it are done."""
    for stage in setup.stages[:-1]:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    return setup.stages[-1], step


def learning_rate(stage: Stage, done: int, fresh: int, is_last: bool) -> float:
    """A rise, a plateau, and in the last stage a fall over its last fifth. ``fresh``: steps of this optimizer."""
    fall = (stage.steps - done) / (stage.steps / 5) if is_last else 1.0
    return stage.lr * min(1.0, (min(done, fresh) + 1) / RISE, fall)


@torch.no_grad()
def held_out_loss(model: nn.Module, device: torch.device, setup: Setup, batches: int = 4, size: int = 8) -> float:
    """Flow-matching loss on clips of held-out digits."""
    total = 0.0
    for number in range(batches):
        mixed, when, velocity, classes = batch(HELD_OUT_SEED + number, size, device, setup, held_out=True)
        with precision(device):
            total += (model(mixed, when, classes).float() - velocity).square().mean().item() / batches
    return total


class Run:
    """A model that trains, the average of its weights, and all that a run which goes on needs."""

    def __init__(self, setup: Setup, device: torch.device, seed: int, state: Path, out: Path) -> None:
        self.setup, self.device, self.seed, self.paths = setup, device, seed, (state, out / "teacher.safetensors")
        self.steps, self.step = sum(stage.steps for stage in setup.stages), 0
        self.settings = {"setup": setup.name, "seed": str(seed), "stages": str(setup.stages)}
        torch.manual_seed(seed)
        self.model = VideoTransformer(*setup.sizes).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self.fresh = 0
        self.begin()
        self.stage: Stage | None = None

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer}

    def begin(self) -> None:
        """From the state, the weights of this run, or those that the setup begins with; else from random ones."""
        state, weights = self.paths
        if state.exists():
            found = torch.load(state, map_location=self.device)
            self._check(state, found["settings"])
            for name, part in self._parts().items():
                part.load_state_dict(found[name])
            self.step, self.fresh = found["step"], found["fresh"]
            return
        if weights.exists() and (said := metadata(weights)):
            self._check(weights, {name: said.get(name) for name in self.settings})
            self.step = int(said["step"])
        elif self.setup.begins:
            weights = SETUPS[self.setup.begins].weights / "teacher.safetensors"
        else:
            return
        for model in (self.model, self.average):
            model.load_state_dict(load_file(weights))

    def _check(self, path: Path, settings: dict[str, Any]) -> None:
        if settings != self.settings:
            raise SystemExit(f"{path} is of another run: {settings}. Move it away, or repeat its seed and stages.")

    def save(self) -> None:
        """The state, and the averaged weights; all processes have the same."""
        if RANK:
            return
        state, weights = self.paths
        held = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({**held, "step": self.step, "fresh": self.fresh, "settings": self.settings}, state)
        averaged = {name: x.to(torch.bfloat16).contiguous().cpu() for name, x in self.average.state_dict().items()}
        save_file(averaged, weights, {**self.settings, "step": str(self.step)})

    def advance(self) -> Tensor:
        """One step; gives its loss."""
        stage, done = stage_of(self.setup, self.step)
        if stage is not self.stage:
            torch._dynamo.reset()
            self.stage, how = stage, how_to_compile(self.setup, stage, self.device)
            call = compiled(self.model, **how)
            self.call = nn.parallel.DistributedDataParallel(call) if WORLD > 1 else call
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(stage, done, self.fresh, stage is self.setup.stages[-1])
        number = self.seed * 1_000_000 + self.step
        mixed, when, velocity, classes = batch(
            number, stage.batch, self.device, self.setup, free=FREE, frames=stage.frames
        )
        mixed, when, velocity, classes = (x[RANK::WORLD] for x in (mixed, when, velocity, classes))
        with precision(self.device):
            predicted = self.call(mixed, when, classes)
        loss = (predicted.float() - velocity).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.fresh = self.step + 1, self.fresh + 1
        decay = min(EMA, self.step / (self.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach()


def mean_of_ranks(value: float, device: torch.device) -> float:
    """Of what each process found."""
    if WORLD == 1:
        return value
    summed = torch.tensor(value, device=device)
    dist.all_reduce(summed)
    return summed.item() / WORLD


def metadata(path: Path) -> dict[str, str]:
    """What a file of weights says of the run that wrote it; nothing, of those that ship without."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def how_to_compile(setup: Setup, stage: Stage, device: torch.device) -> dict[str, Any]:
    """Dense attention under Inductor, or a share of key blocks, in tiles."""
    inner = "inductor" if device.type == "cuda" else "eager"
    if stage.keep is None:
        return {"backend": inner}
    options = {"topk": stage.keep, "topp": 0.0, "min_seq_len": 0, "inner": inner}
    return {"backend": "sparge", "options": {**options, "token_order": "tiles", "grid": setup.grid(stage.frames)}}


def train(args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> None:
    """Advance until the steps or the minutes are over."""
    run, losses = Run(args.setup, device, args.seed, args.state, args.out), []
    began, first = time.perf_counter(), run.step
    say(f"begins with step {run.step + 1} of {run.steps}")
    while run.step < run.steps:
        losses.append(run.advance())
        is_over = run.step == run.steps
        if run.step % (LOOKS if WORLD > 1 else 1) == 0:  # all processes end with the same step
            is_over |= mean_of_ranks(time.perf_counter() - began, device) > 60 * args.minutes
        if run.step % args.every == 0 or is_over:
            loss = mean_of_ranks(torch.stack(losses).mean().item(), device)  # waits for the GPU
            minutes = (time.perf_counter() - began) / 60
            rate = (run.step - first) / minutes / 60
            say(f"step {run.step}: loss {loss:.4f}, {rate:.2f} steps/s, {minutes:.1f} min, {run.stage}")
            losses.clear()
        if run.step % (20 * args.every) == 0 or is_over:
            run.save()
        if is_over:
            break
    if run.step < run.steps:
        say(f"stopped after {run.step} of {run.steps} steps; the same command goes on")
    if not RANK:
        show(run, args, say)


def show(run: Run, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """What the averaged weights can do: their loss, and a sheet of samples. They are those of the file, whole clips."""
    loss = held_out_loss(run.average, run.device, run.setup, size=run.setup.batch)
    say(f"held-out loss of the averaged weights: {loss:.4f}")
    noise, classes = noise_of(run.setup, 0, DRAWN, run.device)
    with precision(run.device):
        drawn = sample(run.average, noise, classes, args.sample_steps, shift=run.setup.shift)
    wanted = ", ".join("".join(str(i) for i in range(10) if each[i]) for each in classes)
    sheet({f"digits {wanted}, in this order": drawn}).save(args.out / "samples.png")


def train_reader(args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> None:
    """The network that reads digits in samples."""
    classifier = train_classifier(device, args.setup, args.reader, 256 if args.setup.is_deep else 512)
    for shifted in (False, True):
        video, classes = clips(16, HELD_OUT_SEED, device, setup=args.setup, held_out=True, shifted=shifted)
        found = accuracy(classifier, video, classes).mean().item()
        say(f"classifier on frames of held-out digits{', shifted' if shifted else ''}: {found:.1%}")
    save_file(classifier.state_dict(), args.out / "classifier.safetensors")


def _quiet(_: str) -> None:
    """What all but one process say."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup(parser)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; go on later (no limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", type=int, default=0, help="steps of training the network that reads digits (0)")
    parser.add_argument("--every", type=int, default=50, help="steps between two lines of the log (50)")
    parser.add_argument("--sample-steps", type=int, default=25, help="of the sheet of samples (25)")
    parser.add_argument("--state", type=Path, default=Path("moving_digits.pt"), help="where a run goes on from")
    parser.add_argument("--out", type=Path, help="a folder (the one that the setup's weights are read from)")
    args = parser.parse_args()
    args.out = args.out or args.setup.weights
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", RANK % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group(device_id=device if device.type == "cuda" else None)
    say = _quiet if RANK else journal(args.out / "train.log", device, "a")
    say(f"setup {args.setup}, seed {args.seed}, {WORLD} processes")
    if args.minutes:
        train(args, device, say)
    if args.reader and not RANK:
        train_reader(args, device, say)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
