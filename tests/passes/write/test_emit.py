"""What is written around the op computes the operands, the mask and the result that the graph had."""

from __future__ import annotations

import math

import pytest
import torch
from graphs import Builder, targets, written_out
from hypothesis import given
from hypothesis import strategies as st

from sparge_compile.passes.find import find
from sparge_compile.passes.match.attention import Attention
from sparge_compile.passes.read.axes import Axis, axes_of, settle
from sparge_compile.passes.write.emit import Emitter

B, H, L, S, D = 2, 4, 6, 10, 8
INF = float("-inf")
aten = torch.ops.aten


def emitter_of(b: Builder, *outputs) -> tuple[Emitter, Attention, torch.fx.GraphModule]:
    """The emitter for the one attention of a graph, and the graph."""
    owner = b.module(*outputs)
    (match,) = find(owner)
    assert match.attention is not None, match.refusal
    return Emitter(owner.graph, match.attention, lambda node: node), match.attention, owner


def returned(owner, node_or_nodes, inputs):
    """What nodes of a graph hold when it runs."""
    nodes = node_or_nodes if isinstance(node_or_nodes, tuple) else (node_or_nodes,)
    (end,) = owner.graph.find_nodes(op="output")
    end.args = (nodes,)
    owner.graph.lint()
    owner.recompile()
    return owner(*inputs)


def random_inputs(owner):
    """A random tensor for each input of a graph, by its fake value."""
    made = []
    for node in owner.graph.find_nodes(op="placeholder"):
        fake = node.meta["example_value"]
        x = torch.randn(tuple(map(int, fake.shape)))
        made.append(x > 0 if fake.dtype == torch.bool else x.to(fake.dtype))
    return made


@st.composite
def layouts(draw):
    """Axes, the layout of a tensor that has some of them, and a layout of all to bring it to."""
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
    every = [Axis(size) for size in sizes]

    def arranged(axes):
        dims, rest = [], list(axes)
        while rest:
            take = draw(st.integers(1, len(rest)))
            dims += [()] * draw(st.booleans()) + [tuple(rest[:take])]
            rest = rest[take:]
        return tuple(dims)

    have = arranged(draw(st.permutations(every))[: draw(st.integers(0, len(every)))])
    return every, have, arranged(draw(st.permutations(every)))


@given(layouts())
def test_a_tensor_is_laid_out_as_it_is_wanted(case):
    every, have, want = case
    b = Builder()
    x = b.input("x", *(math.prod(axis.size for axis in dim) for dim in have))
    emitter = Emitter(b.graph, None, lambda node: node)
    node = emitter.arrange(x, have, want)
    owner = b.module(node)
    (given_x,) = random_inputs(owner)
    (got,) = owner(given_x)
    mine = [axis for dim in have for axis in dim]
    # By hand: axes apart, in the wanted order; absent ones are broadcast beside present ones, else of size 1.
    apart = given_x.reshape([axis.size for axis in mine])
    shape, order = [], []
    for dim in want:
        present = [axis for axis in dim if axis in mine]
        order += present
        shape.append([axis.size if axis in mine or present else 1 for axis in dim])
    apart = apart.permute([mine.index(axis) for axis in order])
    index, wide = iter(apart.shape), []
    for dim in want:
        wide += [next(index) if axis in mine else 1 for axis in dim]
    expected = apart.reshape(wide).expand([n for sizes in shape for n in sizes])
    assert torch.equal(got, expected.reshape([math.prod(sizes) for sizes in shape]))
    assert every and node.meta["example_value"].shape == got.shape


def test_what_is_as_wanted_costs_no_node():
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D)
    emitter, _, owner = emitter_of(b, written_out(b, q, k, v))
    before = len(owner.graph.nodes)
    with owner.graph.inserting_before(owner.graph.find_nodes(op="output")[0]):
        assert emitter.operands() == (q, k, v)
    assert emitter.mask() is None and len(owner.graph.nodes) == before


def heads_split(b):
    parts = []
    for name, length in (("q", L), ("k", S), ("v", S)):
        x = b.method("view", b.input(name, B, length, H * D), B, length, H, D)
        parts.append(b.method("transpose", x, 1, 2))
    return written_out(b, *parts)


def folded(b):
    q, k, v = (b.input(name, B * H, n, D) for name, n in (("q", L), ("k", S), ("v", S)))
    scores = b.call(torch.bmm, q, b.method("transpose", k, 1, 2))
    return b.call(torch.bmm, b.call(torch.softmax, scores, -1), v)


def keys_transposed(b):
    q, k, v = b.input("q", B, H, L, D), b.input("k", B, H, D, S), b.input("v", B, H, S, D)
    return b.call(torch.matmul, b.call(torch.softmax, b.call(torch.matmul, q, k), -1), v)


def repeated(b):
    q, k, v = b.qkv(B, H, L, S, D, kv_heads=2)
    wide = [
        b.method("reshape", b.method("expand", b.method("unsqueeze", x, 2), B, 2, 2, S, D), B, H, S, D) for x in (k, v)
    ]
    return written_out(b, q, *wide)


def one_head_of_keys(b):
    q, k, v = b.input("q", B, H, L, D), b.input("k", B, 1, S, D), b.input("v", B, 1, S, D)
    return written_out(b, q, k, v)


def upcast(b):
    q, k, v = b.qkv(B, H, L, S, D, dtype=torch.float16)
    return written_out(b, *(b.method("to", x, torch.float32) for x in (q, k, v)))


def temperature(b):
    q, k, v = b.qkv(B, H, L, S, D)
    scores = b.call(torch.mul, b.call(torch.matmul, q, b.method("transpose", k, -1, -2)), b.input("by", H, 1, 1))
    return b.call(torch.matmul, b.call(torch.softmax, scores, -1), v)


def result_transposed(b):
    q, k, v = b.qkv(B, H, L, S, D)
    weights = b.call(torch.softmax, b.call(torch.matmul, q, b.method("transpose", k, -1, -2)), -1)
    return b.call(torch.einsum, "bhls,bhsd->blhd", weights, v)


def result_changed(b):
    q, k, v = b.qkv(B, H, L, S, D)
    return b.method("mul_", written_out(b, q, k, v), 2)


GRAPHS = [heads_split, folded, keys_transposed, repeated, one_head_of_keys, upcast, temperature, result_transposed]


@pytest.mark.parametrize("make", [*GRAPHS, result_changed], ids=lambda f: f.__name__)
def test_operands_attended_to_by_plain_sdpa_give_the_result(make):
    b = Builder()
    emitter, found, owner = emitter_of(b, make(b))
    inputs = random_inputs(owner)
    output = found.output
    (want,) = returned(owner, output, [x.clone() for x in inputs])
    want = want / 2 if make is result_changed else want  # as it was before the change
    with owner.graph.inserting_before(output):
        q, k, v = emitter.operands()
        op = owner.graph.call_function(
            aten.scaled_dot_product_attention.default, (q, k, v), {"scale": found.scale, "enable_gqa": True}
        )
        result = emitter.result(op)
    got_q, got_k, got_v, got = returned(owner, (q, k, v, result), inputs)
    assert got_q.shape == (found.batch, found.heads, found.length, found.head_size)
    assert got_k.shape == got_v.shape == (found.batch, found.kv_heads, found.keys, found.head_size)
    assert got_q.dtype == got_k.dtype == found.dtype
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (aten.clone.default in targets(owner)) == (make is result_changed)
    assert all("example_value" in node.meta for node in (q, k, v))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_query_that_was_scaled_in_another_dtype_is_cast_back(scaled):
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D, dtype=torch.float16)
    scores = b.call(torch.matmul, q, b.method("transpose", k, -1, -2))
    scores = b.call(torch.mul, scores, b.input("by", H, 1, 1)) if scaled else scores
    weights = b.method("to", b.call(torch.softmax, scores, -1), torch.float16)
    emitter, found, owner = emitter_of(b, b.call(torch.matmul, weights, v))
    with owner.graph.inserting_before(found.output):
        query, *_ = emitter.operands()
    assert found.dtype == query.meta["example_value"].dtype == torch.float16
    assert (query is q) != scaled


