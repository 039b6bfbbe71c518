"""The command ``sparge``: calibrate, show, plot, explain, doctor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

_CALIBRATE = """Find thresholds for every attention head of a model from the model's own inputs.

examples:
  sparge calibrate --model my_models:build --inputs my_models:batches --out model.json
  sparge calibrate --model my_models:build --inputs my_models:batches --target-output-error 0.05 --out model.json
  sparge calibrate --pipeline ./Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --steps 50 --every 13 --out wan.json
  torchrun --nproc-per-node 4 -m sparge_compile.calibrate --model ... --inputs ... --out model.json

A run that was interrupted goes on where it stopped, at a batch boundary, if the same command is given again."""

_ERROR = "most relative L1 error of each head's attention, with as few blocks as it allows (0.05)"
_SPARSITY = "share of key blocks that the whole model skips, where it hurts least"
_OUTPUT = "most relative L2 error of the model's output, a mean over inputs, with as few blocks as it allows"
_INFLUENCE = (
    "spare heads on which the model's output depends, by as many forwards as there are heads, 256 at most (on for a "
    "sparsity and for the output's error)"
)

_ORDERS = (
    "orders of tokens to choose from, where the grid of a site is known: raster, or tiles in frames, rows and columns "
    "(raster 2x4x8 4x4x4 4x8x2 8x4x2 1x8x8); the first batch runs once more for it"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Errors about arguments and files are printed as a sentence; SPARGE_TRACEBACK=1 shows where they come from.
    """
    args = _parser().parse_args(arguments)
    try:
        status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("SPARGE_TRACEBACK"):
            raise
        print(f"sparge: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparge", description="Thresholds for block-sparse attention, and what they do."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    raw = argparse.RawDescriptionHelpFormatter
    _calibrate_arguments(
        commands.add_parser("calibrate", help="find thresholds", description=_CALIBRATE, formatter_class=raw)
    )
    _show_arguments(commands.add_parser("show", **_described("print a calibration file as a table, or aim it anew")))
    _plot_arguments(commands.add_parser("plot", **_described("draw a calibration file as two PNGs (needs matplotlib)")))
    _explain_arguments(
        commands.add_parser(
            "explain",
            **_described("which attention of a model would be replaced on the first batch, and why not the rest"),
        )
    )
    _doctor_arguments(
        commands.add_parser(
            "doctor", **_described("what is installed, which kernels run here, right or wrong, how fast")
        )
    )
    return parser


def _described(text: str) -> dict[str, Any]:
    """The same sentence in the list of commands and in the command's own help."""
    return {"help": text, "description": text[0].upper() + text[1:] + "."}


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    parser.add_argument("--out", required=True, help="the calibration file to write (JSON)")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument("--target-error", type=float, help=_ERROR)
    aim.add_argument("--target-sparsity", type=float, help=_SPARSITY)
    aim.add_argument("--target-output-error", type=float, help=_OUTPUT)
    parser.add_argument("--influence", action=argparse.BooleanOptionalAction, help=_INFLUENCE)
    parser.add_argument("--orders", nargs="+", metavar="ORDER", help=_ORDERS)
    by = "which error of a head counts, over samples (worst with --target-error, else mean)"
    parser.add_argument("--by", choices=("worst", "mean"), help=by)
    parser.add_argument(
        "--mode",
        choices=("hybrid", "topk", "topp"),
        default="hybrid",
        help="both thresholds, or one alone for comparison (hybrid)",
    )
    parser.add_argument(
        "--phases",
        type=float,
        nargs="*",
        default=(),
        metavar="FROM",
        help="for denoising: shares of the model's steps in a batch from which on other thresholds hold, as 0.2 0.6",
    )
    parser.add_argument("--every", type=int, default=1, help="measure every n-th call of the model in a batch (1)")
    parser.add_argument(
        "--query-blocks", type=int, default=32, help="blocks of 128 queries to look at, of each call and head (32)"
    )
    parser.add_argument("--memory", type=int, default=1024, help="MiB of scratch memory on the device (1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of query blocks (0)")
    parser.add_argument("--batches", type=int, help="use only the first so many batches")
    _schedule_arguments(parser)
    parser.set_defaults(run=_calibrate)


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--target-error", type=float, help="aim anew: the most relative L1 error of each head")
    again.add_argument("--target-sparsity", type=float, help="aim anew: the share of key blocks to skip")
    again.add_argument("--target-output-error", type=float, help="aim anew: the most error of the output")
    _schedule_arguments(parser)
    parser.add_argument("--out", help="write the calibration, aimed anew or with another plan, to this file")
    parser.set_defaults(run=_show)


def _schedule_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dense-steps",
        type=int,
        nargs="+",
        metavar="N",
        help="for denoising: dense in the first N steps, the last -N, or from one to another, as 2 10",
    )
    parser.add_argument(
        "--dense-layers", nargs="+", metavar="NAME", help="dense in every step: N for blocks 0 to N - 1, or patterns"
    )
    parser.add_argument(
        "--sparsities", type=float, nargs="+", metavar="SHARE", help="for denoising: a target sparsity for each step"
    )


