"""Token order in the passes: stated grids, what stays raster and why, and the nodes that carry an order."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from graphs import CHECKPOINT, Builder, targets

from sparge_compile import attention
from sparge_compile.options import Options
from sparge_compile.passes import pipeline
from sparge_compile.passes.substitute import OP
from sparge_compile.passes.work import Work
from sparge_compile.passes.write.orders import ORDER
from sparge_compile.report import Report

L, D = 60, 4
GRID = (3, 4, 5)
TILES = Options(min_seq_len=0, token_order="tiles", topk=0.5, topp=0.0)


def work_of(*sites: str, length: int = L, dynamic: tuple[int, ...] = ()) -> Work:
    b = Builder()
    x = b.input("x", 1, 2, length, D, dynamic=dynamic)
    for site in sites:
        x = b.call(F.scaled_dot_product_attention, x, x, x, is_causal=site == "causal")
    return Work(b.module(x))


def run(work: Work, options: Options = TILES, **more) -> list[str]:
    decide = partial(pipeline.decide_sites, options=options, **more)
    pipeline.run(work, pipeline.find, decide, *pipeline.rewriting_passes(options, lambda values: values))
    return [row.order.partition(", made by")[0] for row in work.add_to(Report())]


def with_grid(grid, **more) -> Options:
    return Options(min_seq_len=0, token_order="tiles", topk=0.5, topp=0.0, grid=grid, **more)


def test_a_stated_grid_orders_all_sites_by_one_node():
    work = work_of("sdpa", "sdpa")
    assert run(work, with_grid(GRID)) == ["tiles 4×4×4 of 3×4×5"] * 2
    assert str(work.add_to(Report())).count("made by 2 gathers for 2 sites") == 2
    assert targets(work.graph_module).count(ORDER) == 1 and targets(work.graph_module).count(OP) == 2
    x, row = torch.randn(1, 2, L, D), torch.tensor([[0.5, 0.0]] * 2)
    want = attention(x, x, x, topk=0.5, topp=0.0, grid=GRID)
    want = attention(want, want, want, topk=0.5, topp=0.0, grid=GRID)
    torch.testing.assert_close(work.graph_module(x, row, row)[0], want)


def test_raster_is_the_default_and_says_nothing():
    work = work_of("sdpa")
    assert run(work, Options(min_seq_len=0, grid=GRID)) == [""] and ORDER not in targets(work.graph_module)
    assert "order" not in str(work.add_to(Report())).splitlines()[1]


@pytest.mark.parametrize(
    "grid, site, why",
    [
        (None, "sdpa", "no grid known"),
        (GRID, "causal", "causal"),
        ((3, 4, 6), "sdpa", "the grid 3×4×6 that is given has 72 tokens, not 60"),
        ({"other": GRID}, "sdpa", "no grid known"),
        ((0, 3, 4, 6, -1), "sdpa", "the grid 3×4×6 that is given is no part of 60 tokens"),
    ],
    ids=["none", "causal", "size", "name", "left"],
)
def test_what_stays_raster_says_why(grid, site, why):
    work = work_of(site)
    assert run(work, with_grid(grid)) == [f"raster: {why}"] and ORDER not in targets(work.graph_module)
    assert f"raster: {why}" in str(work.add_to(Report()))


def test_a_fixed_grid_is_not_that_of_a_length_that_changes():
    work = work_of("sdpa", dynamic=(2,))
    assert run(work, with_grid(GRID)) == [
        "raster: the grid 3×4×5 that is given has 60 tokens, and their number here changes"
    ]


def test_grids_by_name_and_with_what_stands_beside_them():
    grids = {"(root)#1": (4, 3, 4, 4, 8), "(root)*": GRID}
    assert run(work_of("sdpa", "sdpa"), with_grid(grids, tile=(4, 4, 4))) == [
        "tiles 4×4×4 of 3×4×5",
        "tiles 4×4×4 of 3×4×4 with 4 before and 8 behind",
    ]


def test_a_stated_grid_is_that_of_one_part():
    b = Builder()
    text, video = b.input("text", 1, 2, 7, D), b.input("video", 1, 2, L, D)
    x = b.call(torch.cat, [text, video], 2)
    work = Work(b.module(b.call(F.scaled_dot_product_attention, x, x, x)))
    assert run(work, with_grid(GRID)) == ["tiles 4×4×4 of 3×4×5 with 7 before"]


@pytest.mark.parametrize("beside", [(-1, 8), (8, -1), (0, -1)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_a_sequence_has_left_stands_before_or_behind(beside, dynamic):
    grid = beside[0], 3, 4, 4, beside[1]
    work = work_of("sdpa", "sdpa", dynamic=(2,) if dynamic else ())
    assert all(order.startswith("tiles 4×4×4 of 3×4×4 with") for order in run(work, with_grid(grid)))
    assert targets(work.graph_module).count(ORDER) == 1
    row = torch.tensor([[0.5, 0.0]] * 2)
    for length in (L, L + 37, 40) if dynamic else (L,):  # of 40 tokens the grid is no part
        x = torch.randn(1, 2, length, D)
        left = length - 48 - max(beside)
        whole = tuple(left if size == -1 else size for size in grid) if left >= 0 else None
        want = attention(x, x, x, topk=0.5, topp=0.0, grid=whole)
        want = attention(want, want, want, topk=0.5, topp=0.0, grid=whole)
        torch.testing.assert_close(work.graph_module(x, row, row)[0], want)


def test_the_keys_of_another_sequence_are_not_what_is_left():
    b = Builder()
    x, text = b.input("x", 1, 2, 48, D), b.input("text", 1, 2, L, D)
    work = Work(b.module(b.call(F.scaled_dot_product_attention, x, text, text)))
    assert run(work, with_grid((0, 3, 4, 4, -1))) == ["raster: the grid 3×4×4 that is given is no part of 48 tokens"]


def test_a_marker_states_the_grid_of_its_module_or_of_what_it_names():
    b = Builder()
    x = b.input("x", 1, 2, L, D)
    b.opaque(torch.ops.sparge.grid, 0, 5, 4, 3, 0, "second*")
    for path in ("first", "second", "third"):
        with b.inside(path):
            if path != "third":
                b.opaque(torch.ops.sparge.grid, 0, *GRID, -1 if path == "first" else 0, "")
            x = b.call(F.scaled_dot_product_attention, x, x, x)
    work = Work(b.module(x))
    assert run(work) == [
        "tiles 4×4×4 of 3×4×5",
        "tiles 4×4×4 of 5×4×3",
        "raster: no grid known",
    ]
    assert "sparge.grid" not in work.graph_module.code


def test_the_grid_of_options_comes_before_that_of_markers():
    b = Builder()
    b.opaque(torch.ops.sparge.grid, 0, 5, 4, 3, 0, "*")
    x = b.input("x", 1, 2, L, D)
    work = Work(b.module(b.call(F.scaled_dot_product_attention, x, x, x)))
    assert run(work, with_grid(GRID)) == ["tiles 4×4×4 of 3×4×5"]


def test_an_order_is_handed_to_checkpointed_code_once():
    b = Builder()
    x = b.input("x", 1, 2, L, D)
    body = Builder(of=b)
    y = body.input("y", 1, 2, L, D)
    for _ in range(2):
        y = body.call(F.scaled_dot_product_attention, y, y, y)
    called = b.nested(CHECKPOINT, body.module(y), x)
    work = Work(b.module(called))
    run(work, with_grid(GRID))
    (inner,) = [m for m in pipeline.graphs_of(work.graph_module) if m is not work.graph_module]
    assert targets(work.graph_module).count(ORDER) == 1 and ORDER not in targets(inner)
    assert len(inner.graph.find_nodes(op="placeholder")) == 1 + 2 + 2  # y, the order, and two thresholds


def test_modules_with_other_grids_share_no_order():
    work = work_of("sdpa")
    pipeline.run(work, pipeline.find)
    (match,) = work.matches
    from dataclasses import replace

    other = replace(match, site=replace(match.site, name="other"))
    options = with_grid({"(root)": GRID, "other": (4, 3, 5)})
    pipeline.decide_sites(work, options, alike=lambda match: [(other, False)])
    assert work.steps[0].decision.order == "raster: modules that share this graph are given other grids"
