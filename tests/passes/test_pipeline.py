"""The passes run in the order in which they are listed, note what they did, and log what they changed."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder, targets

from sparge_compile import ops
from sparge_compile.options import Options
from sparge_compile.passes import pipeline
from sparge_compile.passes import work as work_module
from sparge_compile.passes.pipeline import Work
from sparge_compile.passes.substitute import OP
from sparge_compile.report import Reason, Report

MARK = torch.ops.sparge.mark
SPARSE = Options(min_seq_len=0)
H = 2


def work_of(*sites: str, marked: str = "") -> Work:
    """A graph with one attention for each word: ``sdpa``, or ``dropout``, which must stay."""
    b = Builder()
    x = b.input("x", 1, H, 70, 4)
    if marked:
        b.opaque(MARK, b.input("attached", H, 2), 0 if marked == "first" else ops.REST)
    for site in sites:
        x = b.call(F.scaled_dot_product_attention, x, x, x, None, 0.5 if site == "dropout" else 0.0)
    return Work(b.module(x))


def run(work: Work, options=SPARSE, **more) -> Work:
    decide = partial(pipeline.decide_sites, options=options, **more)
    pipeline.run(work, pipeline.find, decide, *pipeline.rewriting_passes(options, lambda values: values))
    return work


def test_passes_run_in_the_order_of_the_list():
    rewriting = ["substitute", "hoist", "in_turns", "in_parts", "erase_markers", "check"]
    assert run(work_of("sdpa")).passes == ["find", "decide_sites", *rewriting]
    names = [
        getattr(each, "func", each).__name__
        for each in pipeline.rewriting_passes(SPARSE, lambda x: x, with_outputs=True)
    ]
    assert names == ["substitute", "return_outputs", "hoist", "in_turns", "in_parts", "erase_markers", "check"]


def test_each_pass_finds_what_the_one_before_it_left():
    seen = []
    work = work_of("sdpa")
    pipeline.run(
        work,
        pipeline.find,
        lambda work: seen.append((len(work.matches), len(work.steps))),
        partial(pipeline.decide_sites, options=SPARSE),
        lambda work: seen.append((len(work.matches), len(work.steps))),
    )
    assert seen == [(1, 0), (1, 1)]


def test_a_graph_is_rewritten():
    work = run(work_of("sdpa", "sdpa"))
    assert work.changed and targets(work.graph_module) == [OP, OP]
    assert [match.site.name for match, _ in work.substituted] == ["(root)", "(root)#1"]
    inputs = work.graph_module.graph.find_nodes(op="placeholder")
    assert [x.placeholder for x in work.threshold_inputs] == inputs[1:]
    assert [x.match for x in work.threshold_inputs] == work.sparse
    x, row = torch.randn(1, H, 70, 4), torch.tensor([[1.0, 0.0]] * H)
    want = F.scaled_dot_product_attention(x, x, x)
    want = F.scaled_dot_product_attention(want, want, want)
    torch.testing.assert_close(work.graph_module(x, row, row)[0], want, atol=1e-5, rtol=1e-5)


def test_a_graph_that_stays_dense_stays_as_it_was():
    work = work_of("dropout")
    code = work.graph_module.code
    run(work)
    work.graph_module.recompile()
    assert not work.changed and work.graph_module.code == code
    assert (work.substituted, work.threshold_inputs, work.sparse) == ([], [], [])
    (step,) = work.steps
    assert not step.is_sparse and step.decision.reason is Reason.DROPOUT


def test_steps_have_a_decision_for_each_match_in_order():
    work = run(work_of("sdpa", "dropout", "sdpa"))
    assert [step.match for step in work.steps] == work.matches
    assert [step.is_sparse for step in work.steps] == [True, False, True]
    assert work.sparse == [work.matches[0], work.matches[2]]
    report = work.add_to(Report())
    assert report.graphs == 1 and [row.status for row in report.sites] == ["sparse", "dense", "sparse"]
    assert work.add_to(report) is report and (report.graphs, len(report)) == (2, 6)


def test_finding_and_deciding_change_nothing():
    work = work_of("sdpa", "dropout")
    code = work.graph_module.code
    pipeline.run(work, pipeline.find, partial(pipeline.decide_sites, options=SPARSE))
    work.graph_module.recompile()
    assert work.graph_module.code == code and not work.changed


def test_thresholds_are_those_of_the_options():
    options = Options(min_seq_len=0, topk=0.25, topp=0.5)
    work = work_of("sdpa")
    given = []
    pipeline.run(work, pipeline.find, partial(pipeline.decide_sites, options=options))
    pipeline.run(work, *pipeline.rewriting_passes(options, lambda values: given.append(values) or "a fake tensor"))
    (made,) = work.threshold_inputs
    assert made.values.tolist() == [[0.25, 0.5]] * H and made.values.dtype == torch.float32
    assert given == [made.values] and made.placeholder.meta["example_value"] == "a fake tensor"


@pytest.mark.parametrize("marked, inputs", [("", 2), ("first", 1), ("all", 0)])
def test_markers_take_the_place_of_new_inputs_and_are_erased(marked, inputs):
    work = run(work_of("sdpa", "sdpa", marked=marked))
    assert len(work.threshold_inputs) == inputs and len(work.substituted) == 2
    assert MARK not in targets(work.graph_module)
    by_input = [node.args[3].name == "attached" for _, node in work.substituted]
    assert by_input == {"": [False, False], "first": [True, False], "all": [True, True]}[marked]


def test_a_marker_without_a_site_is_erased_too():
    work = run(work_of("dropout", marked="first"))
    assert work.changed and MARK not in targets(work.graph_module)


# Sparse attention costs four times as much for each pair that it keeps.
COSTS = {"dense_base": 0, "dense_pair": 1e-9, "sparse_base": 0, "pool": 0, "select": 0, "sparse_pair": 4e-9}


def long_work() -> Work:
    b = Builder()
    x = b.input("x", 1, H, 1024, 4)
    work = Work(b.module(b.call(F.scaled_dot_product_attention, x, x, x)))
    pipeline.run(work, pipeline.find)
    return work


def test_attached_thresholds_are_decided_as_a_tenth_of_the_blocks():
    """They may be changed at any time, so what they hold now decides nothing."""
    options = Options(costs=COSTS, topk=0.9)
    work = long_work()
    (match,) = work.matches
    pipeline.decide_sites(work, options)
    assert work.steps[0].decision.reason is Reason.SLOWER
    pipeline.decide_sites(work, options, attached={match.node})
    assert work.steps[0].decision.reason is Reason.PAYS
    assert work.steps[0].decision.detail == "thresholds attached"


@pytest.mark.parametrize("shared", [True, False])
def test_a_site_that_would_not_pay_is_sparse_where_another_module_s_is(shared):
    work = long_work()
    options = Options(costs=COSTS, topk=0.9)
    pipeline.decide_sites(work, options, alike=lambda m: [(m, shared)])  # where it is attached, it pays
    (step,) = work.steps
    assert step.decision.reason is (Reason.SHARED if shared else Reason.SLOWER)
    pipeline.run(work, *pipeline.rewriting_passes(options, lambda values: values))
    assert [x.values.tolist() for x in work.threshold_inputs] == [[[1.0, 0.0]] * H] * shared  # all blocks are kept


def test_outputs_of_sparse_sites_are_returned_where_that_is_asked_for():
    work = work_of("sdpa", "dropout")
    pipeline.run(work, pipeline.find, partial(pipeline.decide_sites, options=SPARSE))
    pipeline.run(work, *pipeline.rewriting_passes(SPARSE, lambda values: values, with_outputs=True))
    (end,) = work.graph_module.graph.find_nodes(op="output")
    assert [node.target for node in end.args[0]] == [F.scaled_dot_product_attention, OP]


@pytest.mark.parametrize("some", [True, False])
def test_dense_outputs_are_returned_of_the_matches_that_are_given(some):
    work = work_of("sdpa")
    pipeline.run(work, pipeline.find)
    pipeline.run(work, partial(pipeline.return_dense, matches=work.matches if some else []), pipeline.check)
    assert work.changed == some and targets(work.graph_module) == [F.scaled_dot_product_attention]
    assert len(work.graph_module(torch.randn(1, H, 70, 4))) == 1 + some


def test_check_refuses_a_broken_graph_and_leaves_an_unchanged_one_alone():
    work = work_of("sdpa")
    (call,) = work.graph_module.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    (x,) = work.graph_module.graph.find_nodes(op="placeholder")
    call.append(x)  # the call reads what stands after it
    pipeline.check(work)  # nothing changed, so nothing is looked at
    work.changed = True
    with pytest.raises(RuntimeError):
        pipeline.check(work)


LINE = re.compile(r"pass (\d+), (\w+): [\d.]+ ms, (\d+) nodes changed")


def logged(caplog, work) -> list[tuple[int, str, int]]:
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="sparge_compile"):
        run(work)
    lines = [LINE.fullmatch(record.getMessage()) for record in caplog.records]
    return [(int(m[1]), m[2], int(m[3])) for m in lines if m]


def test_the_log_numbers_passes_and_counts_the_nodes_that_each_changed(caplog):
    # The call and a new input appear, the old call goes, and the output reads another node.
    assert logged(caplog, work_of("sdpa")) == [
        (1, "find", 0),
        (2, "decide_sites", 0),
        (3, "substitute", 4),
        (4, "hoist", 0),
        (5, "in_turns", 0),
        (6, "in_parts", 0),
        (7, "erase_markers", 0),
        (8, "check", 0),
    ]
    assert [count for *_, count in logged(caplog, work_of("dropout"))] == [0] * 8
    assert [count for *_, count in logged(caplog, work_of("dropout", marked="first"))] == [0, 0, 0, 0, 0, 0, 1, 0]


def test_without_debugging_nothing_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="sparge_compile"):
        run(work_of("sdpa"))
    assert not caplog.records


def test_the_report_says_which_kernels_run_on_the_gpus_of_sparse_sites(monkeypatch):
    """Once for each GPU; a site that stays dense asks nothing."""
    asked = []
    monkeypatch.setattr(work_module.inventory, "summary", lambda device: asked.append(device) or "those that fit")
    work = run(work_of("sdpa", "sdpa", "dropout"))
    cuda = torch.device("cuda", 1)
    attention = SimpleNamespace(device=cuda)
    report = Report()
    work_module._note(report, [step._replace(match=replace(step.match, attention=attention)) for step in work.steps])
    assert report.kernels == {"cuda:1": "those that fit"} == report.to_dict()["kernels"] and asked == [cuda]
    assert str(report).splitlines()[1] == "cuda:1: those that fit"
    assert not work.add_to(Report()).kernels, "a CPU needs no line"
