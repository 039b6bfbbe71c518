"""Several calibrations as one: every head keeps at least what each file keeps, and what has no meaning is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibration import measured_calibration

from sparge_compile import Calibration, attach, calibration_part, merge_calibrations
from sparge_compile.cli import main
from sparge_compile.kernels import reference
from sparge_compile.sharing.merging import lost_measurements

SHARES = st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])
PAIRS = st.tuples(SHARES.filter(bool), SHARES)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(PAIRS, min_size=2, max_size=2), min_size=2, max_size=3), st.integers(0, 99), st.booleans())
def test_each_head_keeps_what_it_keeps_with_each_file(rows, seed, causal):
    """By the oracle: the map of the merged thresholds holds the map of each."""
    merged = merge_calibrations([Calibration({"a": pairs}) for pairs in rows]).sites["a"]
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 2, 512, 8, generator=generator) for _ in range(2))

    def kept(pairs):
        return reference.block_map(q, k, torch.tensor(pairs), is_causal=causal).to_dense()

    whole = kept(merged)
    for pairs in rows:
        assert not (kept(pairs) & ~whole).any()


def test_other_sites_stand_beside_each_other_with_what_was_measured():
    first = measured_calibration(sites=("blocks.0", "blocks.1"))
    second = measured_calibration(sites=("blocks.2",), device="gpu")
    merged = merge_calibrations([first, second])
    assert merged.sites == {**first.sites, **second.sites} and list(merged.phases) == list(first.phases)
    assert lost_measurements([first, second]) == "" and merged.origin.device == "cpu + gpu"
    assert merged.summary().heads == first.summary().heads + second.summary().heads
    again = merged.at(target_error=0.05)
    assert again.sites["blocks.2"] == second.at(target_error=0.05).sites["blocks.2"], "each head keeps its own bound"


@pytest.mark.parametrize(
    "second, reason",
    [
        (Calibration({"c": [(0.5, 0)]}), "a file has none"),
        (measured_calibration(), "nobody measured the larger thresholds of 2 sites"),
        (measured_calibration(1, sites=("c",)), "phases begin elsewhere"),
        (measured_calibration(sites=("c",), seed=1), "other settings: seed"),
    ],
)
def test_where_measurements_are_lost_it_says_why(second, reason):
    given = [measured_calibration(), second]
    assert reason in lost_measurements(given) and merge_calibrations(given).origin is None


def test_the_same_sites_get_the_larger_thresholds_from_each_phase_on():
    low = Calibration({"a": [(0.1, 0.4), (0.3, 0.0)]}, {0.5: {"a": [(0.05, 0.0), (0.3, 0.0)]}}, about={"steps": "50"})
    high = Calibration({"a": [(0.2, 0.1)]}, {0.25: {"a": [(0.1, 0.9)]}}, about={"steps": "50", "resolution": "720p"})
    merged = merge_calibrations([low, high])
    assert merged.all_phases() == {
        0.0: {"a": ((0.2, 0.4), (0.3, 0.1))},
        0.25: {"a": ((0.1, 0.9), (0.3, 0.9))},
        0.5: {"a": ((0.1, 0.9), (0.3, 0.9))},
    }
    assert merged.about == {"resolution": "720p", "steps": "50"}
    described = high.described(resolution="480p")
    assert merge_calibrations([high, described]).about["resolution"] == "720p + 480p"


def test_a_pattern_covers_a_site_that_the_other_file_names():
    merged = merge_calibrations([Calibration({"*": [(0.5, 0.0)]}), Calibration({"a": [(0.2, 0.3)] * 2})])
    assert merged.sites == {"*": ((0.5, 0.0),), "a": ((0.5, 0.3),) * 2}


def test_plans_tiles_and_kept_tokens_come_along():
    about = {"kept": {"a": {"keep_keys": 64}}, "tiles": {"a": (2, 4, 8)}}
    plan = {"dense_steps": 2, "dense_layers": ["a"]}
    one = Calibration({"a": [(0.5, 0)]}, **about).scheduled(**plan)
    merged = merge_calibrations([one, Calibration({"b": [(0.5, 0)]}).scheduled(**plan)])
    assert merged.kept == one.kept and merged.tiles == one.tiles and merged.schedule == one.schedule


def measured(**changes):
    return measured_calibration(sites=("a",), **changes)


A = Calibration({"a": [(0.5, 0)] * 2})


@pytest.mark.parametrize(
    "given, words",
    [
        ([A], "two calibrations or more"),
        ([A, Calibration({"a": [(0.5, 0)] * 3})], "site 'a' of other numbers of heads: 2, 3"),
        ([measured(), measured(head_size=32)], "other head sizes: 16, 32"),
        ([measured(), measured(model="Other")], "other models: Model, Other"),
        ([A.described(model_id="x/y"), A.described(model_id="x/z")], "other models: x/y, x/z"),
        ([A, Calibration({"a": [(0.5, 0)] * 2}, tiles={"a": (2, 4, 8)})], "other tiles"),
        ([A, Calibration({"a": [(0.5, 0)] * 2}, kept={"a": {"keep_keys": 8}})], "other kept tokens"),
        ([A, measured(complete=False)], "interrupted"),
        ([Calibration({"a.*": [(0.5, 0)]}), Calibration({"*.b": [(0.5, 0)]})], "patterns that may mean the same"),
        ([A, A.scheduled(dense_steps=2)], "other plans"),
        ([A, Calibration({"b": [(0.5, 0)]}).scheduled(dense_layers=["*"])], "other plans"),
        ([A.scheduled(dense_layers=["a"]), A], "other plans"),
        ({"not a name": A, "b": A}, "transformer_2"),
    ],
)
def test_what_has_no_meaning_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        merge_calibrations(given)


class Block(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_parts_of_a_pipeline_in_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    high, low = measured(), replace(measured().at(target_sparsity=0.4), about={"model_id": "x"})
    high.save("high.json")
    low.save("low.json")
    assert main(["merge", "transformer=high.json", "transformer_2=low.json", "--out", "both.json"]) == 0
    assert "without measurements" in (shown := capsys.readouterr().out) and "transformer_2.a" in shown
    merged = Calibration.load("both.json")
    assert list(merged.sites) == ["transformer.a", "transformer_2.a"]
    assert merged.about == {"model_id": "x", "part": "transformer + transformer_2"}
    part = calibration_part(merged, "transformer_2")
    assert (part.sites, part.phases) == (low.sites, low.phases) and part.about == {
        "model_id": "x",
        "part": "transformer_2",
    }
    attach(torch.nn.ModuleDict({"a": Block()}), part).remove()
    assert main(["show", "both.json", "--part", "transformer", "--out", "again.json"]) == 0
    assert Calibration.load("again.json").sites == high.sites
    assert main(["show", "both.json", "--part", "vae"]) == 2
    assert "allowed: transformer, transformer_2" in capsys.readouterr().err


def test_parts_keep_what_was_measured_alike_and_plans_by_name():
    low = measured_calibration(sites=("b",)).scheduled(dense_layers=["b"])
    high = measured_calibration(sites=("a",))
    merged = merge_calibrations({"one": high, "two": low})
    assert merged.schedule.dense_layers == ("two.b",) and merged.summary().heads == 8
    again = calibration_part(merged, "two")
    assert again.sites == low.sites and again.schedule == low.schedule
    assert again.origin.curves == low.origin.curves and again.at(target_error=0.12).sites == low.sites


def test_the_command_merges_files_and_says_what_is_lost(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured_calibration(sites=("a",)).save("a.json")
    measured_calibration(sites=("b",)).save("b.json")
    assert main(["merge", "a.json", "b.json", "--out", "c.json", "--about", "resolution=both"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("resolution: both\n") and "without measurements" not in shown
    assert Calibration.load("c.json").about == {"resolution": "both"}
    assert main(["merge", "a.json", "c.json", "--out", "d.json"]) == 0
    assert "cannot be aimed anew: nobody measured" in capsys.readouterr().out
    assert main(["merge", "x=a.json", "b.json", "--out", "d.json"]) == 2
    assert "PART=FILE for all of them" in capsys.readouterr().err
