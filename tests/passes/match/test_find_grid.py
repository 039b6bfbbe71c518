"""The grid that a graph shows for the tokens of queries and keys, and what must not be taken for one."""

from __future__ import annotations

import operator
import re

import pytest
import torch
import torch.nn.functional as F
from graphs import CHECKPOINT, Builder
from torch.fx import Node

from sparge_compile.kernels.order import Grid
from sparge_compile.options import Options
from sparge_compile.passes.find import find
from sparge_compile.passes.order import NO_GRID, SiteOrder, order_sites
from sparge_compile.passes.read.fx_utils import size_hint

T, H, W, C, TEXT = 3, 4, 5, 8, 6


def attend(b: Builder, x: Node, y: Node | None = None) -> Node:
    """Two heads of x [B, L, C] attend to y."""
    q, k = (b.method("transpose", b.method("unflatten", z, -1, (2, -1)), 1, 2) for z in (x, x if y is None else y))
    return b.call(F.scaled_dot_product_attention, q, k, k)


def orders(b: Builder, *outputs: Node, **options: object) -> list[SiteOrder]:
    graph_module = b.module(*outputs)
    settings = Options(token_order="tiles", **options)
    return list(order_sites(graph_module, find(graph_module), settings).values())


def grids(b: Builder, *outputs: Node, **options: object) -> list[tuple[Grid | None, Grid | None] | str]:
    """Of each site the grids of queries and keys, as they were traced; of one in raster order, why."""

    def hints(sized):
        return None if sized is None else Grid(*map(size_hint, sized.grid))

    found = orders(b, *outputs, **options)
    return [order.why if order.is_raster else (hints(order.queries), hints(order.keys)) for order in found]


def both(*sizes: int) -> list[tuple[Grid, Grid]]:
    return [(Grid(*sizes), Grid(*sizes))]


def tokens_of(b: Builder, video: Node) -> Node:
    """[B, C, T, H, W] as a convolution gives it, in a line."""
    return b.method("transpose", b.method("flatten", video, 2), 1, 2)


def video(b: Builder, frames: int = T, height: int = H, width: int = W, **how: object) -> Node:
    """The output of a patch embedding."""
    x = b.input("x", 1, 4, frames, 2 * height, 2 * width, **how)  # type: ignore[arg-type]
    weight = b.input("weight", C, 4, 1, 2, 2)
    return b.call(F.conv3d, x, weight, None, (1, 2, 2))


def image(b: Builder) -> Node:
    x, weight = b.input("x", 1, 4, 2 * H, 2 * W), b.input("weight", C, 4, 2, 2)
    return b.call(F.conv2d, x, weight, None, 2)


def test_a_flattened_video():
    b = Builder()
    assert grids(b, attend(b, tokens_of(b, video(b)))) == both(0, T, H, W, 0)


def test_through_what_leaves_tokens_in_their_place():
    b = Builder()
    x = tokens_of(b, video(b))
    h = b.call(F.linear, b.call(F.layer_norm, x, (C,)), b.input("w", C, C))
    h = b.call(operator.add, x, b.call(F.gelu, h))
    assert grids(b, attend(b, b.call(operator.mul, h, b.input("gate", 1, 1, C)))) == both(0, T, H, W, 0)


def test_symbolic_sizes_have_nodes():
    b = Builder()
    x = b.call(F.linear, tokens_of(b, video(b, dynamic=(2, 3, 4))), b.input("w", C, C))
    (order,) = orders(b, attend(b, x))
    assert [size_hint(size) for size in order.queries.grid] == [0, T, H, W, 0]
    assert isinstance(order.queries.grid.height, torch.SymInt) and order.queries.equals(order.keys)
    assert all(isinstance(part.node, Node) for term in order.queries.terms[1:4] for part in term)
    assert re.fullmatch(r"tiles 4×4×4 of s\d+×\(s\d+//2\)×\(s\d+//2\)", str(order))


def test_an_image_has_one_frame():
    b = Builder()
    (order,) = orders(b, attend(b, tokens_of(b, image(b))))
    assert order.queries.grid == Grid(0, 1, H, W, 0) and str(order) == "tiles 1×8×8 of 1×4×5"


def test_patches_that_are_cut_by_reshapes():
    b = Builder()
    x = b.method("view", b.input("x", 1, 3, 2 * H, 2 * W), 1, 3, H, 2, W, 2)
    x = b.method("flatten", b.method("flatten", b.method("permute", x, 0, 2, 4, 1, 3, 5), 3), 1, 2)
    x = b.call(F.linear, x, b.input("w", C, 12))
    assert grids(b, attend(b, x)) == both(0, 1, H, W, 0)


def test_a_rotary_table():
    """Frames, rows and columns are broadcast into the table of a model that gets its tokens in a line."""
    b = Builder()
    x = b.input("x", 1, T * H * W, C)
    axes = [b.call(torch.arange, n) for n in (T, H, W)]
    mesh = b.call(torch.meshgrid, *axes, indexing="ij")
    angles = [b.method("flatten", b.call(operator.getitem, mesh, i)) for i in range(3)]
    table = b.method("unsqueeze", b.call(torch.stack, [*angles, angles[0], *angles, angles[0]], -1), 0)
    assert grids(b, attend(b, b.call(operator.mul, x, table))) == both(0, T, H, W, 0)


