"""From which length on the cost model calls attention sparse: a table of what it says, nothing is measured.

    python benchmarks/break_even.py                       # one sequence, 24 heads, bfloat16, the table of an H200
    python benchmarks/break_even.py --heads 12 --device-class cpu

Queries are as many as keys; the host is as fast as the table's.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Sequence

import harness
import torch

from sparge_compile.cost import CostModel, class_costs
from sparge_compile.passes.decide import MARGIN, MIN_KEYS

KEPT = (0.8, 0.5, 0.25, 0.1)
HEAD_SIZES = (64, 128)
LAUNCHED = ("compiled", "eager", "graph")
LONGEST = 1 << 20


def least_length(costs: CostModel, heads: int, head_size: int, kept: float, batch: int = 1) -> int | None:
    """The least number of tokens from which on such an attention is sparse; None: it never is."""
    limit = costs.limit(MIN_KEYS, kept, MARGIN, is_causal=False)

    def is_sparse(n: int) -> bool:
        return limit.holds(batch, heads, heads, n, n, head_size, head_size)

    return 1 + bisect_left(range(1, LONGEST), True, key=is_sparse) if is_sparse(LONGEST) else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device-class", default="sm90", help='as "sm90" or "cpu" (sm90)')
    args = parser.parse_args(argv)
    dtype = torch.float32 if args.device_class == "cpu" else torch.bfloat16
    rows = []
    for trains in (False, True):
        for launched in LAUNCHED:
            for size in HEAD_SIZES:
                row: dict[str, object] = {"for": "training" if trains else "inference", "by": launched, "D": size}
                costs = class_costs(args.device_class, 1.0, dtype, size, None, launched).of(trains)
                for kept in KEPT:
                    least = least_length(costs, args.heads, size, kept, args.batch)
                    row[f"{kept:.0%} kept"] = "never" if least is None else f"{least:,}"
                rows.append(row)
    print(harness.table(rows))


if __name__ == "__main__":
    main()
