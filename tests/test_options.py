"""Options and calibration files: what is refused, how identity is derived, what survives a round trip."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparge_compile import Calibration, CostModel, Options

COSTS = {"dense_base": 0.0, "dense_pair": 1.0, "sparse_base": 0.0, "pool": 0.0, "select": 0.0, "sparse_pair": 1.0}


@pytest.mark.parametrize(
    "options, error, parts",
    [
        ({"top_k": 0.5}, ValueError, ["unknown option", "'top_k'", "topk", "min_seq_len"]),
        ({"topk": "0.5"}, TypeError, ["topk", "'0.5'", "a number"]),
        ({"topk": 0}, ValueError, ["topk", "got 0", "(0, 1]"]),
        ({"topk": 1.5}, ValueError, ["topk", "1.5", "(0, 1]"]),
        ({"topk": float("nan")}, ValueError, ["topk", "nan", "(0, 1]"]),
        ({"topp": -0.1}, ValueError, ["topp", "-0.1", "[0, 1]"]),
        ({"topk": True}, TypeError, ["topk", "True", "a number"]),
        ({"keep_keys": 1.5}, TypeError, ["keep_keys", "1.5", "the first n tokens"]),
        ({"keep_keys": True}, TypeError, ["keep_keys", "True"]),
        ({"keep_keys": "image"}, ValueError, ["keep_keys", "'image'", '"text"']),
        ({"keep_keys": (9, 3)}, ValueError, ["keep_keys", "(9, 3)", "start before stop"]),
        ({"keep_keys": 0}, ValueError, ["keep_keys", "got 0"]),
        ({"dense_queries": 1, "keep_keys": 5}, TypeError, ["dense_queries", "1", "True or False"]),
        ({"dense_queries": True}, ValueError, ["dense_queries", "without kept keys"]),
        ({"token_order": "morton"}, ValueError, ["token_order", "'morton'", "'raster', 'tiles'"]),
        ({"tile": (4, 4, 8)}, ValueError, ["tile", "(4, 4, 8)", "64"]),
        ({"grid": (21, 30)}, TypeError, ["grid", "(21, 30)", "(frames, height, width)"]),
        ({"grid": {"a.*": (21, 0, 52)}}, ValueError, ["'a.*'", "grid", "(21, 0, 52)"]),
        ({"min_seq_len": 1.5}, TypeError, ["min_seq_len", "1.5", "None"]),
        ({"min_seq_len": -1}, ValueError, ["min_seq_len", "-1", "0 or more"]),
        ({"min_seq_len": True}, TypeError, ["min_seq_len", "True"]),
        ({"on_unsupported": "explode"}, ValueError, ["on_unsupported", "'explode'", "'warn'"]),
        ({"inner": "cudagraphs"}, ValueError, ["inner", "'cudagraphs'", "'aot_eager'"]),
        ({"inner": "eager", "inductor": {"max_autotune": True}}, ValueError, ["inner", "'inductor'"]),
        ({"inductor_mode": "fast"}, ValueError, ["inductor_mode", "'fast'", "max-autotune"]),
        ({"inductor": {"nonsense": 1}}, ValueError, ["inductor", "nonsense", "list_options"]),
        ({"inductor": 3}, TypeError, ["inductor", "3", "a dict"]),
        ({"calibration": 3}, TypeError, ["calibration", "3", "a path"]),
        ({"costs": {"dense_base": 1}}, ValueError, ["costs", "sparse_pair", "fit_cost_model"]),
        ({"costs": {**COSTS, "pool": -1}}, ValueError, ["pool", "-1", "0 or more"]),
        (3, TypeError, ["options", "3", "a dict"]),
    ],
)
def test_bad_options_are_refused_in_four_parts(options, error, parts):
    with pytest.raises(error) as caught:
        Options.parse(options)
    message = str(caught.value)
    assert all(part in message for part in [*parts, "got ", "allowed: "]), message


def test_bad_options_are_refused_when_compiling():
    with pytest.raises(Exception, match="unknown option"):
        torch.compile(lambda x: x + 1, backend="sparge", options={"topK": 1})(torch.ones(1))


CHANGED = {
    "dense_steps": 2,
    "dense_layers": 2,
    "calibration": Calibration({"a": [(0.5, 0.0)]}),
    "topk": 0.25,
    "precision": "fp8",
    "topp": 0.125,
    "keep_keys": 64,
    "dense_queries": True,
    "token_order": "tiles",
    "tile": (4, 4, 4),
    "grid": {"a": (21, 30, 52)},
    "min_seq_len": 17,
    "costs": CostModel(**COSTS),
    "additive_masks": True,
    "on_unsupported": "error",
    "inner": "eager",
    "inductor": {"max_autotune": True},
    "inductor_mode": "max-autotune",
}


def test_every_field_enters_the_digest():
    assert set(CHANGED) == {f.name for f in dataclasses.fields(Options)}
    needs = {"dense_queries": {"keep_keys": 32}}
    changed = ({name: value, **needs.get(name, {})} for name, value in CHANGED.items())
    digests = {Options(**each).digest() for each in changed} | {Options().digest()}
    assert len(digests) == len(CHANGED) + 1
    assert Options(topk=0.25).digest() == Options(topk=0.25).digest()


def test_equal_grids_are_equal_options():
    one, other = (
        Options(grid=grid, tile=tile) for grid, tile in (((2, 3, 4), [2, 4, 8]), ([0, 2, 3, 4, 0], (2, 4, 8)))
    )
    assert one == other and one.digest() == other.digest()
    by_name = Options(grid={"a.b": (1, 2, 3), "a.*": (4, 5, 6, 7, 8)})
    assert [by_name.grid_of(name) for name in ("a.b", "a.c", "c")] == [(0, 1, 2, 3, 0), (4, 5, 6, 7, 8), None]


def test_calibrations_with_other_contents_have_other_digests():
    one, other = (Options(calibration=Calibration({"a": [(topk, 0.0)]})) for topk in (0.5, 0.25))
    assert one.digest() != other.digest()


def test_lookup_prefers_the_exact_name_then_the_first_pattern():
    calibration = Calibration({"a.*": [(0.1, 0.0)], "a.b": [(0.2, 0.0)], "*": [(0.3, 0.0)]})
    assert calibration.lookup("a.b", 2) == ((0.2, 0.0),) * 2
    assert calibration.lookup("a.c", 1) == ((0.1, 0.0),)
    assert calibration.lookup("z", 1) == ((0.3, 0.0),)
    assert Calibration({"a": [(0.1, 0.0)]}).lookup("z", 1) is None


pairs = st.tuples(st.floats(0, 1, exclude_min=True), st.floats(0, 1))


@given(st.dictionaries(st.text(max_size=10), st.lists(pairs, min_size=1, max_size=4), max_size=4))
def test_saving_and_loading_changes_nothing(tmp_path_factory, sites):
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    calibration = Calibration(sites)
    calibration.save(path)
    assert Calibration.load(path) == calibration
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


GOOD = {
    "format": "sparge-calibration",
    "format_version": 1,
    "created_by": "x",
    "sites": {"a": {"thresholds": [[0.5, 0.1]]}},
}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: "not json",
        lambda d: [],
        lambda d: {**d, "format": "other"},
        lambda d: {**d, "format_version": 2},
        lambda d: {**d, "more": 1},
        lambda d: {**d, "sites": []},
        lambda d: {**d, "sites": {"a": [[0.5, 0.1]]}},
        lambda d: {**d, "sites": {"a": {"thresholds": []}}},
        lambda d: {**d, "sites": {"a": {"thresholds": [[0.5]]}}},
        lambda d: {**d, "sites": {"a": {"thresholds": [["x", 0.1]]}}},
        lambda d: {**d, "sites": {"a": {"thresholds": [[0.0, 0.1]]}}},
        lambda d: {**d, "sites": {"a": {"thresholds": [[float("nan"), 0.1]]}}},
        lambda d: {**d, "sites": {"a": {"thresholds": [[1e400, 0.1]]}}},
        lambda d: {**d, "sites": {"a": {"thresholds": "ab"}}},
    ],
)
def test_strange_files_are_refused(tmp_path, change):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(GOOD))
    assert Calibration.load(path).lookup("a", 3) == ((0.5, 0.1),) * 3
    changed = change(GOOD)
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises((ValueError, TypeError), match="got"):
        Calibration.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    Calibration({"a": [(0.5, 0.0)]}).save(path)
    monkeypatch.setattr(os, "replace", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Calibration({"a": [(0.25, 0.0)]}).save(path)
    assert Calibration.load(path).lookup("a", 1) == ((0.5, 0.0),)
    assert list(tmp_path.iterdir()) == [path]
