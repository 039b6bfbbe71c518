"""The list of a query block, split over several programs: the result of one."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, check_attention, random_map
from torch import Tensor

from sparge_compile.kernels import launch
from sparge_compile.kernels.block_map import BlockMap

CASES = [
    Case(3, 400, 24, batch=2, layout="blhd", dtype=torch.float16),
    Case(129, 700, 32, key_heads=1, layout="fused", value_size=16),
    Case(150, 330, 16, is_causal=True),
    Case(100, 350, 16, mask="full", batch=2),
    Case(40, 330, 16, mask="add", heads=1, key_heads=1),
]


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "list_parts", lambda programs, n_key, device: 3)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_are_put_together(case: Case, split: None) -> None:
    check_attention(case, random_map(case))


@pytest.mark.interpreter
def test_lists_may_be_shorter_than_their_parts(split: None) -> None:
    kept = torch.zeros(1, 2, 2, 5, dtype=torch.bool)
    kept[0, 0, :, 2] = kept[0, 1, 0, 4] = True
    check_attention(Case(200, 300, 16), BlockMap.from_dense(kept))


def test_lists_are_split_where_a_gpu_has_nothing_else_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: 9)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    device = torch.device("cuda")
    assert launch.list_parts(24, 4096, device) == 5
    assert launch.list_parts(24, 64, device) == 2  # no part has less than 32 blocks
    assert launch.list_parts(67, 4096, device) == launch.list_parts(24, 63, device) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(1, 16000, 128, heads=8, layout="blhd"), Case(100, 9000, 64, heads=4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_few_queries_over_many_keys(case: Case, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    with device:
        assert launch.list_parts(case.heads, -(-case.keys // 64), device) > 1
        check_attention(case._replace(dtype=dtype), random_map(case))


@pytest.mark.gpu
def test_few_queries_in_a_cuda_graph() -> None:
    from sparge_compile import attention

    q, (k, v) = torch.randn(1, 4, 64, 64, device="cuda"), torch.randn(2, 1, 4, 8192, 64, device="cuda")

    def run() -> Tensor:
        return attention(q, k, v, topk=0.3)

    want = run()
    run()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
