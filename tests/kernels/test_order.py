"""Token order: a permutation after which the blocks of a grid are compact, tiles where whole tiles fit.

Faces are held to the reference on permuted tokens, the public function to dense attention of the tokens as they stand.
"""

from __future__ import annotations

import math
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_map, block_constant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from sparge_compile import Grid, attention
from sparge_compile.keeping import END, OF_GRAPH
from sparge_compile.kernels import order, reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap
from sparge_compile.kernels.how import How
from sparge_compile.kernels.order import TILE, copy_of_order, made_as, make_order, parse_tile, tile_of, tile_text

CPU = torch.device("cpu")
TILES = [(2, 4, 8), (4, 4, 4), (1, 8, 8), (4, 8, 2), (1, 1, 64), (3, 5, 4), (1, 2, 3)]
GRIDS = [Grid(0, 3, 5, 7, 0), Grid(70, 5, 6, 13, 9), Grid(3, 4, 4, 8, 0)]
MASKS = ("none", "row", "pairs", "float")

grids = st.builds(
    Grid, st.integers(0, 140), st.integers(1, 6), st.integers(1, 10), st.integers(1, 12), st.integers(0, 70)
)


def thresholds(heads: int) -> Tensor:
    return torch.tensor(([[0.34, 0.55], [0.12, 0.81]] * heads)[:heads])


