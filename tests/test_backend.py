"""The backend as users call it: options, run-time thresholds, warnings, caches, dynamic shapes, graph breaks."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from toys import Bare, Block, Stack

from sparge_compile import Calibration, attention, backend, explain, inner
from sparge_compile.options import Options
from sparge_compile.passes import pipeline


class Broken(Stack):
    def forward(self, x):
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


FAST = {"min_seq_len": 0, "inner": "eager"}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_dense_thresholds_give_dense_results_and_gradients(inner):
    model, x = Stack(), torch.randn(2, 300, 32)
    compiled = torch.compile(
        model, backend="sparge", fullgraph=True, options={"min_seq_len": 0, "topk": 1.0, "inner": inner}
    )
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(want.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_sparse_thresholds_give_what_the_op_gives_and_its_gradients(inner, monkeypatch):
    model, x = Stack(1), torch.randn(2, 700, 32)
    parameters = list(model.parameters())
    compiled = torch.compile(
        model, backend="sparge", options={"min_seq_len": 0, "topk": 0.3, "topp": 0.2, "inner": inner}
    )
    got = compiled(x)
    dense = model(x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attention(q, k, v, topk=0.3, topp=0.2))
    want = model(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got - dense).abs().max() > 1e-3
    grads = (torch.autograd.grad(y.sum(), parameters) for y in (got, want))
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_thresholds_are_read_at_run_time(opened_graphs):
    """One compiled graph serves any thresholds: its inputs are tensors, and writing to them is enough."""
    model, x = Stack(), torch.randn(1, 700, 32)
    options = {"min_seq_len": 0, "topk": 0.2, "topp": 0.0, "inner": "aot_eager"}
    compiled = torch.compile(model, backend="sparge", fullgraph=True, options=options)
    with torch.no_grad():
        sparse = compiled(x)
        for made in opened_graphs[0].threshold_inputs:
            made.values[:, 0] = 1.0
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert (sparse - model(x)).abs().max() > 1e-3
    assert len(opened_graphs) == 1, "changing thresholds must not recompile"


def test_calibration_by_path_and_by_object(tmp_path):
    calibration = Calibration({"blocks.0": [(0.2, 0.0)] * 4, "blocks.*": [(1.0, 0.0)]})
    calibration.save(tmp_path / "model.json")
    model, x = Stack(), torch.randn(1, 700, 32)
    outs = [
        torch.compile(model, backend="sparge", options={**FAST, "calibration": given})(x)
        for given in (calibration, str(tmp_path / "model.json"), tmp_path / "model.json")
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert (outs[0] - model(x)).abs().max() > 1e-3


def test_calibration_for_other_heads_is_refused():
    options = {**FAST, "calibration": Calibration({"blocks.1": [(0.2, 0.0)] * 3})}
    with pytest.raises(Exception, match=r"blocks\.1.*3 heads.*4 pairs"):
        torch.compile(Stack(), backend="sparge", options=options)(torch.randn(1, 300, 32))


def test_names_are_the_same_in_explain_and_in_compilation(caplog):
    model, x = Stack(), torch.randn(1, 300, 32)
    names = [row.name for row in explain(model, FAST)(x)]
    assert names == ["blocks.0", "blocks.1"]
    with caplog.at_level(logging.INFO, logger="sparge_compile"):
        torch.compile(model, backend="sparge", options=FAST)(x)
    assert "2 of 2 attention sites sparse" in caplog.text
    assert all(name in caplog.text for name in names)
    assert [row.name for row in explain(torch.compile(model), FAST)(x)] == names


class Pipe:
    """Calls its model twice, with what it makes of its own arguments."""

    def __init__(self, model):
        self.model = model

    def __call__(self, length, *, times=2):
        return [self.model(torch.randn(1, length, 32)) for _ in range(times)]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_calls_the_model_may_be_given(compiled):
    model = Stack()
    pipe = Pipe(torch.compile(model, backend="sparge", options=FAST) if compiled else model)
    report = explain(pipe.model, FAST, call=pipe)(300, times=3)
    assert [row.name for row in report.sparse] == ["blocks.0", "blocks.1"]
    assert model.__dict__.get("_compiled_call_impl") is None, "calls go through nothing of ours any more"
    assert len(explain(pipe.model, Options(**FAST), call=lambda: None)()) == 0
    with pytest.raises(TypeError, match=r"explain: bad model.*nn\.Module where call is given"):
        explain(pipe, call=pipe)
    with pytest.raises(TypeError, match=r"explain: bad model: got int; allowed: an nn\.Module or a function"):
        explain(3)


def test_what_attends_beside_the_model_is_not_in_its_report():
    class Attending(Pipe):
        """As a pipeline's encoder of texts and its decoder of latents do."""

        def __call__(self, length):
            x = torch.randn(1, length, 32)
            return self.model(F.scaled_dot_product_attention(x, x, x)) + Stack()(x)

    pipe = Attending(Stack())
    report = explain(pipe.model, FAST, call=pipe)(300)
    assert [(row.name, row.status) for row in report] == [("blocks.0", "sparse"), ("blocks.1", "sparse")]


