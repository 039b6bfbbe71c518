"""Token order: tiles of a grid as blocks, with padding where the grid's edge cuts them.

Faces are held to the reference on permuted tokens, the public function to dense attention of the tokens as they stand.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_map, block_constant, poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from sparge_compile import Grid, attention
from sparge_compile.keeping import END, OF_GRAPH
from sparge_compile.kernels import reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap
from sparge_compile.kernels.how import How
from sparge_compile.kernels.order import Order, held_slots, make_order

CPU = torch.device("cpu")
TILES = [(2, 4, 8), (4, 4, 4), (1, 8, 8), (4, 8, 2), (1, 1, 64), (3, 5, 4), (1, 2, 3)]
GRIDS = [Grid(0, 3, 5, 7, 0), Grid(70, 5, 6, 13, 9), Grid(3, 2, 4, 8, 0)]
SMALL = [GRIDS[0], Grid(5, 2, 4, 15, 0)]
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
def test_an_order_is_a_permutation_into_tiles(grid: Grid, tile: tuple[int, int, int]) -> None:
    order = make_order(grid, tile, CPU)
    slots, sizes = order.slots.view(-1, KEY_BLOCK).tolist(), order.sizes.tolist()
    assert len(sizes) % 2 == 0
    blocks = [slot[:size] for slot, size in zip(slots, sizes, strict=True)]
    assert sorted(token for block in blocks for token in block) == list(range(grid.tokens))
    assert torch.equal(order.slots[order.places.long()], torch.arange(grid.tokens, dtype=torch.int32))
    assert sum(map(bool, sizes)) * KEY_BLOCK == grid.padding(tile).slots

    def box(token: int) -> tuple[int, ...] | str:
        """Where a token belongs: before the grid, behind it, or its tile."""
        number = token - grid.prefix
        if not 0 <= number < grid.frames * grid.height * grid.width:
            return "before" if number < 0 else "behind"
        f, y, x = number // grid.width // grid.height, number // grid.width % grid.height, number % grid.width
        return f // tile[0], y // tile[1], x // tile[2]

    boxes = [{box(token) for token in block} for block in blocks]
    assert all(len(some) <= 1 for some in boxes)  # no block holds tokens of two
    of_tiles = [next(iter(some)) for some in boxes if some and not isinstance(next(iter(some)), str)]
    assert len(set(of_tiles)) == len(of_tiles)  # and each tile is one block
    for one, next_one in itertools.pairwise(of_tiles):
        assert sum(abs(a - b) for a, b in zip(one, next_one, strict=True)) == 1  # beside the one before
    for first in range(0, len(boxes), 2):  # a query block does not mix the grid with what is beside it
        kinds = {isinstance(x, str) for some in boxes[first : first + 2] for x in some}
        assert len(kinds) <= 1
    of_block = order.slots.view(-1, QUERY_BLOCK).tolist()
    for slot, held in zip(of_block, held_slots(order.sizes).view(-1, QUERY_BLOCK).tolist(), strict=True):
        tokens = {token for token, there in zip(slot, held, strict=True) if there}
        assert set(slot) == tokens  # padding repeats a token of its query block


def test_two_tiles_together_are_round() -> None:
    order = make_order(Grid(0, 2, 8, 16, 0), (2, 4, 8), CPU)
    y = order.slots[:QUERY_BLOCK] // 16 % 8
    assert y.unique().tolist() == list(range(8))  # 2 x 8 x 8, not 2 x 4 x 16


def test_what_padding_costs() -> None:
    padding = Grid(0, 21, 30, 52, 0).padding((2, 4, 8))
    assert padding == (32760, 11 * 8 * 7 * 64)
    assert padding.share == pytest.approx(0.169, abs=1e-3)
    assert Grid(0, 21, 30, 52, 0).padding((3, 5, 4)).share == pytest.approx(1 - 60 / 64)
    assert Grid(0, 2, 4, 8, 0).padding().share == 0


def test_the_op_gives_copies() -> None:
    arguments = (*GRIDS[0], [2, 4, 8], CPU)
    first = torch.ops.sparge.order(*arguments)
    want = [x.clone() for x in first]
    for x in first:
        x.fill_(7)
    assert all(map(torch.equal, torch.ops.sparge.order(*arguments), want))
    opcheck(torch.ops.sparge.order.default, arguments)


def ordered_problem(order: Order, mask: str, key_heads: int = 1) -> tuple[list[Tensor], Tensor | None]:
    """q, k and v [1, H, slots, D], of block means that float32 holds, and a mask of the slots."""
    rows = len(order.slots)
    held = held_slots(order.sizes).unsqueeze(-1)
    q, k = (block_constant(1, h, rows, 16, b) for h, b in ((2, QUERY_BLOCK), (key_heads, KEY_BLOCK)))
    v = torch.randn(1, key_heads, rows, 16)
    given = [torch.where(held, x, torch.nan) for x in (q, k)]
    made = None
    if mask != "none":
        opened = torch.rand(1, 1, 1 if mask == "row" else rows, rows) < (0.5 if mask == "row" else 0.02)
        made = torch.zeros(opened.shape).masked_fill(~opened, -torch.inf) if mask == "float" else opened
    return [*given, torch.where(held, v, 0.0)], made


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grid", SMALL, ids=str)
def test_maps_are_the_rules(face: ModuleType, grid: Grid, mask: str) -> None:
    order = make_order(grid, (2, 4, 8), torch.get_default_device())
    (q, k, _), made = ordered_problem(order, mask)
    how = How(made, False, 0.25, sizes_q=order.sizes, sizes_k=order.sizes)
    with poisoned_memory():
        got = BlockMap(*face.block_map(q, k, thresholds(2), *how))
    want = reference.block_map(q, k, thresholds(2), made, False, 0.25, sizes_q=order.sizes, sizes_k=order.sizes)
    assert_same_map(got, want)
    assert not (got.to_dense() & (order.sizes == 0)).any()  # blocks without tokens are invisible


RANGES = ([0, 3, 0, 3], [-20, END, 0, 0], [OF_GRAPH, OF_GRAPH, OF_GRAPH, OF_GRAPH], [40, 44, 41, 43])


@pytest.mark.parametrize("sides", ("both", "queries", "keys"))
def test_kept_tokens_are_tokens_in_any_order(face: ModuleType, sides: str) -> None:
    torch.manual_seed(1)
    order = make_order(SMALL[1], (2, 4, 8), torch.get_default_device())
    (q, k, _), _ = ordered_problem(order, "none")
    limits = torch.cat([thresholds(4), torch.tensor(RANGES)], 1)
    q = q.nan_to_num().repeat(1, 2, 1, 1)
    k = k.nan_to_num()
    given = {"parts": (5, SMALL[1].tokens - 5)}
    for side, letter in (("queries", "q"), ("keys", "k")):
        if sides in ("both", side):
            given |= {f"sizes_{letter}": order.sizes, f"slots_{letter}": order.slots}
    got = BlockMap(*face.block_map(q, k, limits, *How(None, False, 0.25, **given)))
    assert_same_map(got, reference.block_map(q, k, limits, None, False, 0.25, **given))


@pytest.mark.parametrize(
    "sides, mask", [("both", "none"), ("both", "row"), ("both", "pairs"), ("queries", "none"), ("keys", "none")]
)
def test_attention_and_gradients_are_the_references(face: ModuleType, sides: str, mask: str) -> None:
    order = make_order(SMALL[1], (2, 4, 8), torch.get_default_device())
    (q, k, v), made = ordered_problem(order, mask)
    sizes_q, sizes_k = (order.sizes if sides in ("both", side) else None for side in ("queries", "keys"))
    q = torch.randn_like(q) if sizes_q is None else torch.where(q.isnan(), q, torch.randn_like(q))
    k = torch.randn_like(k) if sizes_k is None else torch.where(k.isnan(), k, torch.randn_like(k))
    block_map = BlockMap.from_dense(torch.rand(1, 2, len(order.sizes) // 2, len(order.sizes)) < 0.5)
    how = How(made, False, 0.25, sizes_q=sizes_q, sizes_k=sizes_k)
    with poisoned_memory():
        out, lse = face.forward(q, k, v, *block_map, *how)
    q, k = (x.nan_to_num() for x in (q, k))  # the backward multiplies padding by 0
    held = torch.ones(len(order.slots), dtype=torch.bool) if sizes_q is None else held_slots(sizes_q)
    dout, dlse = torch.randn_like(out) * held.unsqueeze(-1), torch.randn_like(lse)
    with poisoned_memory():
        grads = face.backward(dout, q, k, v, out, lse, dlse, face.pack(*block_map), *how)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    true, true_lse = reference.attention(*exact, block_map, made, False, 0.25, sizes_q=sizes_q, sizes_k=sizes_k)
    seen = true_lse != -torch.inf
    wanted = torch.autograd.grad((true * dout).sum() + (true_lse * dlse)[seen].sum(), exact)
    torch.testing.assert_close(out.double(), true, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


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
    slots, sizes = order.slots.long(), {"sizes_q": order.sizes, "sizes_k": order.sizes}
    of_slots = made
    if made is not None:
        of_slots = made[..., slots] if mask == "row" else made[..., slots, :][..., slots]
    moved = [x.double()[:, :, slots] for x in (q, k, v)]
    block_map = reference.block_map(*moved[:2], torch.tensor([[0.3, 0.4]] * 2), of_slots, False, 0.25, **sizes)
    want = reference.attention(*moved, block_map, of_slots, False, 0.25, **sizes)[0][:, :, order.places.long()]
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


def test_opcheck() -> None:
    order = make_order(GRIDS[0], (2, 4, 8), CPU)
    held = held_slots(order.sizes)
    qkv = [(torch.randn(1, 2, len(held), 16) * held.unsqueeze(-1)).requires_grad_() for _ in "qkv"]
    how = How(None, False, 0.25, sizes_q=order.sizes, sizes_k=order.sizes)
    ops = torch.ops.sparge
    opcheck(ops.attend_for_backward.default, (*qkv, thresholds(2), *how[:3], 0, [], *how[3:]))
    opcheck(ops.attend.default, (*(x.detach() for x in qkv), thresholds(2), *how[:3], 0, [], *how[3:]))


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
        sides = (*order, order[0], order[2])
        packed = (0, [], False, None, None, 0, 0, [])
        return torch.ops.sparge.attention(q, k, v, thresholds(2), None, False, None, *packed, *sides)

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
        torch.ops.sparge.attention(*head, *order, order.slots, order.sizes)
    with pytest.raises(ValueError, match="an order of tokens is not whole"):
        torch.ops.sparge.attention(*head, order.slots)