def operands(grid: Grid, heads: int = 2, key_heads: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and v [B, H, L, D] whose memory is [B, L, H, D]."""
    shapes = [(2, grid.tokens, h, 16) for h in (heads, key_heads, key_heads)]
    return [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


@given(grid=grids, tile=st.sampled_from(TILES))
@settings(max_examples=60)
def test_an_order_is_a_permutation_of_the_grid(grid: Grid, tile: tuple[int, int, int]) -> None:
    slots, places = make_order(grid, tile, CPU)
    tokens = torch.arange(grid.tokens, dtype=torch.int32)
    assert torch.equal(slots.sort().values, tokens) and torch.equal(slots[places.long()], tokens)
    behind = grid.tokens - grid.suffix
    for beside in (slice(grid.prefix), slice(behind, None)):  # what is no grid stays where it is
        assert torch.equal(slots[beside], tokens[beside])


@given(grid=grids, tile=st.sampled_from(TILES), scale=st.integers(1, 6))
@settings(max_examples=40)
def test_parts_are_cut_until_each_is_a_block(grid: Grid, tile: tuple[int, int, int], scale: int) -> None:
    grid = grid._replace(frames=grid.frames * scale, width=grid.width * scale)
    levels = order._levels

    def blocks() -> list[list[int]]:
        return [sorted(block.tolist()) for block in make_order(grid, tile, CPU).slots.split(KEY_BLOCK)]

    found = blocks()
    with mock.patch.object(order, "_levels", lambda count: levels(count) + 3):
        assert blocks() == found


def test_a_tile_that_is_moved_is_that_of_the_grid_moved_back() -> None:
    """Borders lie where they are asked for; what is cut off on one side comes in on the other."""
    grid = Grid(3, 8, 8, 8, 5)
    slots, places = make_order(grid, (4, 4, 4, 0, 2, 3), CPU)
    assert slots.sort().values.tolist() == list(range(grid.tokens))
    assert torch.equal(slots[places.long()], torch.arange(grid.tokens, dtype=torch.int32))
    number = torch.arange(grid.tokens)
    assert torch.equal(slots[:3], number[:3].int()) and torch.equal(slots[-5:], number[-5:].int())
    rolled = number[3:-5].view(8, 8, 8).roll((0, -2, -3), (0, 1, 2)).flatten()
    plain = make_order(grid, (4, 4, 4), CPU).slots[3:-5] - 3
    assert torch.equal(slots[3:-5], rolled[plain.long()].int())
    assert (
        parse_tile((4, 4, 4, 0, 0, 0), "here") == (4, 4, 4) and tile_text((1, 8, 8, 0, 4, 4)) == "1×8×8 moved by 0×4×4"
    )
    for wrong in ((4, 4, 4, 1), (4, 4, 4, 0, -1, 0), (4, 4, 5, 0, 0, 1)):
        with pytest.raises(ValueError, match="tile is no box of tokens"):
            parse_tile(wrong, "here")


def test_attention_in_moved_tiles_is_that_of_moved_operands() -> None:
    grid, by, seed = (8, 8, 8), (1, 2, 3), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 512, 16, generator=seed).unbind()
    options = {"topk": 0.3, "topp": 0.0, "grid": grid}

    def moved(x: torch.Tensor, sign: int) -> torch.Tensor:
        return x.unflatten(2, grid).roll([sign * n for n in by], (2, 3, 4)).flatten(2, 4)

    wanted = moved(attention(*(moved(x, -1) for x in (q, k, v)), tile=(4, 4, 4), **options), 1)
    found = attention(q, k, v, tile=(4, 4, 4, *by), **options)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, attention(q, k, v, tile=(4, 4, 4), **options))


def boxes(grid: Grid, tile: tuple[int, int, int], block: int) -> list[tuple[int, ...]]:
    """Frames, rows and columns of the box around each block of a grid without anything before or behind it."""
    slots = make_order(grid, tile, CPU).slots
    found = []
    for tokens in slots.split(block):
        where = (tokens // (grid.height * grid.width), tokens // grid.width % grid.height, tokens % grid.width)
        found.append(tuple(int(x.max() - x.min()) + 1 for x in where))
    return found


@given(
    count=st.tuples(*(st.integers(1, n) for n in (5, 6, 7))),
    tile=st.sampled_from([tile for tile in TILES if math.prod(tile) == KEY_BLOCK]),
)
@settings(max_examples=30)
def test_a_grid_of_whole_tiles_is_cut_into_them(count: tuple[int, ...], tile: tuple[int, int, int]) -> None:
    grid = Grid(0, *(n * size for n, size in zip(count, tile, strict=True)), 0)
    assert set(boxes(grid, tile, KEY_BLOCK)) == {tile}
    of_queries = boxes(grid, tile, QUERY_BLOCK)
    assert all(math.prod(box) == QUERY_BLOCK for box in of_queries[: math.prod(count) // 2])  # two that touch


@pytest.mark.parametrize("tile, pair", [((2, 4, 8), (4, 4, 8)), ((4, 8, 2), (4, 8, 4)), ((4, 4, 4), (8, 4, 4))])
def test_two_tiles_together_are_round(tile: tuple[int, int, int], pair: tuple[int, int, int]) -> None:
    grid = Grid(0, *(2 * size for size in tile), 0)
    assert set(boxes(grid, tile, QUERY_BLOCK)) == {pair}


def spread(where: Tensor, block: int, shape: tuple[int, ...]) -> Tensor:
    """How far the places [L, 3] of tokens are from the middle of their block, squared, in units of a shape: [N]."""
    far = torch.stack([some.var(0, correction=0) for some in where.split(block)])
    return (far / torch.tensor(shape) ** 2).sum(-1) / sum((1 - n**-2.0) / 12 for n in shape)


@pytest.mark.parametrize("grid, tile", [((21, 30, 52), (2, 4, 8)), ((13, 15, 14), (4, 4, 4)), ((1, 37, 53), (1, 8, 8))])
@pytest.mark.parametrize("prefix", [0, 226])
def test_blocks_of_any_grid_are_nearly_as_compact_as_tiles(
    grid: tuple[int, int, int], tile: tuple[int, int, int], prefix: int
) -> None:
    slots = make_order(Grid(prefix, *grid, 0), tile, CPU).slots.double()
    number = slots[-(-prefix // QUERY_BLOCK) * QUERY_BLOCK :] - prefix  # of the blocks of the grid alone
    where = torch.stack((number // (grid[1] * grid[2]), number // grid[2] % grid[1], number % grid[2]), -1)
    far = spread(where, KEY_BLOCK, tile)
    assert far.mean() < 1.35 and far.max() < 8  # none is torn
    if grid[0] > 1:
        assert spread(where, QUERY_BLOCK, (2 * tile[0], *tile[1:])).mean() < 1.4


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_rows_of_any_dimension(dim: int) -> None:
    grid = (7, 7, 7, 7)
    x = torch.randn(grid, dtype=torch.float64).permute(2, 0, 3, 1).requires_grad_()
    index = torch.randperm(7).int()
    inverse = index.argsort().int()
    got = torch.ops.sparge.rows(x, index, inverse, dim)
    torch.testing.assert_close(got, x.index_select(dim, index))
    assert got.stride() == x.stride()
    assert torch.autograd.gradcheck(lambda y: torch.ops.sparge.rows(y, index, inverse, dim), x, fast_mode=True)
    opcheck(torch.ops.sparge.rows.default, (x, index, inverse, dim))


def test_operands_that_are_reordered_already() -> None:
    grid = Grid(5, 3, 5, 7, 9)
    slots, places = torch.ops.sparge.order(*grid, [2, 4, 8], CPU)
    q, k, v = (x.detach() for x in operands(grid))
    keep = torch.rand(2, 1, 1, grid.tokens) > 0.3
    how = {"attn_mask": keep, "slots_q": slots, "places_q": places, "slots_k": slots, "places_k": places}
    want = torch.ops.sparge.attention(q, k, v, thresholds(2), **how)
    moved = (x.index_select(2, slots) for x in (q, k, v))
    got = torch.ops.sparge.attention(*moved, thresholds(2), **how, reordered=True)
    torch.testing.assert_close(got.index_select(2, places), want)


def test_the_op_gives_copies() -> None:
    arguments = (*GRIDS[0], [2, 4, 8], CPU)
    first = torch.ops.sparge.order(*arguments)
    want = [x.clone() for x in first]
    for x in first:
        x.fill_(7)
    assert all(map(torch.equal, torch.ops.sparge.order(*arguments), want))
    opcheck(torch.ops.sparge.order.default, arguments)


RANGES = ([0, 3, 0, 3], [-20, END, 0, 0], [OF_GRAPH, OF_GRAPH, OF_GRAPH, OF_GRAPH], [40, 44, 41, 43])


@pytest.mark.parametrize("sides", ("both", "queries", "keys"))
def test_kept_tokens_are_tokens_in_any_order(face: ModuleType, sides: str) -> None:
    torch.manual_seed(1)
    grid = Grid(5, 3, 5, 20, 0)
    slots = make_order(grid, (2, 4, 8), torch.get_default_device()).slots
    q, k = (block_constant(1, h, grid.tokens, 16, b) for h, b in ((4, QUERY_BLOCK), (1, KEY_BLOCK)))
    limits = torch.cat([thresholds(4), torch.tensor(RANGES)], 1)
    given = {"parts": (5, grid.tokens - 5)}
    for side, letter in (("queries", "q"), ("keys", "k")):
        if sides in ("both", side):
            given[f"slots_{letter}"] = slots
    got = BlockMap(*face.block_map(q, k, limits, *How(None, False, 0.25, **given)))
    assert_same_map(got, reference.block_map(q, k, limits, None, False, 0.25, **given))


@given(grid=grids, tile=st.sampled_from(TILES), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_all_blocks_are_dense_attention(grid: Grid, tile: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = operands(grid)
    out, lse = attention(q, k, v, enable_gqa=True, grid=grid, tile=tile, return_lse=True)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert out.stride() == q.stride()
    scores = q @ k.mT * 0.25
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    got, true = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, want))
    torch.testing.assert_close(got, true, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sparse_is_the_rule_on_permuted_tokens(grid: Grid, mask: str) -> None:
    torch.manual_seed(0)
    q, k, v = operands(grid)
    order = make_order(grid, (4, 4, 4), CPU)
    made = None
    if mask != "none":
        opened = torch.rand(2, 1, 1 if mask == "row" else grid.tokens, grid.tokens) < 0.6
        made = torch.randn(opened.shape).masked_fill(~opened, -torch.inf) if mask == "float" else opened
    options = {"enable_gqa": True, "topk": 0.3, "topp": 0.4, "grid": grid, "tile": (4, 4, 4)}
    out, share = attention(q, k, v, made, return_sparsity=True, **options)  # type: ignore[arg-type]
    slots = order.slots.long()
    of_slots = made
    if made is not None:
        of_slots = made[..., slots] if mask == "row" else made[..., slots, :][..., slots]
    moved = [x.double()[:, :, slots] for x in (q, k, v)]
    block_map = reference.block_map(*moved[:2], torch.tensor([[0.3, 0.4]] * 2), of_slots, False, 0.25)
    want = reference.attention(*moved, block_map, of_slots, False, 0.25)[0][:, :, order.places.long()]
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    assert 0 < share < 1
    weight = torch.randn_like(out)
    got, true = (torch.autograd.grad((x * weight).sum(), (q, k, v), retain_graph=True) for x in (out, want))
    torch.testing.assert_close(got, true, atol=1e-4, rtol=1e-4)
    again = torch.autograd.grad((out * weight).sum(), (q, k, v))
    assert all(map(torch.equal, got, again))


def test_kept_tokens_of_a_grid() -> None:
    torch.manual_seed(0)
    q, k, v = operands(GRIDS[1])
    options = {"enable_gqa": True, "topk": 0.1, "grid": GRIDS[1], "keep_keys": 80}
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, :80]
    found = attention(q, k, v, dense_queries=True, **options)[:, :, :80]  # type: ignore[arg-type]
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(attention(q, k, v, **options)[:, :, :80], want, atol=1e-3)  # type: ignore[arg-type]


def test_a_text_keeps_its_order() -> None:
    torch.manual_seed(0)
    grid = GRIDS[0]
    q, (k, v) = operands(grid)[0], (torch.randn(2, 1, 77, 16) for _ in "kv")
    mask = torch.rand(2, 1, grid.tokens, 77) < 0.5
    for made in (None, mask):
        out = attention(q, k, v, made, enable_gqa=True, grid=grid)
        want = F.scaled_dot_product_attention(q, k, v, made, enable_gqa=True)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_one_graph_for_all_resolutions() -> None:
    graphs = []

    def backend(graph_module, examples):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph_module)
        return aot_eager(graph_module, examples)

    def model(x: Tensor, weight: Tensor) -> Tensor:  # [B, C, T, H, W]
        frames, height, width = x.shape[2:]
        q, k, v = (x.flatten(2).mT @ weight).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        order = torch.ops.sparge.order(0, frames, height, width, 0, [2, 4, 8], x.device)
        packed = (0, [], False, None, None, 0, 0, [])
        return torch.ops.sparge.attention(q, k, v, thresholds(2), None, False, None, *packed, *order, *order)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    weight = torch.randn(8, 96, requires_grad=True)
    for shape in ((3, 5, 7), (5, 6, 13), (2, 2, 2)):
        x = torch.randn(2, 8, *shape)
        got, want = compiled(x, weight), model(x, weight)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weight) for y in (got, want)))
    assert len(graphs) == 1
    assert not any(node.op == "call_function" and "sym" in str(node.target) for node in graphs[0].graph.nodes)


WRONG = {
    "causality": ({"is_causal": True, "grid": GRIDS[0]}, "does not go with causality"),
    "tokens": ({"grid": (3, 5, 8)}, "grid has not the query's tokens"),
    "axes": ({"grid": (105,)}, "grid cannot be read"),
    "nothing": ({"grid": (0, 5, 7)}, "grid has no tokens"),
    "less than nothing": ({"grid": (-2, 3, 5, 7, 0)}, "grid has no tokens"),
    "anywhere": ({"grid": (-1, 3, 5, 7, -1)}, "grid may stand anywhere"),
    "nothing left": ({"grid": (-1, 3, 5, 7, 1)}, "grid has not the query's tokens"),
    "tile": ({"grid": GRIDS[0], "tile": (2, 4, 9)}, "tile is no box of tokens"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_what_is_refused(options: dict, message: str) -> None:
    q, k, v = operands(GRIDS[0])
    with pytest.raises((TypeError, ValueError), match=message):
        attention(q, k, v, enable_gqa=True, **options)


def test_operands_that_do_not_fit_are_refused() -> None:
    q, k, v = operands(GRIDS[0])
    order = make_order(GRIDS[1], (2, 4, 8), CPU)
    head = (q, k, v, thresholds(2), None, False, None, 0, [], False, None, None, 0, 0, [])
    with pytest.raises(ValueError, match="places_q does not fit"):
        torch.ops.sparge.attention(*head, order.slots[: q.shape[2]], order.places, *order)
    with pytest.raises(ValueError, match="an order of tokens is not whole"):
        torch.ops.sparge.attention(*head, order.slots)


def test_an_order_is_made_as_that_of_another_tile_while_it_is_tried():
    grid, image, device = Grid(3, 4, 8, 16, 5), Grid(0, 1, 16, 32, 0), torch.device("cpu")
    other = (*TILE, 0, 0, 1)
    with made_as({TILE: (2, 4, 8), other: None}):
        for sizes, tile in ((grid, (2, 4, 8)), (image, (1, 8, 8))):  # an image has no frames to cut
            for given in (TILE, tile_of(TILE, sizes)):
                torch.testing.assert_close(copy_of_order(sizes, given, device), make_order(sizes, tile, device))
            assert copy_of_order(sizes, other, device).slots.tolist() == list(range(sizes.tokens))
    torch.testing.assert_close(copy_of_order(grid, TILE, device), make_order(grid, TILE, device))
