"""Larger calls that hold attention, opened: values are eager's, masks keep their meaning, and what says more stays."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from helpers import rewrite_graph
from torch import nn

from sparge_compile import explain
from sparge_compile.options import Options
from sparge_compile.passes.decide import decide
from sparge_compile.passes.find import find
from sparge_compile.passes.read.fx_utils import clone
from sparge_compile.report import Reason

EXACT = {"min_seq_len": 0, "topk": 1.0, "topp": 0.0, "inner": "eager", "on_unsupported": "dense"}
SPARSE = Options(min_seq_len=0, on_unsupported="dense")
LENGTH = 100

PADDING = torch.zeros(2, LENGTH, dtype=torch.bool)
PADDING[1, 70:] = True
LATER = torch.ones(LENGTH, LENGTH).triu(1) > 0
ADDED = torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH)

# What a layer is given beside its input, and the mask that attention then has.
GIVEN = {
    "nothing": ({}, "none"),
    "padding": ({"src_key_padding_mask": PADDING}, "bool"),
    "mask": ({"src_mask": LATER}, "bool"),
    "mask and padding": ({"src_mask": LATER, "src_key_padding_mask": PADDING}, "bool"),
    "causal": ({"src_mask": LATER, "is_causal": True}, "bool"),
    "mask of each head": ({"src_mask": LATER.expand(8, LENGTH, LENGTH)}, "bool"),
}


def graph_of(function, *args, **kwargs):
    """Dynamo's graph of a function."""
    caught = []
    torch.compile(function, backend=lambda gm, _: caught.append(gm) or gm.forward, fullgraph=True)(*args, **kwargs)
    return caught[0]


def targets(graph):
    return {node.target for node in graph.graph.nodes}


def assert_parity(function, *args, fullgraph=True, eager=None, inner="eager", **kwargs):
    """At topk = 1 the compiled model gives what eager mode gives, within 1e-5 of the largest entry; returns both."""
    compiled = torch.compile(function, backend="sparge", fullgraph=fullgraph, options={**EXACT, "inner": inner})
    got, want = compiled(*args, **kwargs), (eager or function)(*args, **kwargs)
    bound = 1e-5 * want.abs().max().item()
    torch.testing.assert_close(got, want, atol=bound, rtol=0)
    return got, want


def layer(**how):
    return nn.TransformerEncoderLayer(32, 4, 64, **{"batch_first": True, **how}).eval()


@pytest.mark.parametrize(
    "norm_first, activation, given", [*((False, "relu", given) for given in GIVEN), (True, "gelu", "mask and padding")]
)
def test_the_inference_kernel_of_the_encoder_layer_is_written_out(norm_first, activation, given):
    model, (masks, kind) = layer(norm_first=norm_first, activation=activation), GIVEN[given]
    x = torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        assert torch._transformer_encoder_layer_fwd in targets(graph_of(model, x, **masks))
        (row,) = explain(model, EXACT)(x, **masks)
        assert (row.name, row.kind, row.status, row.site.mask) == ("self_attn", "mha", "sparse", kind)
        assert_parity(model, x, **masks)


def test_the_inference_kernel_stays_where_attention_stays():
    """An additive mask changes scores. (The kernel itself hides every key whose entry is not zero.)"""
    model, x = layer(), torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        graph = clone(graph_of(model, x, src_mask=ADDED))
        before = graph.code
        (match,) = find(graph)
        assert (match.site.name, match.site.mask) == ("self_attn", "additive")
        assert decide(match, SPARSE).reason is Reason.ADDITIVE_MASK
        assert rewrite_graph(graph, SPARSE).threshold_inputs == []
        assert graph.code == before
        (row,) = explain(model, {**EXACT, "min_seq_len": LENGTH + 1})(x)
        assert row.reason is Reason.TOO_SHORT


@pytest.mark.parametrize("training, given", [*((True, given) for given in GIVEN), (False, "mask and padding")])
def test_the_other_layout_and_training(given, training):
    model, (masks, _) = layer(batch_first=False, dropout=0.0).train(training), GIVEN[given]
    x = torch.randn(LENGTH, 2, 32)
    (row,) = explain(model, EXACT)(x, **masks)
    assert (row.name, row.status) == ("self_attn", "sparse")
    assert_parity(model, x, **masks)


def test_names_do_not_depend_on_the_mode():
    model, x = nn.TransformerEncoder(layer(dropout=0.0), 2), torch.randn(2, LENGTH, 32)
    names = ["layers.0.self_attn", "layers.1.self_attn"]
    with torch.no_grad():
        assert [row.name for row in explain(model.eval(), EXACT)(x)] == names
    assert [row.name for row in explain(model.train(), EXACT)(x)] == names


