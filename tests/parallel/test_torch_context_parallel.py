"""torch's own context_parallel: SDPA on DTensors that are sharded along the sequence is sparse, heads exchanged."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_in_processes
from torch import Tensor, nn

from sparge_compile import Calibration, explain

pytestmark = pytest.mark.multigpu

HEADS, SIZE, LENGTH, WIDTH = 4, 16, 512, 32
CALIBRATION = Calibration({"(root)": [(0.15, 0.0), (0.3, 0.2), (0.9, 0.0), (0.1, 0.5)]})
OPTIONS = {"calibration": CALIBRATION, "min_seq_len": 0, "inner": "aot_eager"}


class Block(nn.Module):
    is_causal = False

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return x + self.out(out.transpose(1, 2).flatten(2))


def outcome(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """The output, and the gradients of a loss that is a sum over tokens."""
    torch._dynamo.reset()
    model.zero_grad()
    out = torch.compile(model, backend="sparge", options=OPTIONS, fullgraph=True)(x)
    (out * target).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def rule_for_a_cpu() -> None:
    """How SDPA of a CPU is sharded along the sequence, which torch derives without end; for GPUs it has a rule."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.experimental import register_sharding

    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    def _(query: Any, key: Any, value: Any, *others: Any) -> Any:
        return [([Shard(2)] * 2, [Shard(2)] * 3 + [None] * len(others))]


def of_two_processes(device: torch.device) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    torch.manual_seed(0)
    model = Block().to(device)
    x, target = (torch.randn(2, LENGTH, WIDTH).to(device) for _ in range(2))
    dense, want = model(x).detach(), outcome(model, x, target)
    if device.type == "cpu":
        rule_for_a_cpu()
    found: dict[str, Any] = {"sparse": (want[0] - dense).abs().max().item()}
    mine = [y.clone() for y in (x, target)]
    rows = torch.arange(LENGTH, device=device)[None, :, None].clone()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # torch's own attention on GPUs refuses pieces from both ends without causality.
    options = mock.patch.object(_cp_options, "enable_load_balance", device.type == "cpu")
    with options, context_parallel(mesh, buffers=[*mine, rows], buffer_seq_dims=[1] * 3):
        got = outcome(model, *mine)
        for grad in got[1:]:
            dist.all_reduce(grad)
        found["sites"] = [(row.name, row.status, row.shapes["keys"]) for row in explain(model, OPTIONS)(mine[0])]
        model.is_causal = True
        torch._dynamo.reset()
        found["causal"] = [(row.status, row.detail) for row in explain(model, OPTIONS)(mine[0])]
        want[0] = want[0][:, rows.flatten()]
    found["apart"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))
    return found


def test_outputs_and_gradients_are_those_of_one_process(tmp_path):
    for found in run_in_processes(of_two_processes, tmp_path):
        assert found["sites"] == [("(root)", "sparse", LENGTH)]
        assert found["sparse"] > 1e-2, "thresholds that change nothing show nothing"
        assert found["apart"] < (1e-5 if torch.cuda.device_count() < 2 else 5e-3)
        ((status, detail),) = found["causal"]
        assert status == "dense" and "causality over a sequence that DTensor shards" in detail
