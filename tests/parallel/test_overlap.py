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

SHORT = {"all_to_all_single": "send", "wait_tensor": "wait", "sparge.attend": "attend"}
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
    rank at once, and in turns."""
    torch.manual_seed(0)
    model = Block().to(device).requires_grad_(False)
    x, text = torch.randn(1, 256, 64, device=device), torch.randn(1, 20, 64, device=device)
    found = []
    for least in (turns.LEAST_BYTES, 0):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="sparge", options=OPTIONS, fullgraph=True)
        with mock.patch.object(turns, "LEAST_BYTES", least):
            _, codes = run_and_get_code(compiled, x, text)
        (code,) = (code for code in codes if "sparge" in code)
        body = [line.split("#")[0] for line in code.split("def call")[1].splitlines() if "assert_" not in line]
        calls = re.findall(r"\.(?:add)?(mm|all_to_all_single|wait_tensor|sparge\.attend)\b", "\n".join(body))
        found.append([SHORT.get(call, call) for call in calls])
    return found


def test_an_exchange_is_under_way_while_others_are_computed(tmp_path: Path):
    values, keys_and_queries, text = ["mm", "send"], ["mm", "mm", "send"], ["mm"]
    for at_once, in_turns in run_in_processes(code_of, tmp_path):
        assert at_once[:8] == [*values, *keys_and_queries, *text, "wait", "wait"]
        assert at_once[8:10] == ["attend", "send"]
        assert in_turns[:9] == [*values, *keys_and_queries, "send", *text, "wait", "wait"]
        assert in_turns[9:14] == ["attend", "wait", "send", "attend", "send"], "the first result goes behind the second"
