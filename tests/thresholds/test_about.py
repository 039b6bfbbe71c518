"""What a calibration says of itself: kept wherever the thresholds go, refused where it is no short text; its tables."""

from __future__ import annotations

import json

import pytest
from test_calibration import measured_calibration

from sparge_compile import Calibration
from sparge_compile.thresholds.about import parse_about

WAN = {"model_id": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "resolution": "81x480x832"}


def test_it_is_in_the_file_and_stays_where_thresholds_change(tmp_path):
    described = measured_calibration().described(resolution="81x480x832", model_id=WAN["model_id"])
    assert list(described.about.items()) == list(WAN.items()), "in one order"
    path = tmp_path / "c.json"
    described.save(path)
    assert json.loads(path.read_text())["format_version"] == 6
    loaded = Calibration.load(path)
    assert loaded == described and loaded.table().startswith("model id: Wan-AI/Wan2.1-T2V-1.3B-Diffusers\nresolution: ")
    for other in (
        loaded.at(target_sparsity=0.3),
        loaded.scheduled(dense_layers=1),
        loaded.at_progress(0.5),
        loaded.scheduled(sparsities=(0.1, 0.3)),
    ):
        assert other.about == WAN
    plain = loaded.described(model_id=None, resolution=None)
    assert plain == measured_calibration() and plain.to_dict()["format_version"] == 2


@pytest.mark.parametrize(
    "about, words",
    [
        ({"colour": "red"}, "model_id, part, resolution"),
        (["model_id"], "bad about"),
        ({"note": ""}, "bad note"),
        ({"note": "two\nlines"}, "bad note"),
        ({"steps": 50}, "bad steps"),
        ({"note": "x" * 501}, "at most 500"),
    ],
)
def test_what_is_no_short_text_is_refused(about, words):
    with pytest.raises(ValueError, match=words):
        Calibration({"*": [(0.5, 0.0)]}, about=about)


def test_entries_of_the_command_line():
    assert parse_about(["note=a = b", "steps="]) == {"note": "a = b", "steps": None}
    with pytest.raises(ValueError, match="NAME=TEXT"):
        parse_about(["resolution"])


def test_a_row_for_each_head_of_some_sites():
    found = measured_calibration(phases=2)
    lines = found.table("blocks.1").splitlines()
    assert lines[0].split()[:4] == ["site", "from", "head", "topk"] and len(lines) == 2 + 2 * 2
    assert lines[2].split()[:3] == ["blocks.1", "0", "0"] and "%" in lines[2]
    assert len(found.table("blocks.*").splitlines()) == 2 + 2 * 2 * 2
    plain = Calibration({"a": [(0.25, 0.5)]}).table("a").splitlines()
    assert plain[2].split() == ["a", "0", "0", "0.25", "0.5"] and len(plain[0].split()) == 5
    with pytest.raises(ValueError, match=r"no such site.*blocks\.0, blocks\.1"):
        found.table("layers.*")
