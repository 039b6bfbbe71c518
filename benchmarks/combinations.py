"""What people use beside sparse attention, each with it on a tiny pipeline of diffusers: a table of what works.

    python benchmarks/combinations.py                      # all of it, some minutes
    python benchmarks/combinations.py --only LoRA          # the rows whose name begins so
    python benchmarks/combinations.py --markdown docs/combinations.md

A row works if the pipeline, compiled block by block with thresholds attached, gives what it gives uncompiled as soon as
all blocks are kept, and something else with a third of them, at the sites that should be sparse. What is refused is
refused by the sentence that the table has.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import harness
import torch
from combination_rows import ROWS, Row
from combining import FEW

from sparge_compile import Calibration, attach
from sparge_compile.options import Options
from sparge_compile.running.listeners import heard_by

OPTIONS = {"min_seq_len": 200, "inner": "eager"}
NEAR = 2e-3  # relative, of a run of a few steps in float32 whose attention is computed in another order
HEADING = """# Used beside it

What people use beside sparse attention, each tried with it on a tiny pipeline of diffusers, compiled block by block
with attached thresholds. A row works if all blocks kept give what the uncompiled pipeline gives, and a third of them
something else. Written by `benchmarks/combinations.py`; `tests/whole/test_combinations.py` holds the rows.

"""
REST = """
An attention backend of diffusers is replaced where its site becomes sparse, so `native`, the default, is the one to
keep: the others want a library, or a GPU, for what stays dense alone.
[The README](../README.md#what-stays-dense-and-why) says how calls of these libraries are read. deepspeed runs on a CPU
too (`DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`); there the gradient of a step was compared, in one
process.
"""


class Sites:
    """Hears which sites are sparse."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def ran(self, options: Options, names: list[str], outputs: Sequence[torch.Tensor]) -> None:
        self.names.update(names)


@torch.no_grad()
def tried(row: Row) -> str:
    """Try a row; what came: ``"works"``, ``"refused"``, ``"not tried"``, or what is wrong."""
    if (missing := next((package for package in row.needs if find_spec(package) is None), None)) is not None:
        return f"not tried: no {missing} here"
    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
            wrong = compared(row)
    except Exception as error:
        if row.refused and row.refused in str(error):
            return "refused"
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        torch.compiler.reset()
    return f"was to be refused by {row.refused!r}" if row.refused and not wrong else wrong or "works"


def compared(row: Row) -> str | None:
    """What is wrong with a row whose pipeline runs; None: nothing."""
    plain = row.before(row.build())
    row.after(plain)
    dense = row.draw(plain)
    pipe = row.before(row.build())
    models = [getattr(pipe, name) for name in row.models]
    handles = [attach(model, Calibration({row.pattern: [FEW]})) for model in models]
    for model in models:
        row.compile(model, dict(OPTIONS))
    if row.is_drawn_before:
        row.draw(pipe)
    row.after(pipe)
    sites = Sites()
    with heard_by(sites):
        sparse = row.draw(pipe)
    for handle in handles:
        handle.set(topk=1.0, topp=0.0)
    whole = row.draw(pipe)
    found = fnmatch.filter(sites.names, row.pattern)  # others may be sparse where sizes are dynamic, if it pays
    if len(found) != row.sites:
        return f"sparse at {', '.join(sorted(found)) or 'no site'}, wanted {row.sites}"
    error, change = (float((x - dense).norm() / dense.norm()) for x in (whole, sparse))
    if not error < NEAR:
        return f"with all blocks kept the result is {error:.2g} from the dense one"
    return None if change > 10 * error else f"with a third of the blocks it is {change:.2g} from the dense one"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args(argv)
    rows: list[dict[str, object]] = []
    for row in ROWS:
        if row.name.startswith(args.only):
            came = tried(row)
            print(f"{row.name}: {came}", flush=True)
            note = " ".join(filter(None, (row.refused and f'"{row.refused} …"', row.note)))
            rows.append({"beside it": row.name, "": came, "note": note})
    table = harness.table(rows)
    print(table)
    if args.markdown:
        args.markdown.write_text(f"{HEADING}{table}\n{REST}", encoding="utf-8")


if __name__ == "__main__":
    main()
