"""The coverage tables: over real model classes, every attention that eager mode executes must be found; ways to write
attention, which must be found; and code that looks like it, which must stay.

    python benchmarks/coverage.py                            # all of it
    python benchmarks/coverage.py --only Llama               # names and libraries that hold this text
    python benchmarks/coverage.py --markdown docs/coverage.md --jobs 8

``executed`` is counted in eager mode without this project's matcher: calls of torch's fused attention and of the
libraries' own attention functions. The command fails where found differs from executed, where the sparse op does not
run once for each sparse site, and where the output at topk = 1 is not that of eager mode.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import coverage_models
import coverage_spellings
import coverage_today
import torch
from coverage_models import Model, models
from tabulate import tabulate
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import sparge_compile
from sparge_compile.report import Reason, Report

MODELS = (*coverage_models.MODELS, *coverage_today.MODELS)
OPTIONS = {"min_seq_len": 0, "topk": 1.0, "topp": 0.0, "on_unsupported": "dense"}
ALLOWED_ERROR = 1e-5  # of the largest entry of the output
COLUMNS = ("model", "executed", "found", "sparse", "dense", "graphs", "error", "seconds")

FUSED = {
    torch.nn.functional.scaled_dot_product_attention,
    torch.nn.functional.multi_head_attention_forward,
    torch._transformer_encoder_layer_fwd,
    torch._native_multi_head_attention,
}


@dataclass
class Row:
    """What became of one model; ``problems`` is empty where all is well."""

    model: Model
    executed: int = 0
    found: int = 0
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    graphs: int = 0
    error: float = 0.0
    seconds: float = 0.0
    lengths: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def cells(self, with_lengths: bool) -> list[object]:
        name = f"{self.model.library}: {self.model.name}"
        cells = [name, self.executed, self.found, self.sparse, _text(self.dense), self.graphs]
        cells += [f"{self.error:.0e}", f"{self.seconds:.1f}"]
        return [*cells, _text(self.lengths)] if with_lengths else cells


class Counted(TorchFunctionMode):
    """Counts the calls of torch's fused attention; what such a call calls inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function in FUSED
        return function(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """A function that says how often attention has been executed since."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name in library_functions():
            stack.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name))))
        mode = stack.enter_context(Counted())
        yield lambda: calls + mode.calls


def library_functions() -> list[tuple[Any, str]]:
    """The attention functions that libraries write out themselves, as (owner, name)."""
    name = "eager_attention_forward"
    loaded = [module for key, module in sys.modules.items() if key.startswith("transformers.models.")]
    found: list[tuple[Any, str]] = [
        (module, name) for module in loaded if isinstance(module, ModuleType) and name in vars(module)
    ]
    if (diffusers := sys.modules.get("diffusers.models.attention_processor")) is not None:
        found.append((diffusers.Attention, "get_attention_scores"))
    return found


def cover(model: Model) -> Row:
    """One row: count, explain, compile, compare."""
    start, row = time.perf_counter(), Row(model)
    torch.compiler.reset()
    module, inputs = models.seeded(model.build)
    module.train(model.training)
    options = {**OPTIONS, "inner": model.inner}
    # What fullgraph=True turns on, so that explain sees the same graph.
    whole = {"capture_scalar_outputs": model.fullgraph, "capture_dynamic_output_shape_ops": model.fullgraph}
    with torch.set_grad_enabled(model.gradients), torch._dynamo.config.patch(whole):
        with counting() as calls:
            module(**inputs)
            row.executed = calls() if model.executed is None else model.executed
        want = models.tensor_of(module(**inputs)).detach()
        report = sparge_compile.explain(module, options)(**inputs)
        count(report, row)
        torch.compiler.reset()
        call: Any = torch.compile(module, backend="sparge", options=options, fullgraph=model.fullgraph)
        got = models.tensor_of(call(**inputs)).detach()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call(**inputs)
    row.error = ((got - want).abs().max() / want.abs().max()).item()
    if row.found != row.executed:
        row.problems.append(f"{row.executed} executed, {row.found} found")
    ran = sum(event.name in ("sparge::attend", "sparge::attend_for_backward") for event in profiled.events())
    if ran != row.sparse:
        row.problems.append(f"{row.sparse} sparse, and the sparse op ran {ran} times")
    if not row.error <= ALLOWED_ERROR:
        row.problems.append(f"error {row.error:.1e}")
    row.seconds = time.perf_counter() - start
    return row


def attempt(model: Model) -> Row:
    """:func:`cover`, or what went wrong: one broken model must not hide the others."""
    try:
        return cover(model)
    except Exception as error:
        return Row(model, problems=[f"{type(error).__name__}: {str(error).splitlines()[0]}"])


def _attempt_in_process(number: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    row = attempt(MODELS[number])
    return {name: value for name, value in vars(row).items() if name != "model"}  # models do not travel


def covered(wanted: Sequence[Model], jobs: int) -> Iterator[Row]:
    """A row for each model, in their order."""
    if jobs == 1:
        yield from map(attempt, wanted)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        numbers = [next(n for n, each in enumerate(MODELS) if each is model) for model in wanted]
        for model, found in zip(wanted, pool.map(_attempt_in_process, numbers), strict=True):
            row = Row(model)
            vars(row).update(found)
            yield row


def count(report: Report, row: Row) -> None:
    """Sites by what became of them. A softmax that is not attention is reported too, and is no attention found."""
    attentions = [site for site in report if site.reason is not Reason.NOT_ATTENTION]
    row.graphs = report.graphs
    row.found = len(attentions)
    row.sparse = sum(site.status == "sparse" for site in attentions)
    row.dense = Counter(site.reason.value for site in attentions if site.status == "dense")
    row.lengths = Counter(f"{site.shapes['length']}×{site.shapes['keys']}" for site in attentions)


def _text(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items())


def versions() -> str:
    names = ("torch", "transformers", "diffusers", "timm")
    found = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def markdown(
    rows: Sequence[Row], notes: Sequence[str], arguments: Sequence[str], with_lengths: bool, more: Sequence[str]
) -> str:
    """The page for docs/: what was run with what, the table, what is wrong or was left out."""
    command = " ".join(["python", "benchmarks/coverage.py", *arguments])
    lines = [
        "# Coverage",
        "",
        f"Written by `{command}`, with {versions()}.",
        "",
        "## Models",
        "",
        "Models with random weights at tiny sizes, on a CPU in float32, `min_seq_len` 0 and `topk` 1. *Executed*:",
        "attention computations of one forward, counted in eager mode. *Found*: those in the report, sparse or dense",
        "for the reason given. *Error*: the largest difference from eager mode, relative to the largest entry.",
        "",
        f"{len(rows)} rows, {sum(row.executed for row in rows)} attentions executed, "
        f"{sum(row.found for row in rows)} found, {sum(row.sparse for row in rows)} of them sparse.",
        "",
        table(rows, with_lengths, "github"),
    ]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    if more:
        lines += ["", *more]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row], with_lengths: bool, style: str) -> str:
    headers = [*COLUMNS, "lengths"] if with_lengths else list(COLUMNS)
    return tabulate([row.cells(with_lengths) for row in rows], headers=headers, tablefmt=style, disable_numparse=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="run models whose library or name holds one of these texts")
    parser.add_argument("--lengths", action="store_true", help="a column with queries × keys")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the models (default 1)")
    given = parser.parse_args(arguments)
    texts = [text.lower() for text in given.only or [""]]
    wanted = [m for m in MODELS if any(text in f"{m.library}: {m.name}".lower() for text in texts)]
    if not wanted:
        parser.error(f"no model holds {' or '.join(texts)}; models: {', '.join(m.name for m in MODELS)}")

    notes = [f"left out: {m.library}: {m.name} ({m.missing} is not installed)" for m in wanted if m.missing]
    print(*notes, sep="\n", flush=True)
    rows = []
    for row in covered([m for m in wanted if not m.missing], given.jobs):
        rows.append(row)
        line = f"{row.seconds:6.1f} s  {row.model.library}: {row.model.name}"
        print(f"{line}  {'; '.join(row.problems) or 'as it should be'}", flush=True)
    print(table(rows, given.lengths, "simple"))
    functions = [] if given.only else list(coverage_spellings.rows())
    problems = [f"wrong: {row.model.library}: {row.model.name}: {what}" for row in rows for what in row.problems]
    problems += [f"wrong: {kind} {row.name}: {what}" for kind, row in functions for what in row.problems]
    print(*problems, sep="\n")
    if given.markdown:
        more = coverage_spellings.markdown(functions) if functions else ()
        given.markdown.write_text(markdown(rows, [*problems, *notes], arguments, given.lengths, more))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
