"""The Triton kernels against the reference, run on a CPU by Triton's interpreter (float32 and float16)."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Case,
    assert_map_matches,
    assert_same_map,
    block_constant,
    check_attention,
    poisoned_memory,
    random_map,
    random_mask,
    random_qkv,
    scale_of,
)
from torch import Tensor

from sparge_compile.kernels import block_map as forms
from sparge_compile.kernels import reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div

pytestmark = pytest.mark.interpreter

THRESHOLDS = torch.tensor([[0.34, 0.55], [0.12, 0.81]])


def triton_map(
    q: Tensor, k: Tensor, thresholds: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float = 0.25
) -> BlockMap:
    from sparge_compile.kernels.triton import select

    with poisoned_memory():
        return select.block_map(q, k, thresholds, mask, is_causal, scale)


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
def test_map_is_the_references_where_scores_tie(mask: str, is_causal: bool) -> None:
    q, k = block_constant(1, 2, 600, 16, QUERY_BLOCK, values=1), block_constant(1, 1, 700, 16, KEY_BLOCK, values=1)
    attn_mask = constant_mask(mask, 600, 700)
    want = reference.block_map(q, k, THRESHOLDS, attn_mask, is_causal, 0.25)
    assert_same_map(triton_map(q, k, THRESHOLDS, attn_mask, is_causal), want)


@pytest.mark.parametrize("topp", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("topk", [0.001, 0.25, 1.0])
def test_map_at_extreme_thresholds(topk: float, topp: float) -> None:
    thresholds = torch.tensor([[topk, topp], [0.5, 0.0]])
    q, k = block_constant(1, 2, 300, 16, QUERY_BLOCK), block_constant(1, 2, 500, 16, KEY_BLOCK)
    assert_same_map(triton_map(q, k, thresholds), reference.block_map(q, k, thresholds, scale=0.25))


def test_equal_scores_keep_the_lower_index() -> None:
    q, k = torch.zeros(1, 2, 129, 16), torch.zeros(1, 2, 512, 16)
    got = triton_map(q, k, torch.tensor([[0.5, 0.0], [0.1, 0.75]]))
    assert got.counts.tolist() == [[[4, 4], [6, 6]]]
    assert got.indices[0, 0, 0, :4].tolist() == [0, 1, 2, 3] and got.indices[0, 1, 1, :6].tolist() == list(range(6))


def test_both_zeros_tie() -> None:
    """-0.0 and 0.0 are one score: an order by bits alone would part them."""
    q, k = torch.zeros(1, 1, 10, 16), torch.ones(1, 1, 256, 16)
    q[..., 0] = 1.0
    k[:, :, :64, 0], k[:, :, 64:, 0] = -0.0, 0.0
    k[:, :, :64, 1:] = -1.0
    assert triton_map(q, k, torch.tensor([[0.25, 0.0]])).indices[0, 0, 0, 0] == 0


@pytest.mark.parametrize("length, keys, head_size", [(1, 1, 1), (63, 65, 72), (129, 200, 40), (257, 1100, 16)])
@pytest.mark.parametrize("layout", ["blhd", "bhdl"])
def test_map_of_random_inputs(length: int, keys: int, head_size: int, layout: str) -> None:
    case = Case(length, keys, head_size, batch=2, key_heads=1, layout=layout, is_causal=layout == "blhd")
    q, k, _ = random_qkv(case)
    got = triton_map(q, k, THRESHOLDS, None, case.is_causal, 1.5)
    assert_map_matches(got, q, k, THRESHOLDS, None, case.is_causal, 1.5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_rows_with_a_score_that_is_not_finite_keep_every_visible_block(poison: float) -> None:
    q, k = block_constant(1, 2, 700, 16, QUERY_BLOCK), block_constant(1, 2, 830, 16, KEY_BLOCK)
    q[0, 0, 300, 0] = poison
    k[0, 1, 500, 0] = poison
    want = reference.block_map(q, k, THRESHOLDS, None, True, 0.25)
    assert_same_map(triton_map(q, k, THRESHOLDS, None, True), want)
    assert (want.counts[0, 0, 3:] < 8).any()  # the partner: other rows of that head stay sparse


@pytest.mark.parametrize("n_key", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_forms_of_a_map(n_key: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparge_compile.kernels.triton import lists

    small = {"PACK_ENTRIES": 16, "PACK_WORDS": 2, "UNPACK_BLOCKS": 32, "INVERT_ROWS": 4}
    for name, value in small.items():
        monkeypatch.setattr(lists, name, value)  # several steps and parts even for short lists
    dense = torch.rand(2, 1, 5, n_key) < density
    with poisoned_memory():
        bits = lists.pack(BlockMap.from_dense(dense), n_key)
        unpacked = lists.unpack(bits, n_key)
        inverted = BlockMap(*lists.invert(bits, 5, n_key))
    assert torch.equal(bits, forms.pack(dense))
    assert_same_map(unpacked, BlockMap.from_dense(dense))
    assert_same_map(inverted, BlockMap.from_dense(dense.mT))


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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    check_attention(case, random_map(case), with_dlse=case.keys % 2 == 0)


@pytest.mark.parametrize("case", [CASES[i] for i in (2, 3, 7)], ids=str)
def test_attention_through_tensor_descriptors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparge_compile.kernels import launch
    from sparge_compile.kernels.triton import tiles

    used = []
    make = tiles.descriptor
    monkeypatch.setattr(launch, "use_descriptors", lambda dtype, device: True)
    monkeypatch.setattr(tiles, "descriptor", lambda *args: used.append(args) or make(*args))
    check_attention(case, random_map(case))
    assert used


def test_attention_under_its_own_map() -> None:
    """The usual way: a causal map by the rule, of which only the last blocks need element masks."""
    case = Case(300, 300, 16, is_causal=True, key_heads=1)
    q, k, _ = random_qkv(case)
    check_attention(case, triton_map(q, k, THRESHOLDS, None, True, scale_of(case)))


def test_one_map_for_all_batches_and_heads() -> None:
    case = Case(130, 130, 16, batch=2, is_causal=True)
    check_attention(case, BlockMap.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool)))


def test_topk_of_one_is_dense_attention() -> None:
    from sparge_compile.kernels.triton import forward

    case = Case(200, 330, 32)
    q, k, v = random_qkv(case)
    block_map = triton_map(q, k, torch.tensor([[1.0, 0.0]] * 2), scale=scale_of(case))
    assert (block_map.counts == 6).all()
    out, _ = forward.forward(q, k, v, block_map, None, False, scale_of(case))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_huge_scores_of_real_keys_do_not_leak_from_the_tail() -> None:
    """Keys past the end score 0; where all real scores are far below, exp(0 - lse) is infinite and dq was NaN."""
    from sparge_compile.kernels.triton import backward, forward, lists

    q, k, v = torch.full((1, 1, 5, 16), 8.0), torch.full((1, 1, 70, 16), -8.0), torch.randn(1, 1, 70, 16)
    block_map = BlockMap.from_dense(torch.ones(1, 1, 1, 2, dtype=torch.bool))
    out, lse = forward.forward(q, k, v, block_map, None, False, 0.25)
    grads = backward.backward(out, q, k, v, out, lse, None, lists.pack(block_map, 2), None, False, 0.25)
    assert all(x.isfinite().all() for x in (out, lse, *grads))


def test_nan_in_one_head_stays_there() -> None:
    from sparge_compile.kernels.triton import backward, forward, lists

    case = Case(200, 130, 16, batch=1, heads=2, key_heads=2)
    q, k, v = random_qkv(case)
    k[:, 1, 70] = torch.nan
    block_map = triton_map(q, k, THRESHOLDS)
    assert (block_map.counts[:, 1] == 3).all()  # shown, not hidden: all blocks are kept, as in dense attention
    out, lse = forward.forward(q, k, v, block_map, None, False, 0.25)
    grads = backward.backward(out, q, k, v, out, lse, None, lists.pack(block_map, 3), None, False, 0.25)
    for x in (out, lse, *grads):
        assert x[:, 0].isfinite().all() and x[:, 1].isnan().any()


def test_expanded_output_gradient() -> None:
    """``out.sum().backward()`` sends a gradient of which every stride is 0."""
    from sparge_compile.kernels.triton import backward, forward, lists

    case = Case(150, 100, 16, key_heads=1)
    q, k, v = random_qkv(case)
    block_map = random_map(case, density=1.0)
    out, lse = forward.forward(q, k, v, block_map, None, False, 0.25)
    bits, dout = lists.pack(block_map, 2), torch.ones(()).expand(q.shape)
    expanded = backward.backward(dout, q, k, v, out, lse, None, bits, None, False, 0.25)
    dense = backward.backward(dout.contiguous(), q, k, v, out, lse, None, bits, None, False, 0.25)
    for a, b in zip(expanded, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch, length, keys", [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_nothing_to_do(batch: int, length: int, keys: int) -> None:
    from sparge_compile.kernels.triton import backward, forward, lists

    case = Case(length, keys, 16, batch=batch, mask="key" if keys else "none")
    q, k, v = random_qkv(case)
    n_key = ceil_div(keys, KEY_BLOCK)
    block_map = triton_map(q, k, THRESHOLDS, random_mask(case))
    assert_same_map(block_map, reference.block_map(q, k, THRESHOLDS, random_mask(case)))
    with poisoned_memory():
        out, lse = forward.forward(q, k, v, block_map, None, False, 0.25)
        bits = lists.pack(block_map, n_key)
        unpacked = lists.unpack(bits, n_key)
        grads = backward.backward(out, q, k, v, out, lse, None, bits, None, False, 0.25)
    assert_same_map(unpacked, block_map)
    assert (out == 0).all() and (lse == -torch.inf).all() and all((x == 0).all() for x in grads)