def test_encoder_with_padding():
    """Eager mode packs what is not padding into a nested tensor, if it may; compiled code does not."""
    packs = nn.TransformerEncoder(layer(), 2).eval()
    plain = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval()
    plain.load_state_dict(packs.state_dict())
    x = torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        rows = explain(packs, EXACT)(x, src_key_padding_mask=PADDING)
        assert [(row.status, row.site.mask) for row in rows] == [("sparse", "bool")] * 2
        for model in (packs, plain):
            assert_parity(model, x, src_key_padding_mask=PADDING, eager=plain)
        torch.testing.assert_close(
            torch.compile(packs, backend="sparge", options=EXACT)(x, src_key_padding_mask=PADDING)[~PADDING],
            packs(x, src_key_padding_mask=PADDING)[~PADDING],
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("grad", [True, False])
def test_transformer_with_decoder(grad):
    model = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, LENGTH, 32), torch.randn(2, LENGTH, 32)
    masks = {
        "tgt_mask": LATER,
        "tgt_is_causal": True,
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
    }
    with torch.set_grad_enabled(grad):
        report = explain(model, EXACT)(source, target, **masks)
        assert [(row.name, row.status, row.site.mask, row.site.is_causal) for row in report] == [
            ("encoder.layers.0.self_attn", "sparse", "bool", False),
            ("decoder.layers.0.self_attn", "sparse", "none", True),
            ("decoder.layers.0.multihead_attn", "sparse", "bool", False),
        ]
        plain = nn.TransformerEncoder(model.encoder.layers[0], 1, model.encoder.norm, enable_nested_tensor=False)
        plain.load_state_dict(model.encoder.state_dict())
        model.encoder = plain.eval()
        assert_parity(model, source, target, inner="aot_eager", **masks)
        assert_parity(model.decoder, target, source, tgt_mask=LATER, tgt_is_causal=False, tgt_key_padding_mask=PADDING)


MHA = {
    "padding": {"key_padding_mask": PADDING},
    "mask": {"attn_mask": LATER},
    "both": {"attn_mask": LATER, "key_padding_mask": PADDING},
    "mask of each head": {"attn_mask": LATER.expand(8, LENGTH, LENGTH), "key_padding_mask": PADDING},
    "causal and padding": {"attn_mask": LATER, "key_padding_mask": PADDING, "is_causal": True},
}


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("given", MHA)
def test_boolean_masks_of_multi_head_attention_stay_boolean(given, extra):
    model, x = nn.MultiheadAttention(32, 4, batch_first=True, **extra), torch.randn(2, LENGTH, 32)

    def attend(x):
        return model(x, x, x, need_weights=False, **MHA[given])[0]

    (row,) = explain(attend, EXACT)(x)
    assert (row.status, row.site.mask, row.site.keys) == ("sparse", "bool", LENGTH + len(extra))
    both = assert_parity(attend, x, inner="eager" if extra else "aot_eager")
    grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in both]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * want.abs().max().item() + 1e-5, rtol=1e-4)


def test_unbatched_attention_with_masks():
    model, x = nn.MultiheadAttention(32, 4), torch.randn(LENGTH, 32)

    def attend(x):
        return model(x, x, x, key_padding_mask=PADDING[1], attn_mask=LATER, need_weights=False)[0]

    assert [row.site.mask for row in explain(attend, EXACT)(x)] == ["bool"]
    assert_parity(attend, x)


MORE_THAN_HIDING = {
    "added": lambda x, m: m(x, x, x, attn_mask=ADDED, need_weights=False)[0],
    "one of two added": lambda x, m: m(
        x,
        x,
        x,
        attn_mask=ADDED,
        key_padding_mask=torch.zeros_like(PADDING, dtype=x.dtype).masked_fill_(PADDING, -torch.inf),
        need_weights=False,
    )[0],
    "finite": lambda x, m: m(
        x, x, x, attn_mask=torch.zeros(LENGTH, LENGTH).masked_fill(LATER, -1.0), need_weights=False
    )[0],
    "not from zero": lambda x, m: m(
        x, x, x, attn_mask=torch.ones_like(LATER, dtype=x.dtype).masked_fill_(LATER, -torch.inf), need_weights=False
    )[0],
    "written to": lambda x, m: m(
        x,
        x,
        x,
        attn_mask=torch.zeros_like(LATER, dtype=x.dtype).masked_fill_(LATER, -torch.inf).add_(ADDED),
        need_weights=False,
    )[0],
}


@pytest.mark.parametrize("case", MORE_THAN_HIDING)
def test_masks_that_do_more_than_hide_stay_additive(case):
    model, x = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, LENGTH, 32)
    (row,) = explain(lambda x: MORE_THAN_HIDING[case](x, model), EXACT)(x)
    assert (row.status, row.reason) == ("dense", Reason.ADDITIVE_MASK)


def _ior(hide, more):
    hide |= more


def _iand(hide, more):
    hide &= more


def _setitem(hide, more):
    hide[:] = more


