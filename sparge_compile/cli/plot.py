"""``sparge plot``: pictures of a calibration file."""

from __future__ import annotations

import argparse

HELP = "draw a calibration file as two PNGs (needs matplotlib)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, and where the pictures go."""
    parser.add_argument("file")
    parser.add_argument("--out", metavar="PREFIX", help="how the names of the pictures begin (as that of the file)")


def run(args: argparse.Namespace) -> int:
    """Draw, and print the paths."""
    from ..calibrate.plot import plot
    from ..thresholds.calibration import Calibration

    for path in plot(Calibration.load(args.file), args.out or args.file.removesuffix(".json")):
        print(path)
    return 0
