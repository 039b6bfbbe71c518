"""Arguments of the commands that run a model: which, on what, under which options."""

from __future__ import annotations

import argparse
from typing import Any


def add_source(parser: argparse.ArgumentParser) -> None:
    """A model and its inputs by name or as a pipeline, and the options that say which attention counts."""
    parser.add_argument(
        "--model",
        metavar="MODULE:NAME",
        help="an nn.Module, or a function that returns one, or (module, function that runs it on a batch)",
    )
    parser.add_argument(
        "--inputs",
        metavar="MODULE:NAME",
        help="the batches, or a function that returns them: tuples or dicts of the model's arguments",
    )
    parser.add_argument("--pipeline", metavar="FOLDER", help="instead, a diffusers pipeline in a local folder")
    parser.add_argument("--prompts", metavar="FILE", help="of a pipeline: a prompt on each line")
    parser.add_argument("--steps", type=int, default=50, help="of a pipeline: denoising steps (50)")
    parser.add_argument(
        "--arguments", default="{}", metavar="JSON", help='of a pipeline: {"height": 480, "width": 832, ...}'
    )
    parser.add_argument("--device", help="of a pipeline: where to run (cuda if there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of a pipeline: load in this dtype")
    parser.add_argument("--min-seq-len", type=int, help="attention over fewer keys stays dense (1024)")
    parser.add_argument("--additive-masks", action="store_true", help="attention with masks that change scores, too")
    parser.add_argument(
        "--grid",
        type=int,
        nargs="+",
        metavar="N",
        help="frames, rows and columns of the tokens, where graphs do not show it; or five numbers, with the tokens "
        "before and behind",
    )


def source_of(args: argparse.Namespace) -> Any:
    """The ``calibrate.sources.Source`` that the arguments name.

    Raises:
        ValueError: neither of the two pairs, or both.
    """
    from ..calibrate.sources import from_pipeline, from_python
    from ..errors import value_error

    if args.pipeline and args.prompts and not (args.model or args.inputs):
        return from_pipeline(args.pipeline, args.prompts, args.steps, args.arguments, args.device, args.dtype)
    if args.model and args.inputs and not (args.pipeline or args.prompts):
        return from_python(args.model, args.inputs)
    raise value_error(
        "no model",
        given=", ".join(x for x in ("model", "inputs", "pipeline", "prompts") if getattr(args, x)) or "none",
        allowed="--model and --inputs, or --pipeline and --prompts",
        todo="Give one of the two pairs.",
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The backend's options that the arguments give."""
    return {"min_seq_len": args.min_seq_len, "additive_masks": args.additive_masks, "grid": args.grid}
