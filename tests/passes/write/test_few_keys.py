"""Dense attention to few keys in training: whose queries are taken in parts, and that it stays the same attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, targets

from sparge_compile.passes.find import Match, find
from sparge_compile.passes.write import few_keys
from sparge_compile.passes.write.few_keys import parts_of, take_in_parts

SDPA = F.scaled_dot_product_attention


@pytest.mark.parametrize(
    "length, keys, heads, parts",
    [
        pytest.param(32760, 512, 12, 6, id="Wan-1.3B: 48 programs"),
        pytest.param(75600, 512, 40, 2, id="Wan-14B: 160 programs"),
        pytest.param(32760, 1024, 40, 1, id="as many programs as the GPU wants"),
        pytest.param(32760, 1025, 12, 1, id="more keys"),
        pytest.param(32749, 512, 12, 1, id="a prime number of queries"),
        pytest.param(6144, 512, 12, 1, id="parts would be too short"),
    ],
)
def test_queries_come_in_the_least_parts_that_fill_the_gpu(length, keys, heads, parts):
    assert parts_of(length, keys, heads, at_a_time=132) == parts


def attention(
    heads: int = 2, rows_first: bool = True, device: str = "cuda", trains: bool = True, **given: Any
) -> Match:
    """SDPA of 4,096 queries and 77 keys, of a batch of two."""
    b = Builder()
    q = b.input("q", 2, *((4096, heads) if rows_first else (heads, 4096)), 8, device=device)
    q = b.method("transpose", q, 1, 2) if rows_first else q
    k = b.input("k", 2, 2, 77, 8, device=device)
    v = b.input("v", *given.pop("values", (2, 2, 77, 8)), device=device)
    if given.pop("mask", False):
        given["attn_mask"] = b.input("mask", 4096, 77, dtype=torch.bool, device=device)
    (match,) = find(b.module(b.call(SDPA, q, k, v, **given)))
    assert match.attention is not None
    return replace(match, attention=replace(match.attention, trains=trains))


@pytest.fixture(autouse=True)
def _a_gpu_of_two(monkeypatch):
    monkeypatch.setattr(few_keys, "multiprocessors", lambda device: 4)


def test_attention_is_taken_in_parts():
    match = attention()
    graph_module = match.graph_module
    assert take_in_parts([match]) == 1
    graph_module.graph.lint()
    assert targets(graph_module).count(SDPA) == 1
    (node,) = (node for node in graph_module.graph.nodes if node.target is SDPA)
    shapes = [tuple(x.meta["example_value"].shape) for x in node.args]
    assert shapes == [(4, 2, 2048, 8), (4, 2, 77, 8), (4, 2, 77, 8)]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"trains": False}, id="without a backward"),
        pytest.param({"device": "cpu"}, id="on a CPU"),
        pytest.param({"mask": True}, id="a mask"),
        pytest.param({"is_causal": True}, id="causal"),
        pytest.param({"dropout_p": 0.1}, id="dropout"),
        pytest.param({"heads": 4, "enable_gqa": True}, id="key heads that are shared"),
        pytest.param({"rows_first": False}, id="queries of a head behind one another"),
        pytest.param({"values": (1, 2, 77, 8)}, id="values that both sequences share"),
        pytest.param({"values": (2, 77, 8)}, id="values without a batch"),
    ],
)
def test_other_attention_stays_as_it_is(how):
    match = attention(**how)
    before = targets(match.graph_module)
    assert take_in_parts([match]) == 0 and targets(match.graph_module) == before


def test_results_and_gradients_are_the_same(monkeypatch):
    monkeypatch.setattr(few_keys, "_parts", lambda match: 2)
    match = attention(device="cpu", scale=0.3)
    assert take_in_parts([match]) == 1
    graph_module = match.graph_module
    graph_module.recompile()
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4096, 2, 8), (2, 2, 77, 8), (2, 2, 77, 8)))
    results = []
    for attend in (lambda q, k, v: SDPA(q.transpose(1, 2), k, v, scale=0.3), lambda *x: graph_module(*x)[0]):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*results)
