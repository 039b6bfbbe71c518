"""Token order on a GPU: orders made there, and calls in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile import Grid, attention
from sparge_compile.kernels import order
from sparge_compile.kernels.order import make_order

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]
BF16 = torch.bfloat16
GRIDS = [Grid(70, 5, 6, 13, 9), Grid(0, 21, 9, 20, 0)]


def test_an_order_is_that_of_the_cpu() -> None:
    for grid in (*GRIDS, Grid(0, 16, 16, 16, 0)):
        found, want = (make_order(grid, (2, 4, 8), torch.device(x)) for x in ("cuda", "cpu"))
        assert all(torch.equal(x.cpu(), y) for x, y in zip(found, want, strict=True))


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
def test_a_compiled_call_is_the_call(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(order, "_made", {})  # the first call makes the order: what is kept is no memory of a CUDA graph
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
