"""Where a graph stands in a model, told by the parameters among its inputs; no graph is compiled here."""

from __future__ import annotations

import pytest
import torch
from blocks import WEIGHT, Model, graph_of
from torch import nn

from sparge_compile.running.places import Frame, Names, Place, find_root, modules_on_stack
from sparge_compile.user_model import was_compiled


def locator_of(model, block, names=None):
    """The locator of a graph that was traced from a block, which reads x and its weight."""
    weight = block.proj.weight
    frame = Frame(graph_of(None, (WEIGHT, weight)))
    return frame.locator("L['self']", "proj", Names(model) if names is None else names)


def test_a_place_puts_its_name_before_a_path():
    model = Model()
    place = Place(model, "blocks.1")
    assert place.root is model and place.name("attn") == "blocks.1.attn" and place.name("(root)") == "blocks.1"
    assert Place().root is None and Place().name("attn") == "attn"


def test_a_place_does_not_keep_its_model_alive():
    place = Place(Model(), "blocks.1")
    assert place.root is None


def test_names_are_those_of_the_user_s_model():
    model = Model(2)
    names = Names(model)
    assert names.by_name["blocks.1.proj"] is model.blocks[1].proj
    assert names.prefixes(model.blocks[1].proj.weight, "proj.weight") == ["blocks.1"]
    assert names.prefixes(model.blocks[1].proj.weight, "weight") == ["blocks.1.proj"]
    assert names.prefixes(model.blocks[1].proj.weight, "other.weight") == []
    assert names.prefixes(torch.zeros(1), "proj.weight") == []


def test_a_tensor_that_modules_share_has_all_their_names():
    shared = nn.Linear(4, 4)
    model = Model(2, shared)
    assert Names(model).prefixes(shared.weight, "shared.weight") == ["blocks.0", "blocks.1"]


def test_modules_of_one_class_are_alike():
    model = Model(3)
    model.head = nn.Linear(4, 4)
    found = {name: tensor for tensor, name in Names(model).alike("blocks.0", "proj.weight")}
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2"]
    assert found["blocks.2"] is model.blocks[2].proj.weight


def test_a_parameter_among_the_inputs_tells_the_place():
    model = Model(3)
    locator = locator_of(model, model.blocks[1])
    assert locator.first.prefix == "blocks.1" and locator.first.root is model
    for i, block in enumerate(model.blocks):
        place = locator.place([torch.zeros(4), block.proj.weight])
        assert place.name("proj") == f"blocks.{i}.proj"
        assert locator.place([None, block.proj.weight]) is place  # the same one at each call
    assert {place.prefix for place in locator.places()} == {"blocks.0", "blocks.1", "blocks.2"}


def test_only_parameters_and_buffers_tell_a_place():
    model = Model(2)
    frame = Frame(graph_of(("L['x']", torch.zeros(4)), None))
    locator = frame.locator("L['self']", "proj", Names(model))
    assert locator.first.prefix is None and frame.inputs == [None, None]


def test_a_parameter_of_another_model_tells_no_place():
    locator = locator_of(Model(2), Model(2).blocks[1])
    assert locator.first.prefix is None


def test_without_names_a_place_is_unknown():
    model = Model(2)
    locator = Frame(graph_of(None, (WEIGHT, model.blocks[1].proj.weight))).locator("L['self']", "proj", None)
    assert locator.first.prefix is None and locator.first.name("proj") == "proj"


def test_a_tensor_of_one_module_is_asked_before_one_that_many_share():
    shared = nn.Linear(4, 4)
    model = Model(3, shared)
    of_all = "L['self']._modules['shared']._parameters['weight']", shared.weight
    locator = Frame(graph_of(of_all, (WEIGHT, model.blocks[2].proj.weight))).locator("L['self']", "proj", Names(model))
    assert locator.first.prefix == "blocks.2"


def test_a_look_at_another_model_keeps_nothing():
    model, other = Model(2), Model(2)
    locator = locator_of(model, model.blocks[0])
    known = len(locator.places())
    assert locator.where([None, other.blocks[1].proj.weight], Names(other)).prefix == "blocks.1"
    assert len(locator.places()) == known


def test_a_frame_remembers_what_was_compiled():
    model = Model(1)
    assert not was_compiled(model)
    Frame(graph_of((WEIGHT, model.blocks[0].proj.weight)))
    assert was_compiled(model)


class Look(nn.Module):
    """Calls its child, or itself looks at the stack."""

    def __init__(self, child=None):
        super().__init__()
        self.child = child

    def forward(self, look):
        return look() if self.child is None else self.child(look)


def test_the_modules_that_are_being_called_innermost_first():
    inner = Look()
    outer = Look(inner)
    assert outer(lambda: list(dict.fromkeys(modules_on_stack()))) == [inner, outer]
    assert outer(find_root) is outer and inner(find_root) is inner and find_root() is None


def test_the_name_of_what_is_being_called():
    model = Look(Look())
    names = Names(model)
    assert model(names.called) == "child" and names.called() is None
    assert Look()(names.called) is None  # a stranger


@pytest.mark.parametrize("path, prefix", [("(root)", "child"), ("absent", None)])
def test_frames_without_parameters_are_placed_by_what_is_being_called(path, prefix):
    model = Look(Look())
    frame, names = Frame(graph_of(None)), Names(model)
    locator = model(lambda: frame.locator("L['self']", path, names))
    assert locator.first.prefix == prefix
