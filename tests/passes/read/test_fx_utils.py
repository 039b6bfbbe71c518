"""Values behind nodes, arguments by name, copies of graphs, new inputs."""

from __future__ import annotations

import pytest
import torch
from graphs import CHECKPOINT, Builder

from sparge_compile.passes.read import fx_utils


def test_the_value_of_a_node_is_what_tracing_left_and_of_anything_else_itself():
    graph = torch.fx.Graph()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    x.meta.update(example_value=1, val=2)
    y.meta.update(val=2)
    assert [fx_utils.value_of(each) for each in (x, y, z, 7, None)] == [1, 2, None, 7, None]


def test_arguments_come_by_name_with_defaults():
    def function(a, b, c=3):
        raise AssertionError("only its signature is used")

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(function, (x,), {"b": 2})
    assert dict(fx_utils.bind(fx_utils.signature_of(function), node)) == {"a": x, "b": 2, "c": 3}
    with pytest.raises(TypeError):
        fx_utils.bind(fx_utils.signature_of(function), graph.call_function(function, (x,)))


def test_sizes_as_they_were_traced_with():
    b = Builder()
    size = b.input("x", 8, dynamic=(0,)).meta["example_value"].shape[0]
    assert fx_utils.size_hint(size) == 8 and fx_utils.size_hint(5) == 5
    assert fx_utils.size_text(5) == 5 and fx_utils.size_text(size) == str(size) != "8"
    unknown = b.mode.shape_env.create_unbacked_symint()
    assert fx_utils.size_hint(unknown) is None
    assert not b.mode.shape_env.guards


def nested():
    """A graph that runs another one, and has a parameter."""
    b = Builder()
    x = b.input("x", 3)
    inner = Builder(of=b)
    body = inner.module(inner.call(torch.exp, inner.input("y", 3)))
    weight = b.attribute("weight", torch.nn.Parameter(torch.ones(3)))
    caller = b.nested(CHECKPOINT, body, x)
    return b.module(caller, weight), body


def test_only_an_attribute_that_is_a_graph_names_a_nested_graph():
    outer, body = nested()
    by_name = {node.name: node for node in outer.graph.nodes}
    assert fx_utils.submodule_of(by_name["body"], outer) is body
    for other in (by_name["weight"], by_name["x"], 7, None):
        assert fx_utils.submodule_of(other, outer) is None


def test_a_copy_shares_tensors_and_no_node():
    outer, body = nested()
    outer.graph.find_nodes(op="placeholder")[0].meta["grapharg"] = object()
    outer.graph.find_nodes(op="placeholder")[0]._dynamo_source = "L['x']"
    outer.meta["note"] = "kept"
    code, inner_code = outer.code, body.code
    copy = fx_utils.clone(outer)
    assert copy.code == code and copy.body.code == inner_code
    assert copy.weight is outer.weight and copy.body is not body and copy.meta == {"note": "kept"}
    (x,) = copy.graph.find_nodes(op="placeholder")
    assert "grapharg" not in x.meta and x._dynamo_source == "L['x']" and "example_value" in x.meta
    for module in (copy, copy.body):
        (end,) = module.graph.find_nodes(op="output")
        end.args = ((),)
        module.recompile()
    assert outer.code == code and body.code == inner_code and outer.body is body


def test_a_new_input_comes_last():
    b = Builder()
    x, y = b.input("x", 3), b.input("y", 3)
    owner = b.module(b.call(torch.add, x, y))
    made = [fx_utils.add_input(owner, "more", value) for value in (1, 2)]
    assert owner.graph.find_nodes(op="placeholder") == [x, y, *made]
    assert len({node.target for node in made}) == 2
    assert [fx_utils.value_of(node) for node in made] == [1, 2]
    owner.graph.lint()


@pytest.mark.parametrize("keys", [{"val"}, {"example_value"}])
def test_a_new_input_has_its_value_under_the_keys_of_the_others(keys):
    """Inductor's cpp_wrapper took a Dynamo graph with "val" on our input alone for an exported program."""
    b = Builder()
    x = b.input("x", 3)
    x.meta = {key: x.meta.get("val", x.meta.get("example_value")) for key in keys}
    owner = b.module(b.call(torch.neg, x))
    assert ("val" in fx_utils.add_input(owner, "more", 1).meta) == ("val" in keys)


def test_a_new_input_after_one_with_a_default_has_one():
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x", default_value=1))
    owner = torch.fx.GraphModule({}, graph)
    fx_utils.add_input(owner, "x", 2)
    owner.recompile()
    assert owner(3) == 3


def test_a_copy_has_the_names_of_the_original():
    """torch.export names inputs as Python's builtins where the model does, and its signature names them."""
    graph = torch.fx.Graph()
    x = graph.placeholder("input")
    x.name = "input"
    graph.output(graph.call_function(torch.neg, (x,)))
    given = torch.fx.GraphModule({}, graph)
    assert [n.name for n in fx_utils.clone(given).graph.nodes] == [n.name for n in graph.nodes]


def test_a_graph_without_inputs_gets_a_first_one():
    b = Builder()
    owner = b.module(b.call(torch.ones, 3))
    made = fx_utils.add_input(owner, "more", 1)
    assert next(iter(owner.graph.nodes)) is made
