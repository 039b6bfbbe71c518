"""Heads exchanged by copy engines: what NCCL's exchange gives, and nothing packed before.

Where there are fewer than two GPUs, the graphs are those of copy engines, and gloo moves what they would.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import run_in_processes
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from sparge_compile import Ranks, sharded_attention
from sparge_compile.parallel import engines
from sparge_compile.parallel.exchange import all_to_all
from sparge_compile.passes.write import turns

OPTIONS = {"topk": 0.3, "topp": 0.0, "min_seq_len": 0}
WAYS = ("eager", "aot_eager", "turns")


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (torch.empty(5, 7), (1, 35, 35)),
        (torch.empty(()), (1, 1, 1)),
        (torch.empty(10, 12, 8)[:, :3], (10, 24, 96)),
        (torch.empty(1, 10, 12, 8).transpose(1, 2)[:, 2:4].permute(2, 0, 1, 3), (10, 16, 96)),
        (torch.empty(2, 10, 12, 8)[:, :, :3].transpose(0, 1), None),
        (torch.empty(4, 6).T, None),
        (torch.empty(7).expand(5, 7), None),
        (torch.empty(8).as_strided((5, 4), (1, 1)), None),
    ],
    ids=["contiguous", "a number", "some heads", "of a model", "two samples", "columns", "one row", "overlapping"],
)
def test_rows_that_are_as_far_apart(x, want):
    if want is not None and want[0] > 1:
        assert not x.is_contiguous()
    assert engines.rows_of(x) == want


def test_processes_that_share_no_memory_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"share no memory \(no GPU\).*GPUs of one host.*Leave copy_engines out"):
        engines.use(SimpleNamespace(group_name="none"))
    with pytest.raises(ValueError, match=r"the group 'none'.*Ranks\.of\(group, copy_engines=True\)"):
        engines.all_to_all(torch.empty(2, 3), "none")


def lane_of(group: Any, capacity: int, is_recorded: bool = False) -> SimpleNamespace:
    return SimpleNamespace(group=group, capacity=capacity, is_recorded=is_recorded, exchange=torch.clone)


def test_memory_that_a_cuda_graph_has_recorded_outlives_larger_exchanges(monkeypatch):
    group = SimpleNamespace(group_name="a group")
    monkeypatch.setattr(engines, "lanes", {})
    monkeypatch.setattr(engines, "_recorded", [])
    monkeypatch.setattr(engines, "Lane", lane_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    recorded = engines.lanes["a group"] = lane_of(group, 4)
    for size, is_recorded in ((1, False), (2, True), (4, False)):
        engines.lanes["a group"].is_recorded = is_recorded
        engines.all_to_all(torch.zeros(2, size), "a group")
        assert engines.lanes["a group"].capacity == 8 * size
    assert recorded not in engines._recorded and [lane.capacity for lane in engines._recorded] == [8]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"64 bytes in a CUDA graph.*32 are shared.*Call the model once"):
        engines.all_to_all(torch.zeros(2, 8), "a group")


def test_a_group_has_nothing_of_one_before_that_had_its_name(monkeypatch):
    before, now = (SimpleNamespace(group_name="0") for _ in range(2))
    monkeypatch.setattr(engines, "lanes", {"0": lane_of(before, 4)})
    engines.drop_of_a_group_before(before)
    assert "0" in engines.lanes
    engines.drop_of_a_group_before(now)
    assert not engines.lanes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor, ranks: Ranks) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (4, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return sharded_attention(q, k, v, heads=ranks).transpose(1, 2).flatten(2)


def by_gloo(parts: Tensor, group: str) -> Tensor:
    """In the place of copy engines: to be waited for as well."""
    sizes = [1] * parts.shape[0]
    sent = parts.contiguous().flatten(1)
    return torch.ops._c10d_functional.all_to_all_single(sent, sizes, sizes, group).view(parts.shape)


def with_engines(device: torch.device) -> Ranks:
    """The processes of a group of its own, whose heads go by copy engines."""
    group = dist.new_group([0, 1])
    if device.type == "cuda":
        return Ranks.of(group, copy_engines=True)
    engines.lanes[group.group_name] = mock.Mock(group=group)
    engines.tell_inductor()
    return Ranks.of(group)


def exchanged(device: torch.device) -> dict[str, Any]:
    """Outputs and gradients with and without copy engines, and the code that Inductor writes."""
    library = torch.library.Library("sparge", "FRAGMENT")
    library.impl("all_to_all", by_gloo, "CPU")
    torch.manual_seed(0)
    model, x = Block().to(device), torch.randn(1, 256, 64, device=device)
    found: dict[str, Any] = {}
    for way, ranks in (("usual", Ranks.of()), ("engines", with_engines(device))):
        for inner in WAYS:
            torch._dynamo.reset()
            options = {**OPTIONS, "inner": "inductor" if inner == "turns" else inner}
            run = torch.compile(model, backend="sparge", options=options, fullgraph=True)
            with mock.patch.object(turns, "LEAST_BYTES", 0 if inner == "turns" else turns.LEAST_BYTES):
                out = run(x, ranks)
                model.zero_grad()
                out.square().sum().backward()
            found[f"{way}, {inner}"] = [out.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]
        with torch.no_grad(), mock.patch.object(turns, "LEAST_BYTES", 0):
            torch._dynamo.reset()
            _, codes = run_and_get_code(
                torch.compile(model, backend="sparge", options=OPTIONS, fullgraph=True), x, ranks
            )
        found[f"{way}, code"] = codes[-1].split("def call")[1]
        found[f"{way}, dense"] = [model(x, ranks).detach().cpu()]
    if device.type == "cuda":
        found["alike"] = alike(ranks)
    return found


def alike(ranks: Ranks) -> list[bool]:
    """Whether exchanges of many sizes and strides are NCCL's, and those of a CUDA graph in each replay."""
    generator, found = torch.Generator("cuda").manual_seed(ranks.rank), []
    for rows in (1, 300, 7, 4000, 64, 20000, 20000, 20000):
        whole = torch.randn(rows, 2, 6, 64, device="cuda", generator=generator).bfloat16()
        for x in (whole.transpose(0, 1), whole[:, :, 1:4].transpose(0, 1), whole[..., :32].permute(1, 2, 0, 3)):
            (got,) = all_to_all([x], 2, ranks.group)
            (want,) = all_to_all([x.contiguous()], 2, dist.group.WORLD.group_name)
            found.append(torch.equal(got, want))
    x = torch.zeros(2, 20000, device="cuda")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        got = x
        for _ in range(3):
            (got,) = all_to_all([got + ranks.rank], 2, ranks.group)
    for n in range(5):
        x.fill_(n)
        if n == 3:  # a larger exchange, behind the graph's recording
            all_to_all([torch.zeros(2, 4_000_000, device="cuda")], 2, ranks.group)
        graph.replay()
        want = x.clone()
        for _ in range(3):
            (want,) = all_to_all([want + ranks.rank], 2, dist.group.WORLD.group_name)
        found.append(torch.equal(got, want))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_in_processes(exchanged, tmp_path_factory.mktemp("engines"))


