"""Packed sequences are the loop over sequences, and causality aligned to the bottom right is the reference's.

Without a GPU, the Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from helpers import BlockMap, assert_same_map, block_constant, face_of, poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparge_compile.kernels import attend, reference
from sparge_compile.kernels.how import How

THRESHOLDS = [[0.34, 0.55], [0.12, 0.81]]
CAUSALITY = {"": (False, False), "top_left": (True, False), "bottom_right": (True, True)}


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    """The functions of the GPU, where tensors are born."""
    with torch.device("cuda"):
        yield face_of("triton")


class Packed(NamedTuple):
    """Sequences in one buffer, with rows of no sequence behind them."""

    lengths: tuple[int, ...]
    keys: tuple[int, ...]
    causal: str = ""
    key_heads: int = 1
    head_size: int = 16
    dtype: torch.dtype = torch.float32
    spare: int = 7
    longer: int = 0  # how much more than the longest lengths is said
    value_size: int | None = None  # that of keys

    def how(self, scale: float = 0.25) -> How:
        starts = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (self.lengths, self.keys)]
        longest = [max(1, *x) + self.longer for x in (self.lengths, self.keys)]
        is_causal, bottom_right = CAUSALITY[self.causal]
        return How(None, is_causal, scale, bottom_right, *starts, *longest)

    def inputs(self) -> list[Tensor]:
        """q, k, v [1, H, T, D] whose memory is [1, T, H, D], and the gradients of out and lse."""
        rows, keys = sum(self.lengths) + self.spare, sum(self.keys) + self.spare
        size, value_size = self.head_size, self.value_size or self.head_size
        shapes = (
            (rows, 2, size),
            (keys, self.key_heads, size),
            (keys, self.key_heads, value_size),
            (rows, 2, value_size),
        )
        made = [torch.randn(1, *shape, dtype=self.dtype).transpose(1, 2) for shape in shapes]
        return [*made, torch.randn(1, 2, rows)]

    def places(self) -> list[tuple[slice, slice]]:
        ends = [list(itertools.accumulate((0, *x))) for x in (self.lengths, self.keys)]
        rows, keys = ([slice(*pair) for pair in itertools.pairwise(x)] for x in ends)
        return list(zip(rows, keys, strict=True))


def thresholds() -> Tensor:
    return torch.tensor(THRESHOLDS)


def run(face: ModuleType, case: Packed, inputs: list[Tensor], how: How) -> tuple[BlockMap, tuple[Tensor, ...]]:
    q, k, v, dout, dlse = inputs
    with poisoned_memory():
        lists = BlockMap(*face.block_map(q, k, thresholds(), *how))
        out, lse = face.forward(q, k, v, *lists, *how)
        grads = face.backward(dout, q, k, v, out, lse, dlse, face.pack(*lists), *how)
    return lists, (out, lse, *grads)


def check(face: ModuleType, case: Packed, inputs: list[Tensor]) -> None:
    """Maps, outputs and gradients of a packed call are those of each sequence by itself; other rows are zeros."""
    how = case.how()
    lists, found = run(face, case, inputs, how)
    kept = lists.to_dense()
    assert kept.shape == (len(case.lengths), 2, -(-how.max_seqlen_q // 128), -(-how.max_seqlen_k // 64))
    for n, (rows, keys) in enumerate(case.places()):
        q, k, v, dout, dlse = inputs
        own = [q[:, :, rows], k[:, :, keys], v[:, :, keys], dout[:, :, rows], dlse[:, :, rows]]
        own_lists, want = run(face, case, own, how.of_one())
        n_query, n_key = own_lists.indices.shape[-2:]
        assert_same_map(
            BlockMap.from_dense(kept[n : n + 1, :, :n_query, :n_key]), BlockMap.from_dense(own_lists.to_dense())
        )
        assert not kept[n, :, n_query:].any() and not kept[n, :, :, n_key:].any()
        for x, y, at in zip(found, want, (rows, rows, rows, keys, keys), strict=True):
            torch.testing.assert_close(x[:, :, at], y, atol=2e-5, rtol=2e-5, equal_nan=True)
    out, lse, dq, dk, dv = (x[:, :, -case.spare :] for x in found)
    assert (lse == -torch.inf).all() and all((x == 0).all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("causal, value_size", [("", 16), ("top_left", 16), ("bottom_right", 16), ("bottom_right", 40)])
def test_packed_sequences_are_the_loop_over_them(face: ModuleType, causal: str, value_size: int) -> None:
    case = Packed((128, 1, 200), (70, 200, 64), causal, longer=30, value_size=value_size)
    torch.manual_seed(0)
    check(face, case, case.inputs())


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=4),
    st.sampled_from(sorted(CAUSALITY)),
)
def test_packed_sequences_of_any_lengths(sizes: list[tuple[int, int]], causal: str) -> None:
    lengths, keys = zip(*sizes, strict=True)
    case = Packed(lengths, keys, causal, key_heads=2)
    torch.manual_seed(1)
    check(face_of("cpu"), case, case.inputs())


def test_nothing_of_a_neighbour_gets_into_a_sequence(face: ModuleType) -> None:
    case = Packed((130, 70, 200), (100, 90, 130), "bottom_right")
    inputs = case.inputs()
    how = case.how()
    _, want = run(face, case, inputs, how)
    rows, keys = case.places()[1]
    for x, at in zip(inputs, (rows, keys, keys, rows, rows), strict=True):
        x[:, :, at], x[:, :, -case.spare :] = torch.nan, torch.inf
    _, found = run(face, case, inputs, how)
    for x, y, n in zip(found, want, (0, 0, 0, 1, 1), strict=True):
        for place in (case.places()[0][n], case.places()[2][n]):
            assert torch.equal(x[:, :, place], y[:, :, place])


SIZES = [(150, 150), (200, 330), (1, 200), (200, 65), (129, 1), (257, 193)]


@pytest.mark.parametrize("length, keys", SIZES)
def test_causality_aligned_to_the_bottom_right(face: ModuleType, length: int, keys: int) -> None:
    """Row i of L sees the keys up to i + S - L; in maps, which blocks are visible and on the diagonal follows."""
    torch.manual_seed(2)
    q, k = (block_constant(1, h, n, 16, b, values=1) for h, n, b in ((2, length, 128), (1, keys, 64)))
    v, dout = torch.randn(1, 1, keys, 16), torch.randn(1, 2, length, 16)
    how = How(None, True, 0.25, True)
    with poisoned_memory():
        lists = BlockMap(*face.block_map(q, k, thresholds(), *how))
    if length <= keys:  # else the first rows do not count, and means are not exact
        want = reference.block_map(q, k, thresholds(), None, True, 0.25, bottom_right=True)
        assert_same_map(lists, want)
    with poisoned_memory():
        out, lse = face.forward(q, k, v, *lists, *how)
        grads = face.backward(dout, q, k, v, out, lse, None, face.pack(*lists), *how)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact, exact_lse = reference.attention(*wide, lists, None, True, 0.25, bottom_right=True)
    true = torch.autograd.grad(exact, wide, dout.double())
    for x, y in zip((out, lse, *grads), (exact, exact_lse, *true), strict=True):
        torch.testing.assert_close(x.double(), y.detach(), atol=1e-4, rtol=1e-4)
    sees = reference.open_pairs(length, keys, None, True, q.device, bottom_right=True).any(-1)
    assert torch.equal(lse.isfinite(), sees.expand_as(lse))  # no row lost all its keys


@pytest.mark.parametrize("mask", ["row", "pairs"])
@pytest.mark.parametrize("length, keys", [(200, 300), (300, 200)])
def test_the_bottom_right_under_a_mask(face: ModuleType, length: int, keys: int, mask: str) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((2, length), (1, keys), (1, keys)))
    attn_mask = torch.rand(1, 1, 1 if mask == "row" else length, keys) < 0.6
    how = (attn_mask, True, 0.25, True)
    lists = BlockMap(*face.block_map(q, k, thresholds(), *how))
    assert_same_map(lists, reference.block_map(q, k, thresholds(), *how[:3], bottom_right=True))
    out, lse = face.forward(q, k, v, *lists, *how)
    exact, exact_lse = reference.attention(q, k, v, lists, *how[:3], bottom_right=True)
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, exact_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", CAUSALITY)
def test_below_its_limit_a_packed_call_reads_every_visible_block(face: ModuleType, causal: str) -> None:
    case = Packed((200, 130), (150, 260), causal)
    q, k, v, *_ = case.inputs()
    how = case.how()
    everything = thresholds().fill_(1.0)
    found = attend.attend(face, q, k, v, everything * 0.1, *how[:3], 10_000, (), *how[3:])
    want = face.forward(q, k, v, *face.block_map(q, k, everything, *how), *how)[0]
    assert torch.equal(found, want)


def test_lengths_that_do_not_fit_are_errors_on_a_cpu() -> None:
    case = Packed((200, 130), (150, 260))
    q, k, *_ = case.inputs()
    how = case.how()._replace(max_seqlen_k=200)
    with pytest.raises(ValueError, match="cu_seqlens_k does not fit"):
        face_of("cpu").block_map(q, k, thresholds(), *how)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", CAUSALITY)
@pytest.mark.parametrize("head_size, value_size", [(64, 64), (128, 128), (192, 128)])
def test_packed_sequences_on_tensor_cores(gpu: ModuleType, head_size: int, value_size: int, causal: str) -> None:
    """bfloat16 through descriptors: on Hopper by the kernel that is specialised by warp, if head sizes are equal."""
    case = Packed((1000, 1, 700, 2100), (900, 333, 64, 2500), causal, head_size=head_size, dtype=torch.bfloat16)
    case = case._replace(value_size=value_size)
    inputs, how = case.inputs(), case.how()
    lists, found = run(gpu, case, inputs, how)
    for n, (rows, keys) in enumerate(case.places()):
        q, k, v, dout, dlse = inputs
        own = [q[:, :, rows], k[:, :, keys], v[:, :, keys], dout[:, :, rows], dlse[:, :, rows]]
        own_lists, want = run(gpu, case, own, how.of_one())
        n_query, n_key = own_lists.indices.shape[-2:]
        assert torch.equal(lists.to_dense()[n, :, :n_query, :n_key], own_lists.to_dense()[0])
        for x, y, at in zip(found, want, (rows, rows, rows, keys, keys), strict=True):
            torch.testing.assert_close(x[:, :, at], y, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_a_packed_call_in_a_cuda_graph(gpu: ModuleType) -> None:
    """Captured once, replayed with other sequences in the same buffer: where they begin is read on the device alone."""
    case = Packed((1000, 500, 548), (1000, 500, 548), "top_left", head_size=64, dtype=torch.bfloat16, longer=500)
    inputs, how = case.inputs(), case.how()
    assert how.cu_seqlens_q is not None and how.cu_seqlens_k is not None

    limits = thresholds()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def forward_and_backward() -> tuple[Tensor, ...]:
        q, k, v, dout, dlse = inputs
        lists = gpu.block_map(q, k, limits, *how)
        out, lse = gpu.forward(q, k, v, *lists, *how)
        return out, lse, *gpu.backward(dout, q, k, v, out, lse, dlse, gpu.pack(*lists), *how)

    with torch.cuda.stream(stream):
        forward_and_backward()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_and_backward()
    for lengths in ((1000, 500, 548), (1, 1400, 647)):
        for starts in (how.cu_seqlens_q, how.cu_seqlens_k):
            starts.copy_(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))
        graph.replay()
        for x, y in zip(results, forward_and_backward(), strict=True):
            assert torch.equal(x, y)
