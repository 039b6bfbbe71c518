"""``sparge explain``: what would be replaced."""

from __future__ import annotations

import argparse

from .source import add_source, options_of, source_of

HELP = "which attention of a model would be replaced on the first batch, and why not the rest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, its inputs, and thresholds."""
    add_source(parser)
    parser.add_argument("--calibration", help="a calibration file")
    parser.add_argument("--topk", type=float, help="threshold of sites without one in the file")
    parser.add_argument("--topp", type=float, help="threshold of sites without one in the file")


def run(args: argparse.Namespace) -> int:
    """Run the model once as it is, and print the report."""
    import torch

    from ..backend import explain
    from ..calibrate.inputs import arguments, first_batch
    from ..thresholds.calibration import Calibration

    model, call, batches, _ = source_of(args)
    thresholds = {name: getattr(args, name) for name in ("topk", "topp") if getattr(args, name) is not None}
    calibration = Calibration.load(args.calibration) if args.calibration else None
    positional, named = arguments(first_batch(batches))
    with torch.no_grad():
        options = {**options_of(args), **thresholds, "calibration": calibration}
        print(explain(model, options, call=call)(*positional, **named))
    return 0
