"""The op takes the place of an attention; its region goes, and nothing else."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, targets, written_out

from sparge_compile.passes.find import find
from sparge_compile.passes.substitute import OP, substitute_match

SDPA = F.scaled_dot_product_attention
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
B, H, L, D = 2, 3, 70, 8


def graph_of(make, *extra):
    """A graph over q, k, v and thresholds; what ``make`` gives are its outputs."""
    b = Builder()
    q, k, v = b.qkv(B, H, L, L, D)
    thresholds = b.input("thresholds", H, 2)
    made = make(b, q, k, v)
    owner = b.module(*(made if isinstance(made, list) else [made]))
    return owner, thresholds


def substituted(make):
    """The graph with its matches substituted, what it gave before and what it gives now with all blocks kept."""
    owner, thresholds = graph_of(make)
    inputs = [torch.randn(B, H, L, D) for _ in range(3)] + [torch.tensor([[1.0, 0.0]] * H)]
    want = owner(*(x.clone() for x in inputs))
    replaced: dict = {}
    made = [substitute_match(match, thresholds, replaced) for match in find(owner) if match.attention is not None]
    owner.graph.lint()
    owner.recompile()
    torch.testing.assert_close(owner(*(x.clone() for x in inputs)), want, atol=2e-5, rtol=1e-4)
    return owner, made


def fused(b, q, k, v):
    return b.call(torch.neg, b.call(SDPA, q, k, v))


def causal(b, q, k, v):
    return b.call(SDPA, q, k, v, is_causal=True, scale=0.25)


def kernel(b, q, k, v):
    return b.call(operator.getitem, b.call(KERNEL, q, k, v), 0)


def masked(b, q, k, v):
    mask = b.call(torch.lt, b.call(torch.arange, L), 40)
    return b.call(SDPA, q, k, v, b.method("expand", mask, L, L))


def two_in_a_row(b, q, k, v):
    return b.call(SDPA, written_out(b, q, k, v), k, v)


def one_reads_the_other(b, q, k, v):
    x = b.call(SDPA, q, k, v)
    return written_out(b, x, x, x)


def changed_afterwards(b, q, k, v):
    return b.method("mul_", written_out(b, q, k, v), 2)


def folded(b, q, k, v):
    q, k, v = (b.method("reshape", x, B * H, L, D) for x in (q, k, v))
    weights = b.call(torch.softmax, b.call(torch.bmm, q, b.method("transpose", k, 1, 2)), -1)
    return b.method("view", b.call(torch.bmm, weights, v), B, H, L, D)


GRAPHS = [fused, causal, kernel, masked, written_out, two_in_a_row, one_reads_the_other, changed_afterwards, folded]


@pytest.mark.parametrize("make", GRAPHS, ids=lambda f: f.__name__)
def test_the_op_is_there_and_the_attention_is_gone(make):
    owner, made = substituted(make)
    assert made and [node for node in owner.graph.nodes if node.target is OP] == made
    gone = {SDPA, KERNEL, torch.softmax, torch.bmm, operator.getitem}
    assert not gone & set(targets(owner))
    assert all(node.meta["example_value"].shape is not None and node.args[3].name == "thresholds" for node in made)


def test_arguments_of_the_op():
    owner, (node,) = substituted(causal)
    q, k, v, thresholds = owner.graph.find_nodes(op="placeholder")
    assert node.args == (q, k, v, thresholds)
    assert node.kwargs == {"attn_mask": None, "is_causal": True, "scale": 0.25}
    _, (node,) = substituted(masked)
    assert node.kwargs["attn_mask"] is not None and node.kwargs["is_causal"] is False


def test_one_node_takes_the_place_of_one_and_keeps_its_metadata():
    def traced(b, q, k, v):
        with b.inside("block.attn"):
            node = b.call(SDPA, q, k, v)
        node.meta["stack_trace"] = "where it was written"
        return node

    owner, thresholds = graph_of(traced)
    (match,) = find(owner)
    before = len(owner.graph.nodes)
    node = substitute_match(match, thresholds, {})
    assert len(owner.graph.nodes) == before
    assert node.meta["stack_trace"] == "where it was written" and "block.attn" in node.meta["nn_module_stack"]


def unused_in_place(b, q, k, v):
    b.method("add_", q, 1.0)  # its result is unused, and it is not dead
    return b.call(SDPA, q, k, v)


def unused_pure(b, q, k, v):
    b.call(torch.exp, q)  # as it was found
    return b.call(SDPA, q, k, v)


def in_place_above_the_op(b, q, k, v):
    k = b.method("mul_", b.call(torch.neg, k), 2)
    return b.call(SDPA, q, k, v)


@pytest.mark.parametrize(
    "make, kept",
    [(unused_in_place, "add_"), (unused_pure, torch.exp), (in_place_above_the_op, "mul_")],
    ids=["unused in place", "unused pure", "in place above the op"],
)
def test_what_the_rewrite_did_not_orphan_stays(make, kept):
    owner, _ = substituted(make)
    assert kept in targets(owner)


def region_writes(b, q, k, v):
    scores = b.call(torch.matmul, q, b.method("transpose", k, -1, -2))
    b.method("mul_", scores, 0.5)
    return b.call(torch.matmul, b.call(torch.softmax, scores, -1), v)


def test_what_is_written_inside_the_region_goes_with_it():
    owner, (node,) = substituted(region_writes)
    assert "mul_" not in targets(owner) and torch.softmax not in targets(owner)
    assert node.kwargs["scale"] == 0.5


def test_what_only_the_region_read_goes_unless_it_is_random():
    def chain(random):
        def make(b, q, k, v):
            bias = b.call(torch.ops.aten.bernoulli.p, q, 0.5) if random else b.call(torch.exp, q)
            rows = b.method("sum", bias, -1, keepdim=True)  # the same for all keys: it changes no weight
            scores = b.call(torch.add, b.call(torch.matmul, q, b.method("transpose", k, -1, -2)), rows)
            return b.call(torch.matmul, b.call(torch.softmax, scores, -1), v)

        return make

    owner, _ = substituted(chain(random=False))
    assert torch.exp not in targets(owner) and "sum" not in targets(owner)
    owner, _ = substituted(chain(random=True))
    assert torch.ops.aten.bernoulli.p in targets(owner)  # the numbers that are drawn later stay the same


def test_a_node_that_others_read_stays():
    def make(b, q, k, v):
        key = b.method("transpose", k, -1, -2)
        weights = b.call(torch.softmax, b.call(torch.matmul, q, key), -1)
        return [b.call(torch.matmul, weights, v), key]

    owner, _ = substituted(make)
    assert "transpose" in targets(owner)


def test_what_became_of_earlier_results_is_noted():
    owner, thresholds = graph_of(one_reads_the_other)
    first, second = find(owner)
    replaced: dict = {}
    made = substitute_match(first, thresholds, replaced)
    assert replaced[first.node] is made
    again = substitute_match(second, thresholds, replaced)
    assert again.args[:3] == (made, made, made)
