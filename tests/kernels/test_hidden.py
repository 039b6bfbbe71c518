"""What a mask hides has no influence: not on which blocks are kept, and not on the result."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from helpers import BlockMap, assert_same_map, face_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparge_compile.kernels import reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK

NAN, INF = math.nan, math.inf
MASKS = ("none", "row", "row of heads", "pairs", "pairs of heads", "prefix", "triangle")
FACES = [
    "cpu",
    pytest.param("triton", marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param("triton", marks=pytest.mark.gpu, id="gpu"),
]


class Hidden(NamedTuple):
    """Attention of which something is hidden, and the stuff that is put there."""

    batch: int = 1
    key_heads: int = 1
    group: int = 2
    length: int = 150
    keys: int = 200
    mask: str = "row"
    is_float: bool = False
    is_causal: bool = False
    topk: float = 0.3
    topp: float = 0.4
    stuff: float = NAN
    seed: int = 0

    def how(self, device: str) -> tuple[Tensor | None, bool, float]:
        mask = self.attn_mask()
        return None if mask is None else mask.to(device), self.is_causal, 0.3

    def attn_mask(self) -> Tensor | None:
        torch.manual_seed(self.seed)
        batch, heads, length, keys = self.batch, self.key_heads * self.group, self.length, self.keys
        if self.mask == "none":
            return None
        if self.mask == "prefix":  # padding at the end, or entries of a cache that are not yet written
            opened = torch.arange(keys).view(1, 1, 1, keys) < torch.randint(0, keys + 1, (batch, 1, 1, 1))
        elif self.mask == "triangle":  # causality as a mask, and padding at the beginning
            padding = torch.randint(0, keys + 1, (batch, 1, 1, 1))
            opened = torch.ones(length, keys, dtype=torch.bool).tril() & (torch.arange(keys) >= padding)
        else:
            lead = (batch, heads) if "heads" in self.mask else (batch, 1)
            shape = (*lead, 1 if "row" in self.mask else length, keys)
            opened = torch.rand(shape) < 0.6
            opened &= torch.rand(*lead, 1, keys) < 0.6  # keys that nobody sees
            if "pairs" in self.mask:
                opened &= torch.rand(*lead, length, 1) < 0.7  # queries that see nothing
        return torch.randn(opened.shape).masked_fill(~opened, -INF) if self.is_float else opened

    def inputs(self) -> list[Tensor]:
        """q [B, H, L, D], k and v [B, Hk, S, D]."""
        torch.manual_seed(self.seed + 1)
        return [
            torch.randn(self.batch, self.key_heads * self.group, self.length, 16),
            *(torch.randn(self.batch, self.key_heads, self.keys, 16) for _ in range(2)),
        ]

    def spoilt(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """The same tensors with other things in queries and keys that are hidden; values stay finite."""
        pairs = reference.open_pairs(self.length, self.keys, self.attn_mask(), self.is_causal, q.device)
        pairs = pairs.expand(self.batch, self.key_heads * self.group, -1, -1)
        blind = ~pairs.any(3)
        hidden = ~pairs.any(2).unflatten(1, (self.key_heads, self.group)).any(2)
        finite = self.stuff if math.isfinite(self.stuff) else 50.0
        return [
            x.masked_fill(at.unsqueeze(-1), stuff)
            for x, at, stuff in zip((q, k, v), (blind, hidden, hidden), (self.stuff, self.stuff, finite), strict=True)
        ]


def small(lengths: list[int]) -> st.SearchStrategy[Hidden]:
    return st.builds(
        Hidden,
        batch=st.integers(1, 2),
        key_heads=st.integers(1, 2),
        group=st.integers(1, 2),
        length=st.sampled_from(lengths),
        keys=st.sampled_from(lengths),
        mask=st.sampled_from(MASKS),
        is_float=st.booleans(),
        is_causal=st.booleans(),
        topk=st.sampled_from((0.1, 0.3, 1.0)),
        topp=st.sampled_from((0.0, 0.4, 0.8)),
        stuff=st.sampled_from((NAN, INF, -INF, 30.0)),
        seed=st.integers(0, 99),
    )


def results(face: ModuleType, case: Hidden, x: list[Tensor]) -> tuple[BlockMap, Tensor, Tensor]:
    device = "cuda" if face.__name__.endswith("triton") and torch.cuda.is_available() else "cpu"
    x = [t.to(device) for t in x]
    thresholds = torch.tensor([[case.topk, case.topp]] * x[0].shape[1], device=device)
    block_map = BlockMap(*face.block_map(*x[:2], thresholds, *case.how(device)))
    return block_map, *face.forward(*x, *block_map, *case.how(device))


def check(face: str, case: Hidden) -> None:
    x = case.inputs()
    clean, spoilt = (results(face_of(face), case, some) for some in (x, case.spoilt(*x)))
    assert_same_map(spoilt[0], clean[0])
    assert torch.equal(spoilt[1], clean[1]) and torch.equal(spoilt[2], clean[2])


@given(case=small([1, 64, 100, 200, 300]))
@settings(max_examples=100)
def test_what_is_hidden_has_no_influence_on_a_cpu(case: Hidden) -> None:
    check("cpu", case)


@pytest.mark.parametrize("face", FACES[1:])
@given(case=small([1, 70, 150]))
@settings(max_examples=30 if torch.cuda.is_available() else 12)  # the interpreter is slow
def test_what_is_hidden_has_no_influence_in_the_kernels(face: str, case: Hidden) -> None:
    check(face, case)


@given(case=small([1, 64, 100, 200]))
def test_what_is_hidden_has_no_influence_in_the_reference(case: Hidden) -> None:
    q, k, v = case.inputs()
    thresholds = torch.tensor([[case.topk, case.topp]] * q.shape[1])
    maps = [reference.block_map(*x[:2], thresholds, *case.how("cpu")) for x in ((q, k, v), case.spoilt(q, k, v))]
    assert_same_map(*maps)
    outs = [reference.attention(*x, maps[0], *case.how("cpu"))[0] for x in ((q, k, v), case.spoilt(q, k, v))]
    assert torch.equal(*outs)


@given(case=small([1, 64, 100, 200, 300]))
@settings(max_examples=60)
def test_maps_under_masks_are_the_references(case: Hidden) -> None:
    q, k, _ = (x.double() for x in case.inputs())
    thresholds = torch.tensor([[case.topk, case.topp]] * q.shape[1])
    got = BlockMap(*face_of("cpu").block_map(q, k, thresholds, *case.how("cpu")))
    assert_same_map(got, reference.block_map(q, k, thresholds, *case.how("cpu")))


# ---- one thing at a time


def one_query(face: str) -> tuple[str, Tensor, Tensor, Tensor]:
    """(device, q, k, thresholds): a query that looks for the first feature, four key blocks, of which one is kept."""
    device = "cuda" if face == "triton" and torch.cuda.is_available() else "cpu"
    q, k = torch.zeros(1, 2, 1, 16, device=device), torch.zeros(1, 1, 256, 16, device=device)
    q[..., 0] = 1.0
    return device, q, k, torch.tensor([[0.25, 0.0]] * 2, device=device)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("stale", [-100.0, NAN, INF])
@pytest.mark.parametrize("is_float", [False, True], ids=["bool", "float"])
def test_stale_entries_of_a_cache_steer_nothing(face: str, stale: float, is_float: bool) -> None:
    """The newest block is half full; what an earlier request left in it once had it dropped."""
    device, q, k, thresholds = one_query(face)
    mask = (torch.arange(256, device=device) < 220).view(1, 1, 1, 256)
    mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, -INF) if is_float else mask
    k[:, :, 192:220, 0], k[:, :, 220:] = 1.0, stale
    counts, indices = face_of(face).block_map(q, k, thresholds, mask, False, 1.0)
    assert counts.flatten().tolist() == [1, 1] and indices[..., 0].flatten().tolist() == [3, 3]


@pytest.mark.parametrize("face", FACES)
def test_heads_that_share_keys_and_see_others_have_means_of_their_own(face: str) -> None:
    device, q, k, thresholds = one_query(face)
    k[:, :, :32, 0], k[:, :, 32:64, 0], k[:, :, 64:128, 0] = 3.0, -3.0, 1.0
    mask = torch.ones(1, 2, 1, 256, dtype=torch.bool, device=device)
    mask[:, 0, :, 32:64] = False  # the first head sees what it looks for, the second its opposite
    mask[:, 1, :, :32] = False
    _, indices = face_of(face).block_map(q, k, thresholds, mask, False, 1.0)
    assert indices[..., 0].flatten().tolist() == [0, 1]


@pytest.mark.parametrize("face", FACES)
def test_keys_beyond_the_last_query_of_a_causal_mask_steer_nothing(face: str) -> None:
    device = one_query(face)[0]
    q, k = torch.zeros(1, 1, 300, 16, device=device), torch.zeros(1, 1, 320, 16, device=device)
    q[..., 0], k[:, :, 300:] = 1.0, NAN
    counts, _ = face_of(face).block_map(q, k, torch.tensor([[0.2, 0.0]], device=device), None, True, 1.0)
    assert counts.flatten().tolist() == [2, 3, 2]  # the diagonal, and one block by Top-k
    want = reference.block_map(q, k, torch.tensor([[0.2, 0.0]]), None, True, 1.0)
    assert torch.equal(counts, want.counts)


@pytest.mark.parametrize("face", FACES)
def test_queries_that_see_nothing_do_not_speak_for_their_block(face: str) -> None:
    """Half of a query block is padding that looks for other keys. Nor does it make each block one that is cut."""
    device = one_query(face)[0]
    q, k = (torch.zeros(1, 1, rows, 16, device=device) for rows in (128, 256))
    k[:, :, 64:128, 0], k[:, :, 128:192, 1] = 1.0, 1.0
    q[:, :, :64, 0], q[:, :, 64:, 1] = 9.0, 1.0
    mask = (torch.arange(128, device=device) >= 64).view(1, 1, 128, 1).expand(1, 1, 128, 256)
    counts, indices = face_of(face).block_map(q, k, torch.tensor([[0.25, 0.0]], device=device), mask, False, 1.0)
    assert counts.item() == 1 and indices[0, 0, 0, 0] == 2


@pytest.mark.parametrize("face", FACES)
def test_values_that_are_no_numbers_reach_the_rows_that_read_their_block(face: str) -> None:
    """As in dense attention, where 0 * NaN is NaN; of blocks that are hidden whole nothing is read."""
    device, q, k, _ = one_query(face)
    v = torch.ones_like(k)
    mask = (torch.arange(256, device=device) < 100).view(1, 1, 1, 256)
    v[:, :, 128:] = NAN
    thresholds = torch.ones(2, 2, device=device)
    how = mask, False, 1.0
    out, _ = face_of(face).forward(q, k, v, *face_of(face).block_map(q, k, thresholds, *how), *how)
    assert torch.equal(out, torch.ones_like(out))
    v[:, :, 110] = NAN
    out, _ = face_of(face).forward(q, k, v, *face_of(face).block_map(q, k, thresholds, *how), *how)
    assert out.isnan().all()


def test_a_mask_that_is_expanded_over_heads_is_pooled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparge_compile.kernels import rule

    shapes = []
    real = rule.open_pairs

    def noted(mask: Tensor, *rest: object, **more: object) -> object:
        shapes.append(mask.shape)
        return real(mask, *rest, **more)

    monkeypatch.setattr(rule, "open_pairs", noted)
    q, k = torch.randn(2, 4, QUERY_BLOCK, 16), torch.randn(2, 2, 2 * KEY_BLOCK, 16)
    mask = (torch.arange(128) < 100).expand(2, 4, 128, 128)
    face_of("cpu").block_map(q, k, torch.ones(4, 2), mask, False, 1.0)
    assert shapes and all(shape[:2] == (1, 1) for shape in shapes)
