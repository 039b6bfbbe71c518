"""Dynamic shapes: a model is compiled as often as it would be without us, and each call is decided by its own sizes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sparge_compile import attention, rewrite
from sparge_compile.report import Reason

SPARSE = {"topk": 0.3, "topp": 0.0, "inner": "aot_eager"}
ALWAYS = {**SPARSE, "min_seq_len": 0}
BY_COST = {
    **SPARSE,
    "costs": dict.fromkeys(("dense_base", "sparse_base", "pool", "select"), 0.0)
    | {"dense_pair": 1e-9, "sparse_pair": 2e-9},
}


class Block(nn.Module):
    """Self-attention, and cross-attention to a text, each with projections."""

    def __init__(self, heads: int = 2, kv_heads: int | None = None, size: int = 8, **how: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.how = heads, kv_heads or heads, how
        channels = heads * size
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * self.kv_heads * size)
        self.cross_q, self.cross_kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor, text: Tensor | None = None, **how: Any) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads != self.heads, **self.how, **how)
        x = x + out.transpose(1, 2).flatten(2)
        if text is None:
            return x
        q = self.cross_q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.cross_kv(text).view(batch, text.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class LearnedQueries(nn.Module):
    """Of one for the whole batch: its size is a symbol that only keys and values have."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 2, 130, 8))

    def forward(self, x: Tensor) -> Tensor:
        k, v = x.unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(self.queries, k, v) + (self.queries @ k.mT).softmax(-1) @ v


class Causal(nn.Module):
    """Prefill of a language model: a causal mask from positions, and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        at = torch.arange(x.shape[1])
        mask = (at[None, :] <= at[:, None])[None, None] & padding[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class WrittenOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(1, 2).flatten(2)


class Patches(nn.Module):
    """Tokens from pixels: lengths are expressions of the image's sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 16, 2, 2), Block()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        return self.block(torch.cat([text, x], 1), text)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


def tokens(batch: int, length: int, channels: int = 16) -> Tensor:
    return torch.randn(batch, length, channels)


LENGTHS = [(2, 300), (3, 700), (1, 1100), (4, 64), (5, 40), (2, 129), (6, 8)]


def texts() -> Iterable[tuple[Any, ...]]:
    text = [77, 8, 300, 40, 2, 64, 140]
    return [(tokens(*at), tokens(at[0], n)) for at, n in zip(LENGTHS, text, strict=True)]


def images() -> Iterable[tuple[Any, ...]]:
    sizes = ((2, 32, 40, 7), (1, 64, 32, 30), (3, 8, 16, 70))
    return [(torch.randn(b, 3, h, w), tokens(b, n)) for b, h, w, n in sizes]


@dataclass
class Case:
    model: Callable[[], nn.Module]
    inputs: Callable[[], Iterable[tuple[Any, ...]]] = lambda: [(tokens(*at),) for at in LENGTHS]
    train: bool = False
    options: dict[str, Any] = field(default_factory=lambda: ALWAYS)
    how: dict[str, Any] = field(default_factory=lambda: {"dynamic": True})
    keywords: dict[str, Any] = field(default_factory=dict)


CASES = {
    "inference": Case(Block, texts),
    "training": Case(Block, texts, train=True),
    "by cost": Case(Block, texts, options=BY_COST),
    "training by cost": Case(Block, texts, train=True, options=BY_COST),
    "after two shapes": Case(Block, texts, train=True, how={"dynamic": None}),
    "batch of as many as heads": Case(lambda: Block(4), lambda: [(tokens(b, 300, 32),) for b in (4, 2, 3, 8)]),
    "grouped queries": Case(lambda: Block(4, 2), lambda: [(tokens(*at, 32),) for at in LENGTHS], train=True),
    "causal": Case(lambda: Block(is_causal=True), train=True),
    "prefill": Case(Causal, lambda: [(tokens(*at), torch.rand(at) > 0.1) for at in LENGTHS], train=True),
    "written out": Case(WrittenOut, train=True),
    "patches": Case(Patches, images),
    "training on patches": Case(Patches, images, train=True),
    "opened call": Case(Encoder, train=True),
    "numbers and a flag": Case(
        Block,
        keywords={"scale": 0.3, "dropout_p": 0.0, "is_causal": True},
        how={"dynamic": True, "fullgraph": True},
    ),
}


