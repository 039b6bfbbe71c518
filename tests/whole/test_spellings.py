"""Every spelling of attention is found and replaced, every twin and look-alike stays to the byte, with a reason.

The tables are in spellings_*.py and lookalikes.py. Inductor's own patterns of attention are tested here too.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import lookalikes_flash  # noqa: F401  importing it registers its look-alikes
import pytest
import spellings_flash  # noqa: F401  importing it registers its spellings
import spellings_flex  # noqa: F401
import spellings_heads  # noqa: F401
import spellings_masks  # noqa: F401
import spellings_packed  # noqa: F401
import spellings_scores  # noqa: F401
import spellings_shapes  # noqa: F401
import spellings_softmax  # noqa: F401
import torch
import torch.nn.functional as F
from helpers import rewrite_graph
from lookalikes import LOOKALIKES, LookAlike
from spelling import SPELLINGS, Spelling
from torch import Tensor, nn
from torch._inductor.fx_passes import fuse_attention
from torch.nn.attention import flex_attention
from torch.profiler import ProfilerActivity, profile

import sparge_compile
from sparge_compile.options import Options
from sparge_compile.passes.read.fx_utils import clone
from sparge_compile.passes.work import Work
from sparge_compile.report import Reason, Report, SiteReport


@pytest.fixture(autouse=True)
def flex_attention_trains_on_a_cpu(monkeypatch):
    """torch refuses it there, where it has no kernel for the backward; ours has."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)


LOOK = {"min_seq_len": 0, "on_unsupported": "dense"}
DENSE = {**LOOK, "topk": 1.0, "topp": 0.0, "inner": "aot_eager"}
SPARSE = {**DENSE, "topk": 0.3}

# Of the largest entry. In the small dtypes the weights are rounded at other places than SDPA rounds them.
OUTPUT_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GRADIENT_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

spellings = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)


