"""The cost model: which coefficients hold for which attention, and that a limit says what the forms say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparge_compile import CostModel, Options, cost, cost_table, host
from sparge_compile.cost import Shape, cost_model

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MODEL = CostModel(1e-5, 7e-15, 3e-5, 1e-12, 1e-11, 7e-15, dense_host=2e-5, sparse_host=5e-5)


@pytest.fixture
def a_gpu(monkeypatch):
    """Coefficients of a GPU, without one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(host, "_measured", {CUDA: 1.0})


@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 60_000),
    st.integers(1, 60_000),
    st.sampled_from([64, 128]),
    st.floats(0.01, 1.0),
    st.booleans(),
    st.sampled_from([0.0, 5e-5]),
)
def test_a_limit_holds_where_sparse_attention_wins_on_the_gpu_and_on_the_host(
    batch, kv_heads, length, keys, size, density, is_causal, sparse_host
):
    model, margin = replace(MODEL, sparse_host=sparse_host), 1.1
    shape = Shape(batch, 8, kv_heads, length, keys, size, size, is_causal=is_causal)
    dense, sparse = model.dense(shape), model.sparse(shape, density)
    limit = model.limit(1024, density, margin, is_causal)
    wins = dense - margin * sparse
    if margin * sparse_host > model.dense_host:
        wins = min(wins, dense - margin * sparse_host)
    if abs(wins) > 1e-9 * dense:  # else rounding decides
        assert limit.holds(batch, 8, kv_heads, length, keys, size, size) == (keys >= 1024 and wins >= 0)
    assert len(limit.gain) == (8 if sparse_host else 4)


def test_the_diagonal_is_read_beside_what_is_kept():
    causal = Shape(1, 4, 4, 4096, 4096, 64, 64, is_causal=True)
    few, none, half = (MODEL.sparse(causal, density) for density in (0.1, 0.0, 0.5))
    assert half - few == pytest.approx(0.4 * (MODEL.sparse(causal, 1.0) - none))
    pairs_of_the_diagonal = 4 * 4096 * 128 * 64
    open_to_all = MODEL.sparse(replace(causal, is_causal=False), 0.0)
    assert none - open_to_all == pytest.approx(MODEL.sparse_pair * pairs_of_the_diagonal)


def test_a_prediction_is_the_longer_of_device_and_host():
    shape = Shape(1, 8, 8, 1024, 1024, 64, 64)
    found = MODEL.predict(shape, 0.1)
    assert found.sparse < found.sparse_host and found.dense < found.dense_host
    assert found.speedup == pytest.approx(2e-5 / 5e-5) and str(found) == "0.40x (host)"
    training = replace(MODEL, training=replace(MODEL, dense_base=1.0)).predict(shape, 0.1, trains=True)
    assert training.dense > 1 and "training" in str(training)
    assert MODEL.of(True) is MODEL, "without coefficients of its own, training is as inference"


@pytest.mark.parametrize(
    "dtype, size, kind, padding",
    [
        (torch.bfloat16, 64, ("half", 64), 1.0),
        (torch.float16, 128, ("half", 128), 1.0),
        (torch.bfloat16, 40, ("half", 64), 64 / 40),
        (torch.bfloat16, 72, ("half", 128), 128 / 72),
        (torch.bfloat16, 256, ("half", 256), 1.0),
        (torch.float32, 64, ("float32", 64), 1.0),
        (torch.float32, 200, ("float32", 128), 256 / 200),  # the nearest that there is
    ],
)
def test_dtype_and_head_size_choose_the_coefficients(a_gpu, dtype, size, kind, padding):
    found = cost_model(CUDA, dtype, size)
    forward, step = cost_table.GPU["sm90"][kind]
    assert found.dense_pair == forward[1] and found.sparse_pair == pytest.approx(forward[5] * padding)
    assert found.training.dense_base == step[0] and found.training.sparse_pair == pytest.approx(step[5] * padding)


def test_who_launches_chooses_the_time_of_the_host(a_gpu, monkeypatch):
    eager, compiled, graph = (cost_model(CUDA, launched=who) for who in ("eager", "compiled", "graph"))
    assert (compiled.dense_host, compiled.sparse_host) == cost_table.HOST["compiled"][0]
    assert (eager.training.dense_host, eager.training.sparse_host) == cost_table.HOST["eager"][1]
    assert graph.sparse_host == graph.training.dense_host == 0 and graph.sparse_pair == compiled.sparse_pair
    under = cost_model(CUDA, masked=True)
    assert under.sparse_host == compiled.sparse_host + cost_table.MASKED[0] and under.dense_host == compiled.dense_host
    assert under.training.sparse_host == compiled.training.sparse_host + cost_table.MASKED[1]
    assert cost_model(CUDA, launched="graph", masked=True).sparse_host == 0
    monkeypatch.setattr(host, "_measured", {CUDA: 2.0})
    assert cost_model(CUDA, launched="eager").sparse_host == 2 * eager.sparse_host
    assert cost_model(CPU, launched="eager").sparse_host == 0, "a CPU's own times have it"


