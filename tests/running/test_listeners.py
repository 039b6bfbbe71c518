"""Listeners hear of each call of a graph, and additional outputs are taken off before its caller sees a result."""

from __future__ import annotations

import contextvars

import pytest
import torch
from blocks import WEIGHT, Model, graph_of

from sparge_compile.options import Options
from sparge_compile.running import listeners
from sparge_compile.running.graph import Slot
from sparge_compile.running.listeners import (
    Outlet,
    current_listeners,
    heard_by,
    outputs_wanted,
    want_outputs,
    with_outlet,
)
from sparge_compile.running.places import Frame, Names

OPTIONS = Options()


class Notes:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.heard = []

    def ran(self, options, names, outputs):
        self.heard.append((options, names, list(outputs)))


def slots_of(model, count=2):
    frame = Frame(graph_of(None, (WEIGHT, model.blocks[0].proj.weight)))
    locator = frame.locator("L['self']", "proj", Names(model))
    return [Slot(locator, "proj", number) for number in range(count)]


def args_of(block):
    return [torch.zeros(1), block.proj.weight]


@pytest.mark.parametrize("has_outputs", [True, False])
def test_additional_outputs_go_to_listeners_and_not_to_the_caller(has_outputs):
    model, notes = Model(2), Notes()
    run = with_outlet(lambda *args: ["result", "one", "two"], Outlet(OPTIONS, slots_of(model), has_outputs))
    with heard_by(notes):
        given = run(*args_of(model.blocks[1]))
    assert given == (["result"] if has_outputs else ["result", "one", "two"])
    names = ["blocks.1.proj", "blocks.1.proj#1"]
    assert notes.heard == [(OPTIONS, names, ["one", "two"] if has_outputs else [])]


def test_outputs_are_taken_off_when_nobody_listens():
    model = Model(1)
    outlet = Outlet(OPTIONS, slots_of(model), True)
    assert outlet(args_of(model.blocks[0]), ("result", 1, 2)) == ("result",)


def test_names_of_the_model_that_was_given_need_no_stack():
    model, other, notes = Model(2), Model(2), Notes()
    outlet = Outlet(OPTIONS, slots_of(model, 1), False, Names(other))
    with heard_by(notes):
        outlet(args_of(other.blocks[1]), ())
    assert notes.heard[0][1] == ["blocks.1.proj"]


def test_listeners_are_told_in_a_block_and_put_back():
    one, two = Notes(), Notes()
    assert current_listeners() == ()
    with heard_by(one):
        with pytest.raises(KeyError), heard_by(two, one):
            assert current_listeners() == (two, one)
            raise KeyError
        assert current_listeners() == (one,)
    assert current_listeners() == ()


def test_listeners_belong_to_a_context():
    with heard_by(Notes()):
        assert contextvars.Context().run(current_listeners) == ()


def test_outputs_are_wanted_while_somebody_asks_and_trains(monkeypatch):
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    monkeypatch.setattr(listeners, "_wanted", 0)
    assert not outputs_wanted()
    want_outputs(1)
    want_outputs(1)
    assert outputs_wanted() and len(resets) == 2  # what is there does not return them
    with torch.no_grad():
        assert not outputs_wanted()
    want_outputs(-1)
    assert outputs_wanted() and len(resets) == 2
    want_outputs(-1)
    assert not outputs_wanted()
