"""The thresholds of one call: those of the block that runs the graph, of its calibration or attached to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blocks import WEIGHT, Model, comes_from
from graphs import Builder

from sparge_compile import Calibration
from sparge_compile.options import Options
from sparge_compile.passes import pipeline
from sparge_compile.passes.find import find
from sparge_compile.passes.write.threshold_inputs import ThresholdInput, new_input
from sparge_compile.running.graph import Slot
from sparge_compile.running.places import Frame, Names
from sparge_compile.running.thresholds import RunTime
from sparge_compile.thresholds.buffers import CHILD, Attached

H = 2


def runtime(model, options, sites=1, keys=70):
    """A graph of the first block with so many sites in ``proj``; what it gets at run time, and what was reported."""
    b = Builder()
    x = b.input("x", 1, H, keys, 4)
    weight = b.input("weight", 4, 4)
    comes_from(weight, WEIGHT, model.blocks[0].proj.weight)
    for _ in range(sites):
        x = b.call(F.scaled_dot_product_attention, x, x, x)
    owner = b.module(x)
    locator = Frame(owner).locator("L['self']", "proj", Names(model))
    inputs: list[ThresholdInput] = []
    slots = {}
    for number, match in enumerate(find(owner)):
        slots[match.node] = Slot(locator, "proj", number)
        named = slots[match.node].at(locator.first, match)
        pairs = pipeline.thresholds_for(named, options)
        inputs.append(new_input(named, owner, torch.tensor(pairs), None)[0])
    reported: list[list[str]] = []
    return RunTime(inputs, slots, options, reported.append), reported


def call(run, block):
    return [x.tolist() for x in run([None, block.proj.weight])]


def pairs(topk):
    return [[topk, 0.0]] * H


def calibration(*topks):
    return Calibration({f"blocks.{i}.proj": [(topk, 0.0)] * H for i, topk in enumerate(topks)})


def test_each_block_gets_its_own_thresholds():
    model = Model(3)
    run, _ = runtime(model, Options(min_seq_len=0, calibration=calibration(0.25, 0.5, 0.75)))
    assert [call(run, block) for block in model.blocks] == [[pairs(0.25)], [pairs(0.5)], [pairs(0.75)]]


def test_later_places_are_reported_once():
    model = Model(2)
    run, reported = runtime(model, Options(min_seq_len=0))
    for block in (*model.blocks, *model.blocks):
        call(run, block)
    assert reported == [["blocks.1.proj"]]


def test_a_place_keeps_its_tensors():
    model = Model(2)
    run, _ = runtime(model, Options(min_seq_len=0))
    args = [None, model.blocks[1].proj.weight]
    assert run(args)[0] is run(args)[0]
    assert run(args)[0] is not run([None, model.blocks[0].proj.weight])[0]


def test_sites_of_one_module_are_told_by_number():
    model = Model(2)
    both = Calibration({"blocks.1.proj": [(0.25, 0.0)] * H, "blocks.1.proj#1": [(0.5, 0.0)] * H})
    run, _ = runtime(model, Options(min_seq_len=0, calibration=both, topk=1.0, topp=0.0), sites=2)
    assert call(run, model.blocks[0]) == [pairs(1.0), pairs(1.0)]
    assert call(run, model.blocks[1]) == [pairs(0.25), pairs(0.5)]


def test_a_block_that_would_not_pay_keeps_all_blocks():
    model = Model(2)
    costs = {"dense_base": 0, "dense_pair": 1e-9, "sparse_base": 0, "pool": 0, "select": 0, "sparse_pair": 2e-9}
    given = calibration(0.25, 0.75)
    run, _ = runtime(model, Options(costs=costs, calibration=given), keys=1024)
    assert [call(run, block) for block in model.blocks] == [[pairs(0.25)], [pairs(1.0)]]
    run, _ = runtime(model, Options(costs=costs, calibration=given, min_seq_len=0), keys=1024)
    assert [call(run, block) for block in model.blocks] == [[pairs(0.25)], [pairs(0.75)]]


def attach(block, *rows):
    held = Attached()
    held.put(0, torch.tensor(rows))
    block.proj.add_module(CHILD, held)
    return held


def test_attached_thresholds_are_read_at_each_call():
    model = Model(2)
    attach(model.blocks[0], *pairs(0.5))
    held = attach(model.blocks[1], [0.25, 0.0])  # one pair for all heads
    run, reported = runtime(model, Options(min_seq_len=0, topk=1.0, topp=0.0))
    assert call(run, model.blocks[0]) == [pairs(0.5)] and call(run, model.blocks[1]) == [pairs(0.25)]
    held.put(0, torch.tensor([[0.75, 0.0]]))
    assert call(run, model.blocks[1]) == [pairs(0.75)]
    assert reported == [[]]  # they are no thresholds of the options


def test_a_block_without_attached_thresholds_has_those_of_the_options():
    model = Model(2)
    attach(model.blocks[0], *pairs(0.5))
    run, _ = runtime(model, Options(min_seq_len=0, topk=1.0, topp=0.0))
    assert [call(run, block) for block in model.blocks] == [[pairs(0.5)], [pairs(1.0)]]
