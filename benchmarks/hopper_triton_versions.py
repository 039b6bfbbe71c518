"""Our kernels under several versions of Triton on one GPU: right or wrong, and how fast.

    python benchmarks/hopper_triton_versions.py                               # the Triton that is installed
    python benchmarks/hopper_triton_versions.py /tmp/triton-3.8.0 /tmp/triton-3.9.0   # and those unpacked there

A folder holds the package ``triton``, as ``pip install --no-deps --target FOLDER triton==3.9.0`` leaves it. Each
version runs in a process of its own, with its folder before all others; the installed one runs first and last, so that
the figures of one table compare. Every result is checked against the definition before its time is taken.

A version tried with success may be added to ``TRIED`` in sparge_compile/kernels/triton/trial.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import attention as shapes
import harness
import methods
import torch

HERE = Path(__file__).parent
SECONDS = 500  # for one version


def measure(name: str, density: float) -> list[dict[str, object]]:
    """The rows of the Triton that this process imports: the trial of the Hopper kernel, then each of our kernels."""
    import triton

    from sparge_compile.kernels.triton import trial

    device = torch.device("cuda", 0)
    fault = trial._try(device) if trial.launch.architecture(device) == 9 else "not a Hopper GPU"
    first: dict[str, object] = {"Triton": triton.__version__, "shape": name, "trial": fault or "right"}
    torch.manual_seed(0)
    problem = shapes.SHAPES[name]
    inputs = methods.Inputs.of(problem, torch.bfloat16, device)
    ours, block_map = methods.our_methods(inputs, methods.thresholds_for(density, inputs))
    rows = methods.rows_of(methods.measure(ours, device), problem, "", block_map)
    wanted = ("method", "direction", "ms", "TFLOP/s", "kernels", "trouble")
    return [first | {key: row[key] for key in wanted if key in row} for row in rows]


def rows_of(folder: str | None, name: str, density: float) -> list[dict[str, object]]:
    """What a process that imports Triton from a folder measures; or one row that says how it failed."""
    paths = [*([folder] if folder else []), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--one", "--shape", name, "--density", str(density)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return [{"Triton": folder or "installed", "shape": name, "trouble": f"not done in {SECONDS} s"}]
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        return [{"Triton": folder or "installed", "shape": name, "trouble": f"exit status {done.returncode}"}]
    rows: list[dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="folders that hold a package triton")
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), default="A")
    parser.add_argument("--density", type=float, default=0.05, help="share of key blocks to keep (default 0.05)")
    parser.add_argument("--csv", help="write all rows to this file as well")
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args(arguments)
    device = harness.require("cuda")
    if args.one:
        print(json.dumps(measure(args.shape, args.density)))
        return
    print(harness.header(device), flush=True)
    rows = []
    for folder in [None, *args.folders, *([None] if args.folders else [])]:
        rows += rows_of(folder and os.path.abspath(folder), args.shape, args.density)
        print(f"\n{harness.table(rows)}", flush=True)
    if args.csv:
        harness.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
