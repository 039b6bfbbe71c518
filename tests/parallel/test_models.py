"""A model that diffusers shards among two processes, in training: Ulysses and ring equal one process."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import run_in_processes
from torch import Tensor, nn

from sparge_compile import Calibration, shard_attention

pytestmark = [pytest.mark.multigpu, pytest.mark.slow]

SIZES = {"num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16}
CALIBRATION = Calibration({"blocks.*.attn1": [(0.8, 0.0), (0.9, 0.3), (0.1, 0.0), (0.05, 0.0)]})
OPTIONS = {"calibration": CALIBRATION, "min_seq_len": 64, "inner": "eager"}


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(**SIZES, freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=32)


def gradients(model: nn.Module, run: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradient of its square's mean by each parameter."""
    model.zero_grad()
    out = run(**inputs)[0]
    out.square().mean().backward()
    return {"output": out.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def of_two_processes(device: torch.device) -> dict[str, Any]:
    from diffusers import ContextParallelConfig

    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 16, 16, generator=generator).to(device),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 12, 16, generator=generator).to(device),
        "return_dict": False,
    }
    model, found = wan().to(device), {}
    dense = model(**inputs)[0]
    want = gradients(model, torch.compile(model, backend="sparge", options=OPTIONS), inputs)
    found["sparse"] = (want["output"] - dense).abs().max().item()
    for way in ("ulysses_degree", "ring_degree"):
        model = wan().to(device)
        torch._dynamo.reset()
        with mock.patch.object(torch.accelerator, "device_count", return_value=2):  # by which it divides
            model.enable_parallelism(config=ContextParallelConfig(**{way: dist.get_world_size()}))
        handle = shard_attention(model, CALIBRATION)
        got = gradients(model, torch.compile(model, backend="sparge", options=OPTIONS), inputs)
        for name, grad in got.items():
            if name != "output":
                dist.all_reduce(grad)
        found[way] = max(((got[n] - want[n]).abs().max() / want[n].abs().max()).item() for n in want)
        run = torch.compile(model, backend="sparge", options=OPTIONS)
        with torch.no_grad():
            run(**inputs)
            found[f"{way}, measured"] = handle.measure(lambda: run(**inputs))  # noqa: B023
        found[f"{way}, said"] = str(handle)
    return found


def test_gradients_and_outputs_are_those_of_one_process(tmp_path):
    pytest.importorskip("diffusers")
    for found in run_in_processes(of_two_processes, tmp_path):
        assert found["sparse"] > 1e-3, "thresholds that change nothing show nothing"
        assert max(found["ulysses_degree"], found["ring_degree"]) < 1e-4
        said = found["ulysses_degree, said"].splitlines()
        assert said[0].startswith("sparge: attention over 2 ranks that exchange heads; time of the dearest rank ÷ mean")
        assert said[0].endswith(f"measured: {found['ulysses_degree, measured']:.2f}")
        assert 1 <= found["ulysses_degree, measured"] < 2 and found["ring_degree, measured"] >= 1
        assert said[-1].split() == ["blocks.1.attn1", "1.84", "1.03"]


def test_a_model_of_one_process_is_refused():
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="nothing is shared among processes"):
        shard_attention(wan())
