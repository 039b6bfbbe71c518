"""Ways to write attention, and code that only looks like it: the tables of tests/whole, run once each.

A spelling is compiled with ``topk`` 1 and compared with the same call of SDPA, forward and backward; its twin, the same
code with one argument changed, and each look-alike must stay as they are.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

import sparge_compile

WHOLE = Path(__file__).parent.parent / "tests" / "whole"
sys.path.append(str(WHOLE))
LOOK = {"min_seq_len": 0, "on_unsupported": "dense"}
DENSE = {**LOOK, "topk": 1.0, "topp": 0.0, "inner": "aot_eager"}


@dataclass
class Row:
    """What became of one function; ``problems`` is empty where all is well."""

    name: str
    cells: Sequence[object] = ()
    problems: list[str] = field(default_factory=list)


def tables() -> tuple[list[Any], list[Any]]:
    """The spellings and the look-alikes that tests/whole registers."""
    for path in sorted((*WHOLE.glob("spellings_*.py"), *WHOLE.glob("lookalikes_*.py"))):
        import_module(path.stem)
    return import_module("spelling").SPELLINGS, import_module("lookalikes").LOOKALIKES


def spelling_row(spelling: Any) -> Row:
    """Where a spelling is written, how it is found, its errors, and why its twin stays."""
    torch.compiler.reset()
    torch.manual_seed(0)
    inputs = spelling.inputs()
    (found,) = _quietly(sparge_compile.explain(spelling.function, LOOK), *inputs)
    twins = list(_quietly(sparge_compile.explain(spelling.twin, LOOK), *inputs))
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point() and x.dim() != 2]
    call = torch.compile(spelling.function, backend="sparge", fullgraph=True, options=DENSE)
    got, want = call(*inputs), spelling.same(F.scaled_dot_product_attention, *inputs)
    row = Row(spelling.name)
    errors = _errors(got, want, leaves)
    where = spelling.function.__module__.removeprefix("spellings_")
    mask = "causal" if found.site.is_causal else found.site.mask
    text = found.status if found.status == "sparse" else found.reason.value
    twin = ", ".join(dict.fromkeys(each.reason.value for each in twins))
    row.cells = [spelling.name, where, found.kind, text, mask, *(f"{e:.0e}" for e in errors), twin]
    if found.reason is not spelling.reason:
        row.problems.append(f"found as {found.reason.value}")
    bounds = {torch.float32: (1e-5, 1e-5)}.get(want.dtype, (3e-2, 8e-2))
    if any(not error <= bound for error, bound in zip(errors, bounds, strict=True)):
        row.problems.append(f"errors {errors[0]:.1e}, {errors[1]:.1e}")
    if any(each.status == "sparse" for each in twins):
        row.problems.append("its twin is replaced")
    return row


def lookalike_row(lookalike: Any) -> Row:
    """A look-alike and why it stays."""
    torch.compiler.reset()
    torch.manual_seed(0)
    sites = list(_quietly(sparge_compile.explain(lookalike.function, LOOK), *lookalike.inputs()))
    why = [each.reason.value + (f": {each.detail}" if each.detail else "") for each in sites]
    row = Row(lookalike.name, [lookalike.name, ", ".join(dict.fromkeys(why)) or "nothing is found"])
    if any(each.status == "sparse" for each in sites):
        row.problems.append("it is replaced")
    return row


def rows() -> Iterator[tuple[str, Row]]:
    """Every row with the table that it belongs to: ``spelling`` or ``look-alike``."""
    # torch refuses to train flex_attention on a CPU, where it has no kernel for the backward; ours has.
    flex = import_module("torch.nn.attention.flex_attention")
    flex._validate_device = lambda query, key, value: None
    spellings, lookalikes = tables()
    for kind, entries, make in (("spelling", spellings, spelling_row), ("look-alike", lookalikes, lookalike_row)):
        for entry in entries:
            try:
                yield kind, make(entry)
            except Exception as error:  # one that is broken must not hide the others
                problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                yield kind, Row(entry.name, [entry.name], [problem])


def markdown(found: Sequence[tuple[str, Row]]) -> list[str]:
    """The sections of the page."""
    spellings, lookalikes = (
        [row.cells for kind, row in found if kind == wanted] for wanted in ("spelling", "look-alike")
    )
    columns = ("spelling", "of", "kind", "became", "mask", "error", "gradients", "its twin stays")
    return [
        "## Spellings",
        "",
        f"{len(spellings)} ways to write attention (`tests/whole/spellings_*.py`), each compiled with `topk` 1 and",
        "compared with SDPA on the same inputs, forward and backward: the largest difference, relative to the largest",
        "entry. The twin is the same code with one argument changed; it must stay, for the reason given.",
        "",
        tabulate(spellings, headers=columns, tablefmt="github", disable_numparse=True),
        "",
        "## Look-alikes",
        "",
        f"{len(lookalikes)} functions that look like attention (`tests/whole/lookalikes*.py`) and stay as they are.",
        "",
        tabulate(lookalikes, headers=("function", "why"), tablefmt="github", disable_numparse=True),
    ]


def _errors(got: Tensor, want: Tensor, leaves: Sequence[Tensor]) -> tuple[float, float]:
    """Of the output, and the largest of the gradients of a fixed projection."""
    projection = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(want.dtype)
    gradients = [torch.autograd.grad(x, leaves, projection, allow_unused=True) for x in (got, want)]
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None and b.any()]
    return _error(got, want), max((_error(a, b) for a, b in pairs), default=0.0)


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _quietly(function: Any, *inputs: Tensor) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        return function(*inputs)
