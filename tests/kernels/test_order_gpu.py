"""Token order on a GPU: padding in the kernels for real, Hopper's own among them, and calls in CUDA graphs."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from helpers import Case, Problem, Results, assert_results_bounded, face_of, poisoned_memory, random_matrix, random_qkv
from torch import Tensor

from sparge_compile import Grid, attention
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap
from sparge_compile.kernels.how import How
from sparge_compile.kernels.order import Order, held_slots, make_order

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]
BF16 = torch.bfloat16
GRIDS = [Grid(70, 5, 6, 13, 9), Grid(0, 21, 9, 20, 0)]


def raster(block_map: BlockMap, order: Order) -> Tensor:
    """bool [B, H, L, L]: the pairs of tokens that a map of blocks of slots lets attention see."""
    kept = block_map.to_dense().repeat_interleave(QUERY_BLOCK, 2).repeat_interleave(KEY_BLOCK, 3)
    return kept[:, :, order.places.long()][..., order.places.long()]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("head_size, dtype", [(64, BF16), (128, BF16), (256, BF16), (72, torch.float16)], ids=str)
@pytest.mark.parametrize("portable", [False, True], ids=["any", "portable"])
def test_tiles_are_attention_to_their_tokens(
    grid: Grid, head_size: int, dtype: torch.dtype, portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if portable:
        forward = import_module("sparge_compile.kernels.triton.forward")
        monkeypatch.setattr(forward, "hopper_refusal", lambda device: "left out")
    torch.manual_seed(0)
    face, length = face_of("triton"), grid.tokens
    case = Case(length, length, head_size, heads=4, key_heads=2, dtype=dtype, layout="blhd")
    order = make_order(grid, (2, 4, 8), torch.device("cuda"))
    slots, places, held = order.slots.long(), order.places.long(), held_slots(order.sizes)
    kept = torch.rand(1, 4, len(order.sizes) // 2, len(order.sizes)) < 0.4
    kept[:, 0, 0] = False
    lists = BlockMap.from_dense(kept)
    q, k, v = random_qkv(case)
    dout, dlse = random_matrix(1, 4, length, head_size, dtype, "blhd"), torch.randn(1, 4, length)
    how = How(None, False, head_size**-0.5, sizes_q=order.sizes, sizes_k=order.sizes)

    moved = [x[:, :, slots] for x in (q, k, v)]
    with poisoned_memory():
        out, lse = face.forward(*moved, *lists, *how)
        grads = face.backward(dout[:, :, slots], *moved, out, lse, dlse[:, :, slots], face.pack(*lists), *how)
        again = face.backward(dout[:, :, slots], *moved, out, lse, dlse[:, :, slots], face.pack(*lists), *how)
        padded = [x.masked_fill(~held.unsqueeze(-1), torch.nan) for x in moved[:2]]
        of_nan, lse_of_nan = face.forward(*padded, moved[2], *lists, *how)
    assert (out[:, :, ~held] == 0).all() and (lse[:, :, ~held] == -torch.inf).all()
    assert all((x[:, :, ~held] == 0).all() for x in grads)
    assert torch.equal(of_nan, out) and torch.equal(lse_of_nan, lse)
    assert all(map(torch.equal, grads, again))
    whole = BlockMap.from_dense(torch.ones(1, 1, -(-length // QUERY_BLOCK), -(-length // KEY_BLOCK), dtype=torch.bool))
    problem = Problem(q, k, v, whole, raster(lists, order), False, how.scale, dout, dlse)
    assert_results_bounded(Results(*(x[:, :, places] for x in (out, lse, *grads))), problem)


@pytest.mark.parametrize("head_size", [64, 128])
def test_a_call_in_a_cuda_graph(head_size: int) -> None:
    torch.manual_seed(0)
    grid = GRIDS[1]
    q, k, v = (torch.randn(1, grid.tokens, 2, head_size, dtype=BF16).transpose(1, 2).requires_grad_() for _ in "qkv")
    weight = torch.randn_like(q)

    def step() -> tuple[Tensor, ...]:
        out = attention(q, k, v, topk=0.3, topp=0.2, grid=grid)
        return out, *torch.autograd.grad(out, (q, k, v), weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for x in (q, k, v):
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(map(torch.equal, captured, step()))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_call_is_the_call(mode: str) -> None:
    torch.manual_seed(0)
    grid = GRIDS[1]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, topk=0.3, grid=grid, keep_keys=100) + 1

    compiled = torch.compile(call, mode=mode, fullgraph=True)
    for _ in range(3):
        q, k, v = (torch.randn(1, grid.tokens, 2, 64, dtype=BF16).transpose(1, 2).requires_grad_() for _ in "qkv")
        got, want = compiled(q, k, v), call(q, k, v)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (got, want))
        torch.testing.assert_close(*grads)


def test_nothing_waits_for_the_host() -> None:
    grid = GRIDS[1]
    q, k, v = (torch.randn(1, 2, grid.tokens, 64, dtype=BF16).requires_grad_() for _ in "qkv")
    run = {"topk": 0.3, "grid": grid, "keep_keys": 100, "dense_queries": True}
    attention(q, k, v, **run).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, **run).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_all_blocks_are_dense_attention() -> None:
    grid = Grid(0, 21, 30, 52, 0)
    q, k, v = (torch.randn(1, 2, grid.tokens, 128, dtype=BF16) for _ in "qkv")
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, grid=grid), want, atol=2e-3, rtol=2e-2)
