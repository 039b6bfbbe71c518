"""The two models of the study as data: what their clips are, how noise is timed, where their weights lie.

``SMALL``: 6,144 tokens, two digits on black. ``LARGE``: 25,088 tokens, three digits that move in depth
before a texture. The transformer is the same; only what it sees differs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

CLASSES = 10
PATCH = 4  # pixels of a token's side, in one frame
HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"


@dataclass(frozen=True)
class Stage:
    """A part of a training: clips of so many frames, at this share of key blocks (None: dense attention of torch)."""

    steps: int
    batch: int
    lr: float
    frames: int
    keep: float | None = None


@dataclass(frozen=True)
class Setup:
    """One configuration. A clip is [frames, side, side] in [-1, 1] and has ``digits`` different classes."""

    name: str
    frames: int
    side: int
    digits: int
    is_deep: bool  # sizes change, the near covers the far, the ground is textured
    shift: float  # of times towards noise: what fills many pixels is seen through much noise
    reader: tuple[int, ...]  # channels of the network that reads digits
    batch: int  # clips of a step of fine-tuning; samples are drawn from half as many
    rounds: int  # batches of held-out clips, and of samples, for a figure
    blind: tuple[int, int, int]  # for each seed: clips left out, controls, pairs
    stages: tuple[Stage, ...]  # of training
    begins: str = ""  # the setup whose weights training begins with
    sizes: tuple[int, int, int] = (256, 8, 4)  # of the transformer: width, layers, heads

    def __str__(self) -> str:
        return self.name

    @property
    def weights(self) -> Path:
        """The folder of what was trained: teacher, student, classifier, and their logs."""
        return HERE / "weights" / ("" if self.name == "small" else self.name)

    @property
    def results(self) -> Path:
        """The folder of the tables that docs/fidelity.md is made from."""
        return DOCS / "fidelity" / ("" if self.name == "small" else self.name)

    def grid(self, frames: int | None = None) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        return frames or self.frames, self.side // PATCH, self.side // PATCH

    def shape(self, count: int, frames: int | None = None) -> tuple[int, int, int, int]:
        """Of some clips, or their noise."""
        return count, frames or self.frames, self.side, self.side


SMALL = Setup(
    "small",
    frames=24,
    side=64,
    digits=2,
    is_deep=False,
    shift=12.0,
    reader=(32, 64, 128),
    batch=16,
    rounds=4,
    blind=(10, 2, 10),
    stages=(Stage(4000, batch=32, lr=1e-3, frames=24),),
)
# Token for token, attention over whole clips costs four times that over quarters of them; a fifth of the key blocks
# brings that back. The last stage is dense, so that the model is one of dense attention.
LARGE = Setup(
    "large",
    frames=32,
    side=112,
    digits=3,
    is_deep=True,
    shift=16.0,
    reader=(32, 64, 128, 128),
    batch=4,
    rounds=16,
    blind=(6, 4, 20),
    stages=(
        Stage(2500, batch=32, lr=1e-3, frames=8),
        Stage(3730, batch=8, lr=7e-4, frames=32, keep=0.2),
        Stage(500, batch=8, lr=3e-4, frames=32),
    ),
    begins="small",
)
SETUPS = {setup.name: setup for setup in (SMALL, LARGE)}


def add_setup(parser: argparse.ArgumentParser) -> None:
    """The option --setup, which becomes ``args.setup``, a Setup."""
    parser.add_argument("--setup", type=_setup, default=SMALL, metavar="NAME", help="small or large (small)")


def _setup(name: str) -> Setup:
    if name not in SETUPS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SETUPS)}")
    return SETUPS[name]
