"""Models and inputs by name, for the command line: ``module:object``, or the folder of a diffusers pipeline."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import explain_error, value_error


class Source(NamedTuple):
    """A model, what runs it on a batch (None: the model itself), the batches, and what is known about it."""

    model: nn.Module
    call: Callable[..., Any] | None
    batches: Iterable[Any]
    about: Mapping[str, str] = MappingProxyType({})


def from_python(model: str, inputs: str) -> Source:
    """Return a model and its batches, each named as ``module:object``; modules of the working directory are found.

    Args:
        model: names a module, a pair of one and what runs it on a batch, or a callable that gives one of these.
        inputs: names an iterable of batches, or a callable that gives one.

    Raises:
        ValueError: a name that leads nowhere, or to something else.
    """
    built = _named(model)
    built = built() if callable(built) and not isinstance(built, nn.Module) else built
    module, call = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, nn.Module) or not (call is None or callable(call)):
        raise _wrong_argument(f"--model {model}", type(built).__name__, "an nn.Module, or (module, callable)")
    batches = _named(inputs)
    batches = batches() if callable(batches) else batches
    if not isinstance(batches, Iterable):
        raise _wrong_argument(
            f"--inputs {inputs}", type(batches).__name__, "an iterable of batches, or a callable that gives one"
        )
    return Source(module, call, batches)


def from_pipeline(
    folder: str, prompts: str, steps: int, arguments: str, device: str | None, dtype: str | None
) -> Source:
    """Return the denoiser of a diffusers pipeline, run on the lines of a text file.

    Args:
        folder: what ``DiffusionPipeline.save_pretrained`` wrote; nothing is downloaded.
        prompts: the text file; empty lines are left out.
        steps: denoising steps.
        arguments: a JSON object with further keyword arguments of the pipeline's call.
        device, dtype: where to run, and what to load in; None: a GPU if there is one, and float32, as
            diffusers loads what is not told.

    Raises:
        ImportError: there is no diffusers.
        OSError: there is no file of prompts.
        ValueError: another folder, no prompts, arguments that are no JSON object, a pipeline without a denoiser.
    """
    try:
        import diffusers
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            explain_error(
                "--pipeline needs diffusers", given="none", allowed="diffusers", todo="Run `pip install diffusers`."
            )
        ) from error
    if not Path(folder).is_dir():
        raise _wrong_argument(
            "--pipeline", folder, "a folder that DiffusionPipeline.save_pretrained wrote; nothing is downloaded"
        )
    try:
        keywords = json.loads(arguments)
    except ValueError:
        keywords = None
    if not isinstance(keywords, dict):
        raise _wrong_argument("--arguments", arguments, 'a JSON object, as \'{"height": 480, "width": 832}\'')
    lines = [line.strip() for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise _wrong_argument("--prompts", prompts, "a text file with a prompt on each line")
    loaded_in = {} if dtype is None else {dtype_name(diffusers.__version__): getattr(torch, dtype)}
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **loaded_in)
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe.set_progress_bar_config(disable=True)
    part = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    model = getattr(pipe, part, None)
    if not isinstance(model, nn.Module):
        raise _wrong_argument("--pipeline", type(pipe).__name__, "a pipeline with a transformer or a unet")

    @functools.wraps(pipe.__call__)  # so that it is seen what it may be given: a callback at the end of a step
    def call(number: int, prompt: str, **more: Any) -> Any:
        generator = torch.Generator("cpu").manual_seed(number)
        given = {"output_type": "latent", **keywords, **more}
        return pipe(prompt, num_inference_steps=steps, generator=generator, **given)

    about = {
        "model_id": Path(folder).resolve().name,
        "part": part,
        "scheduler": type(pipe.scheduler).__name__,
        "steps": str(steps),
        "inputs": f"{len(lines)} prompt{'s' * (len(lines) > 1)}",
    }
    sizes = [keywords[name] for name in ("num_frames", "height", "width") if name in keywords]
    if sizes:
        about["resolution"] = "x".join(map(str, sizes))
    return Source(model, call, list(enumerate(lines)), about)


def dtype_name(version: str) -> str:
    """What ``from_pretrained`` of a diffusers of this version calls the dtype; by the other name older ones drop it."""
    return "dtype" if tuple(map(int, version.split(".")[:2])) >= (0, 40) else "torch_dtype"


def _named(name: str) -> Any:
    module, colon, path = name.partition(":")
    if not colon or not module or not path:
        raise _wrong_argument("a name", repr(name), "module:object, as my_models:build")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        if not hasattr(value, part):
            raise _wrong_argument(f"the name {name!r}", f"a module without {part!r}", "an object of the module")
        value = getattr(value, part)
    return value


def _wrong_argument(what: str, given: object, allowed: str) -> ValueError:
    return value_error(what, given=given, allowed=allowed, todo="See `sparge calibrate --help`.")
