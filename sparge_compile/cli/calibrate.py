"""``sparge calibrate``: find thresholds, write a file."""

from __future__ import annotations

import argparse
import os

from .plan import add_about, add_plan, described, planned
from .source import add_source, options_of, source_of

HELP = "find thresholds"
DESCRIPTION = """Find thresholds for every attention head of a model from the model's own inputs.

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
_PHASES = "for denoising: shares of the model's steps in a batch from which on other thresholds hold, as 0.2 0.6"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, its inputs, an aim, how to measure, a plan."""
    add_source(parser)
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
    parser.add_argument("--phases", type=float, nargs="*", default=(), metavar="FROM", help=_PHASES)
    parser.add_argument("--every", type=int, default=1, help="measure every n-th call of the model in a batch (1)")
    parser.add_argument(
        "--query-blocks", type=int, default=32, help="blocks of 128 queries to look at, of each call and head (32)"
    )
    parser.add_argument("--memory", type=int, default=1024, help="MiB of scratch memory on the device (1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of query blocks (0)")
    parser.add_argument("--batches", type=int, help="use only the first so many batches")
    add_plan(parser)
    add_about(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate, save, and print the table; under torchrun, the first process does."""
    import itertools

    from ..calibrate.run import calibrate

    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shared:
        _join_processes()
    model, call, batches, about = source_of(args)
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
        options=options_of(args),
        query_blocks=args.query_blocks,
        every=args.every,
        memory=args.memory,
        seed=args.seed,
        out=args.out,
        share_batches=shared,
        progress=True,
    )
    if not shared or int(os.environ["RANK"]) == 0:
        named = calibration.described(**about) if about else calibration
        changed = described(planned(named, args), args)
        if changed is not calibration:
            changed.save(args.out)
        print(changed.table())
    return 0


def _join_processes() -> None:
    """Under torchrun: one process group, and a GPU for each process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("gloo")