@pytest.mark.multigpu
@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "dense"])
def test_outputs_and_gradients_are_those_of_other_exchanges(found, way):
    for of_rank in found:
        for got, want in zip(of_rank[f"engines, {way}"], of_rank[f"usual, {way}"], strict=True):
            assert got.abs().max() > 0
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.multigpu
@pytest.mark.slow
def test_parts_are_sent_from_where_they_lie(found):
    """Products and attention alone write what is sent: each line that sends reads a product's or attention's result."""
    for of_rank in found:
        usual, code = of_rank["usual, code"], of_rank["engines, code"]
        written = r"torch\.ops\.sparge\.all_to_all\.default\((?:reinterpret_tensor\()?(buf\d+)"
        sent = re.findall(written, code)
        assert len(sent) == 7, "values, twice keys, queries and results"
        products = set(re.findall(r"extern_kernels.*out=(?:reinterpret_tensor\()?(buf\d+)", code))
        attention = set(re.findall(r"(buf\d+) = torch\.ops\.sparge\.attend", code))
        results = set(re.findall(r"(buf\d+) = (buf\d+)", code))
        aliases = {name for name, of in results if of in attention}
        assert set(sent) <= products | attention | aliases
        assert len(re.findall("fused", code)) < len(re.findall("fused", usual))


@pytest.mark.multigpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs exchange")
def test_exchanges_of_any_size_and_of_replays_are_those_of_nccl(found):
    for of_rank in found:
        assert all(of_rank["alike"]) and len(of_rank["alike"]) == 29
