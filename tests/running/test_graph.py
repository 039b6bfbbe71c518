"""The opening of a graph of Dynamo: a copy, its matches under their full names, the slot of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import WEIGHT, Model, comes_from
from graphs import Builder

from sparge_compile.running.graph import open_graph
from sparge_compile.running.places import Names
from sparge_compile.thresholds.buffers import CHILD, Attached

H = 2


def traced(block, sites=2, marked=False):
    """A graph as Dynamo traces it from a block, with attention in its ``proj``."""
    b = Builder()
    x = b.input("x", 1, H, 70, 4)
    weight = b.input("weight", 4, 4)
    comes_from(weight, WEIGHT, block.proj.weight)
    with b.inside("L['self']._modules['proj']"):
        if marked:
            b.opaque(torch.ops.sparge.mark, b.input("attached", H, 2), 0)
        for _ in range(sites):
            x = b.call(F.scaled_dot_product_attention, x, x, x)
    return b.module(x)


def opened(model, block=1, **options):
    return open_graph(traced(model.blocks[block], **options), Names(model))


def test_matches_have_their_full_names():
    model = Model(3)
    work = opened(model)
    assert [match.site.name for match in work.matches] == ["blocks.1.proj", "blocks.1.proj#1"]
    assert work.passes == ["find", "place"]


def test_without_a_model_a_name_is_a_path_below_the_block():
    work = open_graph(traced(Model(2).blocks[1]), None)
    assert [match.site.name for match in work.matches] == ["proj", "proj#1"]


def test_the_graph_that_dynamo_gave_is_left_alone():
    model = Model(2)
    graph = traced(model.blocks[0])
    code = graph.code
    work = open_graph(graph, Names(model))
    assert work.graph_module is not graph and work.graph_module.code == code
    work.graph_module.graph.find_nodes(op="output")[0].args = ((),)
    graph.recompile()
    assert graph.code == code


def test_every_match_has_a_slot_with_its_number():
    model = Model(3)
    work = opened(model)
    slots = [work.slots[match.node] for match in work.matches]
    assert [(slot.path, slot.number) for slot in slots] == [("proj", 0), ("proj", 1)]
    assert slots[0].locator is slots[1].locator
    place = slots[1].locator.place([None, model.blocks[2].proj.weight])
    assert slots[1].name(place) == "blocks.2.proj#1"
    assert slots[1].at(place, work.matches[1]).site.name == "blocks.2.proj#1"
    assert {other.prefix for other in slots[0].others()} == {"blocks.0", "blocks.2"}


def test_other_modules_that_may_run_the_graph_are_alike():
    model = Model(3)
    held = Attached()
    held.put(0, torch.tensor([[0.5, 0.0]]))
    model.blocks[2].proj.add_module(CHILD, held)
    work = opened(model)
    found = {match.site.name: attached for match, attached in work.alike(work.matches[0])}
    assert found == {"blocks.0.proj": False, "blocks.2.proj": True}


@pytest.mark.parametrize("number, attached", [(0, [True, False]), (1, [False, True]), (-1, [True, True])])
def test_what_is_attached_in_the_place_that_is_compiled(number, attached):
    model = Model(2)
    held = Attached()
    held.put(number, torch.tensor([[0.5, 0.0]]))
    model.blocks[1].proj.add_module(CHILD, held)
    work = opened(model)
    assert [match.node in work.attached for match in work.matches] == attached


def test_a_marker_in_the_graph_tells_that_thresholds_are_attached():
    model = Model(2)
    work = opened(model, marked=True)
    assert [match.node in work.attached for match in work.matches] == [True, False]
    assert opened(model).attached == set()


def test_a_softmax_that_is_no_attention_has_the_name_of_its_module_and_no_number():
    model = Model(2)
    graph = traced(model.blocks[0], sites=1)
    (end,) = graph.graph.find_nodes(op="output")
    (attention,) = graph.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    with graph.graph.inserting_before(attention):
        gate = graph.graph.call_function(torch.softmax, (attention.args[0], -1))
    gate.meta = dict(attention.meta)
    end.args = ((attention, gate),)
    work = open_graph(graph, Names(model))
    assert [(m.site.name, m.site.kind) for m in work.matches] == [
        ("blocks.0.proj", "softmax"),
        ("blocks.0.proj", "sdpa"),
    ]
    assert all(slot.number == 0 for slot in work.slots.values())
