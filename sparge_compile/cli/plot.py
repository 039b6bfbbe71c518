"""``sparge plot``: pictures of a calibration file, and of what it does to a model."""

from __future__ import annotations

import argparse

from .source import add_source, add_survey, surveyed

HELP = "draw a calibration file, and what it does to a model, as PNGs (needs matplotlib)"
DESCRIPTION = """Draw a calibration file as PNGs: the sparsity of each head, error by sparsity, sparsity over a run.

With a model (--model and --inputs, or --pipeline and --prompts) instead what the file does to it on the first batch:
the block map of each head of a site, the time of each site, dense and sparse, and its sparsity call by call."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, a model if there is one, and where the pictures go."""
    parser.add_argument("file")
    add_source(parser)
    add_survey(parser)
    parser.add_argument("--site", metavar="NAME", help="whose block map to draw (the first that is sparse)")
    parser.add_argument("--out", metavar="PREFIX", help="how the names of the pictures begin (as that of the file)")


def run(args: argparse.Namespace) -> int:
    """Draw, and print the paths."""
    from ..showing.plots import plot_calibration, plot_survey
    from ..thresholds.calibration import Calibration

    calibration = Calibration.load(args.file)
    out = args.out or args.file.removesuffix(".json")
    seen = surveyed(args, calibration)
    for path in plot_calibration(calibration, out) if seen is None else plot_survey(seen, out, args.site):
        print(path)
    return 0
