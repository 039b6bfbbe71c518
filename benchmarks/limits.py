"""What limits each kernel, as NVIDIA's Nsight Compute (ncu) measures it: a launch of each at a shape of attention.py.

    python benchmarks/limits.py                         # A, both directions and the forward in 8 bits
    python benchmarks/limits.py --shape C --density 1
    python benchmarks/limits.py --page ncu.csv          # keeps all that ncu said, too

A row: the kernel's time at the clocks that the GPU has, how busy its tensor cores and its issue slots are, its L2 and
its memory (percent of their peak), warps that are resident, and what ncu says that the warps wait for most.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attention
import harness
import torch
from methods import Inputs, eight_bit_methods, our_methods, thresholds_for
from tabulate import tabulate

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
METRICS = {  # of ncu's page of details, and what a column is called
    "Duration": "time",
    "Issue Slots Busy": "issue slots, %",
    "L2 Cache Throughput": "L2, %",
    "DRAM Throughput": "memory, %",
    "Achieved Active Warps Per SM": "warps of 64",
}
# Of the sentences that ncu adds: the busiest pipeline, and what warps wait for.
BUSIEST = re.compile(r"(\S+) is the (?:highest-utilized|most utilized) pipeline \(([\d.]+)%\)")
WAIT = re.compile(r"spends ([\d.]+) cycles being stalled (.*?)\. .*?([\d.]+)% of the total", re.DOTALL)


def profiled(args: argparse.Namespace) -> None:
    """What runs under ncu: our methods, each once more after all are compiled."""
    problem = attention.SHAPES[args.shape]
    torch.manual_seed(0)
    inputs = Inputs.of(problem, torch.bfloat16, torch.device("cuda"))
    thresholds = thresholds_for(args.density, inputs)
    methods, block_map = our_methods(inputs, thresholds)
    methods += eight_bit_methods(inputs, thresholds, block_map)
    for method in methods:
        method.call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for method in methods:
        method.call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def under_ncu(args: argparse.Namespace) -> str:
    """The page of details, as CSV."""
    sections = [word for name in SECTIONS for word in ("--section", name)]
    which = ["--profile-from-start", "off", "--kernel-name-base", "function", "--kernel-name", "regex:^_.*_kernel$"]
    ncu = ["ncu", "--csv", "--page", "details", "--print-details", "all", "--clock-control", "none", *sections, *which]
    inside = [sys.executable, __file__, "--inside", "--shape", args.shape, "--density", str(args.density)]
    ran = subprocess.run([*ncu, *inside], capture_output=True, text=True)
    if args.page:
        Path(args.page).write_text(ran.stdout)
    if ran.returncode:
        raise SystemExit(f"ncu ended with {ran.returncode}:\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
    return ran.stdout


def rows_of(page: str) -> list[dict[str, object]]:
    """One row for each kernel, of its first launch."""
    lines = page.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    first: dict[str, str] = {}  # of each kernel, its launch
    rows: dict[str, dict[str, object]] = {}
    for line in csv.DictReader(lines[start:]):
        name = line["Kernel Name"].removesuffix("_kernel").lstrip("_")
        if first.setdefault(name, line["ID"]) != line["ID"]:
            continue
        row = rows.setdefault(name, {"kernel": name})
        if column := METRICS.get(line["Metric Name"]):
            unit = f" {line['Metric Unit']}" if column == "time" else ""
            row.setdefault(column, f"{line['Metric Value']}{unit}")
        said = line.get("Rule Description") or ""
        if found := BUSIEST.search(said):
            row["busiest pipeline"] = f"{found[1]} {found[2]} %"
        if found := WAIT.search(said):
            row["warps wait"] = f"{found[3]} %: {found[2][:60]}"
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="A", choices=sorted(attention.SHAPES), help="(A)")
    parser.add_argument("--density", type=float, default=0.05, help="share of key blocks to keep (0.05)")
    parser.add_argument("--page", help="write what ncu says to this file as well")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = harness.require("cuda")
    if args.inside:
        profiled(args)
        return
    if shutil.which("ncu") is None:
        raise SystemExit("This needs NVIDIA's Nsight Compute: ncu is not on the PATH. It comes with the CUDA toolkit.")
    print(f"{harness.header(device)}\nshape {args.shape}, {args.density:.0%} of the key blocks")
    print(tabulate(rows_of(under_ncu(args)), headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main()
