"""A fault of ours while we look at a graph: the user's model runs as it is, a warning and the report tell of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from toys import Stack

import sparge_compile
from sparge_compile import explain, rewrite
from sparge_compile.calibrate import site_calls
from sparge_compile.passes import find, pipeline
from sparge_compile.passes.mha import open as opening
from sparge_compile.passes.read.writes import Writes
from sparge_compile.running import graph, places

FAST = {"min_seq_len": 0, "topk": 0.2, "topp": 0.0, "inner": "eager"}
LENGTH = 300


def fails(*args, **kwargs):
    raise ZeroDivisionError("on purpose")


# What is made to fail, and the analysis that is named for it.
FAULTS = {
    "copy": (graph, "clone", "copy"),
    "reading": (Writes, "__init__", "find"),
    "matching": (find, "match_sdpa", "find"),
    "markers": (pipeline, "markers_of", "find"),
    "stack": (places, "modules_on_stack", "place"),
    "names": (places.Names, "__init__", "place"),
    "frame": (graph, "Frame", "place"),
    "locator": (places.Locator, "__init__", "place"),
    "attached": (graph, "attached_to", "decide_sites"),
    "decision": (pipeline, "decide", "decide_sites"),
}
IN_ORDER = [pytest.param(*fault, id=name) for name, fault in FAULTS.items()]


@pytest.mark.parametrize("owner, name, analysis", IN_ORDER)
def test_a_model_is_compiled_as_it_is(owner, name, analysis, monkeypatch):
    model, x = Stack().eval(), torch.randn(1, LENGTH, 32)
    want = model(x)
    monkeypatch.setattr(owner, name, fails)
    with pytest.warns(UserWarning, match=rf"analysis '{analysis}' failed at \w+.py:\d+ with ZeroDivisionError.*issue"):
        got = torch.compile(model, backend="sparge", options=FAST)(x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("owner, name, analysis", IN_ORDER)
def test_with_on_unsupported_error_it_is_an_error(owner, name, analysis, monkeypatch):
    monkeypatch.setattr(owner, name, fails)
    compiled = torch.compile(Stack(), backend="sparge", options={**FAST, "on_unsupported": "error"})
    with pytest.raises(Exception, match=f"looked into: got analysis '{analysis}' failed .* issue"):
        compiled(torch.randn(1, LENGTH, 32))


@pytest.mark.parametrize("owner, name, analysis", [x for x in IN_ORDER if x.id not in ("stack", "names")])
def test_explain_reports_it(owner, name, analysis, monkeypatch):
    monkeypatch.setattr(owner, name, fails)
    report = explain(Stack(), FAST)(torch.randn(1, LENGTH, 32))
    assert not report.sites and report.graphs == 1
    (failure,) = report.failures
    assert (failure.analysis, failure.error) == (analysis, "ZeroDivisionError: on purpose")
    assert f"analysis '{analysis}' failed" in str(report)
    assert report.to_dict()["failures"][0]["analysis"] == analysis


def test_a_place_that_cannot_be_told_while_a_graph_runs(monkeypatch):
    monkeypatch.setattr(places.Locator, "where", fails)
    report = explain(Stack(), FAST)(torch.randn(1, LENGTH, 32))
    assert len(report.sparse) == 2 and report.failures[0].analysis == "place"


@pytest.mark.parametrize("owner, name", [(graph, "Frame"), (find, "match_sdpa"), (site_calls, "refusal")])
def test_calibration_goes_on_with_what_is_left(owner, name, monkeypatch):
    monkeypatch.setattr(owner, name, fails)
    with pytest.warns(UserWarning, match="failed at"), pytest.raises(ValueError, match="no attention"):
        sparge_compile.calibrate(Stack().eval(), [torch.randn(1, LENGTH, 32)], options={"min_seq_len": 0})


@pytest.mark.parametrize("owner, name, analysis", [(find, "match_sdpa", "find"), (pipeline, "decide", "_decide")])
def test_rewrite_gives_a_copy_that_is_as_it_was(owner, name, analysis, monkeypatch):
    x = torch.randn(1, LENGTH, 32)
    program = torch.export.export(Stack().eval(), (x,))
    monkeypatch.setattr(owner, name, fails)
    with pytest.warns(UserWarning, match=f"analysis '{analysis}' failed"):
        new = rewrite(program, {"min_seq_len": 0})
    assert new.graph_module.meta["sparge_report"].failures[0].analysis == analysis
    assert torch.equal(new.module()(x), program.module()(x))


def test_a_leaf_that_cannot_be_opened_stays_whole(monkeypatch):
    layer, x = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(1, LENGTH, 32)

    class Calls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x, x, need_weights=False)[0]

    monkeypatch.setattr(opening, "copy_inside", fails)
    monkeypatch.setattr("sparge_compile.passes.mha.leaves._inline", fails)
    traced = torch.fx.symbolic_trace(Calls())
    with pytest.warns(UserWarning, match="open_leaves"):
        new = rewrite(traced, {"min_seq_len": 0}, example_inputs=(x,))
    torch.testing.assert_close(new(x), layer(x, x, x, need_weights=False)[0])


def test_what_a_fault_did_not_reach_is_still_replaced(monkeypatch):
    """A graph break gives two graphs; only the second cannot be looked into."""
    real, calls = find.match_sdpa, []

    def second_fails(*args):
        calls.append(args)
        return real(*args) if len(calls) == 1 else fails()

    class Broken(Stack):
        def forward(self, x):
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    monkeypatch.setattr(find, "match_sdpa", second_fails)
    report = explain(Broken(), FAST)(torch.randn(1, LENGTH, 32))
    assert [row.name for row in report.sparse] == ["blocks.0"] and len(report.failures) == 1


def test_thresholds_stay_attached_to_a_model_whose_graph_failed(monkeypatch):
    model, x = Stack().eval(), torch.randn(1, LENGTH, 32)
    want = model(x)
    sparge_compile.attach(model, sparge_compile.Calibration(sites={"blocks.*": [(0.2, 0.0)]}))
    monkeypatch.setattr(find, "match_sdpa", fails)
    with pytest.warns(UserWarning, match="failed at"):
        assert torch.equal(torch.compile(model, backend="sparge", options=FAST)(x), want)


def test_errors_of_users_and_of_the_rewriting_stay_errors(monkeypatch):
    x = torch.randn(1, LENGTH, 32)
    with pytest.raises(Exception, match="unknown option"):
        torch.compile(Stack(), backend="sparge", options={"tokp": 0.5})(x)
    monkeypatch.setattr(pipeline, "substitute_match", fails)
    with pytest.raises(Exception, match="on purpose"):
        torch.compile(Stack(), backend="sparge", options=FAST)(x)


def test_each_fault_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(pipeline, "decide", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.compile(Stack(), backend="sparge", options=FAST)(torch.randn(1, LENGTH, 32))
    assert len([w for w in caught if "failed at" in str(w.message)]) == 1
