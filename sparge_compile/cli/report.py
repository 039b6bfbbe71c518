"""``sparge report``: a page about a calibration, and about what it does to a model."""

from __future__ import annotations

import argparse

from .source import add_source, add_survey, surveyed

HELP = "write a page, one HTML file, about a calibration file and what it does to a model"
DESCRIPTION = """Write a page about a calibration file, about what it does to a model on the first batch, or both.

examples:
  sparge report wan.json --out wan.html
  sparge report wan.json --pipeline ./Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --steps 20 --every 5 \\
    --arguments '{"output_type": "np"}' --out wan.html
  sparge report --model my_models:build --inputs my_models:batches --topk 0.1 --out model.html

With a model, the batch runs three times: as it is, once more while block maps are made, and sparse."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file, a model or both, and where the page goes."""
    parser.add_argument("file", nargs="?", help="a calibration file")
    add_source(parser)
    add_survey(parser)
    parser.add_argument("--title", help="of the page (the model's name)")
    parser.add_argument("--out", required=True, help="the HTML file to write")


def run(args: argparse.Namespace) -> int:
    """Look at the model, if there is one, and write."""
    from ..showing.page import write_report
    from ..thresholds.calibration import Calibration

    calibration = Calibration.load(args.file) if args.file else None
    print(write_report(args.out, calibration, surveyed(args, calibration), title=args.title))
    return 0