def test_graph_breaks_give_one_report():
    report = explain(Broken(), FAST)(torch.randn(1, 300, 32))
    assert [row.name for row in report] == ["blocks.0", "blocks.1"]
    assert report.graphs == 2


def test_nothing_found_is_said():
    report = explain(torch.nn.Linear(4, 4))(torch.randn(2, 4))
    assert len(report) == 0 and "no attention found" in str(report)


def test_report_as_table_and_dict():
    slow = {"dense_base": 0, "dense_pair": 1e-9, "sparse_base": 1, "pool": 0, "select": 0, "sparse_pair": 1}
    report = explain(Stack(), {"costs": slow})(torch.randn(1, 1100, 32))
    first = report.to_dict()["sites"][0]
    assert first["status"] == "dense" and first["reason"] == "slower" and first["prediction"]["dense"] > 0
    assert (first["batch"], first["heads"], first["length"], first["keys"], first["head_size"]) == (1, 4, 1100, 1100, 8)
    assert "blocks.1" in str(report) and "1100×1100" in str(report)
    assert report.sites[0].shapes["kv_heads"] == 4


def decomposed(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def checkpointed(q, k, v):
    return checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)


class Projected(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend, self.qkv = attend, torch.nn.Linear(16, 48)

    def forward(self, x):
        return self.attend(*self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4))


