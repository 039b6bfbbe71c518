"""The command ``sparge``. Each command is a file of this folder: its arguments, and what it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..version import __version__
from . import calibrate, diff, doctor, explain, merge, plot, report, show

# In the order of the list that `sparge --help` prints. Each has HELP, perhaps DESCRIPTION, `add_arguments` and `run`.
_COMMANDS: tuple[Any, ...] = (calibrate, show, diff, merge, plot, report, explain, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 for a no (what differs, a kernel that is wrong), 2 for an error.

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
        of_file = isinstance(error, OSError) and error.strerror and error.filename
        print("sparge:", f"{error.strerror}: {error.filename}" if of_file else error, file=sys.stderr)  # type: ignore[union-attr]
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparge", description="Thresholds for block-sparse attention, and what they do."
    )
    parser.add_argument("--version", action="version", version=f"sparge_compile {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        text: str = command.HELP
        own = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=text,
            description=getattr(command, "DESCRIPTION", f"{text[0].upper()}{text[1:]}."),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser
