"""The order of tokens made once for many sites: where it is made and undone, and results that do not tell."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import CHECKPOINT, Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Node

from sparge_compile import cost
from sparge_compile.options import Options
from sparge_compile.passes import pipeline
from sparge_compile.passes.hoist.hoist import ROWS, made_at_sites
from sparge_compile.passes.read.fx_utils import clone, size_hint, value_of
from sparge_compile.passes.work import Work, graphs_of
from sparge_compile.report import Reason

T, H, W, C, TEXT = 5, 6, 7, 8, 9
L = T * H * W
TILES = Options(min_seq_len=0, token_order="tiles", topk=0.3, topp=0.0, grid=(T, H, W), on_unsupported="dense")

Middle = Callable[[Builder, Node], Node]


def attend(b: Builder, x: Node, y: Node | None = None, **how: Any) -> Node:
    """Two heads of x [B, L, C] attend to y."""
    q, k = (b.method("transpose", b.method("unflatten", z, -1, (2, -1)), 1, 2) for z in (x, x if y is None else y))
    out = b.call(F.scaled_dot_product_attention, q, k, b.call(torch.sigmoid, k), **how)
    return b.method("flatten", b.method("transpose", out, 1, 2), 2)


def weight(b: Builder, *shape: int) -> Node:
    """A new input."""
    return b.input(f"w{len(b.graph.nodes)}", *shape)


def block(b: Builder, x: Node, **how: Any) -> Node:
    """Attention with what is around it."""
    h = b.call(F.linear, b.call(F.layer_norm, x, (C,)), weight(b, C, C))
    return b.call(operator.add, x, attend(b, h, **how))


def finished(b: Builder, *outputs: Node) -> GraphModule:
    """The graph, with its inputs first."""
    for node in reversed(b.graph.find_nodes(op="placeholder")):
        b.graph._root.append(node)
    return b.module(*outputs)


def rewritten(graph_module: GraphModule, options: Options = TILES, **more: Any) -> GraphModule:
    """The graph after all passes, with the thresholds of its sites as last inputs."""
    work = Work(clone(graph_module))
    decide = partial(pipeline.decide_sites, options=options)
    pipeline.run(work, pipeline.find, decide, *pipeline.rewriting_passes(options, lambda values: values, **more))
    assert work.substituted and not work.failures
    return work.graph_module


def rows_in(graph_module: GraphModule) -> list[str]:
    """The tensors that are gathered, by the names of their nodes, in order."""
    nodes = [node for inner in graphs_of(graph_module) for node in inner.graph.nodes]
    return [str(node.args[0]) for node in nodes if node.target is ROWS]


def results(graph_module: GraphModule, real: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of the inputs."""
    sites = len(graph_module.graph.find_nodes(op="placeholder")) - len(real)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in real]
    leaves = [x * 1.0 if x.is_floating_point() else x for x in inputs]  # may be changed in place
    torch.manual_seed(2)
    outputs = graph_module(*leaves, *[torch.tensor([[0.3, 0.0]] * 2)] * sites)
    torch.manual_seed(1)
    sum((x * torch.randn_like(x)).sum() for x in outputs if x.requires_grad).backward()
    return [*(x.detach() for x in outputs), *(x.grad for x in inputs if x.grad is not None)]