TRAINED = {
    "sdpa": partial(Projected, F.scaled_dot_product_attention),
    "decomposed": partial(Projected, decomposed),
    "checkpointed": partial(Projected, checkpointed),
    "opened": partial(torch.nn.TransformerEncoderLayer, 16, 2, 16, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("made", TRAINED.values(), ids=TRAINED)
def test_whether_an_attention_trains_is_read_off_the_graph(made):
    six = {"dense_base": 0, "dense_pair": 1e-9, "sparse_base": 0, "pool": 0, "select": 0, "sparse_pair": 1e-10}
    costs, model = {**six, "training": {**six, "sparse_base": 1}}, made()

    def decided():
        (site,) = explain(model, {"costs": costs})(torch.randn(1, 1100, 16))
        return site.status, site.decision.prediction.trains

    assert decided() == ("dense", True)
    model.requires_grad_(False)
    assert decided() == ("sparse", False)
    model.requires_grad_(True)
    with torch.no_grad():
        assert decided() == ("sparse", False)


def test_dynamic_lengths_take_one_compilation():
    model, compilations = Bare(), []

    def counting(graph_module, inputs):
        compilations.append(1)
        return backend.sparge(graph_module, inputs, options={"min_seq_len": 0, "topk": 1.0})

    compiled = torch.compile(model, backend=counting, dynamic=True)
    for length in (300, 129, 640):
        qkv = [torch.randn(2, 4, length, 8, requires_grad=True) for _ in range(3)]
        got, want = compiled(*qkv), model(*qkv)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        grads = (torch.autograd.grad(x.square().sum(), qkv) for x in (got, want))
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    assert len(compilations) == 1


def test_a_refused_site_warns_once_for_each_reason():
    def two(q):
        q = F.scaled_dot_product_attention(q, q, q)
        return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 64, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="stays dense") as caught:
        torch.compile(two, backend="sparge", options=FAST)(q)
    assert sum("stays dense" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(two, backend="sparge", options={**FAST, "on_unsupported": "dense"})(q)
    with pytest.raises(Exception, match="cannot be replaced"):
        torch.compile(two, backend="sparge", options={**FAST, "on_unsupported": "error"})(q)


def test_a_short_sequence_is_no_reason_to_warn_or_fail():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(Stack(), backend="sparge", options={"on_unsupported": "error"})(torch.randn(1, 300, 32))


def test_a_short_text_under_a_mask_is_none_either():
    """As in LTX, whose mask of the text is added to the scores."""

    def to_text(q, text, mask):
        return F.scaled_dot_product_attention(q, text, text, attn_mask=mask)

    q, text, mask = torch.randn(1, 2, 2048, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 1, 1, 40)
    (row,) = explain(to_text)(q, text, mask)
    assert row.reason.unsupported
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for unsupported in ("warn", "error"):
            torch.compile(to_text, backend="sparge", options={"on_unsupported": unsupported, "inner": "eager"})(
                q, text, mask
            )


def test_an_error_in_a_pass_leaves_dynamos_graph_as_it_was(monkeypatch):
    graphs = []

    def caught(graph_module, inputs):
        graphs.append((graph_module, graph_module.code))
        return backend.sparge(graph_module, inputs, options=FAST)

    monkeypatch.setattr(pipeline, "substitute_match", lambda *given, **named: 1 / 0)
    with pytest.raises(Exception, match="division"):
        torch.compile(Stack(), backend=caught)(torch.randn(1, 300, 32))
    assert graphs[0][0].code == graphs[0][1]


def test_inductor_gets_its_options_and_mode(monkeypatch):
    import torch._inductor.compile_fx as inductor

    seen = []
    monkeypatch.setattr(
        inductor, "compile_fx", lambda graph, *a, config_patches, **k: seen.append(config_patches) or graph.forward
    )
    options = {"min_seq_len": 0, "inductor": {"epilogue_fusion": False}, "inductor_mode": "max-autotune-no-cudagraphs"}
    torch.compile(Block(), backend="sparge", options=options)(torch.randn(1, 100, 32))
    assert seen[0]["epilogue_fusion"] is False and seen[0]["max_autotune"] is True
    torch.compiler.reset()
    torch.compile(Block(), backend="sparge", mode="max-autotune-no-cudagraphs")(torch.randn(1, 100, 32))
    assert seen[1]["max_autotune"] is True


@pytest.mark.parametrize("version, is_off", [("2.11.0+cu130", True), ("2.14.1", True), ("2.15.0", False)])
def test_a_fusion_with_wrong_gradients_is_off_unless_asked_for(monkeypatch, version, is_off):
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(torch, "__version__", version)
    seen, name = [], "triton.mix_order_reduction"
    monkeypatch.setattr(
        inductor, "compile_fx", lambda graph, *a, config_patches, **k: seen.append(config_patches) or graph.forward
    )
    for options in ({}, {"inductor": {name: True}}):
        torch.compiler.reset()
        torch.compile(Block(), backend="sparge", options={"min_seq_len": 0, **options})(torch.randn(1, 100, 32))
    assert seen[0].get(name, True) is not is_off and seen[1][name] is True


def test_inductors_caches_know_source_and_options_but_no_thresholds(monkeypatch):
    """A changed kernel or option must not meet code that was compiled for another; another pair of thresholds may."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    model, qkv = Bare(), torch.randn(3, 1, 4, 100, 8)

    def hits(**options):
        torch.compiler.reset()
        counters.clear()
        with torch.no_grad():
            torch.compile(model, backend="sparge", options={"min_seq_len": 0, **options})(*qkv)
        return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]

    with fresh_cache():
        assert hits() == 0
        assert hits() > 0 and hits(topk=0.25) > 0 and hits(calibration=Calibration({"*": [(0.1, 0.0)]})) > 0
        assert hits(min_seq_len=1) == 0 and hits(inductor={"epilogue_fusion": False}) == 0
        monkeypatch.setattr(inner, "source_digest", lambda: "changed")
        assert hits() == 0


def test_global_state_is_left_alone():
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    before = dynamo.save_config_portable(), inductor.save_config_portable()
    torch.compile(Bare(), backend="sparge", options={"min_seq_len": 0})(*torch.randn(3, 1, 4, 100, 8))
    explain(Block())(torch.randn(1, 100, 32))
    assert before == (dynamo.save_config_portable(), inductor.save_config_portable())


def test_two_models_in_one_process():
    first, second, x = Stack(1), Stack(3), torch.randn(1, 300, 32)
    a = torch.compile(first, backend="sparge", options={**FAST, "topk": 1.0})
    b = torch.compile(second, backend="sparge", options={**FAST, "topk": 0.3, "topp": 0.0})
    torch.testing.assert_close(a(x), first(x), atol=1e-5, rtol=1e-5)
    b(x)
    torch.testing.assert_close(a(x), first(x), atol=1e-5, rtol=1e-5)


def test_equal_options_are_equal():
    assert Options.parse({"topk": 0.3}) == Options.parse({"topk": 0.3})
    assert Options.parse(None) == Options()


def test_explain_of_a_model_in_eval_mode_says_that_gradients_are_recorded():
    """The natural first call has no ``torch.no_grad()``, and training is decided otherwise than inference."""
    model, x = Broken().eval(), torch.randn(1, 2048, 32)
    report = explain(model)(x)
    assert "(training)" in str(report) and "ask under torch.no_grad()" in report.notes[0]
    with torch.no_grad():
        assert explain(model)(x).notes == []
    assert explain(model.train())(x).notes == []


def test_explain_leaves_room_for_compilation():
    """A backend for each explain once used up Dynamo's limit on the frames after a break, and nothing was replaced."""
    model, x = Broken(), torch.randn(1, 700, 32)
    assert {len(explain(model, FAST)(x)) for _ in range(12)} == {2}
    out = torch.compile(model, backend="sparge", options={**FAST, "topk": 0.1, "topp": 0.0})(x)
    assert (out - model(x)).abs().max() > 1e-3


def decode(query, key, value, filled):
    """A step with a static cache, of which the first entries are filled."""
    visible = (torch.arange(key.shape[2]) < filled).view(1, 1, 1, -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


@pytest.mark.parametrize("stale", [0.0, -100.0, float("inf")])
def test_what_a_cache_holds_behind_its_mask_has_no_influence(stale):
    """The answer is in the newest block, most of which is stale: it was dropped."""
    query, value = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1024, 16)
    key = torch.randn(1, 2, 1024, 16)
    key[:, :, 580:590] = query * 3
    key[:, :, 590:] = stale
    got = torch.compile(decode, backend="sparge", options={**FAST, "topk": 0.1, "topp": 0.0})(
        query, key, value, torch.tensor(590)
    )
    want = decode(query, key.where((torch.arange(1024) < 590).view(-1, 1), 0.0), value, 590)
    torch.testing.assert_close(got, want, atol=0.02, rtol=0)


def test_padding_of_a_batch_has_no_influence():
    """A sequence gives the same alone as beside a longer one, padded with anything."""

    def attend(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    qkv = [torch.randn(1, 2, 300, 16) for _ in range(3)]
    padded = [torch.cat([x, torch.full((1, 2, 212, 16), 40.0)], 2) for x in qkv]
    batch = [torch.cat([x, torch.randn(1, 2, 512, 16)]) for x in padded]
    mask = (torch.arange(512) < torch.tensor([[300], [512]])).view(2, 1, 1, 512)
    compiled = torch.compile(attend, backend="sparge", options={**FAST, "topk": 0.4, "topp": 0.0})
    alone = compiled(*qkv, torch.ones(1, 1, 1, 300, dtype=torch.bool))
    pairs = mask & mask.mT  # padding sees nothing, either
    torch.testing.assert_close(compiled(*batch, pairs)[:1, :, :300], alone)


def test_lengths_on_both_sides_of_the_limit():
    """The first length once decided for all."""
    model = Stack(1)
    options = {**FAST, "min_seq_len": 500, "topk": 0.1, "topp": 0.0}
    for lengths in ((700, 300, 900), (300, 700, 200)):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="sparge", options=options, dynamic=True)
        for length in lengths:
            x = torch.randn(1, length, 32)
            assert ((compiled(x) - model(x)).abs().max() > 1e-3) == (length >= 500)


def test_an_expanded_query_can_be_viewed_after_attention():
    """Learned queries for a batch: the output once had another order of strides than dense attention gives."""
    latent, x = torch.randn(1, 2, 100, 16), torch.randn(3, 2, 150, 16)

    def pooled(latent, x):
        return F.scaled_dot_product_attention(latent.expand(3, -1, -1, -1), x, x).view(6, -1, 16)

    compiled = torch.compile(pooled, backend="sparge", options={"min_seq_len": 0, "topk": 1.0, "inner": "aot_eager"})
    torch.testing.assert_close(compiled(latent, x), pooled(latent, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("first", [1200, 2000])
def test_the_break_even_of_the_cost_model_is_asked_at_each_call(first, train):
    """One graph for the lengths that pay and for the others, whichever comes first."""
    pairs = 1e-9 * 2 * 4 * 16  # seconds for the square of a length, dense
    costs = {
        "dense_base": 0,
        "dense_pair": 1e-9,
        "sparse_base": pairs * 1500**2,
        "pool": 0,
        "select": 0,
        "sparse_pair": 0,
    }
    compilations = []

    def counting(graph_module, inputs):
        compilations.append(1)
        return backend.sparge(
            graph_module, inputs, options={"costs": costs, "topk": 0.1, "topp": 0.0, "inner": "eager"}
        )

    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend=counting)
    for length in (first, 1100, 3000, 1400, 1700):
        q = torch.randn(2, 4, length, 16, requires_grad=train)
        torch._dynamo.mark_dynamic(q, 2)
        sparse = (compiled(q) - F.scaled_dot_product_attention(q, q, q)).abs().max() > 1e-3
        assert sparse == (length > 1600)
    assert len(compilations) == 1


def test_source_and_version_enter_the_digest(monkeypatch, tmp_path):
    digest = inner.source_digest.__wrapped__
    before = digest()
    assert before == digest() == inner.source_digest()
    monkeypatch.setattr(inner, "__version__", "another")
    assert digest() != before
    monkeypatch.undo()
    for path in Path(inner.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(inner, "__file__", str(tmp_path / "inner.py"))
    copied = digest()
    with (tmp_path / "ops.py").open("a") as file:
        file.write("#")
    assert digest() != copied
