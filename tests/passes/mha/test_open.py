"""Larger calls that hold attention: opened they hold one fused call; closed ones say why."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, targets

from sparge_compile.passes.match.attention import Attention
from sparge_compile.passes.match.sdpa import is_sdpa, match_sdpa
from sparge_compile.passes.mha import open as opening
from sparge_compile.passes.read.reader import Reader
from sparge_compile.report import Reason

L, B, C, H = 6, 2, 8, 2
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def mha(b: Builder, mask=None, padding=None, read=(0,), **options):
    """A call of F.multi_head_attention_forward over inputs of the graph, and the outputs that are read."""
    x = b.input("x", L, B, C)
    in_w, in_b = b.input("in_weight", 3 * C, C), b.input("in_bias", 3 * C)
    out_w, out_b = b.input("out_weight", C, C), b.input("out_bias", C)
    settings = {"training": False, "need_weights": 1 in read, **options}
    if padding is not None:
        settings["key_padding_mask"] = padding
    if mask is not None:
        settings["attn_mask"] = mask
    node = b.call(
        F.multi_head_attention_forward, x, x, x, C, H, in_w, in_b, None, None, False, 0.0, out_w, out_b, **settings
    )
    return node, [b.call(operator.getitem, node, i) for i in read]


def additive(b, mask):
    zeros = b.call(torch.zeros_like, mask, dtype=torch.float32)
    return b.method("masked_fill_", zeros, mask, float("-inf"))


def opened(make):
    """The call, the graph module and the reader of a graph, and the inside of its call."""
    b = Builder()
    node, read = make(b)
    owner = b.module(*read)
    reader = Reader(owner)
    return node, owner, reader, opening.open_up(node, reader)


def padded(b, changed=False):
    padding = b.input("padding", B, L, dtype=torch.bool)
    made = additive(b, padding)
    if changed:
        b.method("mul_", made, 0.5)
    return mha(b, padding=made)


def test_a_call_is_opened_to_one_fused_call():
    node, _, reader, inside = opened(mha)
    assert targets(inside).count(SDPA) == 1
    assert len(inside.graph.find_nodes(op="placeholder")) == len(opening.tensor_inputs(node, reader)) == 5
    (call,) = filter(is_sdpa, inside.graph.nodes)
    found = match_sdpa(call, Reader(inside))
    assert isinstance(found, Attention) and (found.batch, found.heads, found.length, found.head_size) == (B, H, L, 4)


def test_the_opened_call_computes_the_same():
    node, owner, reader, inside = opened(padded)
    inputs = [
        torch.randn(tuple(n.meta["example_value"].shape))
        if n.name != "padding"
        else torch.arange(L).expand(B, L) >= torch.tensor([[L], [4]])
        for n in owner.graph.find_nodes(op="placeholder")
    ]
    (want,) = owner(*inputs)
    opening.put_inside(owner, node, inside, reader)
    owner.graph.lint()
    owner.recompile()
    assert F.multi_head_attention_forward not in targets(owner) and targets(owner).count(SDPA) == 1
    torch.testing.assert_close(owner(*inputs)[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", [False, True], ids=["kept", "changed"])
def test_a_mask_that_torch_made_additive_is_boolean_inside(changed):
    node, owner, reader, inside = opened(lambda b: padded(b, changed))
    (call,) = filter(is_sdpa, inside.graph.nodes)
    found = match_sdpa(call, Reader(inside))
    assert found.mask_kind == ("additive" if changed else "bool")
    opening.put_inside(owner, node, inside, reader)
    owner.graph.lint()
    assert (torch.zeros_like in targets(owner)) == changed  # the spelling that nobody reads goes


def test_what_was_put_in_has_the_module_stack_of_the_call():
    def make(b):
        with b.inside("blocks.0.attn"):
            return mha(b)

    node, owner, reader, inside = opened(make)
    stack = node.meta["nn_module_stack"]
    copies = opening.put_inside(owner, node, inside, reader)
    made = [copy for inner, copy in copies.items() if inner.op != "placeholder"]
    assert made and all(copy.meta["nn_module_stack"] == stack for copy in made)
    assert all("example_value" in copy.meta for copy in made)


@pytest.mark.parametrize("read, whole", [((0,), False), ((0, 1), True), ((1,), True)], ids=str)
def test_a_call_whose_weights_are_read_stays_closed(read, whole):
    node, _, reader, inside = opened(lambda b: mha(b, read=read))
    assert opening.returns_weights(node, reader) == whole
    assert (inside is None) == whole
    assert opening.why_closed(node, reader) is (Reason.WEIGHTS_USED if whole else None)


def test_a_call_without_shapes_stays_closed():
    b = Builder()
    node, read = mha(b)
    for each in b.graph.nodes:
        each.meta.clear()
    reader = Reader(b.module(*read))
    assert opening.why_closed(node, reader) is Reason.NO_SHAPES and opening.open_up(node, reader) is None


def test_modules_that_hold_attention_are_known():
    b = Builder()
    x = b.input("x", L, B, C)
    attention = b.graph.call_module("attention", (x, x, x))
    layer = b.graph.call_module("layer", (x,))
    plain = b.graph.call_module("plain", (x,))
    b.root.attention = torch.nn.MultiheadAttention(C, H)
    b.root.layer = torch.nn.TransformerEncoderLayer(C, H, 16)
    b.root.plain = torch.nn.Linear(C, C)
    first = b.graph.call_function(operator.getitem, (attention, 0))
    reader = b.reader(first, layer, plain)
    assert [opening.holds_attention(node) for node in (attention, layer, plain, x, first)] == [True, True] + [False] * 3
    assert not opening.returns_weights(attention, reader) and not opening.returns_weights(layer, reader)


@pytest.mark.parametrize("gelu", [True, False], ids=["gelu", "relu"])
def test_an_encoder_layer_is_opened_in_place_of_its_result(gelu):
    b = Builder()
    x = b.input("x", B, L, C)
    shapes = [(3 * C, C), (3 * C,), (C, C), (C,)], [(C,), (C,), (C,), (C,), (16, C), (16,), (C, 16), (C,)]
    first, rest = ([b.input(f"w{i}_{j}", *s) for j, s in enumerate(group)] for i, group in enumerate(shapes))
    node = b.opaque(
        torch._transformer_encoder_layer_fwd, x, C, H, *first, gelu, False, 1e-5, *rest, value=x.meta["example_value"]
    )
    owner = b.module(b.call(torch.neg, node))
    reader = Reader(owner)
    inside = opening.open_up(node, reader)
    opening.put_inside(owner, node, inside, reader)
    owner.graph.lint()
    owner.recompile()
    assert torch._transformer_encoder_layer_fwd not in targets(owner) and targets(owner).count(SDPA) == 1
    assert targets(owner)[-1] is torch.neg
