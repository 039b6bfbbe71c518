"""Parts of the Triton kernels behind their face, run on a CPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, assert_same_map, check_attention, poisoned_memory, random_map

from sparge_compile.kernels import block_map as forms
from sparge_compile.kernels.block_map import BlockMap

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("n_key", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_forms_of_a_map(n_key: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparge_compile.kernels.triton import lists

    small = {"PACK_ENTRIES": 16, "PACK_WORDS": 2, "UNPACK_WORDS": 1, "INVERT_ROWS": 4}
    for name, value in small.items():
        monkeypatch.setattr(lists, name, value)  # several steps and parts even for short lists
    dense = torch.rand(2, 1, 5, n_key) < density
    with poisoned_memory():
        bits = lists.pack(*BlockMap.from_dense(dense))
        unpacked, inverted = lists.unpack(bits, 5, n_key)
    assert torch.equal(bits, forms.pack(dense))
    assert_same_map(unpacked, BlockMap.from_dense(dense))
    assert_same_map(inverted, BlockMap.from_dense(dense.mT))


@pytest.mark.parametrize("batch, n_query, n_key", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_forms_of_a_map(batch: int, n_query: int, n_key: int) -> None:
    from sparge_compile.kernels.triton import lists

    empty = BlockMap.from_dense(torch.zeros(batch, 2, n_query, n_key, dtype=torch.bool))
    with poisoned_memory():
        bits = lists.pack(*empty)
        unpacked, inverted = lists.unpack(bits, n_query, n_key)
        assert_same_map(unpacked, empty)
        assert (inverted.counts == 0).all()


@pytest.mark.parametrize(
    "case",
    [
        Case(65, 63, 24, layout="blhd", dtype=torch.float16),
        Case(129, 200, 32, key_heads=1, layout="fused", dtype=torch.float16),
        Case(257, 100, 72, is_causal=True, layout="fused"),
        Case(129, 200, 40, key_heads=1, layout="blhd", dtype=torch.float16, value_size=16),
        Case(150, 130, 16, is_causal=True, layout="blhd", dtype=torch.float16, value_size=48),
    ],
    ids=str,
)
def test_attention_through_tensor_descriptors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparge_compile.kernels import launch
    from sparge_compile.kernels.triton import tiles

    used = []
    make = tiles.descriptor
    monkeypatch.setattr(launch, "use_descriptors", lambda dtype, device: True)
    monkeypatch.setattr(tiles, "descriptor", lambda *args: used.append(args) or make(*args))
    check_attention(case, random_map(case))
    assert used
