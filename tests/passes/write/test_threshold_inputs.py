"""Which node carries a site's thresholds: a marker's, for the attention that follows in its module, or a new input."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import CHECKPOINT, Builder, targets

from sparge_compile import ops
from sparge_compile.passes.find import find
from sparge_compile.passes.write.threshold_inputs import (
    MARK,
    attached_thresholds,
    erase_markers,
    markers_of,
    new_input,
)

H = 2


def mark(b: Builder, name: str, number: int = 0, rows: int = H):
    """A marker with thresholds that are an input of their own; the input is returned."""
    given = b.input(name, rows, 2)
    b.opaque(MARK, given, number)
    return given


def attend(b: Builder, x):
    return b.call(F.scaled_dot_product_attention, x, x, x)


def by_site(owner):
    """The name of the input that each site's marker holds."""
    matches = find(owner)
    found = markers_of(owner, matches)
    return {m.site.name: found[m.node].node.args[0].name if m.node in found else None for m in matches}


def test_a_marker_belongs_to_the_attention_that_follows():
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    mark(b, "t")
    assert by_site(b.module(attend(b, x))) == {"(root)": "t"}


def test_a_marker_after_the_attention_is_none_of_its():
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    out = attend(b, x)
    mark(b, "t")
    assert by_site(b.module(out)) == {"(root)": None}


def test_a_marker_belongs_to_its_own_module():
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    for path in ("a", "b"):
        with b.inside(path):
            mark(b, f"t_{path}")
    with b.inside("b"):
        x = attend(b, x)
    with b.inside("a"):
        x = attend(b, x)
    with b.inside("c"):
        x = attend(b, x)
    assert by_site(b.module(x)) == {"b": "t_b", "a": "t_a", "c": None}


def test_markers_of_one_module_are_told_by_number():
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    mark(b, "second", 1)
    mark(b, "first", 0)
    assert by_site(b.module(attend(b, attend(b, attend(b, x))))) == {
        "(root)": "first",
        "(root)#1": "second",
        "(root)#2": None,
    }


def test_a_marker_for_the_rest_is_for_those_without_a_number():
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    mark(b, "rest", ops.REST)
    mark(b, "second", 1)
    assert by_site(b.module(attend(b, attend(b, attend(b, x))))) == {
        "(root)": "rest",
        "(root)#1": "second",
        "(root)#2": "rest",
    }


def test_a_module_that_is_called_twice_marks_its_attention_twice():
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    given = mark(b, "t")
    x = attend(b, x)
    b.opaque(MARK, given, 0)
    assert by_site(b.module(attend(b, x))) == {"(root)": "t", "(root)#1": "t"}


def checkpointed(outside: bool):
    """Attention in a checkpoint, its marker outside or inside; thresholds are inputs of the root."""
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    given = b.input("t", H, 2)
    inner = Builder(of=b)
    y = inner.input("y", 1, H, 6, 4)
    if outside:
        b.opaque(MARK, given, 0)
    else:
        inner.opaque(MARK, inner.input("inner_t", H, 2), 0)
    body = inner.module(attend(inner, y))
    caller = b.nested(CHECKPOINT, body, *([x] if outside else [x, given]))
    return b.module(b.call(operator.getitem, caller, 0)), body


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_a_marker_reaches_into_nested_graphs(outside):
    owner, body = checkpointed(outside)
    (match,) = find(owner)
    marker = markers_of(owner, [match])[match.node]
    assert marker.graph_module is (owner if outside else body)
    node = attached_thresholds(match, marker)
    assert node.graph is body.graph and node.op == "placeholder"
    (caller,) = owner.graph.find_nodes(op="call_function", target=CHECKPOINT)
    assert caller.args[-1].name == "t" and len(caller.args) - 1 == len(body.graph.find_nodes(op="placeholder"))
    owner.graph.lint()
    body.graph.lint()


def test_a_marker_in_a_nested_graph_is_not_for_those_outside():
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    inner = Builder(of=b)
    y = inner.input("y", 1, H, 6, 4)
    inner.opaque(MARK, inner.input("inner_t", H, 2), 0)
    body = inner.module(inner.call(torch.exp, y))
    inside = b.call(operator.getitem, b.nested(CHECKPOINT, body, x, b.input("t", H, 2)), 0)
    assert by_site(b.module(attend(b, inside))) == {"(root)": None}


@pytest.mark.parametrize("rows", [H, 1], ids=["a pair for each head", "one pair for all"])
def test_attached_thresholds_are_one_pair_for_each_head(rows):
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    given = mark(b, "t", rows=rows)
    owner = b.module(attend(b, x))
    (match,) = find(owner)
    node = attached_thresholds(match, markers_of(owner, [match])[match.node])
    assert node.meta["example_value"].shape == (H, 2)
    assert (node is given) == (rows == H)
    owner.graph.lint()


def test_thresholds_for_another_number_of_heads_are_refused():
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    mark(b, "t", rows=3)
    owner = b.module(attend(b, x))
    (match,) = find(owner)
    with pytest.raises(ValueError, match="3 heads"):
        attached_thresholds(match, markers_of(owner, [match])[match.node])


def test_a_new_input_comes_last_and_is_handed_down():
    owner, body = checkpointed(outside=True)
    (match,) = find(owner)
    values = torch.ones(H, 2)
    made, node = new_input(match, owner, values, "a fake tensor")
    assert made.match is match and made.values is values and made.heads == H
    assert owner.graph.find_nodes(op="placeholder")[-1] is made.placeholder
    assert body.graph.find_nodes(op="placeholder")[-1] is node is not made.placeholder
    (caller,) = owner.graph.find_nodes(op="call_function", target=CHECKPOINT)
    assert caller.args[-1] is made.placeholder
    assert node.meta["example_value"] == made.placeholder.meta["example_value"] == "a fake tensor"


def test_a_new_input_of_a_site_of_the_root_is_its_node():
    b = Builder()
    owner = b.module(attend(b, b.input("x", 1, H, 6, 4)))
    (match,) = find(owner)
    made, node = new_input(match, owner, torch.ones(H, 2), "a fake tensor")
    assert node is made.placeholder


def test_markers_are_erased_wherever_they_stand():
    for outside in (True, False):
        owner, body = checkpointed(outside)
        assert MARK in targets(owner if outside else body)
        assert erase_markers(owner)
        assert MARK not in targets(owner) + targets(body)
        assert not erase_markers(owner)


@pytest.mark.parametrize("rows", [H, 1])
def test_thresholds_of_a_marker_come_to_the_device_of_the_site(rows):
    """Whoever offloads a model may leave them elsewhere while a graph is compiled."""
    b = Builder()
    x = b.input("x", 1, H, 6, 4)
    given = b.input("t", rows, 2, device="meta")
    b.opaque(MARK, given, 0)
    owner = b.module(attend(b, x))
    (match,) = find(owner)
    node = attached_thresholds(match, markers_of(owner, [match])[match.node])
    value = node.meta["example_value"]
    assert value.device == torch.device("cpu") and value.shape == (H, 2)
    owner.graph.lint()
