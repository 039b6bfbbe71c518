"""Attention of a sequence that two processes share: outputs, gradients and block maps are those of one process.

Over gloo on a CPU, over NCCL where there are two GPUs (``make test-multigpu``).
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_in_processes
from torch import Tensor, nn

from sparge_compile import Calibration, Ranks, attach, backend, explain, sharded_attention
from sparge_compile.passes.write import turns
from sparge_compile.report import Report
from sparge_compile.running import listeners

pytestmark = pytest.mark.multigpu

HEADS, KEY_HEADS, SIZE, LENGTH, WIDTH = 8, 4, 8, 512, 32
PAIRS = [(0.15, 0.0), (0.3, 0.2), (0.9, 0.0), (0.1, 0.5), (0.5, 0.0), (0.2, 0.1), (0.05, 0.3), (0.4, 0.0)]
CALIBRATION = Calibration({"0": PAIRS, "1": PAIRS[::-1]})
OPTIONS = {"calibration": CALIBRATION, "min_seq_len": 0, "inner": "eager"}
HEADS_OF_RANKS = [3, 1, 0, 2]
LARGEST_ERROR = 1e-5 if torch.cuda.device_count() < 2 else 5e-3  # GPUs may compute float32 products in TF32
BESIDE = {
    "kept": {"keep_keys": 64, "dense_queries": True},
    "tiles": {"token_order": "tiles", "grid": (2, 16, 16)},
    "causal": {},
}


class Block(nn.Module):
    """Attention with grouped queries, over this process alone, or as ``shared`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * SIZE)
        self.out = nn.Linear(HEADS * SIZE, WIDTH)
        self.shared: dict[str, Any] | None = None
        self.is_causal = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, SIZE)).transpose(1, 2).split((HEADS, KEY_HEADS, KEY_HEADS), 1)
        if self.shared is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=True)
        else:
            out = sharded_attention(q, k, v, is_causal=self.is_causal, enable_gqa=True, **self.shared)
        return x + self.out(out.transpose(1, 2).flatten(2))


def outcome(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """The output and the gradients of a loss that is a sum over tokens."""
    out = model(x)
    model.zero_grad()
    (out * target).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))


def said(report: Report) -> list[tuple[str, str]]:
    return [(row.status, row.detail) for row in report]


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="sparge", options={**OPTIONS, **options}, fullgraph=True)


def sharded(device: torch.device) -> dict[str, Any]:
    """How far each way to share a sequence is from one process, and what the report says."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(device)
    x, target = (torch.randn(2, LENGTH, WIDTH, device=device) for _ in range(2))
    dense, want = outcome(model, x, target), outcome(compiled(model), x, target)
    ranks, found = Ranks.of(), {"sparse": apart(want[:1], dense[:1])}
    mine = [y.chunk(ranks.size, 1)[ranks.rank] for y in (x, target)]

    def distance(run: nn.Module, wanted: list[Tensor]) -> float:
        got = outcome(run, *mine)
        for grad in got[1:]:
            dist.all_reduce(grad)
        return apart(got, [wanted[0].chunk(ranks.size, 1)[ranks.rank], *wanted[1:]])

    order = torch.tensor(HEADS_OF_RANKS, device=device)
    for name, shared in {
        "heads": {"heads": ranks},
        "heads in an order": {"heads": ranks, "order": order},
        "ring": {"ring": ranks},
    }.items():
        for block in model:
            block.shared = shared
        found[f"{name}, dense"] = distance(model, dense)
        found[name] = distance(compiled(model), want)
        torch._dynamo.reset()
        rows = explain(model, OPTIONS)(mine[0]).sparse
        found[f"{name}, report"] = [(row.name, row.kind, row.shapes["length"], row.shapes["keys"]) for row in rows]
    with attach(model, CALIBRATION):
        found["attached"] = distance(compiled(model, calibration=None), want)
    keeps = Calibration(CALIBRATION.sites, kept={"0": {"keep_keys": 64}})
    found["ring, kept"] = said(explain(model, {**OPTIONS, "calibration": keeps})(mine[0]))
    with attach(model, keeps):
        torch._dynamo.reset()
        found["ring, kept, attached"] = said(explain(model, {**OPTIONS, "calibration": None})(mine[0]))
    for name, options in BESIDE.items():
        for block in model:
            block.shared, block.is_causal = None, name == "causal"
        wanted = outcome(compiled(model, **options), x, target)
        found[f"{name} is another"] = apart(wanted[:1], want[:1])
        for block in model:
            block.shared = {"heads": ranks, "order": order}
        found[name] = distance(compiled(model, **options), wanted)
    for block in model:
        block.is_causal = False
    before = heard(compiled(model), mine[0])
    small = mock.patch.object(turns, "LEAST_BYTES", 0)
    with small, mock.patch.object(backend, "compile_graph", wraps=backend.compile_graph) as compile_graph:
        found["heads in turns"] = distance(compiled(model), want)
        found["heads in turns, heard"] = apart(heard(compiled(model), mine[0]), before)
    for name, call in zip(("graph", "graph, heard"), compile_graph.call_args_list, strict=True):
        found[name] = [x.target.name() for x in call.args[0].graph.nodes if "sparge." in str(x.target)]
    return found


class Heard:
    """What the sites of graphs gave."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def ran(self, options: Any, names: list[str], outputs: Any) -> None:
        self.outputs += [x.detach() for x in outputs]


def heard(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the sites of a model give, for a hook."""
    heard = Heard()
    listeners.want_outputs(1)
    with listeners.heard_by(heard):
        model(x)
    listeners.want_outputs(-1)
    assert len(heard.outputs) == 2
    return heard.outputs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = run_in_processes(sharded, tmp_path_factory.mktemp("sharded"))
    assert first.keys() == second.keys()
    return {name: max(value, second[name]) for name, value in first.items()}


@pytest.mark.parametrize("way", ["heads", "heads in an order", "heads in turns", "ring", "attached"])
def test_outputs_and_gradients_are_those_of_one_process(found, way):
    assert found["sparse"] > 1e-2, "thresholds that change nothing show nothing"
    assert found[way] < LARGEST_ERROR


@pytest.mark.parametrize("what", BESIDE)
def test_between_exchanges_all_is_as_in_one_process(found, what):
    assert found[f"{what} is another"] > 1e-2, "what changes nothing shows nothing"
    assert found[what] < LARGEST_ERROR


@pytest.mark.parametrize("way", ["heads", "heads in an order", "ring"])
def test_without_the_backend_it_is_dense_attention(found, way):
    assert found[f"{way}, dense"] < LARGEST_ERROR


def test_heads_take_turns_between_exchanges(found):
    of_a_block = ["to_heads_in_turns", "of_rank", "attention", "attention", "to_rows_in_turns"]
    assert found["graph"] == found["graph, heard"] == [f"sparge::{name}" for name in of_a_block * 2]
    assert found["heads in turns, heard"] < LARGEST_ERROR


def test_sites_are_reported_with_the_whole_sequence(found):
    assert found["heads, report"] == [("0", "sdpa", LENGTH, LENGTH), ("1", "sdpa", LENGTH, LENGTH)]
    assert found["ring, report"] == [("0", "ring", LENGTH // 2, LENGTH), ("1", "ring", LENGTH // 2, LENGTH)]


def test_a_site_that_keeps_tokens_is_not_sparse_in_a_ring(found):
    assert found["ring, kept"][0] == ("dense", "kept tokens in a ring")
    assert found["ring, kept"][1][0] == "sparse"
    assert found["ring, kept, attached"] == [("dense", "kept tokens in a ring; thresholds attached")] * 2


def test_heads_that_ranks_do_not_divide_are_refused():
    q, kv = torch.randn(1, 6, 64, 16), torch.randn(1, 3, 64, 16)
    with pytest.raises(ValueError, match="3 key heads over 2 ranks; allowed: a number"):
        sharded_attention(q, kv, kv, enable_gqa=True, heads=Ranks(0, 2, "none"))


@pytest.mark.parametrize("given", [{"is_causal": True}, {"attn_mask": torch.ones(64, dtype=torch.bool)}])
def test_a_ring_refuses_what_hides_keys(given):
    q = torch.randn(1, 2, 64, 16)
    with pytest.raises(ValueError, match="every query sees every key"):
        sharded_attention(q, q, q, ring=Ranks(0, 2, "none"), **given)


def test_grouped_queries_in_a_ring_are_asked_for_as_in_sdpa():
    q, kv = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    with pytest.raises(ValueError, match=r"4 query heads and 2 key heads.*Pass enable_gqa=True"):
        sharded_attention(q, kv, kv, ring=Ranks(0, 2, "none"))
