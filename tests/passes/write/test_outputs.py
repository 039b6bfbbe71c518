"""A graph returns what its attention gives as well: last, in order, out of nested graphs too."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import CHECKPOINT, Builder, targets, written_out

from sparge_compile.passes.find import find
from sparge_compile.passes.write.outputs import dense_outputs, return_also

B, H, L, D = 2, 3, 6, 4
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def dense(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def run(owner, *inputs):
    owner.graph.lint()
    owner.recompile()
    return owner(*inputs)


def inputs(count=3):
    return [torch.randn(B, H, L, D) for _ in range(count)]


def qkv(b):
    return b.qkv(B, H, L, L, D)


def test_outputs_are_returned_last_and_in_order():
    b = Builder()
    q, k, v = qkv(b)
    first = b.call(F.scaled_dot_product_attention, q, k, v)
    second = b.call(F.scaled_dot_product_attention, first, k, v)
    owner = b.module(b.call(torch.exp, second))
    return_also(owner, dense_outputs(find(owner)))
    given = inputs()
    result, one, two = run(owner, *given)
    torch.testing.assert_close(one, dense(*given))
    torch.testing.assert_close(two, dense(one, *given[1:]))
    torch.testing.assert_close(result, two.exp())


def test_nothing_asked_for_changes_nothing():
    b = Builder()
    owner = b.module(b.call(F.scaled_dot_product_attention, *qkv(b)))
    code = owner.code
    return_also(owner, [])
    owner.recompile()
    assert owner.code == code


def folded(b):
    """[B·H, L, D] in and out, split from [B, L, H·D]."""
    parts = []
    for name in "qkv":
        x = b.method("transpose", b.method("view", b.input(name, B, L, H * D), B, L, H, D), 1, 2)
        parts.append(b.method("reshape", x, B * H, L, D))
    q, k, v = parts
    weights = b.call(torch.softmax, b.call(torch.bmm, q, b.method("transpose", k, 1, 2)), -1)
    return b.call(torch.bmm, weights, v)


def test_results_come_as_batch_heads_length_and_head_size():
    b = Builder()
    owner = b.module(folded(b))
    (pair,) = dense_outputs(find(owner))
    return_also(owner, [pair])
    given = [torch.randn(B, L, H * D) for _ in range(3)]
    plain, output = run(owner, *given)
    assert output.shape == (B, H, L, D)
    torch.testing.assert_close(output.reshape(B * H, L, D), plain)


@pytest.mark.parametrize("changed", [True, False], ids=["changed", "kept"])
def test_a_result_that_is_changed_later_is_returned_as_it_was(changed):
    b = Builder()
    q, k, v = qkv(b)
    out = written_out(b, q, k, v)
    owner = b.module(b.method("mul_" if changed else "mul", out, 2))
    return_also(owner, dense_outputs(find(owner)))
    assert (torch.ops.aten.clone.default in targets(owner)) == changed
    given = inputs()
    twice, output = run(owner, *given)
    torch.testing.assert_close(output, dense(*given, scale=0.5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(twice, 2 * output)


def test_of_a_kernel_the_attention_is_returned():
    b = Builder()
    node = b.call(KERNEL, *qkv(b))
    owner = b.module(b.call(operator.getitem, node, 0))
    return_also(owner, dense_outputs(find(owner)))
    given = inputs()
    plain, output = run(owner, *given)
    torch.testing.assert_close(output, plain)


def nested(depth):
    """Attention in so many checkpoints, one inside the other."""
    outer = Builder()
    builders = [outer]
    for _ in range(depth):
        builders.append(Builder(of=builders[-1]))
    names = ["root", "first", "second"]
    placeholders = [b.qkv(B, H, L, L, D) for b in builders]
    out = builders[-1].call(F.scaled_dot_product_attention, *placeholders[-1])
    module = builders[-1].module(builders[-1].call(torch.exp, out))
    for level in reversed(range(depth)):
        b = builders[level]
        caller = b.nested(CHECKPOINT, module, *placeholders[level], name=names[level + 1])
        module = b.module(b.call(operator.getitem, caller, 0))
    return module


@pytest.mark.parametrize("depth", [1, 2])
def test_results_come_out_of_nested_graphs(depth):
    owner = nested(depth)
    (match,) = find(owner)
    assert len(match.callers) == depth
    return_also(owner, dense_outputs([match]))
    for module in owner.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.graph.lint()
            (end,) = module.graph.find_nodes(op="output")
            assert len(end.args[0]) == 2
    for caller in match.callers:
        assert len(caller.node.meta["example_value"]) == 2
    (end,) = owner.graph.find_nodes(op="output")
    assert end.args[0][1].target is operator.getitem and end.args[0][1].args[1] == 1
    assert end.args[0][1].meta["example_value"].shape == (B, H, L, D)