def test_a_class_of_devices_may_be_asked_without_one():
    graph, compiled = (
        cost.class_costs("sm90", 1.0, torch.bfloat16, 128, None, who).of(True) for who in ("graph", "compiled")
    )
    assert graph.sparse_host == 0 and compiled.sparse_host == cost_table.HOST["compiled"][1][1]
    assert cost.class_costs("sm1", 1.0, torch.bfloat16, 128, None, "graph").of(True) == graph, "unmeasured"


@pytest.mark.parametrize(
    "sizes, forward, backward",
    [
        ((1, 24, 24, 4608, 4608), 1.0, 1.0),
        ((1, 8, 8, 1024, 1024), 132 / 64, 132 / 128),  # too few key blocks to split the lists
        ((1, 1, 1, 128, 1 << 17), 132 / 64, 66.0),  # 64 parts
        ((2, 33, 33, 256, 1024), 1.0, 1.0),
    ],
)
def test_few_programs_leave_multiprocessors_idle(a_gpu, sizes, forward, backward):
    shape = Shape(*sizes, 64, 64)
    assert cost.idle("sm90", shape) == pytest.approx((forward, backward))
    assert cost.idle("cpu", shape) == (1.0, 1.0)
    plain = cost_model(CUDA)
    found = plain.with_idle(CUDA, shape)
    assert found.sparse_pair == pytest.approx(forward * plain.sparse_pair)
    assert found.of(True).sparse_pair == pytest.approx(max(forward, backward) * plain.of(True).sparse_pair)
    assert found.dense_pair == plain.dense_pair


def test_an_order_of_tokens_costs_its_gathers(a_gpu):
    shape = Shape(1, 12, 6, 32760, 32760, 128, 64)
    plain = cost_model(CUDA, value_head_size=64)
    found = plain.with_gathers(CUDA, torch.bfloat16, 128, 64)
    moved = 2 * (12 + 6) * 32760 * (128 + 64) * cost_table.GATHER["sm90"]  # bytes of q, k, v and the result
    assert found.sparse(shape, 0.5) - plain.sparse(shape, 0.5) == pytest.approx(moved)
    assert found.of(True).sparse(shape, 0.5) - plain.of(True).sparse(shape, 0.5) == pytest.approx(2 * moved)
    assert found.dense(shape) == plain.dense(shape)


def test_who_launches_is_read_off_the_options():
    assert Options().launched == "compiled" and Options(inner="eager").launched == "eager"
    assert Options(inner="aot_eager").launched == "eager"
    assert Options(inductor_mode="reduce-overhead").launched == "graph"
    assert Options(inductor_mode="max-autotune-no-cudagraphs").launched == "compiled"
    assert Options(inductor={"triton.cudagraphs": True}).launched == "graph"
    assert Options(inductor_mode="reduce-overhead", inductor={"triton.cudagraphs": False}).launched == "compiled"


@pytest.mark.parametrize("seconds, slow", [(1.0, 1.0), (0.87, 1.0), (1.15, 1.0), (2.9, 2.0**1.5), (0.5, 0.5)])
def test_the_host_is_measured_once_and_rounded_coarsely(monkeypatch, seconds, slow):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(host, "time_dense_call", lambda device: asked.append(device) or seconds * host.REFERENCE)
    monkeypatch.setattr(host, "_measured", {})
    assert [host.slowness(CUDA) for _ in range(2)] == [pytest.approx(slow)] * 2 and asked == [CUDA]


def test_nothing_is_measured_while_a_cuda_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(host, "time_dense_call", lambda device: pytest.fail("measured"))
    monkeypatch.setattr(host, "_measured", {})
    assert host.slowness(CUDA) == 1.0 and not host._measured


def test_the_measurement_does_not_meet_the_modes_of_a_trace():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(x):
        assert host.time_dense_call(CPU) > 0
        return x + 1

    graph = make_fx(traced, tracing_mode="fake")(torch.ones(2)).graph
    assert sum(node.op == "call_function" for node in graph.nodes) == 1
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu"):
        assert host.time_dense_call(CPU) > 0


def test_coefficients_of_a_user_hold_for_the_host_and_for_training_too():
    six = {"dense_base": 1, "dense_pair": 2, "sparse_base": 3, "pool": 4, "select": 5, "sparse_pair": 6}
    found = Options(costs={**six, "sparse_host": 7, "training": {**six, "pool": 8}}).costs
    assert found.sparse_host == 7 and found.dense_host == 0 and found.training.pool == 8
    with pytest.raises(ValueError, match="not a set of cost coefficients"):
        Options(costs={**six, "training": {"pool": 8}})
    with pytest.raises(ValueError, match="sparse_host"):
        Options(costs={**six, "sparse_host": -1})


def test_the_tables_are_whole():
    for kinds in cost_table.GPU.values():
        for forward, step in kinds.values():
            assert len(forward) == len(step) == 6
            assert all(s >= f >= 0 for f, s in zip(forward, step, strict=True)), "a step is more than its forward"
    assert set(cost_table.HOST) == {"compiled", "eager"}
    assert cost.GPU["sm90"], "what stands for every other GPU"
    assert set(cost_table.GATHER) == set(cost_table.PROGRAMS) == set(cost_table.GPU)
    for name, key in cost_table.ESTIMATED:
        assert key in ({*cost_table.HOST, "masked"} if name == "host" else cost_table.GPU[name])