def rows(function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[SiteReport]:
    return sparge_compile.explain(function, LOOK)(*inputs).sites


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    return torch.compile(function, backend="sparge", fullgraph=True, options=options)


def assert_near(got: Tensor, want: Tensor, bounds: dict[torch.dtype, float]) -> None:
    """max |got - want| is at most a bound times max |want|."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert want.abs().max() > 0
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= bounds[want.dtype], f"relative error {error:.1e}"


def differentiable(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The floating inputs, as leaves that gradients are asked for; not what tells padding, [B, S]."""
    return [x.requires_grad_() for x in inputs if x.is_floating_point() and x.dim() != 2]


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """Of a fixed random projection of the output."""
    projection = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return list(torch.autograd.grad(output, leaves, projection, allow_unused=True))


def sparse_calls(call: Callable[..., Any], inputs: tuple[Any, ...]) -> int:
    """How often the sparse op runs. ``call`` has run before: tracing runs it too, on fake tensors."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call(*inputs)
    return sum(event.name in ("sparge::attend", "sparge::attend_for_backward") for event in profiled.events())


def untouched(function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[SiteReport]:
    """The sites of a graph; what is handed on is what Dynamo made, to the byte."""
    graphs: list[torch.fx.GraphModule] = []
    torch.compile(function, backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)(*inputs)
    graph, options = clone(graphs[0]), Options.parse(LOOK)
    before = graph.code
    work = rewrite_graph(graph, options)
    assert work.threshold_inputs == []
    assert graph.code == before == graphs[0].code
    return work.add_to(Report()).sites


@pytest.mark.parametrize("table, least", [(SPELLINGS, 50), (LOOKALIKES, 20)], ids=["spellings", "look-alikes"])
def test_the_tables_are_long_enough(table, least):
    assert len({entry.name for entry in table}) == len(table) >= least


@spellings
def test_a_spelling_is_what_sdpa_computes(spelling: Spelling):
    """The table is right about its own code; nothing of ours runs here."""
    inputs = spelling.inputs()
    assert_near(spelling.function(*inputs), spelling.same(F.scaled_dot_product_attention, *inputs), OUTPUT_ERROR)


@spellings
def test_a_twin_is_not_the_spelling(spelling: Spelling):
    """It returns something else, so that a rewrite would be wrong; none of ours runs here."""
    inputs = spelling.inputs()
    torch.manual_seed(1)  # for dropout
    output = spelling.function(*inputs)
    torch.compiler.reset()  # flex_attention compiles itself; torch 2.15 fails on a second number in its score_mod
    twin = spelling.twin(*inputs)
    assert isinstance(twin, tuple) or not torch.allclose(twin.float(), output.float(), rtol=1e-2, atol=1e-3)


def assert_found(spelling: Spelling, graphs: list[Work]) -> None:
    (row,) = (row for graph in graphs for row in graph.add_to(Report()).sites)
    assert (row.kind, row.status, row.reason) == (
        spelling.kind,
        "sparse" if spelling.sparse else "dense",
        spelling.reason,
    )
    shapes = row.shapes
    assert shapes["batch"] * shapes["heads"] == spelling.product
    if spelling.heads is not None:
        assert shapes["heads"] == spelling.heads
    assert shapes["heads"] == spelling.group * shapes["kv_heads"]
    assert (shapes["length"], shapes["keys"]) == (spelling.length, spelling.keys)
    assert shapes["head_size"] == spelling.head_size
    if spelling.mask is not None:
        assert (row.site.mask, row.site.is_causal) == (spelling.mask, spelling.is_causal)


@spellings
@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_spelling_is_found_and_replaced_is_dense_attention_at_topk_1(spelling: Spelling, inner, opened_graphs):
    inputs = spelling.inputs()
    leaves = differentiable(inputs)
    call = compiled(spelling.function, {**DENSE, "inner": inner})
    got, want = call(*inputs), spelling.same(F.scaled_dot_product_attention, *inputs)
    assert_near(got.detach(), want.detach(), OUTPUT_ERROR)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any())
        if b is not None and b.any():
            assert_near(a, b, GRADIENT_ERROR)
    assert_found(spelling, opened_graphs)
    assert sparse_calls(call, inputs) == spelling.sparse


@pytest.mark.parametrize(
    "spelling",
    # Scores that were rounded to a small dtype order blocks in another way, and a mask that is causal and more has
    # another map than causality with a mask.
    [s for s in SPELLINGS if s.sparse and s.mask is not None and s.inputs()[0].dtype == torch.float32],
    ids=lambda s: s.name,
)
def test_scale_mask_and_heads_are_understood(spelling: Spelling, opened_graphs):
    """Sparse and without gradients, it is what the op gives on the same queries, keys and values."""
    inputs = spelling.inputs()
    got = compiled(spelling.function, SPARSE)(*inputs)
    assert_found(spelling, opened_graphs)
    assert_near(got, spelling.same(partial(sparge_compile.attention, topk=0.3), *inputs), OUTPUT_ERROR)
    if spelling.keys > 64 and spelling.mask == "none":  # blocks enough, and none that a mask hides or forces
        dense = spelling.function(*inputs)
        assert (got - dense).abs().max() > 1e-3 * dense.abs().max(), "nothing was dropped"


@spellings
def test_a_twin_stays_to_the_byte(spelling: Spelling):
    (row,) = untouched(spelling.twin, spelling.inputs())
    assert row.status == "dense" and row.reason in spelling.why


@pytest.mark.parametrize("lookalike", LOOKALIKES, ids=lambda s: s.name)
def test_a_lookalike_stays_to_the_byte(lookalike: LookAlike):
    found = untouched(lookalike.function, lookalike.inputs())
    assert found or lookalike.silent
    for row in found:
        assert (row.status, row.kind in lookalike.kinds) == ("dense", True)
        assert row.reason in lookalike.reasons


DYNAMIC = (
    "einsum_blhd",
    "keys_repeated_by_expand_and_reshape",
    "tril_filled",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "at_operator",
            "bmm_on_flattened_heads",
            "scale_from_the_shape",
            "scale_by_a_tensor_constant",
            "grouped_by_broadcasting",
            "arange_compared",
        )
    ),
)


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_graph_serves_all_lengths(name: str, opened_graphs):
    """Batch, heads and head size are as they were; the lengths are symbols."""
    spelling = next(s for s in SPELLINGS if s.name == name)
    axis = 1 if spelling.name == "einsum_blhd" else 2
    call = torch.compile(spelling.function, backend="sparge", fullgraph=True, options=DENSE)
    for grow in (0, 70):
        inputs = tuple(torch.cat([x, x.narrow(axis, 0, grow)], axis) for x in spelling.inputs())
        for x in inputs:
            torch._dynamo.maybe_mark_dynamic(x, axis)  # causal code makes some of them equal
        with torch.compiler.set_stance("default" if grow == 0 else "fail_on_recompile"):
            got = call(*inputs)
        assert_near(got, spelling.function(*inputs), OUTPUT_ERROR)
    (row,) = opened_graphs[0].add_to(Report()).sites
    assert row.status == "sparse" and isinstance(row.shapes["keys"], str)
    assert sparse_calls(call, inputs) == 1


def test_a_symbolic_head_size_in_the_scale():
    spelling = next(s for s in SPELLINGS if s.name == "scale_from_the_shape")
    inputs = spelling.inputs()
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 3)
    (row,) = rows(spelling.function, inputs)
    assert row.kind == "decomposed"
    assert_near(compiled(spelling.function, DENSE)(*inputs), spelling.function(*inputs), OUTPUT_ERROR)


class Block(nn.Module):
    """Attention with projections, and dropout that is active in training."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.dropout(self.softmax((q * 16**-0.5) @ k.transpose(-2, -1)))
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


def test_the_mode_of_a_module_decides_about_its_dropout():
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 150, 32)
    found = rows(model.train(), (x,))
    assert [(row.name, row.reason) for row in found] == [("0", Reason.DROPOUT), ("1", Reason.DROPOUT)]
    found = rows(model.eval(), (x,))
    assert [(row.name, row.reason) for row in found] == [("0", Reason.LONG_ENOUGH), ("1", Reason.LONG_ENOUGH)]
    call = compiled(model, DENSE)
    got, want = call(x), model(x)
    assert_near(got.detach(), want.detach(), OUTPUT_ERROR)
    parameters = list(model.parameters())
    for name, a, b in zip(
        dict(model.named_parameters()), gradients(got, parameters), gradients(want, parameters), strict=True
    ):
        # A key's bias moves all scores of a row alike: its gradient is zero, and rounding on both sides.
        part = slice(None) if not name.endswith("qkv.bias") else slice(64, None)
        assert_near(a[part], b[part], GRADIENT_ERROR)
    assert sparse_calls(call, (x,)) == 2


