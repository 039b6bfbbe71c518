"""Thresholds that no site used in the first complete forward are told of, once; and nothing is left of the asking."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from test_names import FAST, NAMES, WAYS, Block, Model, X, by_block, run, wrapped
from toys import Stack

from sparge_compile import Calibration, attach
from sparge_compile.notices import forget_warnings
from sparge_compile.running import first_forward

FEW = [(0.1, 0.0)]


def compiled(model, options):
    return torch.compile(model, backend="sparge", options=options)


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "the first forward" in str(w.message)]


def given(way, model, entries, how):
    """A model that is compiled with thresholds as an option, or attached to it."""
    thresholds = Calibration(dict.fromkeys(entries, FEW))
    if how == "attach":
        attach(model, thresholds)
        return way(model, FAST)
    return way(model, {**FAST, "calibration": thresholds})


def nothing_is_left():
    return sys.getprofile() is None and not first_forward._pending


@pytest.mark.parametrize("how", ["calibration", "attach"])
@pytest.mark.parametrize("way", WAYS)
def test_what_no_site_used_is_named_after_the_first_forward(way, how):
    build, compile_it, _ = WAYS[way]
    x, unused = torch.randn(X), ["blocks.1.attn", NAMES[1] + "#1"]
    model = given(compile_it, build(), [*NAMES, *unused], how)
    texts = warned(lambda: run(model, x))
    if way == "function":  # no module is called there
        assert texts == []
        return
    (text,) = texts
    assert all(repr(entry) in text for entry in unused) and repr(NAMES[0]) not in text.partition("Of the")[0]
    assert repr(NAMES[1]) in text.partition("Of the")[2] and type(build()).__name__ in text
    assert nothing_is_left()
    assert warned(lambda: (run(model, x), run(model, torch.randn(1, 400, 32)))) == []
    assert nothing_is_left()


@pytest.mark.parametrize("how", ["calibration", "attach"])
@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(NAMES, marks=pytest.mark.slow),
        pytest.param(["*"], marks=pytest.mark.slow),
        pytest.param(["blocks.[0-2].attn.*", "blocks.[34]*.*"], marks=pytest.mark.slow),
        [*NAMES, "*"],
    ],
)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "function"])
def test_what_sites_used_is_not(way, entries, how):
    build, compile_it, _ = WAYS[way]
    model, x = given(compile_it, build(), entries, how), torch.randn(X)
    assert warned(lambda: (run(model, x), model(x).sum().backward(), run(model, x))) == []
    assert nothing_is_left()


class Failing(Model):
    """Its first forward ends in the middle."""

    fails = True

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0 and self.fails:
                self.fails = False
                raise RuntimeError("out of memory")
        return x


@pytest.mark.parametrize("how", ["calibration", "attach"])
def test_a_forward_that_ends_in_an_exception_does_not_count(how):
    x = torch.randn(X)

    def twice(model):
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, x)
        assert sys.getprofile() is None
        run(model, x)

    assert warned(lambda: twice(given(by_block, Failing(2), NAMES[:2], how))) == []
    torch.compiler.reset()
    (text,) = warned(lambda: twice(given(by_block, Failing(2), [*NAMES[:2], "blocks.1.attn"], how)))
    assert "'blocks.1.attn'" in text and nothing_is_left()


class Branch(Stack):
    def __init__(self):
        super().__init__(2, Block)

    def forward(self, x, both=False):
        x = self.blocks[0](x)
        return self.blocks[1](x) if both else x


def test_a_branch_that_was_not_taken_is_spoken_of():
    model = given(compiled, Branch(), NAMES[:2], "calibration")
    (text,) = warned(lambda: run(model, torch.randn(X)))
    assert repr(NAMES[1]) in text and "A branch that was not taken" in text
    assert warned(lambda: model(torch.randn(X), both=True)) == []


@pytest.mark.parametrize("how", ["calibration", "attach"])
@pytest.mark.parametrize("way", [by_block, wrapped])
def test_models_that_run_graphs_of_others_are_judged_by_whole_forwards(way, how):
    """Graphs that were compiled for one model may run unheard in the first forward of another."""
    x = torch.randn(X)
    first, second = Model(2), Model(2)
    other = copy.deepcopy(second.blocks[1])
    second.blocks[1] = torch.nn.Sequential(other)  # a site of another name
    names = [NAMES[0], "blocks.1.0.attn.inner"]
    assert warned(lambda: run(given(way, first, NAMES[:2], how), x)) == []
    model = given(way, second, names, how)
    assert warned(lambda: (run(model, x), run(model, torch.randn(1, 400, 32)), run(model, x))) == []


def test_a_wrapper_of_another_class_runs_graphs_of_the_model_in_it():
    def ordered(second_tile):
        model, tiles = Model(2), {NAMES[0]: (4, 4, 4), NAMES[1]: second_tile}
        attach(model, Calibration(dict.fromkeys(NAMES[:2], FEW), tiles=tiles), grid=(4, 8, 8))
        return by_block(model, FAST)

    x = torch.randn(1, 256, 32)
    first = ordered((4, 4, 4))
    assert warned(lambda: run(first, x)) == []
    around = Stack(1, lambda: ordered((2, 4, 8)))  # block 1 is compiled anew, block 0 runs the graph of the first model
    assert warned(lambda: (run(around, x), run(around, x))) == []


class Other(Stack):
    """It has no class of those in a Model."""


@pytest.mark.parametrize("way", [by_block, wrapped])
def test_what_is_in_all_models_makes_none_wait_for_its_second_forward(way):
    """Modules of torch, and those that hold attached thresholds."""
    for model, names in ((Model(2), NAMES[:2]), (Other(2), ["blocks.0", "blocks.1"])):
        forget_warnings()
        model = given(way, model, [*names, names[1] + "#1"], "attach")
        (text,) = warned(lambda model=model: run(model, torch.randn(X)))
        assert type(model).__name__ in text


def test_options_are_held_once_however_many_models_are_compiled_with_them():
    for _ in range(3):
        run(given(compiled, Model(2), NAMES[:2], "attach"), torch.randn(X))
    assert len(first_forward._classes) == 1


def test_somebody_elses_profiler_stays():
    profile = torch._dynamo.disable(lambda *event: None)
    model = given(by_block, Model(2), [*NAMES[:2], "blocks.1.attn"], "calibration")
    sys.setprofile(profile)
    try:
        assert warned(lambda: run(model, torch.randn(X))) == []
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert nothing_is_left()
