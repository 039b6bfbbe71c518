"""Inductor has an exchange of heads under way while it computes what does not wait for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from torch import Tensor, nn

from sparge_compile import Ranks, sharded_attention

pytestmark = [pytest.mark.multigpu, pytest.mark.slow]

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


def code_of(device: torch.device) -> list[str]:
    """The products, exchanges and waits of the generated code, and the attention, in their order."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    model = Block().to(device).requires_grad_(False)
    x, text = torch.randn(1, 256, 64, device=device), torch.randn(1, 20, 64, device=device)
    compiled = torch.compile(model, backend="sparge", options=OPTIONS, fullgraph=True)
    _, codes = run_and_get_code(compiled, x, text)
    (code,) = (code for code in codes if "sparge" in code)
    body = [line.split("#")[0] for line in code.split("def call")[1].splitlines() if "assert_" not in line]
    calls: Any = re.findall(r"\.(?:add)?(mm|all_to_all_single|wait_tensor|sparge\.attend)\b", "\n".join(body))
    return calls


def test_an_exchange_is_under_way_while_others_are_computed(tmp_path: Path):
    for calls in run_in_processes(code_of, tmp_path):
        v, kq, out = (i for i, call in enumerate(calls) if call == "all_to_all_single")
        attend, waits = calls.index("sparge.attend"), [i for i, call in enumerate(calls) if call == "wait_tensor"]
        assert calls[:v] == ["mm"], "values are projected and sent first"
        assert calls[v + 1 : kq] == ["mm"] * 2, "keys and queries are projected meanwhile"
        assert calls[kq + 1 : waits[0]] == ["mm"], "the text too, which attention does not read"
        assert waits[:2] == [attend - 2, attend - 1] and out > attend