# ---- Inductor's own patterns


def patterns() -> dict[str, Callable[..., Any]]:
    """Inductor's functions by name, as if they stood here: Dynamo does not look into files of torch."""
    here: dict[str, Any] = {"torch": torch, "math": math, "__builtins__": __builtins__}
    found = {name: each for name, each in vars(fuse_attention).items() if re.fullmatch(r"_sfdp_pattern_\d+", name)}
    for name, function in found.items():
        here[name] = FunctionType(function.__code__.replace(co_filename=__file__), here, name)
    return {name: here[name] for name in found}


def registered() -> list[tuple[str, dict[str, Any]]]:
    """Name and particulars of each pattern that the installed torch registers; none, where it lists them elsewhere."""
    listed = getattr(fuse_attention, "_get_sfdp_patterns", lambda device: ())
    return list(listed(torch.device("cpu")))


def pattern_of(name: str) -> str:
    """The function's name in the name of a pattern, to which it adds dtype, batch and mode."""
    return re.match(r"_sfdp_pattern_\d+", name).group()


def inductor_patterns() -> Iterator[Any]:
    """Every pattern that the installed torch registers, in float32 and float16, with dropout and without."""
    functions = patterns()
    for name, how in registered():
        pattern = pattern_of(name)
        fixed = dict(how["scalar_workaround"])
        if "dropout_p" in inspect.signature(functions[pattern]).parameters:
            fixed.setdefault("dropout_p", 0.0)  # inference, which has no such argument in the registered function
        if "_bs1" not in name:  # another batch size of another entry
            marks = [pytest.mark.slow] if "_half" in name else []
            yield pytest.param(functions[pattern], how["example_inputs"], fixed, id=name[6:], marks=marks)


def test_no_pattern_of_inductor_is_left_out():
    if not registered():
        pytest.skip("this torch lists its patterns elsewhere")
    assert {pattern_of(name) for name, _ in registered()} == set(patterns())


def filled(example: Tensor) -> Tensor:
    """A tensor like an uninitialised example: numbers, or a mask that leaves each row its first key."""
    if example.dim() == 0:
        return torch.full_like(example, 2.0)
    if example.dim() == 3:
        example = example[:6]  # of a thousand heads
    if example.dtype == torch.bool or example.dim() == 2:
        mask = torch.rand(example.shape) < 0.5
        mask[..., 0] = True
        return mask.to(example.dtype)
    x = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype)
    x.normal_(std=example.shape[-1] ** -0.25)  # not all patterns have a scale
    return x.requires_grad_(example.requires_grad)


# What may keep a pattern dense: masks of unknown floats, dropout, a float16 value beside a float32 query.
STATED = (Reason.DROPOUT, Reason.ADDITIVE_MASK, Reason.DTYPE)


@pytest.mark.parametrize("function, examples, fixed", list(inductor_patterns()))
def test_what_inductor_knows_as_attention_is_found(function, examples, fixed, opened_graphs):
    inputs = tuple(filled(x) for x in examples)

    def pattern(*tensors: Tensor) -> list[Tensor]:
        out = function(*tensors, **fixed)
        return list(out) if isinstance(out, tuple) else [out]

    try:
        pattern(*inputs)
    except RuntimeError as error:  # float16 beside float32
        pytest.skip(f"the pattern does not run on its own example: {error}")
    call = compiled(pattern, {**DENSE, "inner": "eager"})
    torch.manual_seed(2)  # for dropout
    got = call(*inputs)
    (row,) = opened_graphs[0].add_to(Report()).sites
    active = fixed.get("dropout_p", 0.0) > 0
    assert row.kind == "decomposed"
    assert row.status == "sparse" or row.reason in STATED
    assert row.status == "dense" or not active
    if len(inputs) == 3 and not active and len({x.dtype for x in (*inputs, *pattern(*inputs))}) == 1:
        assert row.status == "sparse"
    torch.manual_seed(2)
    for a, b in zip(got, pattern(*inputs), strict=True):
        assert_near(a.detach(), b.detach(), OUTPUT_ERROR)
