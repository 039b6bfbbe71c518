"""Replayed calls on a GPU: the same as calls that run, wherever their memory lies."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch import Tensor

import sparge_compile

triton = pytest.importorskip("sparge_compile.kernels.triton")
pytestmark = pytest.mark.gpu


def _call(seed: int, length: int = 640, grad: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return tuple(torch.randn(1, 2, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=grad) for _ in "qkv")


def test_replayed_calls_are_the_calls() -> None:
    for seed in range(12):  # the first is recorded
        q, k, v = _call(seed, grad=True)
        held = [torch.empty(7 * seed + 1, 64, device="cuda") for _ in range(seed)]  # so that addresses move
        out = sparge_compile.attention(q, k, v, topk=0.4, topp=0.3)
        out.float().square().sum().backward()
        thresholds = torch.tensor([[0.4, 0.3]] * 2, device="cuda").clone().t().contiguous().t()  # a form of its own
        q2, k2, v2 = (x.detach().clone().requires_grad_() for x in (q, k, v))
        counts = torch.ops.sparge.block_map(q2, k2, thresholds, None, False, 0.125)
        other, _ = torch.ops.sparge.forward(q2, k2, v2, *counts, None, False, 0.125)
        other.float().square().sum().backward()
        assert torch.equal(out, other)
        for x, y in ((q, q2), (k, k2), (v, v2)):
            assert torch.equal(x.grad, y.grad)
        del held


def test_replayed_calls_are_captured_in_a_cuda_graph() -> None:
    inputs = [_call(seed, 384) for seed in range(3)]
    run = functools.partial(sparge_compile.attention, topk=0.5)
    with torch.no_grad():
        expected = [run(*each).clone() for each in inputs]
        static = [x.clone() for x in inputs[0]]
        run(*static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = run(*static)
            second = run(first, *static[1:])
        for each, want in zip(inputs, expected, strict=True):
            for x, y in zip(static, each, strict=True):
                x.copy_(y)
            graph.replay()
            assert torch.equal(first, want)
            assert torch.equal(second, run(want, *each[1:]))


def test_replayed_calls_in_threads() -> None:
    inputs = [_call(seed, 256) for seed in range(4)]
    with torch.no_grad():
        expected = [sparge_compile.attention(*each, topk=0.5) for each in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(sparge_compile.attention(*inputs[number], topk=0.5), expected[number]):
                    wrong.append(number)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["keys", "rows", "numbers"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_replayed_calls_under_a_mask_are_the_calls(kind: str, is_causal: bool) -> None:
    for seed in range(4):  # the first is recorded
        q, k, v = _call(seed, grad=True)
        rows = 1 if kind == "keys" else 640
        mask = torch.rand(1, 1, rows, 640, device="cuda") > 0.3
        mask[..., : 64 * (seed + 1)] = False
        mask = torch.where(mask, 0.5, -torch.inf).bfloat16() if kind == "numbers" else mask
        out = sparge_compile.attention(q, k, v, mask, is_causal=is_causal, topk=0.4, topp=0.3)
        weight = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), weight)
        how, thresholds = (mask, is_causal, 0.125), torch.tensor([[0.4, 0.3]] * 2, device="cuda")
        with torch.no_grad():  # the functions behind the ops, which nobody replays
            lists = triton.block_map(q, k, thresholds, *how)
            want, lse = triton.forward(q, k, v, *lists, *how)
            expected = triton.backward(weight, q, k, v, want, lse, None, triton.pack(*lists), *how)
        assert torch.equal(out, want)
        assert all(torch.equal(x, y) for x, y in zip(grads, expected, strict=True))
