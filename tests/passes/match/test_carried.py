"""Of which rows of its inputs the rows of a node are made, for nodes that keep rows apart and nodes that mix them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder
from torch.fx import Node

from sparge_compile.passes.match.carried import Origin, Rows

B, L, C = 2, 6, 8
ALL = slice(None)

Make = Callable[[Builder, Node], Node]


def part(b: Builder, x: Node, *index: Any) -> Node:
    return b.call(operator.getitem, x, index)


# What is made of x [B, L, C], the dimension of its rows, and where they are in x.
KEEPS: dict[str, tuple[Make, int, Origin]] = {
    "linear": (lambda b, x: b.call(F.linear, x, b.input("w", C, C), b.input("bias", C)), 1, Origin(1)),
    "product": (lambda b, x: b.call(torch.matmul, x, b.input("w", C, C)), 1, Origin(1)),
    "batch of products": (lambda b, x: b.call(torch.matmul, x, b.input("w", B, C, C)), 1, Origin(1)),
    "norm": (lambda b, x: b.call(F.layer_norm, x, (C,), b.input("w", C)), 1, Origin(1)),
    "rms": (lambda b, x: b.call(torch.rms_norm, x, (C,), None, 1e-6), 1, Origin(1)),
    "transpose": (lambda b, x: b.method("transpose", x, 1, 2), 2, Origin(1)),
    "mean": (lambda b, x: b.method("mean", x, -1), 1, Origin(1)),
    "deviation": (lambda b, x: b.method("var", x, -1, keepdim=True), 1, Origin(1)),
    "softmax": (lambda b, x: b.call(torch.softmax, x, -1), 1, Origin(1)),
    "repeat": (lambda b, x: b.method("repeat_interleave", x, 2, -1), 1, Origin(1)),
    "cast": (lambda b, x: b.method("to", x, torch.bfloat16), 1, Origin(1)),
    "chunk": (lambda b, x: b.call(operator.getitem, b.method("chunk", x, 2, -1), 1), 1, Origin(1)),
    "eval dropout": (lambda b, x: b.call(F.dropout, x, 0.5, False), 1, Origin(1)),
    "cut": (lambda b, x: part(b, x, ALL, slice(2, None)), 1, Origin(1, 2)),
    "split": (lambda b, x: b.call(operator.getitem, b.method("split", x, [2, 4], 1), 1), 1, Origin(1, 2)),
    "joined": (lambda b, x: b.call(torch.cat, [b.input("text", B, 3, C), x], 1), 1, Origin(1, -3)),
    "dense": (lambda b, x: b.call(F.scaled_dot_product_attention, x, *[b.input("k", B, 3, C)] * 2), 1, Origin(1)),
}


@pytest.mark.parametrize("name", KEEPS)
def test_rows_that_stay_apart(name):
    make, dim, want = KEEPS[name]
    b = Builder()
    x = b.input("x", B, L, C)
    node = make(b, x)
    rows = Rows(b.reader(node))
    found = rows.carried(node, dim)
    assert found is not None and found[x] == want and rows.is_read(x, node)


MIXES: dict[str, Make] = {
    "dropout": lambda b, x: b.call(F.dropout, x, 0.5),
    "roll": lambda b, x: b.call(torch.roll, x, 1, 1),
    "flip": lambda b, x: b.method("flip", x, [1]),
    "cumsum": lambda b, x: b.method("cumsum", x, 1),
    "softmax": lambda b, x: b.call(torch.softmax, x, 1),
    "norm": lambda b, x: b.call(F.layer_norm, x, (L, C)),
    "strided": lambda b, x: part(b, x, ALL, slice(0, None, 2)),
    "parted": lambda b, x: b.method("unflatten", x, 1, (2, 3)),
    "twice": lambda b, x: b.call(torch.cat, [x, x], 1),
    "causal": lambda b, x: b.call(F.scaled_dot_product_attention, x, x, x, is_causal=True),
    "convolution": lambda b, x: b.call(F.conv1d, x, b.input("kernel", L, L, 1)),
}


@pytest.mark.parametrize("name", MIXES)
def test_rows_that_mix(name):
    b = Builder()
    x = b.input("x", B, L, C)
    node = MIXES[name](b, x)
    assert Rows(b.reader(node)).carried(node, 1) is None


def test_rows_that_are_read_in_two_ways():
    b = Builder()
    x = b.input("x", B, L, L)
    node = b.call(operator.add, x, b.method("transpose", x, 1, 2))
    (view,) = [n for n in b.graph.nodes if n.target == "transpose"]
    assert Rows(b.reader(node)).carried(node, 1) == {x: Origin(1), view: Origin(1)}


@pytest.mark.parametrize(
    "index, shape, dim, want",
    [
        ((..., slice(0, None, 2)), (B, L, C // 2), 1, Origin(1)),
        ((ALL, ALL, 0), (B, L), 1, Origin(1)),
        ((0,), (L, C), 1, Origin(0)),
        ((ALL, slice(2, None)), (B, L - 2, C), 1, Origin(1, -2)),
        ((ALL, slice(-2, None)), (B, 2, C), 1, Origin(1, -4)),
        ((ALL, slice(None, None, 2)), (B, L // 2, C), 1, None),
        ((ALL, 3), (B, C), 1, None),
        ((slice(0, 1),), (1, L, C), 1, Origin(1)),
    ],
)
def test_rows_that_are_written(index, shape, dim, want):
    b = Builder()
    x, rows = b.method("clone", b.input("x", B, L, C)), b.input("rows", *shape)
    node = b.opaque(operator.setitem, x, index, rows)
    found = Rows(b.reader(x)).carried(node, dim)
    assert found == (None if want is None else {x: Origin(dim), rows: want})


def test_what_a_tensor_looks_like_is_not_what_it_holds():
    b = Builder()
    x = b.input("x", B, L, C)
    empty, cast, size = b.call(torch.empty_like, x), b.method("type_as", b.call(torch.ones, L), x), b.method("size", x)
    rows = Rows(b.reader(empty, cast))
    assert rows.carried(empty, 1) == {}
    assert not any(rows.is_read(x, node) for node in (empty, cast, size))
