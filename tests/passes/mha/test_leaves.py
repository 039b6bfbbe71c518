"""Modules that symbolic_trace leaves whole are opened for any batch and length, or stay whole."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import Builder, targets

from sparge_compile.passes.mha.leaves import LeafOpener

B, L, C, H = 2, 6, 8, 2
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def attention_graph(read=(0,), shapes=True):
    """nn.MultiheadAttention as a leaf, in a module named ``block``."""
    b = Builder()
    x = b.input("x", B, L, C)
    b.root.attn = torch.nn.MultiheadAttention(C, H, batch_first=True)
    with b.inside("block"):
        node = b.graph.call_module("attn", (x, x, x))
        b._note(node, b._run(lambda x: (x.clone(), x.new_empty(B, L, L)), (x,), {}))
        parts = [b.call(operator.getitem, node, i) for i in read]
    if not shapes:
        for each in b.graph.nodes:
            each.meta.clear()
    return b.module(*parts), node


def test_a_leaf_is_opened_for_any_length():
    owner, node = attention_graph()
    x = torch.randn(3, 9, C)
    (want,) = owner(x)
    made = LeafOpener().open(owner)
    assert set(made.values()) == {node.name} and SDPA in targets(owner)
    assert not owner.graph.find_nodes(op="call_module")
    torch.testing.assert_close(owner(x)[0], want, atol=1e-5, rtol=1e-5)
    parameters = [n.target for n in made if n.op == "get_attr"]
    assert "attn.in_proj_weight" in parameters  # they are read from the module, and stay its own
    (sdpa,) = owner.graph.find_nodes(op="call_function", target=SDPA)
    assert next(path for path, _ in sdpa.meta["nn_module_stack"].values()) == "block"


@pytest.mark.parametrize("case", ["weights", "shapes", "not asked for"])
def test_a_leaf_stays_whole(case):
    owner, node = attention_graph(read=(0, 1) if case == "weights" else (0,), shapes=case != "shapes")
    code = owner.code
    made = LeafOpener().open(owner, leaves={"another"} if case == "not asked for" else {node.name})
    assert made == {} and owner.code == code


def test_a_module_without_attention_stays():
    b = Builder()
    x = b.input("x", B, L, C)
    owner = b.module(b.module_call("act", torch.nn.ReLU(), x))
    assert LeafOpener().open(owner) == {} and len(owner.graph.find_nodes(op="call_module")) == 1


def test_a_leaf_is_exported_once(monkeypatch):
    from sparge_compile.passes.mha import leaves

    exported = []
    real = leaves.export
    monkeypatch.setattr(leaves, "export", lambda *args, **kwargs: exported.append(1) or real(*args, **kwargs))
    opener = LeafOpener()
    first, second = attention_graph()[0], attention_graph()[0]
    assert opener.open(first) and opener.open(second) and len(exported) == 1
