"""The calibrations of the trained model in gallery/moving_digits, made anew by the command ``sparge calibrate``.

    python studies/moving_digits/make_gallery.py              # all of them: some ten minutes on two cores
    python studies/moving_digits/make_gallery.py teacher_8x64x64_sparsity-85

Clips are of digits that the model was trained on, at times at which what moves where is decided and later ones. A page
of what a file does to a clip that is drawn, in this folder:

    sparge report ../../gallery/moving_digits/teacher_8x64x64_sparsity-85.json --model make_gallery:sampler \
      --inputs make_gallery:noises --min-seq-len 0 --every 4 --out page.html
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from bank import multi_hot
from demo import noisy_at
from setups import SMALL
from torch import Tensor, nn
from transformer import load, sample

import sparge_compile
from sparge_compile import cli

FOLDER = Path(__file__).resolve().parents[2] / "gallery" / "moving_digits"
FRAMES_VARIABLE = "MOVING_DIGITS_FRAMES"
TIMES = (0.97, 0.9, 0.7, 0.4)
SEED = 41_000_000
STEPS = 12  # of the clip that is drawn
SIZE = f"{{}}x{SMALL.side}x{SMALL.side}"

_SCHEDULER = "scheduler=Euler's method of flow matching, times moved towards noise"
_LICENCE = "licence=Apache-2.0"
_TEACHER = (
    "model_id=studies/moving_digits/weights/teacher.safetensors",
    _SCHEDULER,
    f"inputs={len(TIMES)} noisy clips of training digits at t = {', '.join(map(str, TIMES))}",
    _LICENCE,
)
_STUDENT = {
    "model_id": "studies/moving_digits/weights/student.safetensors",
    "resolution": SIZE.format(SMALL.frames),
    "scheduler": _SCHEDULER.partition("=")[2],
    "licence": _LICENCE.partition("=")[2],
    "note": "The thresholds that these weights were fine-tuned with; other weights want thresholds of their own.",
}
# By file: the frames of its clips, and what `sparge calibrate` is asked.
FILES = {
    "teacher_8x64x64_sparsity-85": (8, ["--target-sparsity", "0.85", "--orders", "raster", "2x4x8", "8x4x2"]),
    "teacher_24x64x64_error-10": (24, ["--target-error", "0.1", "--orders", "2x4x8"]),
}
STUDENT = f"student_{SIZE.format(SMALL.frames)}"


class Clip(NamedTuple):
    """What the sampler draws, as pipelines give it: frames [1, T, 1, 64, 64] in [0, 1]."""

    frames: Tensor


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the model is calibrated by; ``sparge calibrate`` calls this by name."""
    frames = int(os.environ[FRAMES_VARIABLE])
    return [noisy_at(when, SEED + i, frames, held_out=False) for i, when in enumerate(TIMES)]


def sampler() -> tuple[nn.Module, Callable[[Tensor], Clip]]:
    """The model, and what draws a clip of a 3 and a 7 from noise; ``sparge report`` calls this by name."""
    model = load()
    classes = multi_hot(torch.tensor([[3, 7]]))

    def draw(noise: Tensor) -> Clip:
        video = sample(model, noise, classes, steps=STEPS)
        return Clip(((video + 1) / 2).unsqueeze(2))

    return model, draw


def noises() -> list[Tensor]:
    """The noise of one clip of 8 frames, or as many as the environment says."""
    frames = int(os.environ.get(FRAMES_VARIABLE, "8"))
    return [torch.randn(SMALL.shape(1, frames), generator=torch.Generator().manual_seed(11))]


def make(name: str) -> int:
    """Make one file; 0 where that went well."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    out = FOLDER / f"{name}.json"
    if name == STUDENT:
        sparge_compile.Calibration.load(SMALL.weights / "student.json").described(**_STUDENT).save(out)
        return 0
    frames, aim = FILES[name]
    os.environ[FRAMES_VARIABLE] = str(frames)
    command = ["calibrate", "--model", "transformer:load", "--inputs", "make_gallery:batches", "--min-seq-len", "0"]
    command += ["--query-blocks", "8", *aim, "--out", str(out)]
    return cli.main([*command, "--about", *_TEACHER, f"resolution={SIZE.format(frames)}"])


if __name__ == "__main__":
    sys.exit(max(map(make, sys.argv[1:] or (*FILES, STUDENT))))
