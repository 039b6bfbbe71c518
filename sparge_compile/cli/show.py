"""``sparge show``: a calibration file as a table, or aimed anew."""

from __future__ import annotations

import argparse

from .plan import add_about, add_plan, described, planned

HELP = "print a calibration file as a table, or aim it anew"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, another aim or plan, and where to write it."""
    parser.add_argument("file")
    parser.add_argument("--site", metavar="NAME", help="a row for each head of these sites: a name or a pattern")
    parser.add_argument("--part", metavar="NAME", help="of a merged file: what it says of this part, as transformer_2")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--target-error", type=float, help="aim anew: the most relative L1 error of each head")
    again.add_argument("--target-sparsity", type=float, help="aim anew: the share of key blocks to skip")
    again.add_argument("--target-output-error", type=float, help="aim anew: the most error of the output")
    add_plan(parser)
    add_about(parser)
    parser.add_argument("--out", help="write the calibration, aimed anew, planned or described, to this file")


def run(args: argparse.Namespace) -> int:
    """Load, aim, plan, save, print."""
    from ..sharing.parts import calibration_part
    from ..thresholds.calibration import Calibration
    from ..thresholds.checks import AIMS

    calibration = Calibration.load(args.file)
    if args.part:
        calibration = calibration_part(calibration, args.part)
    aims = {name: getattr(args, name) for name in AIMS if getattr(args, name) is not None}
    if aims:
        calibration = calibration.at(**aims)
    calibration = described(planned(calibration, args), args)
    if args.out:
        calibration.save(args.out)
    print(calibration.table(args.site))
    return 0
