"""Runs the kernels under NVIDIA's compute-sanitizer: accesses out of bounds, races in shared memory, barriers.

    python benchmarks/sanitize.py                         # all tools over a choice of the kernel tests
    python benchmarks/sanitize.py --tools memcheck --tests tests/kernels/test_packed.py -k gpu

What runs is the GPU tests of the kernels, by themselves once (so that everything is compiled, and right) and then under
each tool, all tools side by side. torch's cache of memory is off, so that one tensor's end is not another's beginning.
Each row: a tool, the tests that ran under it, the errors that it found, seconds. The last lines of what went wrong
follow, and the exit status is 1 if anything did.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tabulate import tabulate

TOOLS = ("memcheck", "racecheck", "synccheck")
KERNELS = Path(__file__).parents[1] / "tests" / "kernels"
TESTS = [str(KERNELS / f"test_{name}.py") for name in ("triton_gpu", "packed", "eight_bits")]
# One case for each kernel and what it can be specialised by; longer ones take a tool minutes.
CHOICE = "gpu and (test_attention or on_hopper) or test_the_portable_backward or test_packed or kernels_of_a_gpu"


def pytest_command(args: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-k", args.k, *args.tests]


def under(tool: str, args: argparse.Namespace, log: Path) -> subprocess.Popen[str]:
    """The tests under one tool, begun; what the tool finds goes to the log."""
    # Children (compilers) are left alone. cuDNN's kernels, which some tests compare with, are not ours to check.
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
    command += ["--kernel-regex-exclude", "kns=cudnn", "--log-file", str(log)]
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return subprocess.Popen(
        [*command, *pytest_command(args)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def found_in(log: Path) -> tuple[str, list[str]]:
    """How many errors the tool counted ("–": it came to no end), and what it said of them, most frequent first."""
    text = log.read_text(errors="replace") if log.exists() else ""
    count = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    said = Counter(
        re.sub(r"0x[0-9a-f]+|\[\d+ hazards?\]|\(\d+,\d+,\d+\)", "…", line[10:]) for line in text.splitlines()
    )
    errors = [
        f"{n}x {line}" for line, n in said.most_common() if re.search(r"error|race|hazard|barrier| at ", line, re.I)
    ]
    return count[1] if count else "–", errors[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="which checks are made (all)")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files of tests (those of the Triton kernels)")
    parser.add_argument("-k", default=CHOICE, help="which of their tests, as pytest takes it")
    parser.add_argument("--logs", help="a folder that keeps what the tools wrote")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for all tools (1800)")
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit (its bin folder)")
    if subprocess.run(pytest_command(args)).returncode:
        print("the tests fail without a tool: mend them first")
        return 1
    start, rows, wrong = time.perf_counter(), [], []
    with tempfile.TemporaryDirectory() as folder:
        logs = {tool: Path(args.logs or folder) / f"{tool}.log" for tool in args.tools}
        for tool, process in [(tool, under(tool, args, log)) for tool, log in logs.items()]:
            try:
                output, _ = process.communicate(timeout=max(1.0, args.timeout - (time.perf_counter() - start)))
            except subprocess.TimeoutExpired:
                process.kill()
                output = process.communicate()[0] + f"\nstopped after {args.timeout:.0f} s"
            count, errors = found_in(logs[tool])
            ran = re.search(r"\d+ (?:passed|failed)[^\n]*", output)
            rows.append((tool, ran[0] if ran else "–", count, time.perf_counter() - start))
            if process.returncode or count != "0":
                wrong.append(
                    "\n".join([f"{tool}, exit status {process.returncode}:", *errors, *output.splitlines()[-8:]])
                )
    print(tabulate(rows, ["tool", "tests", "errors", "seconds"], floatfmt=".0f", tablefmt="github"))
    print("\n\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