def same_results(given: GraphModule, options: Options = TILES) -> list[str]:
    """What is gathered, once it is shown that results and gradients are those of sites that gather by themselves."""
    hoisted = rewritten(given, options)
    with made_at_sites():
        plain = rewritten(given, options)
    torch.manual_seed(0)
    real = [_real(node) for node in given.graph.find_nodes(op="placeholder")]
    for got, want in zip(results(hoisted, real), results(plain, real), strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert not rows_in(plain)
    return rows_in(hoisted)


def _real(node: Node) -> Tensor:
    fake = node.meta["example_value"]
    shape = [size_hint(size) for size in fake.shape]
    return torch.rand(shape) > 0.5 if fake.dtype == torch.bool else torch.randn(shape)


def test_two_blocks_have_one_order():
    b = Builder()
    x = b.input("x", 1, L, C)
    assert same_results(finished(b, block(b, block(b, x)))) == ["x", "add_1"]


def test_what_export_asserts_before_a_cast_needs_no_order():
    """Exported programs with casts between their sites gathered at each site."""
    b = Builder()
    x = block(b, b.input("x", 1, L, C))
    b.opaque(torch.ops.aten._assert_tensor_metadata.default, x, None, None, torch.float32)
    assert same_results(finished(b, block(b, b.method("float", x)))) == ["x", "add_1"]


def test_a_long_way_to_the_border():
    b = Builder()
    x = b.input("x", 1, L, C)
    for _ in range(600):
        x = b.call(operator.neg, x)
    assert len(same_results(finished(b, block(b, block(b, x))))) == 2


def test_a_site_alone_gathers_by_itself():
    b = Builder()
    x = b.call(F.scaled_dot_product_attention, *(b.input(name, 1, 2, L, 4) for name in "qkv"))
    assert same_results(finished(b, x)) == []


def test_gathers_that_are_made_elsewhere_are_not_paid_for(monkeypatch):
    """Two blocks have one order between them, and pay where one site alone would not."""
    monkeypatch.setitem(cost.GATHER, "cpu", 1.0)
    options = Options(token_order="tiles", grid=(8, 32, 32), topk=0.1, topp=0.0, on_unsupported="dense")

    def steps(make: Callable[[Builder], Node]) -> list[str]:
        b = Builder()
        work = Work(finished(b, make(b)))
        pipeline.run(work, pipeline.find, partial(pipeline.decide_sites, options=options))
        assert all(step.is_sparse is (step.match.node in work.orders) for step in work.steps)
        return [step.decision.reason.value for step in work.steps]

    assert steps(lambda b: block(b, block(b, b.input("x", 1, 8192, C)))) == [Reason.PAYS.value] * 2
    alone = steps(lambda b: b.call(F.scaled_dot_product_attention, *(b.input(name, 1, 2, 8192, 4) for name in "qkv")))
    assert alone == [Reason.SLOWER.value]


def conv(b: Builder, x: Node) -> Node:
    x = b.call(F.conv1d, b.method("transpose", x, 1, 2), weight(b, C, C, 3), None, 1, 1)
    return b.method("transpose", x, 1, 2)


def planes(b: Builder, x: Node) -> Node:
    x = b.method("mean", b.method("unflatten", x, 1, (T, H * W)), 2, keepdim=True)
    return b.method("flatten", b.method("expand", x, -1, -1, H * W, -1), 1, 2)


def mean(b: Builder, x: Node) -> Node:
    return b.call(operator.sub, x, b.method("mean", x, 1, True))


def first(b: Builder, x: Node) -> Node:
    return b.call(operator.add, x, b.call(operator.getitem, x, (slice(None), slice(0, 1))))


def positions(b: Builder, x: Node) -> Node:
    return b.call(operator.add, x, b.method("unsqueeze", b.call(torch.arange, L), -1))


def written_late(b: Builder, x: Node) -> Node:
    """A part that cuts the grid, read before what it is a part of is changed."""
    y = b.call(F.gelu, x)
    part = b.call(operator.getitem, y, (slice(None), slice(3, 4)))
    b.method("mul_", y, 2.0)
    return b.call(operator.add, y, part)


def stacked(b: Builder, x: Node) -> Node:
    """Positions, one by one."""
    w = weight(b, C)
    return b.call(operator.add, x, b.call(torch.stack, [b.call(operator.mul, w, float(i)) for i in range(L)]))


MIXING = {
    "conv": conv,
    "planes": planes,
    "mean": mean,
    "first": first,
    "roll": lambda b, x: b.call(torch.roll, x, 3, 1),
    "flip": lambda b, x: b.method("flip", x, [1]),
    "cumsum": lambda b, x: b.method("cumsum", x, 1),
    "softmax": lambda b, x: b.call(torch.softmax, x, 1),
    "sort": lambda b, x: b.call(operator.getitem, b.method("sort", x, 1), 0),
    "product": lambda b, x: b.call(torch.matmul, weight(b, L, L), x),
    "causal": lambda b, x: attend(b, x, is_causal=True),
    "norm": lambda b, x: b.call(F.layer_norm, x, (L, C)),
    "written late": written_late,
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_a_border(name):
    b = Builder()
    x = MIXING[name](b, block(b, block(b, b.input("x", 1, L, C))))
    found = same_results(finished(b, block(b, block(b, x))))
    once = {"mean", "first"}  # the stream itself goes on in the order of blocks
    assert found[0] == "x" and len(found) == (3 if name in once else 4)


def halves(b: Builder, x: Node) -> Node:
    """Written into a new tensor, as diffusers rotates."""
    out = b.call(torch.empty_like, x)
    for at in (0, 1):
        half = (Ellipsis, slice(at, None, 2))
        b.opaque(operator.setitem, out, half, b.call(operator.mul, b.call(operator.getitem, x, half), at + 2.0))
    return b.method("type_as", out, x)


def gated(b: Builder, x: Node) -> Node:
    """With one gate for each token, from a table, and one for each channel."""
    rows = b.call(operator.mul, x, weight(b, 1, L, 1))
    gate = b.method("chunk", b.call(F.linear, weight(b, 1, 1, C), weight(b, 2 * C, C)), 2, -1)
    return b.call(operator.mul, rows, b.call(operator.getitem, gate, 1))


def in_place(b: Builder, x: Node) -> Node:
    """A tensor that is changed while views of it are read."""
    y = b.call(F.gelu, x)
    view = b.method("unflatten", y, -1, (2, -1))
    b.method("add_", y, x)
    return b.call(operator.add, b.method("flatten", view, 2), y)


def written_over(b: Builder, x: Node) -> Node:
    """Into the last tokens, where more are asked for than there are."""
    out = b.call(torch.zeros_like, x)
    b.opaque(operator.setitem, out, (slice(None), slice(-9 * L, None)), b.call(F.silu, x))
    return b.call(operator.getitem, out, (slice(None), slice(-2 * L, None)))


def by_hand(b: Builder, x: Node) -> Node:
    """A norm and an activation that cuts channels in two, written out."""
    scale = b.method("rsqrt", b.method("mean", b.method("pow", x, 2), -1, keepdim=True))
    a, c = (b.call(operator.getitem, b.method("chunk", b.call(operator.mul, x, scale), 2, -1), i) for i in (0, 1))
    return b.call(torch.cat, [b.call(operator.mul, b.call(F.silu, a), c), a], -1)


KEEPING = {
    "halves": halves,
    "gated": gated,
    "in place": in_place,
    "by hand": by_hand,
    "written over": written_over,
    "dense": attend,
    "masked": lambda b, x: b.method("masked_fill", x, b.call(operator.gt, x, 0.5), 0.0),
    "text": lambda b, x: attend(b, x, weight(b, 1, TEXT, C)),
    "dropped": lambda b, x: b.call(F.dropout, x, 0.5, False),
    "einsum": lambda b, x: b.call(torch.einsum, "blc,dc->bld", x, weight(b, C, C)),
    "heads": lambda b, x: b.method("flatten", b.call(torch.softmax, b.method("unflatten", x, -1, (2, -1)), 2), 2),
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_keeps_tokens_apart_is_none(name):
    b = Builder()
    x = KEEPING[name](b, block(b, b.input("x", 1, L, C)))
    found = same_results(finished(b, block(b, x)))
    assert "x" in found and len(found) == (3 if name == "gated" else 2)


def test_rows_that_are_stacked_are_gathered():
    b = Builder()
    x = stacked(b, block(b, b.input("x", 1, L, C)))
    assert len(same_results(finished(b, block(b, x)))) == 3


def test_a_graph_that_is_run_twice_reads_in_the_order_of_tokens():
    b = Builder()
    inner = Builder(of=b)
    y = inner.input("y", 1, L, C)
    body = finished(inner, inner.method("cumsum", y, 1), inner.method("flip", y, [1]))
    x = block(b, block(b, b.input("x", 1, L, C)))
    once = b.nested(CHECKPOINT, body, x)
    again = b.opaque(CHECKPOINT, once.args[0], x, value=value_of(once))
    for part in (b.call(operator.getitem, call, i) for call in (once, again) for i in (0, 1)):
        x = b.call(operator.add, x, part)
    assert len(same_results(finished(b, block(b, block(b, x))))) > 3


def joined(b: Builder, x: Node) -> Node:
    """A block over a text and a video, which are parted again."""
    joint = block(b, b.call(torch.cat, [weight(b, 1, TEXT, C), x], 1))
    return b.call(operator.getitem, joint, (slice(None), slice(TEXT, None)))


def test_a_part_of_a_joint_sequence_has_an_order():
    b = Builder()
    x = b.input("x", 1, L, C)
    found = same_results(finished(b, joined(b, joined(b, b.call(F.gelu, x)))))
    assert len(found) == 2 and found[0] in ("x", "gelu")


def test_parts_are_split_and_written_into():
    b = Builder()
    x, text = b.input("x", 1, L, C), b.input("text", 1, TEXT, C)
    joint = block(b, b.call(torch.cat, [x, text], 1))
    video = b.call(operator.getitem, joint, (slice(None), slice(None, L)))
    out = b.method("clone", joint)
    b.opaque(operator.setitem, out, (slice(None), slice(0, L)), b.call(F.silu, video))
    parts = b.method("split", block(b, out), [L, TEXT], 1)
    video, text = (b.call(operator.getitem, parts, i) for i in (0, 1))
    options = Options(**{**vars(TILES), "grid": (0, T, H, W, TEXT)})
    found = same_results(finished(b, video, b.method("mean", text, 1)), options)
    assert found == ["x", video.name]


def test_a_part_that_cuts_the_grid_is_a_border():
    b = Builder()
    y = block(b, block(b, b.input("x", 1, L, C)))
    some = b.call(operator.getitem, y, (slice(None), slice(0, H * W)))
    assert same_results(finished(b, y, some)) == ["x", "add_1"]


def test_masks_stay_as_they_are():
    b = Builder()
    x, keep = b.input("x", 1, L, C), b.input("keep", 1, 1, 1, L, dtype=torch.bool)
    y = block(b, block(b, x, attn_mask=keep), attn_mask=keep)
    assert same_results(finished(b, y)) == ["x", "add_1"]


def test_what_users_attend_to_is_returned_in_the_order_of_tokens():
    b = Builder()
    graph_module = finished(b, block(b, block(b, b.input("x", 1, L, C))))
    *_, first, second = rewritten(graph_module, with_outputs=True).graph.find_nodes(op="output")[0].args[0]
    assert first.target is ROWS and second.target is ROWS


def test_results_that_share_memory_go_on_to():
    b = Builder()
    y = b.call(operator.mul, block(b, block(b, b.input("x", 1, L, C))), 2.0)
    views = [b.method("transpose", b.method("unflatten", y, -1, (heads, -1)), 1, 2) for heads in (2, 4)]
    found = [b.call(F.scaled_dot_product_attention, q, q, q) for q in views]
    graph_module = rewritten(finished(b, *views, *found))
    inputs = [torch.randn(value_of(x).shape) for x in graph_module.graph.find_nodes(op="placeholder")]
    one, other, *_ = graph_module(*inputs)
    assert rows_in(graph_module) and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def checkpointed(b: Builder, body: Callable[[Builder, Node], Node], x: Node) -> Node:
    inner = Builder(of=b)
    y, w = inner.input("y", 1, L, C), inner.input("w", C, C)
    nested = finished(inner, body(inner, inner.call(F.linear, y, w)))
    called = b.nested(CHECKPOINT, nested, x, weight(b, C, C), name=f"body{len(b.graph.nodes)}")
    return b.call(operator.getitem, called, 0)


def around(b: Builder, x: Node) -> Node:
    return b.call(operator.add, x, attend(b, x))


def test_checkpointed_blocks_have_one_order():
    b = Builder()
    x = b.input("x", 1, L, C)
    y = checkpointed(b, lambda b, x: b.call(F.gelu, x), checkpointed(b, around, x))
    given = finished(b, checkpointed(b, around, y))
    found = same_results(given)
    assert len(found) == 2 and len(rows_in(rewritten(given))) == 2


def test_a_border_inside_checkpointed_code():
    b = Builder()
    y = checkpointed(b, lambda b, x: b.call(torch.roll, x, 3, 1), block(b, block(b, b.input("x", 1, L, C))))
    assert len(same_results(finished(b, block(b, block(b, y))))) == 4


def test_each_grid_has_a_region():
    b = Builder()
    with b.inside("first"):
        x = block(b, block(b, b.input("x", 1, L, C)))
    with b.inside("second"):
        x = block(b, block(b, x))
    options = Options(**{**vars(TILES), "grid": {"first*": (T, H, W), "second*": (H, T, W)}})
    assert len(same_results(finished(b, x), options)) == 4


def test_a_grid_with_a_text_behind_it_and_without_is_one():
    b = Builder()
    x, text = b.input("x", 1, L, C), b.input("text", 1, TEXT, C)
    x = block(b, x)
    joint = block(b, b.call(torch.cat, [x, text], 1))
    x = block(b, b.call(operator.getitem, joint, (slice(None), slice(None, L))))
    assert same_results(finished(b, x)) == ["x", x.name]


def test_gathers_are_outside_of_code_without_gradients():
    b = Builder()
    x = b.input("x", 1, L, C)
    b.opaque(torch._C._set_grad_enabled, False)
    noise = b.call(F.gelu, x)
    b.opaque(torch._C._set_grad_enabled, True)
    y = block(b, block(b, b.call(operator.add, x, noise)))
    assert len(same_results(finished(b, y))) == 2


@pytest.mark.parametrize("text_first", [True, False])
def test_sizes_that_are_symbols(text_first):
    b = Builder()
    video = b.input("x", 1, 4, T, H, W, dynamic=(2, 3, 4))
    x = b.method("transpose", b.method("flatten", b.call(F.conv3d, video, weight(b, C, 4, 1, 1, 1)), 2), 1, 2)
    text = b.input("text", 1, TEXT, C, dynamic=(1,))
    size = b.call(torch.ops.aten.sym_size.int, text, 1)
    where = slice(size, None) if text_first else slice(None, b.call(operator.neg, size))
    for _ in range(2):
        joint = block(b, b.call(torch.cat, [text, x] if text_first else [x, text], 1))
        part = b.call(operator.mul, part_of(b, joint, where), 2.0)
        b.opaque(operator.setitem, joint, (slice(None), where), b.call(F.silu, part))
        x = part_of(b, block(b, joint), where)
    found = same_results(finished(b, x), Options(**{**vars(TILES), "grid": None}))
    assert len(found) == 2


def part_of(b: Builder, x: Node, where: slice) -> Node:
    return b.call(operator.getitem, x, (slice(None), where))


STEPS: dict[str, Middle] = {
    **MIXING,
    **KEEPING,
    "block": block,
    "joined": joined,
    "checkpointed": lambda b, x: checkpointed(b, around, x),
    "dropout": lambda b, x: b.call(F.dropout, x, 0.5),
}
del STEPS["mean"], STEPS["planes"]  # other sums in another order


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([*STEPS, *["block", "joined", "checkpointed"] * 3]), min_size=2, max_size=7), st.data())
def test_any_graph_gives_what_it_gave(steps: list[str], data: st.DataObject):
    b = Builder()
    made = [b.input("x", 1, L, C)]
    for step in steps:
        x = data.draw(st.sampled_from(made[-2:]))
        y = STEPS[step](b, x)
        made.append(b.call(operator.add, y, made[-1]) if data.draw(st.booleans()) else y)
    if not any(step in ("block", "dense", "joined", "checkpointed") for step in steps):
        made.append(block(b, made[-1]))
    same_results(finished(b, *made[-2:]))
