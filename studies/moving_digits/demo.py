"""One clip of moving digits, from the same noise by three models: dense, sparse without training, distilled.

    python studies/moving_digits/demo.py              # writes demo_output/moving_digits.gif and .png

Calibrates the trained model by the command ``sparge calibrate``, generates, and prints sparsity, time and quality.
Exits with 1 if a figure is not finite.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bank import multi_hot
from digits import HELD_OUT_SEED, clips
from measures import accuracy, load_classifier, measured_sparsity, psnr, velocity_error
from pictures import animate, sheet
from setups import CLASSES, SMALL
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from transformer import load, sample

import sparge_compile
from sparge_compile import cli
from sparge_compile.kernels.order import TILE

HERE = Path(__file__).resolve().parent
TILE_NAME = "x".join(map(str, TILE))
FRAMES_VARIABLE = "MOVING_DIGITS_FRAMES"  # of the clips that calibration sees
CALIBRATION_TIMES = (0.9, 0.97)  # noisy: what moves where is decided there
MEASURED_TIME = 0.9
CALIBRATION_SEED = 40_000_000

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
inner = "inductor" if device.type == "cuda" else "eager"  # on a CPU, compiling takes longer than it saves here
start = time.perf_counter()

Model = Callable[..., Tensor]


def say(text: str) -> None:
    print(f"[{time.perf_counter() - start:5.1f} s] {text}", flush=True)


def noisy_at(when: float, seed: int, frames: int, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The model's arguments for one clip at a time: the mixture with noise, the time, the classes."""
    video, classes = clips(1, seed, held_out=held_out, frames=frames)
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    return torch.lerp(video, noise, when), torch.tensor([when]), classes


