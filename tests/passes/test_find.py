"""Every attention of a graph and of the graphs nested in it is found, named, and told whether something forbids it."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import CHECKPOINT, Builder, written_out

from sparge_compile.passes.find import find
from sparge_compile.report import Reason

SDPA = F.scaled_dot_product_attention
B, H, L, S, D = 2, 4, 6, 10, 8


def attend(b: Builder, x):
    return b.call(SDPA, x, x, x)


def input_of(b: Builder):
    return b.input("x", B, H, L, D)


def test_a_graph_without_attention_has_no_match():
    b = Builder()
    x = input_of(b)
    assert find(b.module(b.call(torch.matmul, x, b.method("transpose", x, -1, -2)))) == []


def test_a_site_says_what_it_is():
    b = Builder()
    q, k, v = b.qkv(B, H, L, S, D, kv_heads=2, dtype=torch.bfloat16)
    with b.inside("blocks.3.attn"):
        node = b.call(SDPA, q, k, v, enable_gqa=True)
    (match,) = find(owner := b.module(node))
    site = match.site
    assert (site.name, site.kind, site.batch, site.heads, site.kv_heads) == ("blocks.3.attn", "sdpa", B, H, 2)
    assert (site.length, site.keys, site.head_size, site.dtype, site.device) == (L, S, D, "bfloat16", "cpu")
    assert (site.mask, site.is_causal) == ("none", False)
    assert match.is_attention and match.refusal is None and match.callers == ()
    assert (match.node, match.graph_module, match.path) == (node, owner, "blocks.3.attn")


def test_both_spellings_are_found_in_order_and_numbered_by_module():
    b = Builder()
    x = input_of(b)
    with b.inside("a"):
        x = attend(b, x)
        x = written_out(b, x, x, x)
    with b.inside("b"):
        x = attend(b, x)
    with b.inside("a"):
        x = attend(b, x)
    found = find(b.module(x))
    assert [(m.site.name, m.site.kind) for m in found] == [
        ("a", "sdpa"),
        ("a#1", "decomposed"),
        ("b", "sdpa"),
        ("a#2", "sdpa"),
    ]


def test_a_softmax_that_is_no_attention_is_listed_and_takes_no_number():
    b = Builder()
    x = input_of(b)
    gate = b.call(torch.softmax, b.input("logits", 3, 7), -1)
    x = attend(b, x)
    softmax, attention = find(b.module(x, gate))
    assert (softmax.site.kind, softmax.is_attention, softmax.refusal.reason) == ("softmax", False, Reason.NOT_ATTENTION)
    assert softmax.site.name == attention.site.name == "(root)" and attention.is_attention


def test_what_is_attention_but_cannot_be_replaced_is_listed_with_its_reason():
    b = Builder()
    x = input_of(b)
    scores = b.call(torch.tanh, b.call(torch.matmul, x, b.method("transpose", x, -1, -2)))
    (match,) = find(b.module(b.call(torch.matmul, b.call(torch.softmax, scores, -1), x)))
    assert (match.site.kind, match.attention, match.refusal.reason) == ("decomposed", None, Reason.SCORES_CHANGED)
    assert match.site.length is None


def test_the_node_of_attention_written_out_is_its_result():
    b = Builder()
    out = written_out(b, *b.qkv(B, H, L, S, D))
    (match,) = find(b.module(b.call(torch.exp, out)))
    assert match.node is out is match.attention.output


def test_dynamic_sizes_are_told_as_text():
    b = Builder()
    x = b.input("x", B, H, 16, D, dynamic=(2,))
    (match,) = find(b.module(attend(b, x)))
    assert match.site.length == match.site.keys == str(x.meta["example_value"].shape[2])


def nested(operator_, twice=False):
    """Attention in a graph that a higher-order operator runs, and once more after it."""
    b = Builder()
    x = input_of(b)
    inner = Builder(of=b)
    body = inner.module(attend(inner, inner.input("y", B, H, L, D)))
    caller = b.nested(operator_, body, x)
    if twice:
        again = b.graph.call_function(operator_, (caller.args[0], x))
        again.meta = dict(caller.meta)
    return b.module(attend(b, b.call(operator.getitem, caller, 0))), body, caller


TRANSPARENT = [CHECKPOINT, torch.ops.higher_order.wrap_with_set_grad_enabled]


@pytest.mark.parametrize("wrapper", TRANSPARENT, ids=lambda op: op.name())
def test_graphs_that_run_once_are_looked_into(wrapper):
    owner, body, caller = nested(wrapper)
    inside, outside = find(owner)
    assert inside.graph_module is body and outside.graph_module is owner
    assert [(c.graph_module, c.node) for c in inside.callers] == [(owner, caller)] and outside.callers == ()
    assert inside.refusal is None is outside.refusal
    assert (inside.site.name, outside.site.name) == ("(root)", "(root)#1")


@pytest.mark.parametrize("case", ["cond", "run twice"])
def test_attention_in_control_flow_is_named_and_forbidden(case):
    owner, _, _ = nested(torch.ops.higher_order.cond) if case == "cond" else nested(CHECKPOINT, twice=True)
    found = find(owner)
    assert [m.refusal and m.refusal.reason for m in found] == [Reason.CONTROL_FLOW] * (len(found) - 1) + [None]
    assert all(m.attention is not None for m in found)  # it is only what is around it


def _grad_increment_nesting():
    raise AssertionError("never run")


def _grad_decrement_nesting():
    raise AssertionError("never run")


def test_attention_inside_a_transform_is_forbidden_and_after_it_is_not():
    b = Builder()
    x = input_of(b)
    b.graph.call_function(_grad_increment_nesting)
    inside = attend(b, x)
    b.graph.call_function(_grad_decrement_nesting)
    after = attend(b, inside)
    assert [m.refusal and m.refusal.reason for m in find(b.module(after))] == [Reason.TRANSFORM, None]


C = H * D


def mha(b: Builder, *read: int):
    x = b.input("x", L, B, C)
    shapes = {"in_w": (3 * C, C), "in_b": (3 * C,), "out_w": (C, C), "out_b": (C,)}
    in_w, in_b, out_w, out_b = (b.input(name, *shape) for name, shape in shapes.items())
    node = b.call(
        F.multi_head_attention_forward, x, x, x, C, H, in_w, in_b, None, None, False, 0.0, out_w, out_b, training=False
    )
    return [b.call(operator.getitem, node, i) for i in read]


def test_multi_head_attention_is_looked_into():
    b = Builder()
    (match,) = find(b.module(*mha(b, 0)))
    assert (match.site.kind, match.site.heads, match.site.length, match.refusal) == ("mha", H, L, None)
    assert match.inside is not None and match.attention.output.graph is match.inside.graph


def test_multi_head_attention_whose_weights_are_read_is_named_and_closed():
    b = Builder()
    (match,) = find(b.module(*mha(b, 0, 1)))
    assert (match.site.kind, match.inside, match.refusal.reason) == ("mha", None, Reason.WEIGHTS_USED)


@pytest.mark.parametrize("shapes, reason", [(True, Reason.OPAQUE), (False, Reason.NO_SHAPES)])
def test_a_module_that_is_a_leaf_is_named(shapes, reason):
    b = Builder()
    x = b.input("x", L, B, C)
    b.root.attn = torch.nn.MultiheadAttention(C, H)
    leaf = b.graph.call_module("attn", (x, x, x))
    if shapes:
        b._note(leaf, (x.meta["example_value"], None))
    (match,) = find(b.module(b.graph.call_function(operator.getitem, (leaf, 0))))
    assert (match.site.kind, match.refusal.reason, match.attention) == ("mha", reason, None)


def test_finding_changes_nothing():
    owner, body, _ = nested(CHECKPOINT)
    code = owner.print_readable(print_output=False) + body.print_readable(print_output=False)
    find(owner)
    for module in (owner, body):
        module.recompile()
    assert owner.print_readable(print_output=False) + body.print_readable(print_output=False) == code
