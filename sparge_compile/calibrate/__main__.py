"""``python -m sparge_compile.calibrate``: the same as ``sparge calibrate``."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
