"""``sparge diff``: what differs between two calibration files."""

from __future__ import annotations

import argparse

HELP = "say what differs between two calibration files, site by site"
DESCRIPTION = """Say what differs between two calibration files: which sites, their thresholds, sparsity and error as
they were measured, tiles, plans, where they come from. The exit status is 0 where a model would run with both in the
same way, 1 where not, and 2 where a file cannot be read, as diff has it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two files."""
    parser.add_argument("first")
    parser.add_argument("second")


def run(args: argparse.Namespace) -> int:
    """Compare, and print."""
    from ..sharing.difference import compare_calibrations
    from ..thresholds.calibration import Calibration

    found = compare_calibrations(Calibration.load(args.first), Calibration.load(args.second))
    print(f"first: {args.first}\nsecond: {args.second}\n{found}")
    return 0 if found.same else 1
