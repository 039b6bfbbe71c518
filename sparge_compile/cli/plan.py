"""Arguments that change a calibration without measuring: what is dense by plan, and what the file says of itself."""

from __future__ import annotations

import argparse
from typing import Any


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``Calibration.scheduled``."""
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


def add_about(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``Calibration.described``."""
    parser.add_argument(
        "--about",
        nargs="+",
        default=(),
        metavar="NAME=TEXT",
        help="what the file says of itself: model_id, part, resolution, scheduler, steps, inputs, licence, note",
    )


def described(calibration: Any, args: argparse.Namespace) -> Any:
    """The calibration with what it shall say of itself; itself where that is nothing."""
    from ..thresholds.about import parse_about

    about = parse_about(args.about)
    return calibration.described(**about) if about else calibration


def planned(calibration: Any, args: argparse.Namespace) -> Any:
    """The calibration with the plan that is asked for; itself where none is."""
    from ..thresholds import calibration as thresholds

    steps, layers = args.dense_steps, args.dense_layers
    given = {
        "dense_steps": steps[0] if steps and len(steps) == 1 else steps,
        "dense_layers": int(layers[0]) if layers and len(layers) == 1 and layers[0].isdigit() else layers,
        "sparsities": args.sparsities,
    }
    plan = {name: value for name, value in given.items() if value is not None}
    return thresholds.planned(calibration, "the plan", **plan) if plan else calibration
