"""Calibrations that do not fit, and files that changed, are told of, once."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from test_names import FAST, NAMES, Model, X, by_block, expected, run, wrapped

import sparge_compile
from sparge_compile import Calibration, Options

FEW = [(0.1, 0.0)]


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "sparge: the calibration" in str(w.message)]


def compiled(model, options):
    return torch.compile(model, backend="sparge", options=options)


@pytest.mark.parametrize("way", [compiled, by_block, wrapped])
@pytest.mark.parametrize("entry", ["blocks.*.atn.inner", "layers.*", "blocks.7.attn.inner"])
@pytest.mark.parametrize("others", [[], [NAMES[0]]], ids=["alone", "beside-one-that-fits"])
def test_entries_that_fit_no_module_are_named_once(way, entry, others):
    model, x = Model(2), torch.randn(X)
    thresholds = Calibration(dict.fromkeys([*others, entry], FEW))
    model = way(model, {**FAST, "calibration": thresholds})
    (text,) = warned(lambda: (run(model, x), run(model, torch.randn(1, 400, 32))))
    assert repr(entry) in text and NAMES[0] in text and "topk = 0.5" in text


@pytest.mark.parametrize("way", [compiled, by_block, wrapped])
@pytest.mark.parametrize("entries", [["*"], [NAMES[0]], ["blocks.?.attn.*", "blocks.1.*"], [NAMES[1] + "#1", "*"]])
def test_entries_that_fit_are_not(way, entries):
    model = way(Model(2), {**FAST, "calibration": Calibration(dict.fromkeys(entries, FEW))})
    assert warned(lambda: run(model, torch.randn(X))) == []


def parts(model, names, entries):
    """Compile some modules on their own, with options that they share."""
    options = {**FAST, "calibration": Calibration(dict.fromkeys(entries, FEW))}
    for block in model.blocks:
        for name in names:
            part = torch.compile(block.get_submodule(name), backend="sparge", options=options)
            block.set_submodule(name, part)
    return model


def test_parts_of_a_model_have_names_of_their_own():
    model, x = Model(2), torch.randn(X)
    want = expected(model, x, Calibration({"*": FEW}), NAMES[:2])
    model = parts(model, ["attn"], ["inner", "other.part"])
    assert warned(lambda: torch.testing.assert_close(run(model, x), want)) == [], "other parts may share the options"
    for names in (["attn"], ["attn.inner"]):
        torch.compiler.reset()
        (text,) = warned(lambda names=names: run(parts(Model(2), names, NAMES[:2]), x))
        assert "ames begin at the module that torch.compile was called on" in text and NAMES[0] in text


def distance(model, x, options):
    dense = run(model, x)
    return float((run(compiled(model, options), x) - dense).norm() / dense.norm())


def test_a_file_that_changed_is_told_of_once_and_read_by_new_options(tmp_path):
    path = tmp_path / "model.json"
    model, x = Model(2), torch.randn(1, 1000, 32)
    options = {**FAST, "calibration": path}
    Calibration({"*": [(1.0, 0.0)]}).save(path)
    assert distance(model, x, options) < 1e-6
    Calibration({"*": [(1.0, 0.0)]}).save(path)
    assert warned(lambda: distance(model, x, options)) == [], "the same contents"
    Calibration({"*": FEW}).save(path)
    found = []
    (text,) = warned(lambda: found.extend((distance(model, x, options), distance(model, x, options))))
    assert str(path) in text and "not read again" in text and max(found) < 1e-6
    fresh = distance(model, x, Options(**options))
    assert fresh > 1e-2
    torch.compiler.reset()
    assert distance(model, x, options) == fresh
    assert warned(lambda: path.unlink() or distance(model, x, options)) == [], "a file that is gone says nothing new"


def test_a_calibration_from_a_file_equals_one_by_hand(tmp_path):
    Calibration({"*": FEW}).save(tmp_path / "model.json")
    loaded = Calibration.load(tmp_path / "model.json")
    assert loaded == Calibration({"*": FEW}) == copy.deepcopy(loaded) and loaded.source is not None
    assert Options(calibration=loaded).digest() == Options(calibration=Calibration({"*": FEW})).digest()


def warned_of(option, call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if f"is what the option {option!r} names" in str(w.message)]


@pytest.mark.parametrize("way", [compiled, by_block])
@pytest.mark.parametrize(
    ("option", "given", "missed"),
    [
        ("dense_layers", ["bloks.*", "blocks.1"], "'bloks.*'"),
        ("dense_layers", "blocks.0.mlp", "'blocks.0.mlp'"),
        ("dense_layers", ["*.attn", "blocks.1", NAMES[0]], None),
        ("dense_layers", 1, None),
        ("grid", {"bloks.*": (1, 10, 30)}, "'bloks.*'"),
        ("grid", {"blocks.0": (1, 10, 30)}, "'blocks.0'"),
        ("grid", {"blocks.*": (1, 10, 30)}, None),
    ],
)
def test_options_that_name_no_site_are_told_of_once(way, option, given, missed):
    model, x = Model(2), torch.randn(X)
    model = way(model, {**FAST, option: given})
    texts = warned_of(option, lambda: (run(model, x), run(model, x)))
    assert len(texts) == (missed is not None)
    assert all(missed in text and NAMES[0] in text for text in texts)


def test_dense_layers_by_number_want_numbers_in_names():
    model = compiled(Model(2).blocks[0], {**FAST, "dense_layers": 2})
    (text,) = warned_of("dense_layers", lambda: run(model, torch.randn(X)))
    assert "'0:2'" in text


def test_eager_code_is_told_of_options_that_name_no_site():
    model = Model(2)

    def replaced():
        with sparge_compile.replace_attention(model, min_seq_len=0, dense_layers="bloks.0"):
            run(model, torch.randn(X))

    (text,) = warned_of("dense_layers", replaced)
    assert "'bloks.0'" in text


@pytest.mark.parametrize(
    "plan", [{"dense_layers": ["blocks.0", "bloks.1"]}, {"grid": {"bloks.1": (1, 10, 30), "*": (1, 10, 30)}}]
)
def test_attach_refuses_a_plan_for_modules_that_are_not_there(plan):
    with pytest.raises(ValueError, match=r"bloks\.1.*blocks\.1") as refused:
        sparge_compile.attach(Model(2), Calibration({"*": FEW}), **plan)
    assert str(refused.value).startswith(f"attach: {next(iter(plan))}")
    fitting = {
        name: {n.replace("bloks", "blocks"): v for n, v in given.items()} if name == "grid" else ["blocks.1"]
        for name, given in plan.items()
    }
    assert sparge_compile.attach(Model(2), Calibration({"*": FEW}), **fitting).names
