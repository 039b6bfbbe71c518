"""Attention in frames that Dynamo leaves to Python is in the report of ``explain``, with its module and its line."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from toys import Block, Stack

from sparge_compile import calibrate, explain
from sparge_compile.report import Reason

FAST = {"min_seq_len": 0}


class Disabled(Block):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


class Loop(Block):
    """What depends on data breaks the graph, and a break in a loop leaves the whole frame to Python."""

    def forward(self, x):
        for _ in range(3):
            y = x[:, torch.nonzero(x[0, :, 0] > -100).flatten()]
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
            x = y + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


class Half(Stack):
    """The first block in a graph, the second outside."""

    def __init__(self):
        super().__init__()
        self.blocks[1] = Disabled()


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    """As a library has it, with a call of another one inside."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


class Library(nn.Module):
    @torch.compiler.disable
    def forward(self, x):
        q = x.unflatten(-1, (4, -1))
        return flash_attn_func(q, q, q).flatten(2)


class Native(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()

    def forward(self, x):
        return 2 * self.attend(x)

    @torch.compiler.disable
    def attend(self, x):
        return self.layer(x)


@pytest.fixture
def x():
    return torch.randn(1, 100, 32)


@pytest.mark.parametrize("block", [Disabled, Loop])
def test_each_module_with_such_attention_is_a_dense_site(block, x):
    report = explain(Stack(2, block), FAST)(x)
    assert [row.name for row in report] == ["blocks.0", "blocks.1"]
    assert all(row.reason in (Reason.OUTSIDE, Reason.LONG_ENOUGH) for row in report)
    if block is Disabled:
        assert {row.reason for row in report} == {Reason.OUTSIDE}
        assert all(row.reason.unsupported and "toys.py:" in row.site.code for row in report)
        assert "outside of graphs: Dynamo left 1 call to Python" in str(report)


def test_what_a_graph_runs_is_not_told_twice(x):
    report = explain(Half(), FAST)(x)
    assert [(row.name, row.status) for row in report] == [("blocks.0", "sparse"), ("blocks.1", "dense")]


def test_a_larger_call_is_named_where_the_user_made_it(x):
    with torch.no_grad():
        (row,) = explain(Native(), FAST)(x)
    assert (row.kind, row.name, row.reason) == ("mha", "layer", Reason.OUTSIDE)
    assert row.site.code.startswith(__file__)


def test_a_function_of_a_library_is_named_once_and_at_the_line_that_calls_it(x):
    (row,) = explain(Library(), FAST)(x)
    assert (row.kind, row.name, row.reason) == ("flash_attn", "(root)", Reason.OUTSIDE)
    line = Library.forward.__wrapped__.__code__.co_firstlineno if hasattr(Library.forward, "__wrapped__") else 0
    assert row.site.code.startswith(f"{__file__}:")
    assert not line or int(row.site.code.rpartition(":")[2]) == line + 3
    assert "replace_attention needs no graph" in str(row.detail)


def test_the_profiler_that_was_there_stays(x):
    assert sys.getprofile() is None
    explain(Stack(1, Disabled), FAST)(x)
    assert sys.getprofile() is None

    def profile(frame, event, arg):
        pass

    sys.setprofile(profile)
    try:
        explain(Stack(1, Disabled), FAST)(x)
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)


def test_the_result_of_a_second_look_is_the_same(x):
    model = Half()
    assert str(explain(model, FAST)(x)) == str(explain(model, FAST)(x))


class Apart(nn.Module):
    """Blocks that are called from one frame, which is compiled once for each, as below hooks that offload."""

    def __init__(self, layers):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x):
        for number in range(len(self.blocks)):
            torch._dynamo.graph_break()
            x = self.attend(x, number)
        return x

    def attend(self, x, number):
        return self.blocks[number](x)


def test_explain_and_calibrate_do_not_meet_the_limit_of_recompilations(x):
    model = Apart(12).eval()
    names = [f"blocks.{i}" for i in range(12)]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=4):
        assert sorted(row.name for row in explain(model, FAST)(x).sparse) == sorted(names)
        assert sorted(calibrate(model, [x], options=FAST, query_blocks=1).sites) == sorted(names)
        assert torch._dynamo.config.recompile_limit == 2


def test_flex_attention_that_is_compiled_by_itself_in_code_that_is_not():
    """As most code has it: it runs as code that Dynamo made, by a backend of its own."""
    flex = torch.compile(flex_attention, backend="eager")

    class Attend(nn.Module):
        @torch.compiler.disable
        def forward(self, x):
            return flex(x, x, x)

    (row,) = explain(nn.Sequential(Attend()))(torch.randn(1, 2, 130, 16))
    assert (row.name, row.kind, row.reason) == ("0", "flex", Reason.OUTSIDE)
    assert row.site.code.startswith(__file__)
