"""The CPU and the GPU have one face; the kernels behind it give what the reference gives.

Without a GPU, the Triton kernels run in Triton's interpreter, in float32 and float16.
"""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Case,
    assert_map_matches,
    assert_same_map,
    block_constant,
    check_attention,
    face_of,
    poisoned_memory,
    random_map,
    random_mask,
    random_qkv,
    scale_of,
)
from torch import Tensor

from sparge_compile import ops  # noqa: F401  importing it defines the ops
from sparge_compile.kernels import allocate, attend, reference
from sparge_compile.kernels import block_map as forms
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div
from sparge_compile.kernels.how import How
from sparge_compile.limit import Limit

THRESHOLDS = [[0.34, 0.55], [0.12, 0.81]]
OPS = ("block_map", "forward", "pack", "backward")
PARTS = ("means", "select")  # the two halves of block_map, which are no ops


def map_of(
    face: ModuleType, q: Tensor, k: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float = 0.25
) -> BlockMap:
    with poisoned_memory():
        return BlockMap(*face.block_map(q, k, torch.tensor(THRESHOLDS), mask, is_causal, scale))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "triton"])
def test_a_face_has_the_arguments_of_the_op(device: str, op: str) -> None:
    if device == "triton":
        pytest.importorskip("triton")
    schema = getattr(torch.ops.sparge, op).default._schema
    parameters = inspect.signature(getattr(face_of(device), op)).parameters.values()
    by_name = [x for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY]  # between ``attend`` and the faces
    assert {x.name for x in by_name} <= {"bits", "counter", "pooled", "codes"}
    arguments = [x for x in parameters if x not in by_name]
    assert all(x.default is inspect.Parameter.empty for x in arguments)
    names = [name for x in arguments for name in (How._fields if x.name == "how" else (x.name,))]
    assert names == [x.name for x in schema.arguments if x.name not in Limit._fields]  # asked before a face is
    assert {*OPS, *PARTS, "code", "centred"} == set(face_of(device).__all__)


# ---- block maps


@pytest.mark.parametrize("kept", [(), (70.0, 130.0, 0.0, 0.0)], ids=["", "kept"])
def test_a_map_is_that_of_the_means_of_its_blocks(face: ModuleType, kept: tuple[float, ...]) -> None:
    q, k = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 320, 16)
    thresholds = torch.tensor([(*pair, *kept) for pair in [*THRESHOLDS, *THRESHOLDS]])
    with poisoned_memory():
        want = BlockMap(*face.block_map(q, k, thresholds, None, False, 0.25))
        assert_same_map(BlockMap(*face.select(*face.means(q, k), thresholds, 0.25)), want)


