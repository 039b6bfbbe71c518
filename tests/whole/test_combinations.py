"""What people use beside sparse attention works, or is refused by the sentence that the table has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from combination_rows import ROWS
from combinations import tried

CHEAP = {"offloading by group, block by block", "accelerate: TorchDynamoPlugin"}
PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=() if row.name in CHEAP else pytest.mark.slow) for row in ROWS]
)
def test_beside(row):
    came = tried(row)
    if came.startswith("not tried"):
        pytest.skip(came)
    assert came == ("refused" if row.refused else "works")


def test_the_page_has_every_row():
    rows = re.findall(r"(?m)^\| (\S.*?) +\| (works|refused) ", PAGE.read_text())
    assert rows == [(row.name, "refused" if row.refused else "works") for row in ROWS]
