"""Kernels that SDPA becomes when it is lowered: their arguments in SDPA's words, and how one is replaced."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import Builder, targets

from sparge_compile.passes.match.sdpa_kernels import (
    SDPA_KERNELS,
    attention_arguments,
    only_attention_is_read,
    replace_kernel,
)

CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
NAMES = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}


def node_of(target, *args, **kwargs):
    b = Builder()
    q, k, v = b.qkv()
    return b.graph.call_function(target, (q, k, v, *args), kwargs)


@pytest.mark.parametrize("kernel", sorted(SDPA_KERNELS, key=str), ids=str)
def test_every_kernel_has_the_arguments_of_sdpa(kernel):
    defaults = {a.name: a.default_value for a in kernel._schema.arguments}
    needed = [a.name for a in kernel._schema.arguments if a.name in ("attn_bias", "compute_log_sumexp")]
    given = {name: None if name == "attn_bias" else True for name in needed if defaults[name] is None}
    node = node_of(kernel, is_causal=True, scale=0.5, **given)
    arguments = attention_arguments(node)
    assert set(arguments) == NAMES
    assert [arguments[name].name for name in ("query", "key", "value")] == ["q", "k", "v"]
    assert (arguments["is_causal"], arguments["scale"], arguments["dropout_p"]) == (True, 0.5, 0.0)
    assert arguments["attn_mask"] is None


def test_a_bias_is_a_mask_and_arguments_may_come_by_position():
    node = node_of(CPU, 0.1, True)
    assert attention_arguments(node)["dropout_p"] == 0.1 and attention_arguments(node)["is_causal"] is True
    node = node_of(torch.ops.aten._scaled_dot_product_efficient_attention.default, "a bias", True)
    assert attention_arguments(node)["attn_mask"] == "a bias"


def test_other_calls_are_none():
    assert attention_arguments(node_of(torch.ops.aten.scaled_dot_product_attention.default)) is None
    assert attention_arguments(Builder().input("x", 2)) is None


def kernel_graph(*read):
    b = Builder()
    node = b.call(CPU, *b.qkv())
    parts = [b.call(operator.getitem, node, i) for i in (0, 1)]
    return b, node, parts, b.module(*(parts[i] for i in read))


@pytest.mark.parametrize("read, alone", [((0,), True), ((0, 1), False), ((1,), False)], ids=str)
def test_whether_the_attention_alone_is_read(read, alone):
    _, node, _, _ = kernel_graph(*read)
    assert only_attention_is_read(node) == alone


def test_a_kernel_that_is_returned_whole_has_all_its_outputs_read():
    b = Builder()
    node = b.call(CPU, *b.qkv())
    b.output(node)
    assert not only_attention_is_read(node)


def test_a_kernel_is_replaced_with_the_reads_of_its_outputs():
    _, node, (first, second), owner = kernel_graph(0)
    with owner.graph.inserting_before(node):
        new = owner.graph.call_function(torch.neg, (node.args[0],))
    new.meta = {**node.meta, "tensor_meta": "of the tuple"}
    replace_kernel(node, new)
    assert targets(owner) == [torch.neg, CPU]  # the kernel itself is left to the caller
    (end,) = owner.graph.find_nodes(op="output")
    assert end.args[0] == (new,) and first._erased and second._erased
    assert new.meta["example_value"].shape == (1, 2, 6, 4) and "tensor_meta" not in new.meta
    owner.graph.lint()
