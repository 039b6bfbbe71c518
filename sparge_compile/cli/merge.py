"""``sparge merge``: several calibration files as one."""

from __future__ import annotations

import argparse
from typing import Any

from .plan import add_about, described

HELP = "put several calibration files together: other layers, other inputs, the parts of a pipeline"
DESCRIPTION = """Put several calibration files together.

Other sites stand beside each other. The same sites, as of other resolutions, get head by head the larger topk and the
larger topp, so that each head keeps at least the blocks that it keeps with each of the files.

examples:
  sparge merge 480p.json 720p.json --out both.json --about "resolution=480p and 720p"
  sparge merge transformer=high.json transformer_2=low.json --out wan22.json
  sparge show wan22.json --part transformer_2 --out low.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, perhaps with the names of parts, and where to write."""
    parser.add_argument("files", nargs="+", metavar="[PART=]FILE")
    add_about(parser)
    parser.add_argument("--out", required=True, help="the calibration file to write (JSON)")


def run(args: argparse.Namespace) -> int:
    """Load, merge, save, print."""
    from ..sharing.merging import lost_measurements, merge_calibrations

    given = _loaded(args.files)
    merged = described(merge_calibrations(given), args)
    merged.save(args.out)
    if reason := lost_measurements(given):
        print(f"merged without measurements, so it cannot be aimed anew: {reason}")
    print(merged.table())
    return 0


def _loaded(files: list[str]) -> Any:
    """The calibrations by the names of their parts, or a list where none has a name."""
    from ..errors import value_error
    from ..thresholds.calibration import Calibration

    named = [(part, path) for part, equals, path in (file.partition("=") for file in files) if equals]
    if not named:
        return [Calibration.load(file) for file in files]
    if len(named) < len(files) or len(dict(named)) < len(named):
        raise value_error(
            "sparge merge: parts",
            given=" ".join(files),
            allowed="files, or PART=FILE for all of them, each part once",
            todo="As sparge merge transformer=high.json transformer_2=low.json --out both.json.",
        )
    return {part: Calibration.load(path) for part, path in named}
