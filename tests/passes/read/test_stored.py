"""What no input of the model reaches: parameters, buffers and constants, and what is made of them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import CHECKPOINT, Builder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparge_compile
from sparge_compile.passes.find import find
from sparge_compile.passes.read.reader import Reader
from sparge_compile.report import Reason

LOOK = {"min_seq_len": 0, "on_unsupported": "dense"}


def test_only_what_reads_content_is_reached():
    b = Builder()
    x, w = b.input("x", 2, 6, 4), b.input("w", 1, 6, 4)
    size = b.method("size", x, 0)
    alone = [b.method("type_as", w, x), b.method("expand_as", w, x), b.method("expand", w, size, -1, -1)]
    alone += [b.call(torch.zeros_like, x), b.method("new_zeros", x, 3)]
    joined = [b.call(torch.cat, [b.method("expand", w, 2, -1, -1), x], 1), b.call(torch.add, w, x)]
    module = b.module(*alone, *joined)
    reader = Reader(module, stored=[w])
    assert all(reader.is_stored(node) for node in (w, *alone))
    assert not any(reader.is_stored(node) for node in (x, *joined))
    assert not any(Reader(module).is_stored(node) for node in (w, *alone[:3])), "nobody says that w is stored"


def test_a_write_reaches_all_names_of_a_tensor():
    """A buffer that is a cache of keys: written through a view, read as a whole."""
    b = Builder()
    x, cache, other = b.input("x", 2, 3, 4), b.input("cache", 2, 6, 4), b.input("other", 2, 6, 4)
    part = b.call(torch.narrow, cache, 1, 0, 3)
    b.method("copy_", part, x)
    read, unwritten = b.method("transpose", cache, 1, 2), b.method("transpose", other, 1, 2)
    reader = Reader(b.module(read, unwritten), stored=[cache, other])
    assert not any(map(reader.is_stored, (cache, part, read)))
    assert all(map(reader.is_stored, (other, unwritten)))


def test_the_inputs_of_a_nested_graph_are_its_operands():
    b = Builder()
    x, w = b.input("x", 6, 4), b.input("w", 50, 4)
    body = Builder(of=b)
    y, table = body.input("y", 6, 4), body.input("table", 50, 4)
    scores = body.call(torch.matmul, y, body.method("t", table))
    inner = body.module(body.call(torch.matmul, body.call(torch.softmax, scores, -1), table))
    module = b.module(b.nested(CHECKPOINT, inner, x, w))
    (codebook,) = find(module, stored=[w])
    assert codebook.site.kind == "softmax" and codebook.refusal.detail == "no input reaches its keys and values"
    (attention,) = find(module)
    assert attention.attention is not None


class Table(nn.Module):
    """Rows of a parameter and of a buffer, and a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.head, self.words = (
            nn.Parameter(torch.randn(200, 16)),
            nn.Linear(16, 200),
            nn.Embedding(200, 16),
        )
        self.register_buffer("values", torch.randn(200, 16))


class Codebook(Table):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.codes.T).softmax(-1) @ self.values


class Vocabulary(Table):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).softmax(-1) @ self.words.weight.to(x).expand(len(x), -1, -1)


class Checkpointed(Table):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: (y @ self.codes.T).softmax(-1) @ self.values, x, use_reentrant=False)


class LearnedQueries(Table):
    """Of a Perceiver; the look-up's twin: what is stored asks, and what is given answers."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.codes.expand(len(x), -1, -1) @ x.mT).softmax(-1) @ x


class MemoryTokens(Table):
    def forward(self, x: Tensor) -> Tensor:
        keys = torch.cat([self.codes.expand(len(x), -1, -1), x], 1)
        return (x @ keys.mT).softmax(-1) @ keys


class LearnedAlone(Table):
    """The first layer of a decoder of learned queries: they attend to one another, and to no input yet."""

    def forward(self, x: Tensor) -> Tensor:
        return x + ((self.codes @ self.codes.T).softmax(-1) @ self.values)[: x.shape[1]]


def statuses(module: nn.Module) -> list[Any]:
    """The reports of Dynamo's graph, of a program, of a decomposed one, and of an FX graph."""
    x = torch.randn(2, 150, 16)
    program = torch.export.export(module, (x,))
    rewritten = [sparge_compile.rewrite(each, LOOK).graph_module for each in (program, program.run_decompositions())]
    rewritten.append(sparge_compile.rewrite(program.module(), LOOK))
    return [sparge_compile.explain(module, LOOK)(x), *(each.meta["sparge_report"] for each in rewritten)]


@pytest.mark.parametrize("kind", [Codebook, Vocabulary])
def test_a_table_that_inputs_ask_is_no_attention(kind):
    for report in statuses(kind()):
        assert [(row.kind, row.status, row.reason) for row in report] == [("softmax", "dense", Reason.NOT_ATTENTION)]


def test_a_table_inside_checkpointed_code():
    (row,) = sparge_compile.explain(Checkpointed(), LOOK)(torch.randn(2, 150, 16))
    assert (row.kind, row.detail) == ("softmax", "no input reaches its keys and values")


@pytest.mark.parametrize("kind", [LearnedQueries, MemoryTokens, LearnedAlone])
def test_learned_tokens_attend(kind):
    for report in statuses(kind()):
        assert [(row.kind, row.status) for row in report] == [("decomposed", "sparse")]