def _schedule(args: argparse.Namespace) -> dict[str, Any]:
    """The plan that is asked for, as ``Calibration.scheduled`` takes it; nothing where none is."""
    steps, layers = args.dense_steps, args.dense_layers
    given = {
        "dense_steps": steps[0] if steps and len(steps) == 1 else steps,
        "dense_layers": int(layers[0]) if layers and len(layers) == 1 and layers[0].isdigit() else layers,
        "sparsities": args.sparsities,
    }
    return {name: value for name, value in given.items() if value is not None}


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file")
    parser.add_argument("--out", metavar="PREFIX", help="how the names of the pictures begin (as that of the file)")
    parser.set_defaults(run=_plot)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    parser.add_argument("--calibration", help="a calibration file")
    parser.add_argument("--topk", type=float, help="threshold of sites without one in the file")
    parser.add_argument("--topp", type=float, help="threshold of sites without one in the file")
    parser.set_defaults(run=_explain)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="where to look (cuda if there is one)")
    parser.add_argument("--shape", type=_shape, metavar="B,H,L,D", help="attention to time (a moderate one)")
    parser.add_argument("--sparsity", type=float, default=0.95, help="of what is timed (0.95)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of what is timed (bfloat16; float32 on a CPU)"
    )
    parser.add_argument("--causal", action="store_true", help="time causal attention")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    parser.set_defaults(run=_doctor)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,H,L,D, as 1,12,32760,128")
    return sizes


def _source_arguments(parser: argparse.ArgumentParser) -> None:
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


def _source(args: argparse.Namespace) -> Any:
    from .calibrate.sources import from_pipeline, from_python
    from .errors import value_error

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


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"min_seq_len": args.min_seq_len, "additive_masks": args.additive_masks, "grid": args.grid}


def _calibrate(args: argparse.Namespace) -> int:
    import itertools

    from .calibrate.run import calibrate

    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shared:
        _join_processes()
    model, call, batches = _source(args)
    if args.batches is not None:
        batches = list(itertools.islice(batches, args.batches))
    calibration = calibrate(
        model,
        batches,
        call=call,
        target_error=args.target_error,
        target_sparsity=args.target_sparsity,
        target_output_error=args.target_output_error,
        influence=args.influence,
        orders=args.orders,
        by=args.by,
        mode=args.mode,
        phases=args.phases,
        options=_options(args),
        query_blocks=args.query_blocks,
        every=args.every,
        memory=args.memory,
        seed=args.seed,
        out=args.out,
        share_batches=shared,
        progress=True,
    )
    if not shared or int(os.environ["RANK"]) == 0:
        if planned := _schedule(args):
            calibration = calibration.scheduled(**planned)
            calibration.save(args.out)
        print(calibration.table())
    return 0


def _join_processes() -> None:
    """Under torchrun: one process group, and a GPU for each process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("gloo")


def _show(args: argparse.Namespace) -> int:
    from .thresholds.calibration import Calibration
    from .thresholds.checks import AIMS

    calibration = Calibration.load(args.file)
    aims = {name: getattr(args, name) for name in AIMS if getattr(args, name) is not None}
    if aims:
        calibration = calibration.at(**aims)
    if planned := _schedule(args):
        calibration = calibration.scheduled(**planned)
    if args.out:
        calibration.save(args.out)
    print(calibration.table())
    return 0


def _plot(args: argparse.Namespace) -> int:
    from .calibrate.plot import plot
    from .thresholds.calibration import Calibration

    for path in plot(Calibration.load(args.file), args.out or args.file.removesuffix(".json")):
        print(path)
    return 0


def _explain(args: argparse.Namespace) -> int:
    import torch

    from .backend import explain
    from .calibrate.inputs import arguments
    from .thresholds.calibration import Calibration

    model, call, batches = _source(args)
    thresholds = {name: getattr(args, name) for name in ("topk", "topp") if getattr(args, name) is not None}
    calibration = Calibration.load(args.calibration) if args.calibration else None
    positional, named = arguments(next(iter(batches)))
    with torch.no_grad():
        options = {**_options(args), **thresholds, "calibration": calibration}
        print(explain(model, options, call=call)(*positional, **named))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    import torch

    from .doctor import as_json, examine

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype) if args.dtype else None
    found = examine(device, args.shape, args.sparsity, dtype, args.causal)
    print(as_json(found) if args.json else found)
    return 0 if found.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
