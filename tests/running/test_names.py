"""Full names after graph breaks and block by block, and each block's own thresholds in a graph that many share."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from toys import Stack

from sparge_compile import Calibration, attention, backend, explain

FAST = {"min_seq_len": 0, "inner": "eager"}
N = 5  # more blocks than Dynamo may compile one by one here
X = (1, 300, 32)


@pytest.fixture(autouse=True)
def _few_graphs():
    with torch._dynamo.config.patch(recompile_limit=N - 1):
        yield


class Attend(torch.nn.Module):
    """Attention without parameters; it shows the q, k, v it was called with to a test that asks."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Attention(torch.nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.inner = Attend()

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.inner(q, k, v).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Model(Stack):
    def __init__(self, layers=N, block=Block):
        super().__init__(layers, block)


class BreakBetween(Model):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


class BreakInside(Block):
    def forward(self, x):
        y = self.norm(x)
        torch._dynamo.graph_break()
        return x + self.attn(y)


class BreakAround(Attend):
    """The graph that holds this attention has no parameter at all."""

    def forward(self, q, k, v):
        torch._dynamo.graph_break()
        out = super().forward(q, k, v)
        torch._dynamo.graph_break()
        return out


def around():
    block = Block()
    block.attn.inner = BreakAround()
    return block


NAMES = [f"blocks.{i}.attn.inner" for i in range(N)]


def calibration(names=NAMES):
    """Thresholds that differ between blocks and heads."""
    return Calibration(
        {n: [(0.2 + 0.05 * i, 0.1 * (i % 3)), (0.9, 0.0), (1.0, 0.0), (0.3, 0.5)] for i, n in enumerate(names)}
    )


def expected(model, x, thresholds=None, names=NAMES):
    """The model with the op in the place of attention, block by block."""
    thresholds, own = thresholds or calibration(names), copy.deepcopy(model)
    for name in names:
        pairs = torch.tensor(thresholds.lookup(name, 4))

        def forward(q, k, v, pairs=pairs):
            return attention(q, k, v, topk=pairs[:, 0], topp=pairs[:, 1])

        own.get_submodule(name).forward = forward
    with torch.no_grad():
        return own(x)


def names_in(plans):
    return [match.site.name for plan in plans for match, _ in plan.steps]


def run(model, x):
    with torch.no_grad():
        return model(x)


def by_block(model, options):
    for block in model.blocks:
        block.compile(backend="sparge", options=options)
    return model


def wrapped(model, options):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="sparge", options=options)
    return model


