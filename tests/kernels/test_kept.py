"""Kept tokens and dense queries: maps equal the rule's definition, and dense rows are dense attention's."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_map, block_constant, face_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparge_compile import attention
from sparge_compile.keeping import END, OF_GRAPH, Kept, beside_longest
from sparge_compile.kernels import reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap
from sparge_compile.kernels.how import How

FACES = [
    "cpu",
    pytest.param("triton", marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param("triton", marks=pytest.mark.gpu, id="gpu"),
]
MASKS = ("none", "row", "pairs", "float")


class Case(NamedTuple):
    """Attention with kept ranges, [H, 4]; equal lengths where ``keys`` is None."""

    length: int
    keys: int | None
    ranges: tuple[tuple[float, float, float, float], ...]
    parts: tuple[int, ...] = ()
    topk: float = 0.3
    topp: float = 0.4
    mask: str = "none"
    is_causal: bool = False
    seed: int = 0

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        torch.manual_seed(self.seed)
        heads, keys = len(self.ranges), self.length if self.keys is None else self.keys
        q = block_constant(2, heads, self.length, 16, QUERY_BLOCK)
        k = block_constant(2, heads, keys, 16, KEY_BLOCK)
        thresholds = torch.tensor([(self.topk, self.topp, *numbers) for numbers in self.ranges])
        mask = None
        if self.mask != "none":
            opened = torch.rand(2, 1, 1 if self.mask == "row" else self.length, keys) < 0.02  # many blocks hold none
            mask = torch.zeros(opened.shape).masked_fill(~opened, -torch.inf) if self.mask == "float" else opened
        return q, k, thresholds, mask


positions = st.integers(-700, 700).map(float)
ranges = st.one_of(
    st.tuples(positions, st.one_of(positions, st.just(END))),
    st.just((OF_GRAPH, OF_GRAPH)),
    st.just((0.0, 0.0)),
)
cases = st.builds(
    Case,
    length=st.integers(1, 600),
    keys=st.one_of(st.none(), st.integers(1, 600)),
    ranges=st.lists(st.tuples(ranges, ranges).map(lambda two: (*two[0], *two[1])), min_size=1, max_size=3).map(tuple),
    parts=st.lists(st.integers(1, 300), max_size=3).map(tuple),
    topk=st.sampled_from([1e-4, 0.05, 0.3, 0.5, 1.0]),
    topp=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
    mask=st.sampled_from(MASKS),
    is_causal=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(case=cases)
@settings(max_examples=60)
def test_maps_are_the_rules_on_a_cpu(case: Case) -> None:
    check_map("cpu", case)


@pytest.mark.parametrize("name", FACES[1:])
@given(case=cases)
@settings(max_examples=60 if torch.cuda.is_available() else 12)  # the interpreter is slow
def test_maps_are_the_rules_in_the_kernels(name: str, case: Case) -> None:
    check_map(name, case)


def check_map(name: str, case: Case) -> None:
    face, device = face_of(name), "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    q, k, thresholds, mask = case.operands()
    want = reference.block_map(q, k, thresholds, mask, case.is_causal, 0.125, parts=case.parts)
    how = How(None if mask is None else mask.to(device), case.is_causal, 0.125, parts=case.parts)
    found = BlockMap(*face.block_map(q.to(device), k.to(device), thresholds.to(device), *how))
    assert_same_map(BlockMap(*(x.cpu() for x in found)), want)


def test_kept_keys_do_not_count_against_the_thresholds() -> None:
    q, k = torch.randn(1, 1, 256, 16), torch.randn(1, 1, 64 * 20, 16)
    plain = torch.tensor([[0.25, 0.0]])
    kept = torch.tensor([[0.25, 0.0, 0, 256, 0, 0]])
    others = reference.block_map(q, k[:, :, 256:], plain).to_dense()
    found = reference.block_map(q, k, kept).to_dense()
    assert found[..., :4].all()
    assert torch.equal(found[..., 4:], others)
    empty = kept * torch.tensor([1, 1, 0, 0, 0, 0])
    assert torch.equal(reference.block_map(q, k, empty).to_dense(), reference.block_map(q, k, plain).to_dense())


@pytest.mark.parametrize("parts, found", [
    ((), (0, 0)), ((300,), (0, 0)), ((64, 200), (0, 64)), ((200, 64), (200, 264)), ((100, 100), (0, 0)),
    ((10, 20, 200), (0, 30)), ((200, 10, 20), (200, 230)), ((10, 200, 20), (0, 0)), ((200, 10, 200), (0, 0)),
    ((0, 50), (0, 0)),
])  # fmt: skip
def test_what_stands_beside_the_longest_part(parts: tuple[int, ...], found: tuple[int, int]) -> None:
    assert beside_longest(parts) == found
    assert reference.tokens_of((OF_GRAPH, OF_GRAPH), sum(parts), parts) == set(range(*found))


@pytest.mark.parametrize("keep, first, last", [(70, 0, 70), (-70, 230, 300), ((100, 140), 100, 140)], ids=str)
def test_dense_rows_are_those_of_dense_attention(keep: int | tuple[int, int], first: int, last: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 32)
    found = attention(q, k, v, topk=0.2, keep_keys=keep, dense_queries=True)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found[:, :, first:last], dense[:, :, first:last])
    sparse_only = attention(q, k, v, topk=0.2, keep_keys=keep)
    assert not torch.allclose(sparse_only[:, :, first:last], dense[:, :, first:last], atol=1e-3)


def test_no_dense_rows_where_queries_are_another_sequence() -> None:
    q, k = torch.randn(1, 2, 300, 32), torch.randn(1, 2, 640, 32)
    both, one = (attention(q, k, k, topk=0.2, keep_keys=70, dense_queries=dense) for dense in (True, False))
    assert torch.equal(both, one)


def test_gradients_go_through_the_kept_blocks() -> None:
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 300, 16))
    attention(q, k, v, topk=0.2, keep_keys=(64, 128), dense_queries=True)[:, :, 64:128].sum().backward()
    found = [x.grad for x in (q, k, v)]
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    F.scaled_dot_product_attention(q, k, v)[:, :, 64:128].sum().backward()
    for grad, x in zip(found, (q, k, v), strict=True):
        torch.testing.assert_close(grad, x.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", [Kept(), Kept((0, 70)), Kept((-70, None), True), Kept("text", True), Kept((5, -5))])
def test_what_is_kept_travels_as_numbers(kept: Kept) -> None:
    assert Kept.of(torch.tensor(kept.numbers).tolist()) == kept
