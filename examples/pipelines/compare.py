"""A pipeline of diffusers, dense and sparse: all that the scripts of this folder share.

A script says in a :class:`Recipe` what is peculiar to its model; :func:`main` loads the pipeline, prints what would be
replaced, calibrates, generates with the same noise by dense and by sparse attention, both compiled block by block, and
prints and draws how they differ. It leaves in ``--out`` the calibrations, ``report.txt``, ``table.txt`` and a picture
or a clip of both side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

import sparge_compile

PROMPTS = (  # calibrated on, unless --prompts names a file with others
    "A red fox walks through deep snow at dawn, its breath visible in the cold air.",
    "A crowded night market in the rain, neon signs reflected in the wet street.",
    "An old fisherman mends his net on a wooden pier, close shot of his hands.",
)
LATENT = {"output_type": "latent"}  # where nobody looks at the frames


def keep_text(pipe: Any, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options for text and image in one sequence, where each block puts them together."""
    return {"keep_keys": "text", "dense_queries": True}


@dataclass(frozen=True)
class Recipe:
    """What is peculiar to a model.

    Attributes:
        hub: where its pipeline lies on the hub.
        call: arguments of the pipeline beside the prompt: size, frames, steps, as its authors give them.
        grid: of (pipe, arguments): frames, rows and columns of the tokens that these arguments lead to; a dict of them
            by site where levels differ.
        models: the pipeline's denoisers.
        blocks: the classes of their blocks, where ``compile_repeated_blocks`` of diffusers does not know them.
        options: of the backend, of (pipe, arguments): what to do with the tokens of a text.
        fps: frames of a clip in a second; None: pictures.
        load: what loads the pipeline from a folder or a name, in a dtype.
        run: what calls it: (pipe, prompt, arguments) to frames [F, H, W, 3] from 0 to 1.
    """

    hub: str
    call: Mapping[str, Any]
    grid: Callable[[Any, Mapping[str, Any]], Any]
    models: tuple[str, ...] = ("transformer",)
    blocks: tuple[str, ...] = ()
    options: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] = lambda pipe, call: {}
    fps: int | None = None
    load: Callable[[str, torch.dtype], Any] | None = None
    run: Callable[[Any, str, Mapping[str, Any]], Any] | None = None


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Do it all as the command line says; returns the rows of the table, by name."""
    args = _arguments(recipe, argv)
    args.out.mkdir(parents=True, exist_ok=True)
    call = {**recipe.call, **json.loads(args.arguments)}
    pipe = _loaded(recipe, args)
    if args.dense_steps is not None and not _has_steps(pipe):
        raise SystemExit(f"{type(pipe).__name__} tells nobody in which step it is: --dense-steps cannot be kept.")
    grid = recipe.grid(pipe, call)
    options = {**recipe.options(pipe, call), "min_seq_len": args.min_seq_len, "inner": args.inner}
    models = {name: model for name in recipe.models if (model := getattr(pipe, name)) is not None}

    def generate(prompt: str, **more: Any) -> Any:
        run = recipe.run or _run
        return run(pipe, prompt, {**call, "generator": torch.Generator().manual_seed(args.seed), **more})

    calibrations = _calibrated(models, {**options, "grid": grid}, generate, pipe, args)
    reports = [
        sparge_compile.explain(model, {**options, "grid": grid, "calibration": calibrations[name]}, call=generate)(
            args.prompt, num_inference_steps=2, **LATENT
        )
        for name, model in models.items()
    ]
    _write(args.out / "report.txt", "\n\n".join(map(str, reports)))

    for model in models.values():
        compile_blocks(model, recipe.blocks, backend=args.inner)
    dense, dense_seconds = _timed(generate, args.prompt)

    steps = {} if args.dense_steps is None else {"dense_steps": args.dense_steps}
    handles = []
    for name, model in models.items():
        handles.append(sparge_compile.attach(model, calibrations[name], grid=grid, **steps))
        compile_blocks(model, recipe.blocks, backend="sparge", options=options)
    told = {"callback_on_step_end": sparge_compile.diffusers_callback(*handles)} if _has_steps(pipe) else {}
    sparse, sparse_seconds = _timed(generate, args.prompt, 2 + (args.dense_steps or 0), **told)

    rows = {
        "dense": {"sparsity": 0.0, "seconds": dense_seconds, "speed-up": 1.0},
        "sparse": {
            **_sparsity(calibrations.values()),
            "seconds": sparse_seconds,
            "speed-up": dense_seconds / sparse_seconds,
            "error": float(np.linalg.norm(sparse - dense) / np.linalg.norm(dense)),
            "PSNR": psnr(sparse, dense),
        },
    }
    _write(args.out / "table.txt", table(rows))
    clips = {"dense": dense, f"sparse, {rows['sparse']['PSNR']:.1f} dB": sparse}
    picture = args.out / ("dense-sparse.gif" if recipe.fps else "dense-sparse.png")
    print(sparge_compile.side_by_side(clips, picture, rate=recipe.fps or 1, height=dense.shape[1]))
    return rows


def _sparsity(calibrations: Iterable[Any]) -> dict[str, float]:
    """That of the steps that are not dense, where the files have it: one without measurements does not."""
    found = [each.summary() for each in calibrations]
    return {} if None in found else {"sparsity": float(np.mean([each.sparsity for each in found]))}


def _arguments(recipe: Recipe, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"{recipe.hub}: dense and sparse, side by side.")
    parser.add_argument("--model", default=recipe.hub, help=f"a folder or a name on the hub ({recipe.hub})")
    parser.add_argument("--prompt", default="A cat in a red scarf looks out of a train window.", help="what to draw")
    parser.add_argument("--arguments", default="{}", metavar="JSON", help=f"of the pipeline, over {dict(recipe.call)}")
    parser.add_argument("--prompts", type=Path, help="a file, a prompt on each line, to calibrate on (three of ours)")
    parser.add_argument("--sparsity", type=float, default=0.75, help="share of key blocks to skip (0.75)")
    parser.add_argument(
        "--every",
        type=int,
        default=7,
        help="measure every n-th call of the model: odd, as guidance calls twice a step (7)",
    )
    parser.add_argument("--orders", nargs="+", help="orders of tokens to choose from, as raster 2x4x8 (six)")
    parser.add_argument(
        "--influence",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask the model on which heads its output depends, by some hundred calls (on)",
    )
    parser.add_argument(
        "--calibration", type=Path, nargs="+", help="files of earlier runs, one for each denoiser, instead"
    )
    parser.add_argument(
        "--dense-steps", type=int, help="leave the first steps of the run dense; --sparsity is that of the others"
    )
    parser.add_argument("--offload", choices=("none", "model", "group", "sequential"), default="none")
    parser.add_argument("--lora", help="a LoRA to load before anything else: a folder or a name on the hub")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, help=f"({here})")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="(bfloat16)")
    parser.add_argument("--inner", default="inductor", help="what compiles the blocks, dense ones too (inductor)")
    parser.add_argument("--min-seq-len", type=int, help="attention over fewer keys stays dense (what does not pay)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="a folder (out)")
    return parser.parse_args(argv)


def _loaded(recipe: Recipe, args: argparse.Namespace) -> Any:
    """The pipeline on its device. A LoRA comes first: hooks of offloading and compiled code know its layers."""
    dtype = getattr(torch, args.dtype)
    pipe = (recipe.load or _load)(args.model, dtype)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    if args.offload != "none":  # hooks break graphs, and each is traced for each block
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    _place(pipe, args.offload, args.device)
    if recipe.fps and hasattr(getattr(pipe, "vae", None), "enable_tiling"):
        pipe.vae.enable_tiling()  # a whole clip at once takes more memory than the denoiser
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


def _load(name: str, dtype: torch.dtype) -> Any:
    import diffusers

    is_new = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (
        0,
        40,
    )  # older ones drop the new name, in silence
    return diffusers.DiffusionPipeline.from_pretrained(name, **{"dtype" if is_new else "torch_dtype": dtype})


def _place(pipe: Any, offload: str, device: str) -> None:
    """Put a pipeline on its device, or have it brought there as it runs."""
    is_modular = not hasattr(pipe, "enable_model_cpu_offload")
    if offload == "none":
        pipe.to(device)
    elif is_modular and offload == "model":
        pipe._components_manager.enable_auto_cpu_offload(device)
    elif is_modular:
        raise SystemExit(f"{type(pipe).__name__} has no --offload {offload}: give --offload model.")
    elif offload == "group":
        pipe.enable_group_offload(torch.device(device), offload_type="leaf_level")
    else:
        getattr(pipe, f"enable_{offload}_cpu_offload")(device=device)


def _run(pipe: Any, prompt: str, call: Mapping[str, Any]) -> Any:
    """Frames [F, H, W, 3]: those of the first clip, or the first picture."""
    made = pipe(prompt=prompt, **{"output_type": "np", **call}, return_dict=False)[0]
    return made if "output_type" in call or np.ndim(made) == 4 else made[0]


def _has_steps(pipe: Any) -> bool:
    return "callback_on_step_end" in signature(pipe.__call__).parameters


def _calibrated(
    models: Mapping[str, Any], options: Mapping[str, Any], generate: Callable[..., Any], pipe: Any, args: Any
) -> dict[str, Any]:
    """The calibration of each denoiser: from its file, or made and written to one."""
    if args.calibration:
        return {
            name: sparge_compile.Calibration.load(file) for name, file in zip(models, args.calibration, strict=True)
        }
    prompts = args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else PROMPTS

    def run(prompt: str, callback_on_step_end: Any = None) -> Any:
        """With this argument calibration sees where steps end, if the pipeline tells."""
        told = {"callback_on_step_end": callback_on_step_end} if _has_steps(pipe) else {}
        return generate(prompt, **LATENT, **told)

    return {
        name: sparge_compile.calibrate(
            model,
            [(prompt,) for prompt in prompts if prompt.strip()],
            call=run,
            target_sparsity=args.sparsity,
            influence=args.influence,
            every=args.every,
            orders=args.orders,
            options=options,
            out=args.out / f"{name}.json",
            progress=True,
        )
        for name, model in models.items()
    }


def compile_blocks(model: Any, blocks: Sequence[str], **how: Any) -> None:
    if not blocks:
        model.compile_repeated_blocks(**how)
    for module in model.modules():
        if type(module).__name__ in blocks:
            module.compile(**how)


def _timed(generate: Callable[..., Any], prompt: str, steps: int = 2, **more: Any) -> tuple[Any, float]:
    """Frames, and the seconds that they take once everything was compiled, in a run of so many steps and a decoding."""
    generate(prompt, num_inference_steps=steps, **more)
    start = time.perf_counter()
    frames = generate(prompt, **more)
    return frames, time.perf_counter() - start


def psnr(frames: Any, reference: Any) -> float:
    """Decibels, of values from 0 to 1."""
    squared = float(np.mean((frames.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if squared == 0 else -10 * math.log10(squared)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    columns = {"sparsity": "{:.1%}", "seconds": "{:.2f}", "speed-up": "{:.2f}x", "error": "{:.2%}", "PSNR": "{:.1f} dB"}
    lines = [
        (name, *(text.format(row[column]) if column in row else "–" for column, text in columns.items()))
        for name, row in rows.items()
    ]
    return tabulate(lines, headers=("", *columns), disable_numparse=True, colalign=("left", *["right"] * len(columns)))


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