def masked(b, *masks):
    """Attention with masks, each put on in its own way: (node, kind)."""
    q, k, v = b.input("q", B, H, L, D), b.input("k", B, H, S, D), b.input("v", B, H, S, D)
    scores = b.call(torch.matmul, q, b.method("transpose", k, -1, -2))
    for mask, kind in masks:
        if kind == "drop":
            scores = b.method("masked_fill", scores, mask, INF)
        elif kind == "keep":
            scores = b.call(torch.where, mask, scores, INF)
        else:
            scores = b.call(torch.add, scores, mask)
    return b.call(torch.matmul, b.call(torch.softmax, scores, -1), v)


def boolean(b, name, *shape):
    return b.input(name, *shape, dtype=torch.bool)


def hiding(b):
    return b.call(torch.where, boolean(b, "hiding", B, 1, 1, S), 0.0, -1e9)


MASKS = {
    "drop": ((1, 1, L, S), lambda b: [(boolean(b, "m", L, S), "drop")]),
    "keep": ((1, 1, L, S), lambda b: [(boolean(b, "m", L, S), "keep")]),
    "padding": ((B, 1, 1, S), lambda b: [(b.method("expand", boolean(b, "m", B, 1, 1, S), B, 1, L, S), "keep")]),
    "numbers that hide": ((B, 1, 1, S), lambda b: [(hiding(b), "add")]),
    "two conditions": (
        (B, 1, L, S),
        lambda b: [(boolean(b, "m", L, S), "drop"), (boolean(b, "n", B, 1, 1, S), "keep")],
    ),
    "numbers": ((1, H, L, S), lambda b: [(b.input("bias", H, L, S), "add")]),
    "two of numbers": ((1, H, L, S), lambda b: [(b.input("bias", H, L, S), "add"), (b.input("keys", S), "add")]),
    "numbers and a condition": (
        (B, H, L, S),
        lambda b: [(b.input("bias", H, L, S), "add"), (boolean(b, "n", B, 1, 1, S), "keep")],
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_the_mask_hides_and_adds_what_the_scores_do(case):
    shape, make = MASKS[case]
    b = Builder()
    emitter, found, owner = emitter_of(b, masked(b, *make(b)))
    inputs = random_inputs(owner)
    with owner.graph.inserting_before(found.output):
        mask = emitter.mask()
    scores = found.region[-2].args[0]  # what the softmax reads
    got, scores, plain = returned(owner, (mask, scores, found.region[0]), inputs)
    added = scores - plain
    assert got.shape == shape
    assert (got.dtype == torch.bool) == (found.mask_kind == "bool")
    wide = got.expand(B, H, L, S)
    if got.dtype == torch.bool:
        assert torch.equal(wide, added > -1e4)
    else:
        torch.testing.assert_close(wide, added, atol=1e-5, rtol=1e-5)


def test_nodes_that_were_replaced_before_are_read_in_their_new_form():
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D)
    new = b.call(torch.neg, q)
    out = written_out(b, q, k, v)
    owner = b.module(out)
    (match,) = find(owner)
    emitter = Emitter(owner.graph, match.attention, lambda node: new if node is q else node)
    assert emitter.operands() == (new, k, v)


def test_a_dynamic_size_that_is_broadcast_is_that_of_the_query():
    b = Builder()
    q = b.input("q", 3, H, L, D, dynamic=(0,))
    k, v = b.input("k", H, S, D), b.input("v", H, S, D)
    weights = b.call(torch.softmax, b.call(torch.matmul, q, b.method("transpose", k, -1, -2)), -1)
    emitter, found, owner = emitter_of(b, b.call(torch.matmul, weights, v))
    with owner.graph.inserting_before(found.output):
        operands = emitter.operands()
    assert aten.sym_size.int in targets(owner)
    inputs = torch.randn(5, H, L, D), torch.randn(H, S, D), torch.randn(H, S, D)
    assert returned(owner, operands, inputs)[1].shape == (5, H, S, D)
    assert set(axes_of(settle(found.key.layout))) < set(axes_of(found.key.wanted))
