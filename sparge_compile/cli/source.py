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
    parser.add_argument("--device", type=device, help="of a pipeline: where to run (cuda if there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of a pipeline: load in this dtype")
    parser.add_argument("--min-seq-len", type=int, help="attention over fewer keys stays dense (1024)")
    parser.add_argument("--additive-masks", action="store_true", help="attention with masks that change scores, too")
    parser.add_argument(
        "--grid",
        type=int,
        nargs="+",
        metavar="N",
        help="frames, rows and columns of the tokens, where graphs do not show it; or five numbers, with the tokens "
        "before and behind, of which one may be -1: what is left",
    )


def device(text: str) -> str:
    """A device of torch that is there, as an argument."""
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} is no device here, as cpu is: {what}") from error
    return text


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


def add_survey(parser: argparse.ArgumentParser) -> None:
    """How to look at a model: thresholds beside those of the file, which calls, whether to time them."""
    parser.add_argument("--topk", type=float, help="threshold of sites without one in the file")
    parser.add_argument("--topp", type=float, help="threshold of sites without one in the file")
    parser.add_argument("--every", type=int, default=1, help="look at every n-th call of the model (1)")
    parser.add_argument("--no-times", action="store_true", help="time nothing")


def surveyed(args: argparse.Namespace, calibration: Any) -> Any:
    """What ``survey`` sees on the first batch; None where no model is given."""
    if not (args.model or args.inputs or args.pipeline or args.prompts):
        return None
    from ..calibrate.inputs import first_batch
    from ..showing.survey import survey

    model, call, batches, _ = source_of(args)
    thresholds = {name: getattr(args, name) for name in ("topk", "topp") if getattr(args, name) is not None}
    options = {**options_of(args), **thresholds, "calibration": calibration}
    return survey(model, first_batch(batches), options, call=call, every=args.every, timed=not args.no_times)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The backend's options that the arguments give."""
    return {"min_seq_len": args.min_seq_len, "additive_masks": args.additive_masks, "grid": args.grid}