WRITES = {
    "method": lambda hide, more: hide.logical_not_(),
    "|=": _ior,
    "&=": _iand,
    "^=": lambda hide, more: operator.ixor(hide, more),
    "item": _setitem,
    "out": lambda hide, more: torch.logical_or(hide, more, out=hide),
    "a view": lambda hide, more: hide[:, 3:].logical_not_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_mask_that_is_written_to_later_is_not_followed_back(write):
    """Followed back, the additive mask would be what the boolean one holds by the time of the call."""
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    more = torch.zeros_like(PADDING)
    more[:, ::3] = True

    def attend(x, hide, more, written=True):
        hide = hide.clone()
        added = torch.zeros_like(hide, dtype=x.dtype).masked_fill_(hide, -torch.inf)
        if written:
            WRITES[write](hide, more)
        return model(x, x, x, key_padding_mask=added, need_weights=False)[0]

    args = torch.randn(2, LENGTH, 32), PADDING, more
    (row,) = explain(attend, EXACT)(*args)
    assert row.reason is Reason.ADDITIVE_MASK
    compiled = torch.compile(attend, backend="sparge", options=EXACT)
    torch.testing.assert_close(compiled(*args), attend(*args), atol=1e-5, rtol=1e-5)
    (row,) = explain(attend, EXACT)(*args, written=False)
    assert row.status == "sparse"


def test_a_mask_that_is_written_to_before_it_is_read_is_followed_back():
    model = nn.MultiheadAttention(32, 4, batch_first=True)

    def attend(x, hide, more):
        hide = hide.clone()
        hide |= more
        added = torch.zeros_like(hide, dtype=x.dtype).masked_fill_(hide, -torch.inf)
        return model(x, x, x, key_padding_mask=added, need_weights=False)[0]

    more = torch.zeros_like(PADDING)
    more[:, ::3] = True
    args = torch.randn(2, LENGTH, 32), PADDING, more
    (row,) = explain(attend, EXACT)(*args)
    assert (row.status, row.site.mask) == ("sparse", "bool")
    compiled = torch.compile(attend, backend="sparge", options=EXACT)
    torch.testing.assert_close(compiled(*args), attend(*args), atol=1e-5, rtol=1e-5)


def test_additive_masks_that_nobody_reads_any_more_are_removed():
    model, x = nn.TransformerEncoder(layer(), 2).eval(), torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        graph = clone(graph_of(model, x, mask=LATER, src_key_padding_mask=PADDING, is_causal=False))
    assert torch.zeros_like in targets(graph)
    rewrite_graph(graph, SPARSE)
    assert not targets(graph) & {torch.zeros_like, "masked_fill_", torch._transformer_encoder_layer_fwd}
    both = nn.ModuleList([layer(), layer()]).eval()

    def second_reads_too(x):
        added = torch.zeros_like(PADDING, dtype=x.dtype).masked_fill_(PADDING, -torch.inf)
        return both[0](x, src_key_padding_mask=added) + added[..., None].exp()

    with torch.no_grad():
        graph = clone(graph_of(second_reads_too, x))
    rewrite_graph(graph, SPARSE)
    assert torch.zeros_like in targets(graph) and torch._transformer_encoder_layer_fwd not in targets(graph)


@pytest.mark.parametrize("mask, mask_type", [(None, None), (LATER, 0), (PADDING, 1), (LATER.expand(2, 4, -1, -1), 2)])
def test_the_native_kernel_is_written_out_unless_its_weights_are_read(mask, mask_type):
    """No trace of today's torch.nn has it, but who calls it himself, does."""
    w = torch.randn(96, 32) / 6, torch.randn(96), torch.randn(32, 32) / 6, torch.randn(32)

    def both(x):
        return torch._native_multi_head_attention(x, x, x, 32, 4, *w, mask, False, True, mask_type)

    x = torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        (row,) = explain(lambda x: both(x)[0], EXACT)(x)
        assert (row.kind, row.status) == ("mha", "sparse")
        assert_parity(lambda x: both(x)[0], x)
        (row,) = explain(both, EXACT)(x)
        assert row.reason is Reason.WEIGHTS_USED


def test_dynamic_lengths_of_an_opened_layer_take_one_compilation():
    model, x = layer(), torch.randn(2, 300, 32)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        try:
            torch.compile(model, backend="eager", fullgraph=True)(x)
        except torch._dynamo.exc.Unsupported:
            pytest.skip("this torch does not trace the inference kernel with symbolic sizes")
        compiled = torch.compile(model, backend="sparge", fullgraph=True, options=EXACT)
        compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for length in (150, 433):
                y = torch.randn(2, length, 32)
                torch.testing.assert_close(compiled(y), model(y), atol=1e-5, rtol=1e-5)


def test_sparse_thresholds_reach_the_attention_inside(monkeypatch):
    from sparge_compile import attention

    model, x = layer(), torch.randn(1, 700, 32)
    with torch.no_grad():
        got = torch.compile(model, backend="sparge", options={**EXACT, "topk": 0.2})(x)
        assert (got - model(x)).abs().max() > 1e-3
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, v, *a, **kw: attention(q, k, v, topk=0.2, topp=0.0)
        )
        monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)
