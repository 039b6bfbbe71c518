"""The one form of attention: its sizes, what kind of mask it has, whether a mask learns."""

from __future__ import annotations

import pytest
import torch
from graphs import Builder, leaf

from sparge_compile.passes.match.attention import Attention, Axes, Mask, Operand
from sparge_compile.passes.read.axes import new_dim, new_layout


def attention(*masks, tuple_output=False):
    b = Builder()
    q, k, v = b.qkv(batch=2, heads=6, kv_heads=3, length=10, keys=20, head_size=8, value_size=16)
    out = b.input("out", 2, 6, 10, 16)
    if tuple_output:
        out.meta["example_value"] = (out.meta["example_value"], None)
    axes = Axes(*map(new_dim, (2, 3, 2, 10, 20, 8, 16)))
    operands = [Operand(x, out, layout, layout) for x in (q, k, v) for layout in [new_layout(leaf(x).shape)]]
    layout = new_layout((2, 6, 10, 16))
    return Attention(axes, *operands, out, layout, torch.float32, tuple(mask(b, out) for mask in masks))


def a_mask(kind, requires_grad=False):
    def make(b, user):
        node = b.input(f"{kind}_mask", 10, 20, requires_grad=requires_grad)
        layout = new_layout((10, 20))
        return Mask(Operand(node, user, layout, layout), kind)

    return make


@pytest.mark.parametrize("tuple_output", [False, True], ids=["tensor", "tuple"])
def test_sizes(tuple_output):
    found = attention(tuple_output=tuple_output)
    assert (found.batch, found.heads, found.kv_heads) == (2, 6, 3)
    assert (found.length, found.keys, found.head_size, found.value_head_size) == (10, 20, 8, 16)
    assert found.result.shape == (2, 6, 10, 16) and found.device == torch.device("cpu")


@pytest.mark.parametrize(
    "kinds, want",
    [
        ([], "none"),
        (["keep"], "bool"),
        (["drop", "hide"], "bool"),
        (["add"], "additive"),
        (["keep", "add"], "additive"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, list) else x,
)
def test_the_kind_of_all_masks_together(kinds, want):
    assert attention(*map(a_mask, kinds)).mask_kind == want


@pytest.mark.parametrize("kind", ["add", "hide"])
def test_a_mask_that_needs_a_gradient_is_learned(kind):
    assert attention(a_mask("keep"), a_mask(kind, requires_grad=True)).learned_mask
    assert not attention(a_mask("keep"), a_mask(kind)).learned_mask


def test_a_condition_never_learns():
    assert not attention(a_mask("keep", requires_grad=True)).learned_mask
