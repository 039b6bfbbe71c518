"""The sites of one module keep their numbers where a break, a loop or the splitter of DDP parts its forward."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparge_compile import Calibration, attach, calibrate, explain

FAST = {"min_seq_len": 0, "inner": "eager"}
X = (1, 300, 32)


def broken_sdpa(q, k, v):
    torch._dynamo.graph_break()
    return F.scaled_dot_product_attention(q, k, v)


class TwoSites(nn.Module):
    """Two attentions in one forward; with 2 and 4 heads, the thresholds of one do not fit the other."""

    heads = (2, 4)
    attention = staticmethod(F.scaled_dot_product_attention)

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in self.heads)

    def attend(self, x, i):
        q, k, v = (part.unflatten(-1, (self.heads[i], -1)).transpose(1, 2) for part in self.qkv[i](x).chunk(3, -1))
        return x + self.attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.attend(self.attend(x, 0), 1)


class BreakBetween(TwoSites):
    def forward(self, x):
        x = self.attend(x, 0)
        torch._dynamo.graph_break()
        return self.attend(x, 1)


class BreakInLoop(TwoSites):
    def forward(self, x):
        for i in range(2):
            x = self.attend(x, i)
            torch._dynamo.graph_break()
        return x


class BreakInMethod(TwoSites):
    def attend(self, x, i):
        torch._dynamo.graph_break()
        return super().attend(x, i)

    def forward(self, x):
        x = self.attend(x, 0)
        return self.attend(x, 1)


class BreakInFunction(TwoSites):
    """Both sites run the same graph, which reads no parameter."""

    heads = (4, 4)
    attention = staticmethod(broken_sdpa)

    def forward(self, x):
        x = self.attend(x, 0)
        return self.attend(x, 1)


KINDS = [TwoSites, BreakBetween, BreakInLoop, BreakInMethod, BreakInFunction]
NAMES = ["0", "0#1", "1", "1#1"]


def pairs(kind):
    return Calibration({name: [(0.1 + 0.2 * i, 0.0)] * kind.heads[i % 2] for i, name in enumerate(NAMES)})


def build(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind()).eval()


def unbroken(kind):
    """The same model without breaks."""
    model = build(kind)
    for block in model:
        block.attention, block.forward = F.scaled_dot_product_attention, partial(TwoSites.forward, block)
        block.attend = partial(TwoSites.attend, block)
    return model


def whole(model, options):
    return torch.compile(model, backend="sparge", options=options)


def by_block(model, options):
    for block in model:
        block.compile(backend="sparge", options=options)
    return model


def run(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("kind", KINDS)
def test_explain_and_calibrate_give_two_names(kind):
    model, x = build(kind), torch.randn(X)
    heads = dict(zip(NAMES, kind.heads * 2, strict=True))
    for _ in range(2):
        with torch.no_grad():
            assert {row.name: row.shapes["heads"] for row in explain(model, FAST)(x)} == heads
    found = calibrate(model, [x], target_error=0.2, options={"min_seq_len": 0})
    assert {name: len(pairs) for name, pairs in found.sites.items()} == heads


@pytest.mark.parametrize("give", ["calibration", "attach"])
@pytest.mark.parametrize("compile_it", [whole, by_block])
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_has_its_own_thresholds(kind, compile_it, give):
    x = torch.randn(X)
    want = run(whole(unbroken(kind), {**FAST, "calibration": pairs(kind)}), x)
    assert (want - run(unbroken(kind), x)).abs().max() > 1e-3
    model, options = build(kind), dict(FAST)
    if give == "attach":
        attach(model, pairs(kind))
    else:
        options["calibration"] = pairs(kind)
    compiled = compile_it(model, options)
    for length in (300, 300, 200, 300):  # what is compiled anew for another length has the same numbers
        got = run(compiled, x[:, :length])
        if length == 300:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_numbers_hold_whatever_was_compiled_before():
    model, x = build(BreakBetween), torch.randn(X)
    with torch.no_grad():
        explain(model, FAST)(x)
        run(whole(model, {**FAST, "calibration": pairs(BreakBetween)}), x)
        torch.compiler.reset()
        other = copy.deepcopy(model)
        assert [row.name for row in explain(other, FAST)(x)] == NAMES
        assert [row.name for row in explain(model, FAST)(x)] == NAMES