def calibration_batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two clips of digits that the model was trained on; ``sparge calibrate`` calls this by name."""
    frames = int(os.environ.get(FRAMES_VARIABLE, SMALL.frames))
    return [noisy_at(when, CALIBRATION_SEED + i, frames, False) for i, when in enumerate(CALIBRATION_TIMES)]


def calibrate(frames: int, out: Path) -> int:
    """Run ``sparge calibrate`` in this process; print what one would type in a shell."""
    command = ["calibrate", "--model", "transformer:load", "--inputs", "demo:calibration_batches", "--out", str(out)]
    command += ["--target-error", "0.05", "--query-blocks", "12", "--min-seq-len", "0", "--orders", TILE_NAME]
    os.environ[FRAMES_VARIABLE] = str(frames)
    settings = f"PYTHONPATH={shlex.quote(os.path.relpath(HERE))} "
    settings += "" if frames == SMALL.frames else f"{FRAMES_VARIABLE}={frames} "
    print(f"\n$ {settings}sparge {shlex.join(command)}", flush=True)
    return cli.main(command)


def generate(name: str, call: Model, noise: Tensor, classes: Tensor, steps: int) -> tuple[Tensor, float]:
    """The clip, and the seconds it took."""
    with tqdm(total=steps, desc=name, unit="call", mininterval=0.5) as bar:

        def counted(*args: Tensor) -> Tensor:
            result = call(*args)
            bar.update()
            return result

        before = time.perf_counter()
        video = sample(counted, noise, classes, steps=steps).cpu()  # waits for a GPU
        return video, time.perf_counter() - before


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--frames", type=int, default=SMALL.frames, help=f"of the clip; fewer for a quick look ({SMALL.frames})"
    )
    parser.add_argument("--steps", type=int, default=12, help="of sampling (12)")
    parser.add_argument("--seed", type=int, default=11, help="of the noise (11: two digits that meet and part)")
    parser.add_argument("--classes", type=int, nargs=2, default=(3, 7), metavar="DIGIT", help="what moves (3 7)")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="a folder (demo_output)")
    args = parser.parse_args()
    if not 1 <= args.frames <= SMALL.frames or args.steps < 1:
        parser.error(f"--frames is from 1 to {SMALL.frames}, --steps at least 1")
    if not all(0 <= digit < CLASSES for digit in args.classes) or args.classes[0] == args.classes[1]:
        parser.error("--classes are two different digits from 0 to 9")
    return args


@torch.no_grad()
def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, sparge_compile {sparge_compile.__version__}, Python {platform.python_version()}")
    print(f"{where}, {dtype}, inner={inner!r}")
    if not (SMALL.weights / "teacher.safetensors").exists():
        print(f"There is no trained model in {SMALL.weights}: train it with studies/moving_digits/train.py")
        return 1

    thresholds = args.out / "moving_digits.json"
    if status := calibrate(args.frames, thresholds):
        return status
    print()
    say(f"thresholds written to {thresholds}")

    variants = [("dense", "teacher", None), ("sparse, not trained", "teacher", thresholds)]
    student = (SMALL.weights / "student.safetensors", SMALL.weights / "student.json")
    if all(path.exists() for path in student):
        variants.append(("sparse, distilled", "student", student[1]))
    else:
        print("There is no distilled student; studies/moving_digits/distil.py trains one on a GPU.")

    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(SMALL.shape(1, args.frames), generator=generator).to(device)
    classes = multi_hot(torch.tensor([args.classes])).to(device)
    inputs = tuple(each.to(device) for each in noisy_at(MEASURED_TIME, HELD_OUT_SEED, args.frames, True))
    classifier = load_classifier()
    videos: dict[str, Tensor] = {}
    velocities, figures = [], []
    for name, weights, path in variants:
        torch._dynamo.reset()  # each variant compiles its own code of the same class
        model, sparsity = load(weights, device, dtype), 0.0
        if path is None:
            call: Model = torch.compile(model, fullgraph=True, dynamic=False) if inner == "inductor" else model
        else:
            calibration = sparge_compile.Calibration.load(path)
            options = {"calibration": calibration, "min_seq_len": 0, "inner": inner}
            call = torch.compile(model, backend="sparge", fullgraph=True, dynamic=False, options=options)
            sparsity = measured_sparsity(model, calibration, inputs)
            say(f"{name}: sparsity {sparsity:.1%}; compiling")
        twice = [torch.cat((each, each)) for each in inputs]  # as sampling does: what is compiled now serves there
        velocities.append(call(*twice)[:1])
        video, seconds = generate(name, call, noise, classes, args.steps)
        videos[name] = video
        error = velocity_error(velocities[-1], velocities[0]).item()
        likeness = psnr(video, videos["dense"]).item()
        read = accuracy(classifier, video, classes.cpu()).item()
        figures.append((name, sparsity, seconds, error, likeness, read))

    rows = [
        (name, "–", f"{seconds:.1f}", "–", "–", f"{read:.0%}")
        if name == "dense"
        else (name, f"{sparsity:.1%}", f"{seconds:.1f}", f"{error:.4f}", f"{likeness:.1f}", f"{read:.0%}")
        for name, sparsity, seconds, error, likeness, read in figures
    ]
    headers = ("variant", "sparsity", "seconds", "velocity error", "PSNR dB", "digits read")
    print(f"\n{tabulate(rows, headers=headers, disable_numparse=True, colalign=('left', *['right'] * 5))}\n")
    print(f"Seconds: {args.steps} steps, compiled beforehand. Velocity error: ‖u − v‖² ÷ ‖v‖², one held-out clip at")
    print(f"t = {MEASURED_TIME}. PSNR: against the dense clip. Digits read: by a small classifier, over all frames.")
    gif, png = args.out / "moving_digits.gif", args.out / "moving_digits.png"
    animate(videos, gif)
    sheet(videos, 2).save(png)
    say(f"wrote {gif} and {png}")
    unsound = [name for name, *numbers in figures if not all(map(math.isfinite, numbers))]
    if unsound:
        print(f"FAULT: a figure of {' and '.join(unsound)} is not finite: the model or its weights are broken")
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main())
