"""The schema of calibration files says what is written, and the page names every field of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_calibration import measured_calibration

from sparge_compile import Calibration
from sparge_compile.thresholds import json_file
from sparge_compile.thresholds.about import ABOUT
from sparge_compile.thresholds.output import ModelOutput

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "calibration.schema.json").read_text())

SITES = ("blocks.0", "blocks.1")
OUTPUT = ModelOutput(dict.fromkeys(SITES, (1.0, 0.5)), 0.2, ((0.1, 0.2),), 0.9, {"runs": 4.0, "error": 0.1})
FULL = measured_calibration(
    target_error=None, by="mean", target_output_error=0.1, output=OUTPUT, gains={"blocks.0": (0.1, 0.2)}
)
EVERYTHING = Calibration(
    FULL.sites,
    FULL.phases,
    FULL.origin,
    kept={"blocks.0": {"keep_keys": 512, "dense_queries": True}, "blocks.1": {"keep_keys": "text"}},
    tiles={"blocks.1": (2, 4, 8)},
    about=dict.fromkeys(ABOUT, "x"),
).scheduled(dense_steps=(2, None), dense_layers=1)
FILES = {
    "measured": measured_calibration(1),
    "phases": measured_calibration(3),
    "plain": Calibration({"*": [(1, 0)]}, phases={0.2: {"*": [(0.1, 0.3)]}}).scheduled(dense_layers=["a", "b.*"]),
    "empty": Calibration({}),
    "everything": EVERYTHING,
}


def signed(calibration: Calibration) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json_file.to_text(calibration.to_dict(), "sites"))
    return document


def fields(schema: Any) -> Iterator[str]:
    """The names of all fields of a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield from schema["properties"]
        for value in schema.values():
            yield from fields(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from fields(value)


def keys(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield key
            yield from keys(value)
    elif isinstance(document, list):
        for value in document:
            yield from keys(value)


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_fits_the_schema_and_is_read_back(name, tmp_path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(signed(FILES[name]), SCHEMA)
    FILES[name].save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == FILES[name]


def test_a_file_by_hand_fits_and_the_schema_has_no_field_that_no_file_has():
    hand = {"format": "sparge-calibration", "format_version": 1, "sites": {"*": {"thresholds": [[0.3, 0.1]]}}}
    jsonschema.validate(hand, SCHEMA)
    assert set(fields(SCHEMA)) <= set(keys(signed(EVERYTHING)))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(extra=1),
        lambda d: d.pop("checksum"),
        lambda d: d["origin"].update(extra=1),
        lambda d: d["origin"].pop("seed"),
        lambda d: d["sites"]["blocks.0"].update(extra=1),
        lambda d: d["sites"]["blocks.0"].pop("samples"),
        lambda d: d["sites"]["blocks.0"]["thresholds"][0].__setitem__(0, [0.5]),
        lambda d: d["sites"]["blocks.0"]["curves"][0].pop("cost"),
        lambda d: d["sites"]["blocks.0"]["kept"].update(extra=1),
        lambda d: d["about"].update(colour="red"),
        lambda d: d["about"].update(note=""),
        lambda d: d["schedule"].update(extra=1),
        lambda d: d["origin"]["output"].pop("safety"),
    ],
)
def test_what_the_schema_refuses_the_reader_refuses_too(change, tmp_path):
    document = signed(EVERYTHING)
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)
    path = tmp_path / "c.json"
    path.write_text(json_file.to_text(document, "sites") if "checksum" in document else json.dumps(document))
    with pytest.raises(ValueError, match=r"calibration file|does not read|this version reads"):
        Calibration.load(path)


def test_the_page_names_every_field():
    page = (ROOT / "docs" / "calibration.md").read_text()
    missing = [name for name in dict.fromkeys(fields(SCHEMA)) if not re.search(rf"`{name}\b", page)]
    assert not missing, f"docs/calibration.md, The file, lacks {missing}"
