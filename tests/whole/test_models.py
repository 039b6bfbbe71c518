"""Real models, compiled with the backend: every attention is found, and values and gradients are those of eager mode.

What each library hands to SDPA stands in models.CASES. Speed is not tested here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES, Case, tensor_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import sparge_compile
from sparge_compile.kernels import reference
from sparge_compile.report import Reason

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

DENSE = {"min_seq_len": 0, "topk": 1.0, "topp": 0.0, "inner": "aot_eager", "on_unsupported": "dense"}
SPARSE = {**DENSE, "topk": 0.3, "topp": 0.2}

# Of the largest entry of what is compared. Attention sums in another order than eager mode does, and a backward adds
# such differences over layers and tokens.
OUTPUT_ERROR = 1e-5
GRADIENT_ERROR = 1e-4

by_name = {case.name: case for case in CASES}


def assert_equal_output(got: Tensor, want: Tensor) -> None:
    """max |got - want| <= 1e-5 max |want|."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert want.abs().max() > 0
    error = (got - want).abs().max() / want.abs().max()
    assert error <= OUTPUT_ERROR, f"relative error of the output: {error:.1e}"


def assert_equal_gradients(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    """max |got - want| <= 1e-4 max |want| for each parameter.

    Where the true gradient is zero (a key's bias moves all scores of a row alike), both are rounding errors: entries
    below eps times the largest gradient of the model are not told from zero.
    """
    assert got.keys() == want.keys()
    largest = max(g.abs().max() for g in want.values() if g is not None)
    zero = torch.finfo(torch.float32).eps * largest
    for name, expected in want.items():
        assert (got[name] is None) == (expected is None), name
        if expected is None:
            continue
        error, allowed = (got[name] - expected).abs().max(), GRADIENT_ERROR * expected.abs().max() + zero
        assert error <= allowed, f"gradient of {name}: {error:.1e}, allowed {allowed:.1e}"


def run(model: nn.Module, call: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output of ``call`` and the gradients of a fixed random projection of it, by parameter of ``model``."""
    model.zero_grad(set_to_none=True)
    output = tensor_of(call(**inputs))
    projection = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * projection).mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


def compiled(model: nn.Module, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend="sparge", options=options, fullgraph=True)


def sparse_calls(call: Any, inputs: dict[str, Any]) -> int:
    """How often the sparse op runs. ``call`` has run before: tracing runs it too, on fake tensors."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call(**inputs)
    return sum(event.name in ("sparge::attend", "sparge::attend_for_backward") for event in profiled.events())


@pytest.fixture
def sdpa_calls(monkeypatch) -> list[dict[str, Any]]:
    """The arguments, by name, of every SDPA call of eager mode."""
    calls: list[dict[str, Any]] = []
    real = F.scaled_dot_product_attention
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    yield calls
    monkeypatch.undo()


def kind_of(mask: Tensor | None) -> str:
    return "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sdpa_gets_what_the_table_says(case: Case, sdpa_calls):
    model, inputs = case.make()
    model(**inputs)
    assert len(sdpa_calls) == len(case.attentions)
    for call, expected in zip(sdpa_calls, case.attentions, strict=True):
        mask = call.get("attn_mask")
        assert (call["query"].shape[2], call["key"].shape[2]) == (expected.length, expected.keys)
        assert (kind_of(mask), None if mask is None else tuple(mask.shape)) == (expected.mask, expected.mask_shape)
        assert bool(call.get("is_causal")) == expected.is_causal
        assert bool(call.get("enable_gqa")) == expected.enable_gqa
        assert call.get("dropout_p", 0.0) == 0.0


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_topk_1_is_dense_attention_and_every_call_is_in_the_report(case: Case, inner: str):
    model, inputs = case.make()
    report = sparge_compile.explain(model, DENSE)(**inputs)
    found = [(row.name, row.kind, row.shapes["length"], row.shapes["keys"], row.reason) for row in report]
    assert found == [(a.name, a.kind, a.length, a.keys, a.reason) for a in case.attentions]
    assert [row.status for row in report] == [a.status for a in case.attentions]
    assert report.graphs == 1
    for row, expected in zip(report, case.attentions, strict=True):
        assert (row.site.mask, row.site.is_causal) == (expected.recognised or expected.mask, expected.is_causal)
        assert (row.shapes["heads"] != row.shapes["kv_heads"]) == expected.enable_gqa

    call = compiled(model, {**DENSE, "inner": inner})
    output, gradients = run(model, call, inputs)
    expected_output, expected_gradients = run(model, model, inputs)
    assert_equal_output(output, expected_output)
    assert_equal_gradients(gradients, expected_gradients)
    assert sparse_calls(call, inputs) == len(report.sparse)


def test_short_keys_stay_dense_and_the_others_do_not():
    model, inputs = by_name["wan"].make()
    options = {**DENSE, "min_seq_len": 100, "inner": "eager"}
    report = sparge_compile.explain(model, options)(**inputs)
    reasons = {row.name: row.reason for row in report}
    assert reasons == {
        a.name: Reason.LONG_ENOUGH if a.keys >= 100 else Reason.TOO_SHORT for a in by_name["wan"].attentions
    }
    call = compiled(model, options)
    call(**inputs)
    assert sparse_calls(call, inputs) == len(report.sparse) == 2


def stand_in(options: dict[str, Any]) -> Any:
    """The reference in the place of SDPA."""

    def attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):  # SDPA's signature
        assert dropout_p == 0.0
        if attn_mask is not None:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
        thresholds = torch.tensor([[options["topk"], options["topp"]]]).expand(query.shape[1], 2)
        blocks = reference.block_map(query.detach(), key.detach(), thresholds, attn_mask, is_causal, scale)
        densities.append(blocks.counts.float().mean().item() / blocks.indices.shape[-1])
        return reference.attention(query, key, value, blocks, attn_mask, is_causal, scale)[0]

    densities: list[float] = []
    attention.densities = densities
    return attention


@pytest.mark.parametrize("name", ["wan", "llama", "deepseek"])
def test_sparse_thresholds_give_what_the_reference_gives(name: str, monkeypatch):
    model, inputs = by_name[name].make()
    report = sparge_compile.explain(model, SPARSE)(**inputs)
    assert not report.dense
    output, gradients = run(model, compiled(model, SPARSE), inputs)
    dense = tensor_of(model(**inputs))

    patched = stand_in(SPARSE)
    monkeypatch.setattr(F, "scaled_dot_product_attention", patched)
    expected_output, expected_gradients = run(model, model, inputs)
    assert len(patched.densities) == len(report.sites)
    assert min(patched.densities) < 0.6, "nothing was dropped"
    assert (expected_output - dense).abs().max() > 100 * OUTPUT_ERROR * dense.abs().max(), "sparse looks like dense"
    assert_equal_output(output, expected_output)
    assert_equal_gradients(gradients, expected_gradients)


@pytest.mark.slow  # a minute each, nearly all of it in the C++ compiler
@pytest.mark.parametrize("name", ["wan", "llama"])
def test_inductor(name: str, caplog):
    model, inputs = by_name[name].make()
    options = {**DENSE, "inner": "inductor"}
    names = [row.name for row in sparge_compile.explain(model, options)(**inputs)]
    call = compiled(model, options)
    with caplog.at_level("INFO", logger="sparge_compile"):
        output, gradients = run(model, call, inputs)
    (logged,) = (record.args[0] for record in caplog.records if record.name == "sparge_compile" and record.args)
    assert [row.name for row in logged] == names == [a.name for a in by_name[name].attentions]
    expected_output, expected_gradients = run(model, model, inputs)
    assert_equal_output(output, expected_output)
    assert_equal_gradients(gradients, expected_gradients)
    assert sparse_calls(call, inputs) == len(names)
