"""What the test suite was run on, as a table in docs/compatibility.md.

    python -m pytest -m "not gpu and not slow" --junitxml=suite.xml && python benchmarks/compatibility.py suite.xml

Run by the Python that ran the suite: it adds its versions, its device and the suite's counts to
docs/compatibility.json, in the place of an earlier run of the same, and writes the table anew. `make test-matrix` does
so for the oldest and the newest versions that are supported.
"""

from __future__ import annotations

import argparse
import json
import platform
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import harness
import torch

DOCS = Path(__file__).parent.parent / "docs"
KEY = ("what", "python", "torch", "triton", "device")

HEAD = """# What was run where

Supported are Python 3.10 to 3.14, torch 2.11 to 2.15 and Triton 3.6 to 3.9, as far as torch itself goes together with
them. A version of Triton with which nobody ran the Hopper kernel checks it before it is used. GPUs of which the
launches were not measured run the portable kernels; a test compiles all of them for sm_80, 86, 89, 90, 100, 120 and
gfx942 (`tests/kernels/test_kernels_compile.py`). `sparge doctor` says what holds on a machine.

Made by `benchmarks/compatibility.py` from the runs in [compatibility.json](compatibility.json).

"""


def counts(path: Path) -> dict[str, object]:
    """Passed, failed, skipped and the date of a JUnit file of pytest's."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    date = suite.get("timestamp", "")[:10]
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped, "date": date}


def here(what: str) -> dict[str, object]:
    """What tells one run from another."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    version = str(torch.__version__).partition("+")[0]
    return dict(zip(KEY, (what, platform.python_version(), version, triton, device), strict=True))


def merged(runs: Sequence[dict[str, object]], run: dict[str, object]) -> list[dict[str, object]]:
    """The runs with a new one in the place of its like, by version of torch."""
    others = [each for each in runs if any(each[key] != run[key] for key in KEY)]
    return sorted([*others, run], key=lambda x: ([int(n) for n in str(x["torch"]).split(".")[:2]], str(x["device"])))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path, nargs="?", help="what pytest wrote with --junitxml; none: the table alone")
    parser.add_argument("--what", default="CPU suite", help="what was run")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the two files")
    args = parser.parse_args(arguments)
    store = args.docs / "compatibility.json"
    runs = json.loads(store.read_text()) if store.exists() else []
    if args.junit:
        runs = merged(runs, here(args.what) | counts(args.junit))
    store.write_text(json.dumps(runs, indent=1) + "\n")
    (args.docs / "compatibility.md").write_text(f"{HEAD}{harness.table(runs)}\n")


if __name__ == "__main__":
    main()
