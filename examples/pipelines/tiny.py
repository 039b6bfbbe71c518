"""The scripts of this folder on tiny pipelines: real classes, random weights, no network, on a CPU, within a minute.

    python examples/pipelines/tiny.py wan21
    python examples/pipelines/tiny.py flux --sparsity 0.4 --out flux

What it draws is noise; all else is as with a model of the hub. It leaves the pipeline in ``--out``, so that the script
itself, or ``sparge calibrate --pipeline``, can go on from there.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
TESTS = HERE.parent.parent / "tests" / "whole"  # where the pipelines are built

VIDEO = {"height": 192, "width": 192, "num_frames": 9, "max_sequence_length": 16}
LARGE = {"height": 416, "width": 416, "num_frames": 9}  # more tokens than the text, which has 1,985
LONG = {"height": 256, "width": 256, "num_frames": 33, "max_sequence_length": 16}
SOUND = {"height": 160, "width": 160, "num_frames": 124, "num_inference_steps": 3}  # five seconds are the least
IMAGE = {"height": 256, "width": 256, "max_sequence_length": 32}
ONE_CALL = {  # of LTX-2's guidance, which has four calls a step
    **{f"{of}guidance_scale": 1.0 for of in ("", "audio_")},
    **{f"{of}modality_scale": 1.0 for of in ("", "audio_")},
    **{f"{of}stg_scale": 0.0 for of in ("", "audio_")},
    "spatio_temporal_guidance_blocks": None,
}
SMALL = ["--dtype", "float32", "--device", "cpu", "--inner", "eager", "--min-seq-len", "200", "--every", "2"]
SMALL += ["--sparsity", "0.3", "--no-influence", "--orders", "2x4x8"]


class Tiny(NamedTuple):
    """Which pipeline a script runs on, the arguments of its call, and more of the script's own."""

    build: str
    call: dict[str, Any]
    more: tuple[str, ...] = ()


TINY = {
    "wan21": Tiny("wan", VIDEO),
    "wan22": Tiny("wan22", VIDEO),
    "hunyuan_video": Tiny("hunyuan_video", VIDEO),
    "hunyuan_video15": Tiny("hunyuan_video15", LARGE, ("--min-seq-len", "1024", "--sparsity", "0.2")),
    "ltx": Tiny("ltx", LONG),
    "ltx2": Tiny("ltx2", LONG | ONE_CALL),
    "cogvideox": Tiny("cogvideox", VIDEO),
    "mochi": Tiny("mochi", VIDEO | {"num_frames": 13}),
    "flux": Tiny("flux", IMAGE),
    "flux2": Tiny("flux2", IMAGE | {"text_encoder_out_layers": [1, 2, 3]}),
    "qwen_image": Tiny("qwen_image", IMAGE),
    "z_image": Tiny("z_image", IMAGE),
    "minimax_h3": Tiny("minimax_h3", SOUND),
    "sd35": Tiny("sd35", IMAGE),
    "sdxl": Tiny("sdxl", {"height": 256, "width": 256}),
}


def built(name: str) -> Any:
    """A pipeline with random weights, always the same."""
    sys.path.append(str(TESTS))
    import tiny_images
    import tiny_modular
    import tiny_pipelines

    builders = (tiny_images, tiny_pipelines, tiny_modular)
    return tiny_pipelines.seeded(next(getattr(of, name) for of in builders if hasattr(of, name)))


def run(script: str, out: Path, more: Sequence[str] = (), **arguments: Any) -> dict[str, Any]:
    """Run a script on its pipeline, with further arguments of its own and of the pipeline; the rows of its table."""
    tiny = TINY[script]
    out.mkdir(parents=True, exist_ok=True)
    built(tiny.build).save_pretrained(str(out / "pipeline"))
    (out / "prompts.txt").write_text("a cat\n")
    call = {"num_inference_steps": 2, **tiny.call, **arguments}
    given = ["--model", out / "pipeline", "--prompts", out / "prompts.txt", "--arguments", json.dumps(call)]
    before, sys.argv = sys.argv, [script, *map(str, given), *SMALL, *tiny.more, "--out", str(out), *more]
    sys.path.insert(0, str(HERE))
    try:
        return runpy.run_path(str(HERE / f"{script}.py"), run_name="__main__")["rows"]
    finally:
        sys.argv = before
        sys.path.remove(str(HERE))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=TINY)
    parser.add_argument("--out", type=Path, help="a folder (tiny-SCRIPT)")
    args, more = parser.parse_known_args()
    run(args.script, args.out or Path(f"tiny-{args.script}"), more)
