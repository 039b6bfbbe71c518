"""Inductor has an exchange of heads under way while it computes what does not wait for it."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from sparge_compile import Ranks, sharded_attention
from sparge_compile.passes.write import turns

pytestmark = [pytest.mark.multigpu, pytest.mark.slow]

CALLS = {"mm": "mm", "all_to_all_single": "send", "wait_tensor": "wait", "sparge.attend": "attend"}
CALLS["sparge.backward"] = "back"
OPTIONS = {"topk": 0.3, "topp": 0.0, "min_seq_len": 0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.text = (nn.Linear(64, 64) for _ in range(4))
        self.ranks = Ranks.of()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (4, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        out = sharded_attention(q, k, v, heads=self.ranks).transpose(1, 2).flatten(2)
        return F.softmax(out @ self.text(text).mT, -1)


def code_of(device: torch.device) -> list[list[str]]:
    """The products, exchanges and waits of the generated code, and the attention, in their order: with all heads of a
    rank at once, in turns, and in the backward of turns."""
    torch.manual_seed(0)
    model = Block().to(device)
    x, text = torch.randn(1, 256, 64, device=device), torch.randn(1, 20, 64, device=device)
    found = []
    for least, trains in ((turns.LEAST_BYTES, False), (0, False), (0, True)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="sparge", options=OPTIONS, fullgraph=True)
        run = (lambda: compiled(x, text).sum().backward()) if trains else torch.no_grad()(lambda: compiled(x, text))  # noqa: B023
        with mock.patch.object(turns, "LEAST_BYTES", least):
            _, codes = run_and_get_code(run)
        code = [code for code in codes if "sparge" in code][-1]
        body = [line.split("#")[0] for line in code.split("def call")[1].splitlines() if "assert_" not in line]
        calls = re.findall(rf"\.(?:add)?({'|'.join(map(re.escape, CALLS))})\b", "\n".join(body))
        found.append([CALLS[call] for call in calls])
    return found


def test_an_exchange_is_under_way_while_others_are_computed(tmp_path: Path):
    values, keys_and_queries, text = ["mm", "send"], ["mm", "mm", "send"], ["mm"]
    for at_once, in_turns, backward in run_in_processes(code_of, tmp_path):
        assert at_once[:8] == [*values, *keys_and_queries, *text, "wait", "wait"]
        assert at_once[8:10] == ["attend", "send"]
        assert in_turns[:9] == [*values, *keys_and_queries, "send", *text, "wait", "wait"]
        assert in_turns[9:14] == ["attend", "wait", "send", "attend", "send"], "the first result goes behind the second"
        first, second = (i for i, call in enumerate(backward) if call == "back")
        assert backward[:first].count("send") == 2, "what comes of both turns is sent first"
        assert "mm" in backward[backward.index("send") : first], "the gradients of weights meanwhile"
        assert backward[first:second] == ["back", "wait", "send"] and backward[second:][:4] == [
            "back",
            *["send"] * 2,
            "wait",
        ]
