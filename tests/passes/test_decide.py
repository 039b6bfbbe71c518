"""Sparse or dense, with a reason: what the options, the cost model and the attention itself say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder

from sparge_compile import Calibration, CostModel
from sparge_compile.keeping import Kept
from sparge_compile.limit import Limit
from sparge_compile.options import Options
from sparge_compile.passes import decide as decide_module
from sparge_compile.passes.decide import MARGIN, MIN_KEYS, decide, expected_density, shape_of, thresholds_for, verdict
from sparge_compile.passes.find import find
from sparge_compile.passes.match.attention import Refusal
from sparge_compile.report import Reason

ALWAYS = Options(min_seq_len=0)
FREE = {"dense_base": 0, "dense_pair": 1e-9, "sparse_base": 0, "pool": 0, "select": 0, "sparse_pair": 0}
SDPA = F.scaled_dot_product_attention


def matched(b: Builder, node):
    (match,) = find(b.module(node))
    return match


def attention(dropout=0.0, mask=None, **sizes):
    b = Builder()
    q, k, v = b.qkv(**sizes)
    given = None if mask is None else mask(b, q.meta["example_value"].shape[2], k.meta["example_value"].shape[2])
    return matched(b, b.call(SDPA, q, k, v, given, dropout))


def test_a_site_becomes_sparse():
    decision = decide(attention(), ALWAYS)
    assert (decision.status, decision.reason, decision.detail) == ("sparse", Reason.LONG_ENOUGH, "10 keys")
    assert decision.prediction is None


def bias(requires_grad):
    return lambda b, rows, keys: b.input("bias", rows, keys, requires_grad=requires_grad)


def padding(b, rows, keys):
    return b.method("expand", b.input("padding", keys, dtype=torch.bool), rows, keys)


DENSE = {
    "dropout": (Reason.DROPOUT, {"dropout": 0.1}),
    "large values": (Reason.HEAD_SIZE, {"value_size": 512}),
    "float64": (Reason.DTYPE, {"dtype": torch.float64}),
    "large heads": (Reason.HEAD_SIZE, {"head_size": 512}),
    "additive mask": (Reason.ADDITIVE_MASK, {"mask": bias(False)}),
    "learned bias": (Reason.LEARNED_BIAS, {"mask": bias(True)}),
}
SPARSE = {
    "no dropout": {"dropout": 0.0},
    "values of 256": {"value_size": 256},
    "bfloat16": {"dtype": torch.bfloat16},
    "heads of 256": {"head_size": 256},
    "boolean mask": {"mask": padding},
}


@pytest.mark.parametrize("case", DENSE)
def test_what_has_no_sparse_kernel_stays_dense(case):
    reason, options = DENSE[case]
    decision = decide(attention(**options), ALWAYS)
    assert (decision.status, decision.reason) == ("dense", reason)


@pytest.mark.parametrize("case", SPARSE)
def test_its_neighbour_becomes_sparse(case):
    assert decide(attention(**SPARSE[case]), ALWAYS).status == "sparse"


def test_additive_masks_are_replaced_where_that_is_asked_for_but_never_learned_ones():
    asked = Options(min_seq_len=0, additive_masks=True)
    assert decide(attention(mask=bias(False)), asked).status == "sparse"
    assert decide(attention(mask=bias(True)), asked).reason is Reason.LEARNED_BIAS


def test_an_order_of_tokens_counts_where_it_is_made():
    b = Builder()
    match = matched(b, b.call(SDPA, *b.qkv(length=2048, keys=2048, head_size=64)))
    options = Options(topk=0.1, topp=0.0, token_order="tiles")
    without, with_gathers = (decide(each, options).prediction.sparse for each in (match, match.gathering()))
    assert with_gathers > without


def test_a_refusal_of_the_match_is_kept_with_its_detail():
    refused = replace(attention(), attention=None, refusal=Refusal(Reason.HEADS, "6 and 4"))
    decision = decide(refused, ALWAYS)
    assert (decision.reason, decision.detail) == (Reason.HEADS, "6 and 4")


def test_a_graph_without_shapes_says_how_to_get_them():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(SDPA, (x, x, x)))
    (match,) = find(torch.fx.GraphModule({}, graph))
    decision = decide(match, ALWAYS)
    assert decision.reason is Reason.NO_SHAPES and "example_inputs" in decision.detail


@pytest.mark.parametrize("least, status", [(0, "sparse"), (10, "sparse"), (11, "dense")])
def test_a_least_number_of_keys_replaces_the_cost_model(least, status):
    decision = decide(attention(keys=10), Options(min_seq_len=least, costs={**FREE, "sparse_base": 1.0}))
    assert decision.status == status
    assert decision.reason is (Reason.LONG_ENOUGH if status == "sparse" else Reason.TOO_SHORT)


@pytest.mark.parametrize("keys, reason", [(MIN_KEYS - 1, Reason.TOO_SHORT), (MIN_KEYS, Reason.PAYS)])
def test_short_keys_stay_dense_whatever_they_would_gain(keys, reason):
    assert decide(attention(length=64, keys=keys), Options(costs=FREE)).reason is reason


@pytest.mark.parametrize("gain, pays_off", [(MARGIN * 1.01, True), (MARGIN * 0.99, False), (0.5, False)])
def test_a_site_must_be_predicted_to_gain_a_margin(gain, pays_off):
    options = Options(costs={**FREE, "sparse_pair": 1e-9 / gain}, topk=1.0)
    match = attention(length=64, keys=MIN_KEYS)
    decision = decide(match, options)
    assert decision.reason is (Reason.PAYS if pays_off else Reason.SLOWER)
    assert decision.prediction.speedup == pytest.approx(gain) and decision.prediction.density == 1.0
    assert (verdict(match.attention, 1.0, options).status == "sparse") == pays_off


def test_fewer_blocks_pay_sooner():
    match = attention(length=64, keys=MIN_KEYS)
    costs = {**FREE, "sparse_pair": 1.5e-9}
    assert decide(match, Options(costs=costs, topk=0.5, topp=0.5)).status == "sparse"
    assert decide(match, Options(costs=costs, topk=0.5, topp=0.8)).status == "dense"


def test_training_is_decided_by_what_a_backward_takes_too():
    costs = {**FREE, "sparse_pair": 1e-10, "training": {**FREE, "sparse_pair": 2e-9}}
    options = Options(costs=costs, topk=1.0)
    inference, training = (attention(length=64, keys=MIN_KEYS, requires_grad=grad) for grad in (False, True))
    assert decide(inference, options).reason is Reason.PAYS
    decision = decide(training, options)
    assert decision.reason is Reason.SLOWER and decision.prediction.trains
    assert decide(training, replace(options, topk=0.1, topp=0.0)).reason is Reason.PAYS
    with torch.no_grad():
        assert decide(attention(length=64, keys=MIN_KEYS, requires_grad=True), options).reason is Reason.PAYS


def test_the_host_must_be_worth_it_too():
    host = {"dense_host": 1e-5, "sparse_host": 1e-4}
    match = attention(length=64, keys=MIN_KEYS)  # 64 · 1024 · 4 · 2 products: 0.5 ms of dense attention
    assert decide(match, Options(costs={**FREE, **host}, topk=0.1)).reason is Reason.PAYS
    assert decide(match, Options(costs={**FREE, **host, "sparse_host": 1e-3}, topk=0.1)).reason is Reason.SLOWER
    even = {"dense_host": 1e-3, "sparse_host": 5e-4}  # where it takes the host less, nothing is asked
    assert decide(match, Options(costs={**FREE, **even}, topk=0.1)).reason is Reason.PAYS
    match, environment = dynamic()
    decision = decide(match, Options(costs={**FREE, "sparse_pair": 1e-10, **host, "sparse_host": 1e-1}, topk=0.1))
    assert decision.reason is Reason.AT_EACH_CALL and len(decision.limit.gain) == 8
    assert "from 2141 keys on" in decision.detail and not environment.guards


@pytest.mark.parametrize(
    "mode, mask, launched",
    [
        (None, None, "compiled"),
        (None, padding, "compiled"),
        ("reduce-overhead", padding, "graph"),
    ],
)
def test_who_launches_an_attention(monkeypatch, mode, mask, launched):
    asked = []
    monkeypatch.setattr(decide_module, "cost_model", lambda *given: asked.append(given) or CostModel(**FREE))
    decide(attention(length=64, keys=MIN_KEYS, mask=mask, dtype=torch.bfloat16), Options(inductor_mode=mode, topk=0.1))
    assert set(asked) == {(torch.device("cpu"), torch.bfloat16, 4, 4, launched, mask is not None)}


def test_kept_tokens_raise_the_bound_of_the_density():
    match = attention(length=1000, keys=1000)
    pairs = ((0.2, 0.0),)
    assert expected_density(pairs, Kept((0, 500)), match) == pytest.approx(0.5 + 0.5 * 0.2)
    assert expected_density(pairs, Kept((-500, None), True), match) == pytest.approx(0.5 + 0.5 * 0.6)
    assert expected_density(pairs, Kept("text"), match) == pytest.approx(0.2)  # none is found
    decision = decide(match, Options(min_seq_len=0, keep_keys=500))
    assert "keeps tokens 0:500" in decision.detail
    beyond = decide(match, Options(min_seq_len=0, keep_keys=(1000, None)))
    assert "keeps nothing: tokens 1000: of 1000" in beyond.detail
    assert "keeps no text" in decide(match, Options(min_seq_len=0, keep_keys="text")).detail


def test_thresholds_come_from_the_calibration_or_the_options():
    match = attention(heads=2)
    pairs = ((0.25, 0.0), (0.5, 0.1))
    assert thresholds_for(match, Options(calibration=Calibration({"(root)": pairs}))) == pairs
    assert thresholds_for(match, Options(topk=0.3, topp=0.2)) == ((0.3, 0.2),) * 2
    other = Calibration({"(root)": [(0.25, 0.0)] * 3})
    with pytest.raises(ValueError, match="heads"):
        decide(match, Options(min_seq_len=0, calibration=other))  # an error stays an error


@pytest.mark.parametrize(
    "pairs, density",
    [(((0.5, 0.8),), 0.8), (((0.5, 0.1), (1.0, 0.0)), 0.75), ((), 0)],
    ids=["the larger", "the mean", "no heads"],
)
def test_the_expected_density(pairs, density):
    assert expected_density(pairs) == density


def dynamic(length=64, dims=(2,)):
    b = Builder()
    x = b.input("x", 3, 2, length, 4, dynamic=dims)
    return matched(b, b.call(SDPA, x, x, x)), b.mode.shape_env


@pytest.mark.parametrize("length", [64, 6000])
@pytest.mark.parametrize(
    "options, detail, limit",
    [
        (Options(min_seq_len=32), "from 32 keys on", Limit(32)),
        (Options(topk=0.5, topp=0.0, costs=FREE), f"from {MIN_KEYS} keys on", Limit(MIN_KEYS, (0.0, 1e-9, 0.0, 0.0))),
        # 3 sequences of 2 heads of 4: n² of 24e-9 s against 1e-3 s · 1.1
        (Options(costs={**FREE, "sparse_base": 1e-3, "dense_pair": 1e-11}), "from 2141 keys on", None),
    ],
    ids=["least length", "free", "break-even"],
)
def test_a_dynamic_length_is_decided_at_each_call(length, options, detail, limit):
    """The length that was traced with decides nothing, and nothing becomes a guard."""
    match, environment = dynamic(length)
    decision = decide(match, options)
    assert decision.status == "sparse" and decision.reason is Reason.AT_EACH_CALL and detail in decision.detail
    assert limit is None or decision.limit == limit
    assert not environment.guards and shape_of(match.attention).length == length


def test_a_dynamic_batch_is_decided_at_each_call():
    match, environment = dynamic(2048, dims=(0,))
    decision = decide(match, Options(costs={**FREE, "sparse_base": 1e-3, "dense_pair": 1e-11}))
    assert decision.reason is Reason.AT_EACH_CALL and "from 4 sequences on" in decision.detail
    assert not environment.guards


def test_what_is_known_of_every_length_is_decided_once():
    match, environment = dynamic()
    assert decide(match, ALWAYS).reason is Reason.LONG_ENOUGH
    loses = Options(costs={**FREE, "sparse_pair": 2e-9}, topk=0.6, topp=0.0)
    assert decide(match, loses).reason is Reason.SLOWER and decide(match, loses).limit is None
    match, environment = dynamic()
    torch._check(match.attention.keys <= 1000)
    environment.guards.clear()
    assert decide(match, Options(costs=FREE)).reason is Reason.TOO_SHORT
    assert not environment.guards


def test_a_size_that_depends_on_data_is_decided_at_each_call():
    b = Builder()
    size = b.mode.shape_env.create_unbacked_symint()
    torch._check(size >= 2)
    with b.mode:
        fake = torch.empty(1, 2, size, 4)
    x = b._note(b.graph.placeholder("x"), fake)
    match = matched(b, b.opaque(SDPA, x, x, x, value=fake))
    assert shape_of(match.attention) is None
    decision = decide(match, Options(costs=FREE))
    assert decision.reason is Reason.AT_EACH_CALL and decision.prediction is None
    assert decide(match, ALWAYS).reason is Reason.LONG_ENOUGH


def test_a_dynamic_number_of_heads_stays_dense():
    b = Builder()
    x = b.input("x", 1, 4, 6, 8, dynamic=(1,))
    assert decide(matched(b, b.call(SDPA, x, x, x)), ALWAYS).reason is Reason.HEADS


def test_deciding_only_reads():
    match = attention()
    before = [(node.target, node.args, node.kwargs) for node in match.graph_module.graph.nodes]
    decide(match, ALWAYS)
    assert [(node.target, node.args, node.kwargs) for node in match.graph_module.graph.nodes] == before