def graphs_of(case: Case, backend: str) -> tuple[int, list[Tensor]]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    options = {"options": case.options} if backend == "sparge" else {}
    model = case.model()
    compiled = torch.compile(model, backend=backend, **case.how, **options)
    results = []
    for given in case.inputs():
        with torch.set_grad_enabled(case.train):
            out = compiled(*given, **case.keywords)
            if case.train:
                out.sum().backward()
        results.append(out.detach())
    assert not counters["unimplemented"] and not counters["graph_break"]
    return counters["stats"]["unique_graphs"], results


SLOW = ("training by cost", "training on patches", "after two shapes", "opened call")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_as_many_graphs_as_without_us(name, caplog):
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        want, _ = graphs_of(CASES[name], "aot_eager")
        with caplog.at_level(logging.INFO, "sparge_compile"):
            got, _ = graphs_of(CASES[name], "sparge")
    assert got == want
    reports = [record.getMessage() for record in caplog.records if "attention sites sparse" in record.getMessage()]
    assert reports
    assert all(re.search(r"sparge: ([1-9]\d*) of \1 ", report) for report in reports)


@pytest.mark.parametrize("train", [False, True])
def test_attention_called_in_compiled_code_takes_one_graph(train):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda *x: attention(*x, topk=0.3).flatten(2), backend="aot_eager", fullgraph=True)
    for length, keys in ((300, 70), (700, 300), (64, 8), (1500, 2100)):
        qkv = [torch.randn(2, 4, n, 8, requires_grad=train) for n in (length, keys, keys)]
        for x in qkv:
            torch._dynamo.mark_dynamic(x, 2)
        compiled(*qkv)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("train", [False, True])
def test_lengths_on_both_sides_of_the_limit_have_their_own_answer(train):
    """Below it a call is dense, to rounding; above, it is sparse; whichever was traced."""
    model = Block()
    compiled = torch.compile(model, backend="sparge", dynamic=True, options={**ALWAYS, "min_seq_len": 500})
    for length in (300, 900, 64, 499, 500):
        x = tokens(2, length).requires_grad_(train)
        found, want = compiled(x), model(x)
        if train:
            found, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, want))
        apart = (found - want).abs().max().item()
        assert apart > 1e-4 if length >= 500 else apart < 1e-5


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("low, high", [(256, 2048), (3000, 65536)])
@pytest.mark.parametrize("options", [ALWAYS, BY_COST], ids=["always", "by cost"])
def test_a_promised_range_stays_whole(low, high, options, train):
    compiled = torch.compile(Block(), backend="sparge", options=options, fullgraph=True)
    x = tokens(2, max(low, 1500))
    torch._dynamo.mark_dynamic(x, 1, min=low, max=high)
    with torch.set_grad_enabled(train):
        compiled(x)  # a guard that cuts the range is an error of torch's


@pytest.mark.parametrize("train", [False, True])
def test_sizes_that_depend_on_data(train):
    class Chosen(Block):
        def forward(self, x, keep):
            return super().forward(x[keep.nonzero().squeeze(1)][None])

    model = Chosen()
    compiled = torch.compile(model, backend="sparge", fullgraph=True, dynamic=True, options={**ALWAYS, "topk": 1.0})
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.set_grad_enabled(train):
        for length in (300, 900, 40):
            given = torch.randn(length, 16), torch.rand(length) > 0.3
            torch.testing.assert_close(compiled(*given), model(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("example", [300, 1500])
def test_a_rewritten_program_takes_what_the_given_one_takes(example):
    model = Block()
    length = torch.export.Dim("length", min=2, max=4096)
    given = torch.export.export(model, (tokens(2, example),), dynamic_shapes={"x": {1: length}})
    options = {name: value for name, value in BY_COST.items() if name != "inner"}
    result = rewrite(given, options)
    (row,) = result.graph_module.meta["sparge_report"]
    assert row.reason is Reason.AT_EACH_CALL and "from 1024 keys on" in row.detail
    assert result.range_constraints == given.range_constraints
    programs = [result, result.run_decompositions(), given.run_decompositions()]
    for program in programs:
        for n, is_sparse in ((100, False), (1200, True)):
            x = tokens(2, n)
            apart = (program.module()(x) - model(x)).abs().max().item()
            assert apart > 1e-4 if is_sparse and program is not programs[-1] else apart < 1e-5


def test_a_dynamic_batch_that_queries_do_not_have():
    model = LearnedQueries()
    call = torch.compile(model, backend="sparge", fullgraph=True, options={**ALWAYS, "topk": 1.0})
    for batch in (3, 5):
        x = torch.randn(batch, 140, 32)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("default" if batch == 3 else "fail_on_recompile"):
            torch.testing.assert_close(call(x), model(x))