def test_a_table_that_is_written_in_halves():
    b = Builder()
    x = tokens_of(b, video(b))
    out = b.call(torch.empty_like, x)
    for first in (0, 1):
        half = b.call(operator.getitem, x, (Ellipsis, slice(first, None, 2)))
        b.opaque(operator.setitem, out, (Ellipsis, slice(first, None, 2)), half)
    assert grids(b, attend(b, out)) == both(0, T, H, W, 0)


@pytest.mark.parametrize("text_first", [True, False])
def test_text_beside_a_video(text_first: bool):
    b = Builder()
    text, x = b.input("text", 1, TEXT, C), tokens_of(b, video(b))
    joint = b.call(torch.cat, [text, x] if text_first else [x, text], 1)
    want = (TEXT, T, H, W, 0) if text_first else (0, T, H, W, TEXT)
    assert grids(b, attend(b, joint)) == both(*want)


def test_a_video_that_is_cut_out_of_what_it_was_joined_to():
    b = Builder()
    text, x = b.input("text", 1, TEXT, C), tokens_of(b, video(b))
    joint = b.call(operator.mul, b.call(torch.cat, [text, x], 1), 2.0)
    cut = b.call(operator.getitem, joint, (slice(None), slice(TEXT, None)))
    split = b.call(operator.getitem, b.method("split", joint, [TEXT, T * H * W], 1), 1)
    shifted = b.call(operator.getitem, joint, (slice(None), slice(TEXT + 1, None)))
    found = grids(b, attend(b, cut), attend(b, split), attend(b, shifted))
    assert found == [*both(0, T, H, W, 0) * 2, NO_GRID]


@pytest.mark.parametrize("text_first", [True, False])
def test_a_video_that_is_cut_out_at_a_symbol(text_first: bool):
    b = Builder()
    text, x = b.input("text", 1, TEXT, C, dynamic=(1,)), tokens_of(b, video(b, dynamic=(2, 3, 4)))
    size = b.call(torch.ops.aten.sym_size.int, text, 1)
    joint = b.call(torch.cat, [text, x] if text_first else [x, text], 1)
    where = slice(size, None) if text_first else slice(None, b.call(operator.neg, size))
    assert grids(b, attend(b, b.call(operator.getitem, joint, (slice(None), where)))) == both(0, T, H, W, 0)


def test_cross_attention_has_keys_as_they_are():
    b = Builder()
    assert grids(b, attend(b, tokens_of(b, video(b)), b.input("text", 1, TEXT, C))) == [(Grid(0, T, H, W, 0), None)]


def test_inside_and_behind_checkpointed_code():
    b = Builder()
    x = tokens_of(b, video(b))
    for i in range(2):
        body = Builder(of=b)
        y = body.input("y", 1, T * H * W, C)
        out = body.method("flatten", body.method("transpose", attend(body, y), 1, 2), 2)
        called = b.nested(CHECKPOINT, body.module(body.call(operator.add, y, out)), x, name=f"body_{i}")
        x = b.call(operator.getitem, called, 0)
    assert grids(b, attend(b, x)) == both(0, T, H, W, 0) * 3


def frames_of_frames(b: Builder) -> Node:
    """Modulation of each frame tells frames and the tokens of a frame: two axes, and no rows and columns."""
    x = b.method("unflatten", b.input("x", 1, T * H * W, C), 1, (T, H * W))
    return attend(b, b.method("flatten", b.call(operator.mul, x, b.input("gate", 1, T, 1, C)), 1, 2))


def two_videos(b: Builder) -> Node:
    x = tokens_of(b, video(b))
    return attend(b, b.call(torch.cat, [x, b.method("clone", x)], 1))


def moved(b: Builder) -> Node:
    """A product over the tokens, and a shift, move them."""
    x = tokens_of(b, video(b))
    return attend(b, b.call(torch.matmul, b.input("mix", 60, 60), b.call(torch.roll, x, 1, 1)))


def pairs_of_rows(b: Builder) -> Node:
    """Four axes are no grid of three."""
    x = b.method("unflatten", tokens_of(b, video(b)), 1, (T, 2, H // 2, W))
    x = b.call(operator.mul, x, b.input("g", 1, T, 1, 1, 1, C))
    x = b.method("flatten", b.method("transpose", x, 2, 3), 1, 4)
    return attend(b, x)


@pytest.mark.parametrize(
    "build, why",
    [
        (frames_of_frames, NO_GRID),
        (two_videos, "several parts of the sequence are grids"),
        (moved, NO_GRID),
        (pairs_of_rows, NO_GRID),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_no_grid(build, why: str):
    b = Builder()
    assert grids(b, build(b)) == [why]


def test_a_window_has_the_grid_of_the_window():
    b = Builder()
    x = b.method("permute", image(b), 0, 2, 3, 1)  # [B, H, W, C]
    x = b.call(F.pad, x, (0, 0, 0, 1))  # 4 × 6
    x = b.method("view", x, 1, 2, 2, 2, 3, C)
    x = b.method("reshape", b.method("permute", x, 0, 1, 3, 2, 4, 5), 4, 6, C)
    assert grids(b, attend(b, x)) in ([NO_GRID], both(0, 1, 2, 3, 0))


def test_queries_and_keys_in_other_orders_stay():
    b = Builder()
    x = b.input("x", 1, 4, 2, 2 * H, 2 * W)
    y = b.call(F.conv3d, x, b.input("w", C, 4, 1, 2, 2), None, (1, 2, 2))
    turned = b.method("transpose", y, 3, 4)
    assert grids(b, attend(b, tokens_of(b, y), tokens_of(b, turned))) == [
        "queries and keys are laid out in different grids"
    ]
