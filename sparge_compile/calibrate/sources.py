"""Models and inputs by name, for the command line: ``module:object``, or the folder of a diffusers pipeline."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import explain_error


class Source(NamedTuple):
    """A model, what runs it on a batch (None: the model itself), and the batches."""

    model: nn.Module
    call: Callable[..., Any] | None
    batches: Iterable[Any]


def from_python(model: str, inputs: str) -> Source:
    """``model`` names a module, or a callable that gives one, or one with what runs it; ``inputs`` an iterable, or a
    callable that gives one. Both as ``module:object``; modules of the working directory are found."""
    made = _named(model)
    made = made() if callable(made) and not isinstance(made, nn.Module) else made
    built, call = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(built, nn.Module) or not (call is None or callable(call)):
        raise _bad(f"--model {model}", type(made).__name__, "an nn.Module, or (module, callable)")
    given = _named(inputs)
    given = given() if callable(given) else given
    if not isinstance(given, Iterable):
        raise _bad(f"--inputs {inputs}", type(given).__name__, "an iterable of batches, or a callable that gives one")
    return Source(built, call, given)


def from_pipeline(folder: str, prompts: str, steps: int, device: str | None, dtype: str | None) -> Source:
    """The denoiser of a diffusers pipeline in a local folder, run on the lines of a text file."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            explain_error("--pipeline needs diffusers", given="none", allowed="diffusers", todo="pip install diffusers")
        ) from error
    if not Path(folder).is_dir():
        raise _bad("--pipeline", folder, "a folder that DiffusionPipeline.save_pretrained wrote; nothing is downloaded")
    lines = [line.strip() for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise _bad("--prompts", prompts, "a text file with a prompt on each line")
    pipe = DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, torch_dtype=getattr(torch, dtype) if dtype else None
    )
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe.set_progress_bar_config(disable=True)
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if not isinstance(model, nn.Module):
        raise _bad("--pipeline", type(pipe).__name__, "a pipeline with a transformer or a unet")

    def call(number: int, prompt: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(number)
        return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent")

    return Source(model, call, list(enumerate(lines)))


def _named(name: str) -> Any:
    module, colon, path = name.partition(":")
    if not colon or not module or not path:
        raise _bad("a name", repr(name), "module:object, as my_models:build")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        if not hasattr(found, part):
            raise _bad(f"the name {name!r}", f"a module without {part!r}", "an object of the module")
        found = getattr(found, part)
    return found


def _bad(what: str, given: object, allowed: str) -> ValueError:
    return ValueError(explain_error(what, given=given, allowed=allowed, todo="See `sparge calibrate --help`."))
