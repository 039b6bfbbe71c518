"""Tiles that a calibration has: in its file, used without an option, attached, and where they cannot be used."""

from __future__ import annotations

import json

import pytest
import torch
from test_followed import Video, by_blocks, grid_of, made, video_of

from sparge_compile import Calibration, attach, explain, rewrite
from sparge_compile.notices import forget_warnings
from sparge_compile.options import Options

GRID = (4, 8, 8)
PAIR = [(0.3, 0.0)]
NAMES = [f"blocks.{i}.attn" for i in range(2)]
TILES = {NAMES[0]: (2, 4, 8), NAMES[1]: (4, 4, 4)}
CALIBRATION = Calibration(dict.fromkeys(NAMES, PAIR), tiles=TILES)
PLAIN = Calibration(CALIBRATION.sites)
OPTIONS = {"min_seq_len": 0, "inner": "eager", "on_unsupported": "dense"}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    forget_warnings()


def by_hand(tiles: dict[str, tuple[int, ...]] = TILES) -> torch.Tensor:
    """One block after the other, each with the options that say the same."""
    model, outs = made(), []
    with torch.no_grad():
        x = video_of(GRID).flatten(2).transpose(1, 2).contiguous()
        for block, tile in zip(model.blocks, tiles.values(), strict=True):
            options = {**OPTIONS, "token_order": "tiles", "tile": tile, "grid": GRID, "topk": 0.3, "topp": 0.0}
            x = torch.compile(block, backend="sparge", options=options)(x)
            outs.append(x)
    return x


def test_a_file_has_the_tiles_and_an_older_one_means_raster(tmp_path):
    path = tmp_path / "c.json"
    CALIBRATION.save(path)
    assert json.loads(path.read_text())["format_version"] == 5
    assert Calibration.load(path) == CALIBRATION and "tiles 4×4×4: blocks.1.attn" in CALIBRATION.table()
    assert CALIBRATION.at_progress(0.5).tiles == CALIBRATION.scheduled(dense_steps=2).tiles == TILES
    PLAIN.save(path)
    assert json.loads(path.read_text())["format_version"] == 2 and Calibration.load(path).tile_of(NAMES[0]) is None


def test_a_file_has_tiles_that_are_moved_and_the_model_runs_in_them(tmp_path):
    moved = {name: (*tile, 0, 2, 1) for name, tile in TILES.items()}
    calibration = Calibration(CALIBRATION.sites, tiles=moved)
    calibration.save(tmp_path / "moved.json")
    assert json.loads((tmp_path / "moved.json").read_text())["format_version"] == 7
    assert Calibration.load(tmp_path / "moved.json") == calibration and "moved by 0×2×1" in calibration.table()
    model, options = made(), {**OPTIONS, "calibration": tmp_path / "moved.json", "grid": GRID}
    with torch.no_grad():
        out = torch.compile(model, backend="sparge", options=options)(video_of(GRID))
        torch._dynamo.reset()
        attach(model, calibration, grid=grid_of)
        attached = by_blocks(model, options=OPTIONS)(video_of(GRID))
        program = torch.export.export(model, (video_of(GRID),))
        exported = rewrite(program, {"min_seq_len": 0, "grid": GRID}).module()(video_of(GRID))
    for found in (out, attached, exported):
        torch.testing.assert_close(found, by_hand(moved))
        assert not torch.allclose(found, by_hand(), rtol=1e-4, atol=1e-4)
    rows = explain(made(), options)(video_of(GRID))
    assert rows.sites[0].order.startswith("tiles 2×4×8 moved by 0×2×1 of 4×8×8")


@pytest.mark.parametrize(
    "tiles", [{"other": (2, 4, 8)}, {NAMES[0]: (4, 8, 8)}, [(2, 4, 8)]], ids=["site", "size", "list"]
)
def test_tiles_that_are_none_are_refused(tiles):
    with pytest.raises(ValueError, match=r"tiles|tile is no box"):
        Calibration(CALIBRATION.sites, tiles=tiles)


@pytest.mark.parametrize(
    "options, measured, tile",
    [
        ({}, None, None),
        ({}, (4, 4, 4), (4, 4, 4)),
        ({"tile": (1, 8, 8)}, (4, 4, 4), (1, 8, 8)),
        ({"tile": (1, 8, 8)}, None, None),
        ({"token_order": "raster"}, (4, 4, 4), None),
        ({"token_order": "tiles"}, (4, 4, 4), (4, 4, 4)),
        ({"token_order": "tiles"}, None, (4, 4, 4)),
    ],
)
def test_options_come_before_what_was_measured(options, measured, tile):
    assert Options(**options).tile_of(measured) == tile
    given = None if measured is None else Calibration({"*": PAIR}, tiles={"*": measured})
    assert Options(**options, calibration=given).orders_tokens == (tile is not None)


def test_tiles_of_a_calibration_need_no_option(opened_graphs):
    model = made()
    options = {**OPTIONS, "calibration": CALIBRATION, "grid": GRID}
    with torch.no_grad():
        out = torch.compile(model, backend="sparge", options=options)(video_of(GRID))
    torch.testing.assert_close(out, by_hand())
    rows = explain(made(), options)(video_of(GRID))
    assert [row.order.split(" of")[0] for row in rows] == ["tiles 2×4×8", "tiles 4×4×4"]


def test_attached_tiles_reach_blocks_that_are_compiled_alone():
    """Blocks of other tiles are other graphs, as the marker in each says its own."""
    model = made()
    attached = attach(model, CALIBRATION, grid=grid_of)
    with torch.no_grad():
        out = by_blocks(model, options=OPTIONS)(video_of(GRID))
    torch.testing.assert_close(out, by_hand())
    assert attached.get().tiles == TILES
    attached.set(PLAIN)  # thresholds alone
    with pytest.raises(ValueError, match="for blocks of another order"):
        attached.set(Calibration(CALIBRATION.sites, tiles={NAMES[0]: (2, 4, 8)}))


@pytest.mark.parametrize("how", ["option", "attached", "blocks"])
def test_where_tiles_cannot_be_used_the_user_hears_of_it(how, opened_graphs):
    model: Video = made()
    options = {**OPTIONS, "on_unsupported": "warn"}
    if how == "attached":
        attach(model, CALIBRATION)  # nobody knows the grid
    else:
        same = Calibration(CALIBRATION.sites, tiles=dict.fromkeys(NAMES, (2, 4, 8)))
        options["calibration"] = CALIBRATION if how == "blocks" else same
    if how == "blocks":  # they share a graph, in which each were to have its own tiles
        options["grid"] = GRID
    with torch.no_grad(), pytest.warns(UserWarning, match="measured in tiles, but its tokens are in raster order"):
        out = by_blocks(model, options=options)(video_of(GRID))
    orders = [step.decision.order for graph in opened_graphs for step in graph.steps]
    why = "modules that share this graph are given other tiles" if how == "blocks" else "no grid known"
    assert orders[0] == f"raster: {why}; thresholds measured in tiles 2×4×8"
    torch._dynamo.reset()
    with torch.no_grad():
        raster = by_blocks(made(), options={**OPTIONS, "calibration": PLAIN})(video_of(GRID))
    torch.testing.assert_close(out, raster)
