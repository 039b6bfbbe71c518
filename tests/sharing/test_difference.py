"""What differs between two calibrations: named, counted by head, and nothing where a model would not notice."""

from __future__ import annotations

from test_calibration import measured_calibration

from sparge_compile import Calibration, compare_calibrations
from sparge_compile.cli import main

PLAIN = Calibration({"a": [(0.25, 0.1), (0.5, 0.1)], "b": [(0.25, 0.0)]})


def test_the_same_is_the_same_however_it_is_written():
    one = compare_calibrations(PLAIN, PLAIN)
    assert one.same and str(one) == "the same thresholds at all 2 sites"
    spelled = Calibration({"a": PLAIN.sites["a"], "b": [(0.25, 0.0)] * 4}, about={"note": "spelled out"})
    found = compare_calibrations(PLAIN, spelled)
    assert found.same and found.about == (("note", "–", "spelled out"),)
    split = Calibration(PLAIN.sites, {0.5: PLAIN.sites})
    assert compare_calibrations(PLAIN, split).same, "a phase that changes nothing"


def test_each_difference_is_named():
    other = Calibration(
        {"a": [(0.25, 0.1), (0.75, 0.1)], "c": [(1, 0)]}, tiles={"a": (2, 4, 8)}, about={"resolution": "81x480x832"}
    ).scheduled(dense_steps=2)
    found = compare_calibrations(PLAIN, other)
    assert not found.same and found.only == (("b",), ("c",)) and found.plans == ("nothing", "steps 0:2")
    (site,) = found.sites
    assert (site.name, site.heads, site.changed, site.topk) == ("a", 2, 1, (0.375, 0.5))
    assert site.sparsity == (None, None) and site.beside == "raster → 2×4×8"
    text = str(found)
    for words in (
        "resolution: – → 81x480x832",
        "only in the first: b",
        "only in the second: c",
        "1 of 2",
        "0.375 → 0.5",
    ):
        assert words in text
    heads = compare_calibrations(PLAIN, Calibration({"a": [(0.25, 0.1)] * 3, "b": [(0.25, 0.0)]}))
    assert heads.sites[0].changed == 3 and heads.sites[0].beside == "2 → 3 heads"


def test_measured_ones_are_compared_by_what_was_measured():
    before = measured_calibration(phases=2)
    after = before.at(target_sparsity=0.6)
    found = compare_calibrations(before, after)
    said = {name: (first, second) for name, first, second in found.about}
    assert said["target error"] == ("0.12", "–") and said["target sparsity"] == ("–", "0.6")
    assert said["sparsity of the whole"][1] == f"{after.summary().sparsity:.1%}"
    starts = {site.start for site in found.sites}
    assert starts <= {0.0, 0.2} and all(site.sparsity[0] != site.sparsity[1] for site in found.sites)
    by_name = {(s.name, s.phase): s.points for s in after.points()}
    site = found.sites[0]
    points = by_name[site.name, 0 if site.start == 0 else 1]
    assert site.error[1] == sum(p.mean for p in points) / len(points)


def test_a_phase_that_begins_elsewhere_is_compared_where_either_begins():
    first = Calibration({"a": [(1, 0)]}, {0.2: {"a": [(0.5, 0)]}})
    second = Calibration({"a": [(1, 0)]}, {0.6: {"a": [(0.5, 0)]}})
    (site,) = compare_calibrations(first, second).sites
    assert site.start == 0.2 and site.topk == (0.5, 1.0)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PLAIN.save("a.json")
    measured_calibration().save("b.json")
    assert main(["diff", "a.json", "a.json"]) == 0 and "the same thresholds at all 2 sites" in capsys.readouterr().out
    assert main(["diff", "a.json", "b.json"]) == 1
    shown = capsys.readouterr().out
    assert (
        "first: a.json" in shown and "only in the second: blocks.0, blocks.1" in shown and "model: – → Model" in shown
    )
    assert main(["diff", "a.json", "none.json"]) == 2 and "sparge: no calibration file" in capsys.readouterr().err
