"""From which size on the pipelines of examples/pipelines pay: what the cost model says, nothing is measured.

    python benchmarks/pipeline_sizes.py                        # the table of docs/models.md, for an H200
    python benchmarks/pipeline_sizes.py --device-class cpu

For each model the tokens of one sequence at its authors' size, text included; the speed-up of self-attention alone that
is predicted there by the share of key blocks that is skipped; and the least number of tokens from which half of them
pays, with the square that has so many, of as many frames. Inference in bfloat16, compiled, no CUDA graphs.
"""

from __future__ import annotations

import argparse
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import harness
import torch
from break_even import least_length

from sparge_compile.cost import Shape, class_costs

PIPELINES = Path(__file__).parent.parent / "examples" / "pipelines"
SKIPPED = (0.5, 0.75, 0.9)


class Heads(NamedTuple):
    """The self-attention of a model: heads, their size, tokens of text and sound in a sequence, sequences in a call."""

    heads: int
    size: int
    text: int = 0
    batch: int = 1


MODELS = {
    "wan21": Heads(12, 128),
    "wan22": Heads(40, 128),
    "hunyuan_video": Heads(24, 128, 256),
    "hunyuan_video15": Heads(16, 128, 1985),
    "ltx": Heads(32, 64, batch=2),
    "ltx2": Heads(32, 128, batch=2),
    "cogvideox": Heads(48, 64, 226, batch=2),
    "mochi": Heads(24, 128, 256),
    "flux": Heads(24, 128, 512),
    "flux2": Heads(48, 128, 512),
    "qwen_image": Heads(24, 128, 256),
    "z_image": Heads(30, 128, 256),
    "minimax_h3": Heads(56, 128, 256 + 414),  # of which the sound of five seconds is 414
    "sd35": Heads(38, 64, 333, batch=2),
    "sdxl": Heads(10, 64, batch=2),
}


def row(script: str, device_class: str) -> dict[str, object]:
    """A line of the table."""
    recipe = runpy.run_path(str(PIPELINES / f"{script}.py"))["RECIPE"]
    heads, size, text, batch = MODELS[script]
    call = {"max_sequence_length": 0, **recipe.call}
    grid = recipe.grid(SimpleNamespace(vae_scale_factor_spatial=8), call)
    grid = next(iter(grid.values())) if isinstance(grid, dict) else grid
    frames, high, wide = grid[-4:-1] if len(grid) == 5 else grid
    dtype = torch.float32 if device_class == "cpu" else torch.bfloat16
    costs = class_costs(device_class, 1.0, dtype, size, None, "compiled")
    length = frames * high * wide + text
    shape = Shape(batch, heads, heads, length, length, size, size)
    at = f"{call['width']}×{call['height']}" + (f"×{call['num_frames']}" if "num_frames" in call else "")
    line: dict[str, object] = {"model": recipe.hub.split("/")[1], "at": at, "tokens": f"{length:,}"}
    for skipped in SKIPPED:
        prediction = costs.predict(shape, 1 - skipped)
        line[f"{skipped:.0%}"] = f"{prediction.speedup:.2f}x"
    least = least_length(costs, heads, size, 1 - SKIPPED[0], batch)
    line["from"] = "never" if least is None else size_of(least, text, frames, call["height"] / high)
    return line


def size_of(tokens: int, text: int, frames: int, stride: float) -> str:
    """So many tokens, and the side of a square that has them."""
    side = math.ceil(math.sqrt(max(1, tokens - text) / frames)) * round(stride)
    return f"{tokens:,} ({side}²)"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-class", default="sm90", help='as "sm90" or "cpu" (sm90)')
    args = parser.parse_args(argv)
    sys.path.append(str(PIPELINES))
    print(harness.table([row(script, args.device_class) for script in MODELS]))


if __name__ == "__main__":
    main()