WAYS = {
    "whole": (Model, lambda m, o: torch.compile(m, backend="sparge", options=o), N),
    "method": (Model, lambda m, o: m.compile(backend="sparge", options=o) or m, N),
    "block.compile": (Model, by_block, 1),
    "blocks wrapped": (Model, wrapped, 1),
    "break between": (BreakBetween, lambda m, o: torch.compile(m, backend="sparge", options=o), 1),
    "break inside": (lambda: Model(block=BreakInside), lambda m, o: torch.compile(m, backend="sparge", options=o), 1),
    "break around": (lambda: Model(block=around), lambda m, o: torch.compile(m, backend="sparge", options=o), 1),
    "function": (Model, lambda m, o: torch.compile(lambda x: m(x), backend="sparge", options=o), N),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_block_has_its_own_thresholds_and_one_graph_serves_equal_blocks(way, opened_graphs):
    build, compile_it, sites = WAYS[way]
    model, x = build(), torch.randn(X)
    want, dense = expected(model, x), run(model, x)
    compiled = compile_it(model, {**FAST, "calibration": calibration()})
    for _ in range(2):
        torch.testing.assert_close(run(compiled, x), want, atol=1e-5, rtol=1e-5)
    assert (want - dense).abs().max() > 1e-3
    assert names_in(opened_graphs) == NAMES[:sites]


@pytest.mark.parametrize("way", WAYS)
def test_explain_gives_full_names_whatever_is_compiled(way):
    build, compile_it, _ = WAYS[way]
    model, x = build(), torch.randn(X)
    for given in (model, *[compile_it(model, FAST)] * 2):
        with torch.no_grad():
            report = explain(given, FAST)(x)
        assert [row.name for row in report] == NAMES
    assert run(given, x).shape == x.shape


class Handed(Model):
    """Blocks that reach the code behind a graph break in something that is no module."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.groups = [[self.blocks[0]], {"rest": list(self.blocks[1:])}]

    def forward(self, x):
        if self.how in ("enumerate", "generator"):
            numbered = enumerate(self.blocks)
            for _, block in numbered if self.how == "enumerate" else ((i, block) for i, block in numbered):
                x = block(x)
                torch._dynamo.graph_break()
            return x
        if self.how == "attribute":
            for block in (self.groups[0][0], *self.groups[1]["rest"]):
                x = block(x)
            return x
        pair, rest = Pair(self.blocks[0], self.blocks[1]), {"rest": tuple(self.blocks)[2:]}
        torch._dynamo.graph_break()
        x = pair.second(pair.first(x))
        torch._dynamo.graph_break()
        for block in rest["rest"]:
            x = block(x)
        return x


class Pair(NamedTuple):
    first: torch.nn.Module
    second: torch.nn.Module


@pytest.mark.parametrize("how", ["enumerate", "generator", "attribute", "containers"])
def test_blocks_in_iterators_and_containers_have_their_full_names(how):
    """`for i, block in enumerate(self.blocks)` with a break in it: the blocks are in what is left of an iterator."""
    model, x = Handed(how), torch.randn(X)
    want = expected(model, x)
    with torch.no_grad():
        assert [row.name for row in explain(model, FAST)(x)] == NAMES
    compiled = torch.compile(model, backend="sparge", options={**FAST, "calibration": calibration()})
    torch.testing.assert_close(run(compiled, x), want, atol=1e-5, rtol=1e-5)
    assert (want - run(model, x)).abs().max() > 1e-3


@pytest.mark.parametrize("hide", [lambda b: b.compile(backend="sparge", options=FAST), None])
def test_explain_sees_into_blocks_that_are_compiled_behind_a_break(hide):
    model, x = BreakBetween(), torch.randn(X)
    wrapped(model, FAST) if hide is None else [hide(block) for block in model.blocks]
    for _ in range(2):
        with torch.no_grad():
            assert [row.name for row in explain(model, FAST)(x)] == NAMES
    called = [getattr(block, "_orig_mod", block)._compiled_call_impl is not None for block in model.blocks]
    assert all(called) == (hide is not None)


def test_a_shared_graph_follows_a_copy_of_the_model(opened_graphs):
    """A copy has parameters of its own; its blocks once would have had nobody's thresholds."""
    options = {**FAST, "calibration": calibration()}
    model, x = by_block(Model(), options), torch.randn(X)
    run(model, x)
    other = by_block(Model(), options)
    torch.testing.assert_close(run(other, x), expected(other, x), atol=1e-5, rtol=1e-5)
    assert len(opened_graphs) == 1


def test_a_block_that_was_first_called_alone(opened_graphs):
    """Warmed up alone, a block is its own root; in the model it has its full name."""
    model, x = by_block(Model(), {**FAST, "calibration": calibration()}), torch.randn(X)
    with pytest.warns(UserWarning, match=r"attn\.inner.*topk"):
        run(model.blocks[3], x)
    torch.testing.assert_close(run(model, x), expected(model, x), atol=1e-5, rtol=1e-5)
    assert names_in(opened_graphs) == ["attn.inner"]


def test_later_blocks_are_logged_under_their_names(caplog):
    with caplog.at_level(logging.INFO, logger="sparge_compile"):
        run(by_block(Model(3), {**FAST, "calibration": calibration()}), torch.randn(X))
    assert "blocks.0.attn.inner  sdpa" in caplog.text
    assert [r.message.rpartition(" ")[2] for r in caplog.records if "shared" in r.message] == NAMES[1:3]


def test_thresholds_of_a_block_keep_their_identity():
    given = []

    def keep(graph_module, inputs):
        compiled = backend.sparge(graph_module, inputs, options={**FAST, "calibration": calibration()})
        thresholds = compiled.__closure__[1].cell_contents
        assert isinstance(thresholds, backend.RunTime)

        def run(*args):
            given.append([id(t) for t in thresholds(args)])
            return compiled(*args)

        return run

    model, x = Model(3), torch.randn(X)
    for block in model.blocks:
        block.compile(backend=keep)
    run(model, x)
    run(model, x)
    assert given[:3] == given[3:] and len(set(map(tuple, given))) == 3


COSTS = {"dense_base": 0, "dense_pair": 1e-9, "sparse_base": 0, "pool": 0, "select": 0, "sparse_pair": 1e-9}


@pytest.mark.parametrize("first", [0, 1])
def test_a_dense_block_and_a_sparse_one_share_a_graph(first, opened_graphs):
    """The first block once decided for all. Alone, the one is dense and the other sparse; so they are together."""
    pairs = [(0.25, 0.0), (0.99, 0.0)]
    thresholds = Calibration({f"blocks.{i}.attn.inner": [pairs[(i + first) % 2]] * 4 for i in range(2)})
    options = {"costs": COSTS, "inner": "eager", "calibration": thresholds}
    model, x = Model(2), torch.randn(1, 1300, 32)
    want = run(torch.compile(model, backend="sparge", options=options), x)
    alone = {match.site.name: decision.status for match, decision in opened_graphs.pop().steps}
    assert sorted(alone.values()) == ["dense", "sparse"] and alone[NAMES[first]] == "sparse"
    torch.testing.assert_close(run(by_block(model, options), x), want, atol=1e-5, rtol=1e-5)
    ((_, decision),) = opened_graphs[0].steps
    assert (decision.status, decision.reason.name) == ("sparse", "SHARED" if first else "PAYS")
    assert (want - run(copy.deepcopy(model), x)).abs().max() > 1e-3


def test_all_dense_blocks_share_a_dense_graph(opened_graphs):
    options = {"costs": COSTS, "inner": "eager", "calibration": Calibration({"*": [(0.99, 0.0)]})}
    run(by_block(Model(3), options), torch.randn(1, 1300, 32))
    assert [d.reason.name for plan in opened_graphs for _, d in plan.steps] == ["SLOWER"]


def test_parameters_that_blocks_share_do_not_mix_their_thresholds():
    """Tied weights: only the module that is called tells the blocks apart."""
    model, x = Model(3), torch.randn(X)
    for block in model.blocks[1:]:
        block.norm.weight, block.norm.bias = model.blocks[0].norm.weight, model.blocks[0].norm.bias
        block.attn.qkv.weight, block.attn.qkv.bias = model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.bias
    want = expected(model, x, names=NAMES[:3])
    got = run(by_block(model, {**FAST, "calibration": calibration()}), x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class Checkpointed(Model):
    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_a_block_that_is_compiled_anew_in_the_backward_keeps_its_name(opened_graphs):
    model, x = Checkpointed(2), torch.randn(X)
    for block in model.blocks:
        block.compile(backend="sparge", options=FAST)
    out = model(x)
    torch._dynamo.reset()  # under FSDP2 tensors may have other strides when activations are made anew
    opened_graphs.clear()
    out.sum().backward()
    found = [match.site.name for graph in opened_graphs for match in graph.matches]
    assert found and set(found) <= {"blocks.0.attn.inner", "blocks.1.attn.inner"}


def test_a_wrapper_around_the_model_is_no_part_of_names():
    class Trainer(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    model, x = Model(2), torch.randn(X)
    compiled = torch.compile(model, backend="sparge", options={**FAST, "calibration": calibration()})
    torch.testing.assert_close(run(Trainer(compiled), x), expected(model, x, names=NAMES[:2]), atol=1e-5, rtol=1e-5)
