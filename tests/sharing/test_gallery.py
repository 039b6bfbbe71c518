"""The gallery: every file loads, says what it is for, fits its model, and stands in the table as it is."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import jsonschema
import make_gallery
import pytest
import transformer
from setups import SMALL

from sparge_compile import Calibration, attach

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "calibration.schema.json").read_text())


def gallery_table():
    spec = importlib.util.spec_from_file_location("gallery_table", ROOT / "gallery" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = gallery_table()


def test_the_page_has_the_table_of_the_files():
    page = TABLE.PAGE.read_text("utf-8")
    assert TABLE.BEGIN + TABLE.table() + TABLE.END in page, "run: python gallery/table.py --write"


def test_the_study_makes_the_files_of_its_model():
    there = {path.stem for path in TABLE.files() if path.parent.name == "moving_digits"}
    assert there == {*make_gallery.FILES, make_gallery.STUDENT}


@pytest.mark.parametrize("path", TABLE.files(), ids=lambda path: path.stem)
def test_a_file_says_what_it_is_for(path):
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    calibration = Calibration.load(path)
    assert {"model_id", "resolution", "licence"} <= set(calibration.about)
    assert calibration.origin is None or calibration.origin.complete
    assert f"_{calibration.about['resolution']}" in path.stem, "named by model, resolution and aim"
    assert not re.search(r"/(home|tmp|work|root)/", path.read_text()), "nobody's own paths"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "gallery" / "moving_digits").glob("*.json")), ids=lambda path: path.stem
)
def test_the_files_of_the_trained_model_fit_it(path):
    model = transformer.VideoTransformer()
    calibration = Calibration.load(path)
    attach(model, calibration).remove()
    curves = {} if calibration.origin is None else calibration.origin.curves
    assert all(each.head_size == model.blocks[0].attention.norm_query.normalized_shape[0] for each in curves.values())
    if path.stem.startswith("student"):
        assert calibration.sites == Calibration.load(SMALL.weights / "student.json").sites
    else:
        assert set(curves) == {name for name, _ in model.named_modules() if name.endswith(".attention")}