def constant_mask(kind: str, length: int, keys: int) -> Tensor | None:
    """Masks whose block means are exact."""
    if kind == "none":
        return None
    if kind == "key":
        return (torch.arange(keys) < keys // 2 + 1).view(1, 1, 1, keys)
    if kind == "full":  # hides whole blocks for some query blocks, single pairs elsewhere
        mask = block_constant(1, 2, length, ceil_div(keys, KEY_BLOCK), QUERY_BLOCK) >= 0
        return mask.repeat_interleave(KEY_BLOCK, 3)[..., :keys] & (torch.rand(length, keys) < 0.5)
    value = block_constant(1, 1, length, ceil_div(keys, KEY_BLOCK), QUERY_BLOCK).repeat_interleave(KEY_BLOCK, 3)
    return value[..., :keys].masked_fill(torch.rand(length, keys) < 0.3, -torch.inf)


@pytest.mark.parametrize("is_causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("mask", ["none", "key", "full", "add"])
def test_map_is_the_references_where_scores_tie(face: ModuleType, mask: str, is_causal: bool) -> None:
    q, k = block_constant(1, 2, 300, 16, QUERY_BLOCK, values=1), block_constant(1, 1, 500, 16, KEY_BLOCK, values=1)
    attn_mask = constant_mask(mask, 300, 500)
    want = reference.block_map(q, k, torch.tensor(THRESHOLDS), attn_mask, is_causal, 0.25)
    assert_same_map(map_of(face, q, k, attn_mask, is_causal), want)


@pytest.mark.parametrize("topp", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("topk", [0.001, 0.25, 1.0])
def test_map_at_extreme_thresholds(face: ModuleType, topk: float, topp: float) -> None:
    thresholds = torch.tensor([[topk, topp], [0.5, 0.0]])
    q, k = block_constant(1, 2, 300, 16, QUERY_BLOCK), block_constant(1, 2, 500, 16, KEY_BLOCK)
    got = BlockMap(*face.block_map(q, k, thresholds, None, False, 0.25))
    assert_same_map(got, reference.block_map(q, k, thresholds, scale=0.25))


def test_equal_scores_keep_the_lower_index(face: ModuleType) -> None:
    q, k = torch.zeros(1, 2, 129, 16), torch.zeros(1, 2, 512, 16)
    counts, indices = face.block_map(q, k, torch.tensor([[0.5, 0.0], [0.1, 0.75]]), None, False, 0.25)
    assert counts.tolist() == [[[4, 4], [6, 6]]]
    assert indices[0, 0, 0, :4].tolist() == [0, 1, 2, 3] and indices[0, 1, 1, :6].tolist() == list(range(6))


def test_both_zeros_tie(face: ModuleType) -> None:
    """-0.0 and 0.0 are one score: an order by bits alone would part them."""
    q, k = torch.zeros(1, 1, 10, 16), torch.ones(1, 1, 256, 16)
    q[..., 0] = 1.0
    k[:, :, :64, 0], k[:, :, 64:, 0] = -0.0, 0.0
    k[:, :, :64, 1:] = -1.0
    assert face.block_map(q, k, torch.tensor([[0.25, 0.0]]), None, False, 0.25)[1][0, 0, 0, 0] == 0


@pytest.mark.parametrize("length, keys, head_size", [(1, 1, 1), (63, 65, 72), (129, 200, 40), (257, 1100, 16)])
@pytest.mark.parametrize("layout", ["blhd", "bhdl"])
def test_map_of_random_inputs(face: ModuleType, length: int, keys: int, head_size: int, layout: str) -> None:
    case = Case(length, keys, head_size, batch=2, key_heads=1, layout=layout, is_causal=layout == "blhd")
    q, k, _ = random_qkv(case)
    got = map_of(face, q, k, None, case.is_causal, 1.5)
    assert_map_matches(got, q, k, torch.tensor(THRESHOLDS), None, case.is_causal, 1.5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_rows_with_a_score_that_is_not_finite_keep_every_visible_block(face: ModuleType, poison: float) -> None:
    q, k = block_constant(1, 2, 700, 16, QUERY_BLOCK), block_constant(1, 2, 830, 16, KEY_BLOCK)
    q[0, 0, 300, 0] = poison
    k[0, 1, 500, 0] = poison
    want = reference.block_map(q, k, torch.tensor(THRESHOLDS), None, True, 0.25)
    assert_same_map(map_of(face, q, k, None, True), want)
    assert (want.counts[0, 0, 3:] < 8).any()  # the partner: other rows of that head stay sparse


@pytest.mark.parametrize("n_key", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_packed_bits(face: ModuleType, n_key: int, density: float) -> None:
    dense = torch.rand(2, 1, 5, n_key) < density
    counts, indices = BlockMap.from_dense(dense)
    live = torch.arange(n_key) < counts.unsqueeze(-1)
    with poisoned_memory():
        bits = face.pack(counts, indices.where(live, 2**31 - 1))  # entries past the counts are not read
    assert torch.equal(bits, forms.pack(dense))


def test_packed_bits_with_room_to_spare(face: ModuleType) -> None:
    """In rows, words and sequences; where a map holds for all sequences, it is given for each."""
    dense = torch.rand(2, 3, 5, 40) < 0.3
    for maps, batch in ((dense, 3), (dense[:1], 2)):
        room = torch.full((batch, 3, 7, 4), -1, dtype=torch.int32)
        bits = face.pack(*BlockMap.from_dense(maps), bits=room)
        used = bits[:2, :, :5, :2]
        assert bits is room and torch.equal(used, forms.pack(maps).expand_as(used))
        assert not bits[:, :, 5:].any() and not bits[..., 2:].any() and not bits[2:].any()


# ---- attention

CASES = [
    Case(1, 1, 16),
    Case(63, 65, 16, batch=2, mask="key"),
    Case(65, 63, 24, layout="blhd", dtype=torch.float16),
    Case(129, 200, 32, key_heads=1, layout="fused", dtype=torch.float16),
    Case(200, 129, 40, layout="bhdl", is_causal=True),
    Case(200, 200, 16, heads=3, key_heads=1, is_causal=True, layout="blhd"),
    Case(130, 400, 16, is_causal=True, mask="key", dtype=torch.float16),
    Case(257, 100, 72, mask="none", is_causal=True, layout="fused"),
    Case(150, 150, 16, mask="full"),
    Case(150, 190, 17, mask="full", is_causal=True, key_heads=1),
    Case(130, 200, 16, batch=2, mask="add", layout="blhd"),
    Case(140, 140, 80, mask="add", is_causal=True, dtype=torch.float16),
    Case(70, 150, 16, batch=2, mask="add_key", key_heads=1),
    Case(1, 300, 16, mask="full"),
    Case(129, 65, 16, scale=-0.3),
    Case(129, 65, 16, scale=0.0),
    Case(129, 200, 16, key_heads=1, layout="fused", dtype=torch.float16, value_size=40),
    Case(200, 190, 40, batch=2, mask="key", is_causal=True, layout="blhd", value_size=16),
    Case(150, 130, 24, mask="full", key_heads=1, value_size=17),
    Case(70, 150, 16, mask="add", layout="bhdl", value_size=72),
    Case(130, 130, 72, is_causal=True, value_size=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(face: ModuleType, case: Case) -> None:
    check_attention(case, random_map(case), with_dlse=case.keys % 2 == 0, face=face)


def test_attention_under_its_own_map(face: ModuleType) -> None:
    """The usual way: a causal map by the rule, of which only the last blocks need element masks."""
    case = Case(300, 300, 16, is_causal=True, key_heads=1)
    q, k, _ = random_qkv(case)
    check_attention(case, map_of(face, q, k, None, True, scale_of(case)), face=face)


def test_one_map_for_all_batches_and_heads(face: ModuleType) -> None:
    case = Case(130, 130, 16, batch=2, is_causal=True)
    check_attention(case, BlockMap.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool)), face=face)


def test_topk_of_one_is_dense_attention(face: ModuleType) -> None:
    case = Case(200, 330, 32)
    q, k, v = random_qkv(case)
    how = None, False, scale_of(case)
    counts, indices = face.block_map(q, k, torch.tensor([[1.0, 0.0]] * 2), *how)
    assert (counts == 6).all()
    out, _ = face.forward(q, k, v, counts, indices, *how)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_huge_scores_of_real_keys_do_not_leak_from_the_tail(face: ModuleType) -> None:
    """Keys past the end score 0; where all real scores are far below, exp(0 - lse) is infinite and dq was NaN."""
    q, k, v = torch.full((1, 1, 5, 16), 8.0), torch.full((1, 1, 70, 16), -8.0), torch.randn(1, 1, 70, 16)
    block_map, how = BlockMap.from_dense(torch.ones(1, 1, 1, 2, dtype=torch.bool)), (None, False, 0.25)
    out, lse = face.forward(q, k, v, *block_map, *how)
    grads = face.backward(out, q, k, v, out, lse, None, face.pack(*block_map), *how)
    assert all(x.isfinite().all() for x in (out, lse, *grads))


def test_nan_in_one_head_stays_there(face: ModuleType) -> None:
    case = Case(200, 130, 16, batch=1, heads=2, key_heads=2)
    q, k, v = random_qkv(case)
    k[:, 1, 70] = torch.nan
    block_map, how = map_of(face, q, k), (None, False, 0.25)
    assert (block_map.counts[:, 1] == 3).all()  # shown, not hidden: all blocks are kept, as in dense attention
    out, lse = face.forward(q, k, v, *block_map, *how)
    grads = face.backward(out, q, k, v, out, lse, None, face.pack(*block_map), *how)
    for x in (out, lse, *grads):
        assert x[:, 0].isfinite().all() and x[:, 1].isnan().any()


def test_dropped_blocks_are_not_read(face: ModuleType) -> None:
    q, k, v = random_qkv(Case(400, 500, 16))
    kept = torch.ones(1, 2, 4, 8, dtype=torch.bool)
    kept[..., 3] = False
    kept[:, :, 0, 5:] = False  # lists of unequal length in one batch
    k[:, :, 192:256], v[:, :, 192:256] = torch.nan, torch.nan
    lists, how = BlockMap.from_dense(kept), (None, False, 0.25)
    out, lse = face.forward(q, k, v, *lists, *how)
    grads = face.backward(out, q, k, v, out, lse, None, face.pack(*lists), *how)
    assert all(x.isfinite().all() for x in (out, lse, *grads))


def test_expanded_output_gradient(face: ModuleType) -> None:
    """``out.sum().backward()`` sends a gradient of which every stride is 0."""
    case = Case(150, 100, 16, key_heads=1)
    q, k, v = random_qkv(case)
    block_map, how = random_map(case, density=1.0), (None, False, 0.25)
    out, lse = face.forward(q, k, v, *block_map, *how)
    bits, dout = face.pack(*block_map), torch.ones(()).expand(q.shape)
    expanded = face.backward(dout, q, k, v, out, lse, None, bits, *how)
    dense = face.backward(dout.contiguous(), q, k, v, out, lse, None, bits, *how)
    for a, b in zip(expanded, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("is_causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("batch, length, keys", [(0, 5, 5), (1, 0, 5), (1, 5, 0), (1, 0, 0)])
def test_nothing_to_do(face: ModuleType, batch: int, length: int, keys: int, is_causal: bool) -> None:
    case = Case(length, keys, 16, batch=batch, mask="key" if keys else "none")
    q, k, v = random_qkv(case)
    mask, how = random_mask(case), (None, is_causal, 0.25)
    block_map = map_of(face, q, k, mask, is_causal)
    assert_same_map(block_map, reference.block_map(q, k, torch.tensor(THRESHOLDS), mask, is_causal))
    with poisoned_memory():
        out, lse = face.forward(q, k, v, *block_map, *how)
        bits = face.pack(*block_map)
        grads = face.backward(out, q, k, v, out, lse, lse, bits, *how)
    assert bits.shape == (*block_map.counts.shape, ceil_div(ceil_div(keys, KEY_BLOCK), 32))
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert all((x == 0).all() and x.shape == like.shape for x, like in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize("lengths", [None, (150, 0, 97)])
@pytest.mark.parametrize("keys", [65, 2049])
def test_the_map_writes_its_bits_and_zeros_behind_them(
    face: ModuleType, lengths: tuple[int, ...] | None, keys: int
) -> None:
    length = sum(lengths or (200,))
    q, k = block_constant(1, 2, length, 4, QUERY_BLOCK), block_constant(1, 2, keys, 4, KEY_BLOCK)
    how = How(None, False, 0.25)
    if lengths is not None:
        starts, key_starts = torch.tensor([0, 150, 150, 247]).int(), torch.tensor([0, 64, 64, keys]).int()
        how = How(None, False, 0.25, False, starts, key_starts, 150, keys)
    with poisoned_memory():
        bits = allocate.new_bits(q, k, how)
        block_map = face.block_map(q, k, torch.tensor(THRESHOLDS), *how, bits=bits)
    want = forms.pack(block_map.to_dense())
    assert torch.equal(attend.used_bits(bits, q, k, how), want)
    assert bits.ne(0).sum() == want.ne(0).sum()  # and zeros in the room to spare
