"""find, decide and substitute on graphs of a few nodes. Each rewrite has a partner that must not be rewritten."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from helpers import rewrite_graph
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sparge_compile import Calibration, attention, explain
from sparge_compile.options import Options
from sparge_compile.passes.decide import decide, expected_density
from sparge_compile.passes.find import find
from sparge_compile.passes.match import sdpa as fused
from sparge_compile.passes.read.fx_utils import clone
from sparge_compile.report import Reason

SPARSE = Options(min_seq_len=0, on_unsupported="dense")
OP = torch.ops.sparge.attention.default


def qkv(batch=2, heads=4, length=100, keys=100, head_size=16, kv_heads=4, value_size=None, dtype=torch.float32):
    return (
        torch.randn(batch, heads, length, head_size, dtype=dtype),
        torch.randn(batch, kv_heads, keys, head_size, dtype=dtype),
        torch.randn(batch, kv_heads, keys, value_size or head_size, dtype=dtype),
    )


def rows(function, *args, options=SPARSE):
    """What explain says of a function of tensors."""
    return explain(function, options)(*args).sites


def graph_of(function, *args):
    """Dynamo's graph of a function."""
    caught = []
    torch.compile(function, backend=lambda gm, _: caught.append(gm) or gm.forward, fullgraph=True)(*args)
    return caught[0]


SPELLINGS = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "keywords": lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q),
    "mixed": lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v, dropout_p=0.0, is_causal=False),
    "torch._C": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
    "aten": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
    "aten.default": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.1),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "positional mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.ones(1, 1, 1, 100, dtype=torch.bool)
    ),
    "keyword mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(100, 100).tril() > 0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_fused_call_is_replaced(spelling):
    function, args = SPELLINGS[spelling], qkv()
    (row,) = rows(function, *args)
    assert (row.status, row.kind, row.name) == ("sparse", "sdpa", "(root)")
    compiled = torch.compile(
        function, backend="sparge", fullgraph=True, options={"min_seq_len": 0, "topk": 1.0, "inner": "eager"}
    )
    torch.testing.assert_close(compiled(*args), function(*args), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value_size", [8, 32])
def test_values_may_have_another_head_size(value_size):
    """The result lies in memory as SDPA's does: a view of it stays one."""

    def function(q, k, v):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).view(8, 100, value_size).sin()

    q, k, v = qkv(value_size=value_size)
    q = q.transpose(1, 2).contiguous()
    (row,) = rows(function, q, k, v)
    assert row.status == "sparse"
    compiled = torch.compile(
        function, backend="sparge", fullgraph=True, options={"min_seq_len": 0, "topk": 1.0, "inner": "eager"}
    )
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v), atol=1e-5, rtol=1e-5)


def _gqa(q, k, v, enable_gqa=True):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)


DENSE = {
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), {}, Reason.DROPOUT),
    "float64": (SPELLINGS["positional"], {"dtype": torch.float64}, Reason.DTYPE),
    "head size": (SPELLINGS["positional"], {"head_size": 512}, Reason.HEAD_SIZE),
    "value head size": (SPELLINGS["positional"], {"value_size": 512}, Reason.HEAD_SIZE),
    "additive mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=-torch.arange(100.0).expand(100, 100)),
        {},
        Reason.ADDITIVE_MASK,
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_what_cannot_be_replaced_stays_with_a_reason(case):
    function, shape, reason = DENSE[case]
    args = qkv(**shape)
    (row,) = rows(function, *args)
    assert (row.status, row.reason) == ("dense", reason)
    graph = clone(graph_of(function, *args))
    before = graph.code
    assert rewrite_graph(graph, SPARSE).threshold_inputs == []
    assert graph.code == before


def test_gqa_is_understood_and_stays_dense_where_heads_do_not_fit():
    assert rows(_gqa, *qkv(kv_heads=2))[0].status == "sparse"
    assert (
        rows(lambda q, k, v: _gqa(q, k, v, False), *qkv(kv_heads=1))[0].status == "sparse"
    )  # broadcast, the same thing
    assert rows(_gqa, *qkv(kv_heads=4))[0].status == "sparse"


def test_the_order_of_sites_is_the_order_of_the_graph():
    def three(q, k, v):
        a = F.scaled_dot_product_attention(q, k, v)
        b = F.scaled_dot_product_attention(a, k, v, dropout_p=0.5)
        return F.scaled_dot_product_attention(b, k, v)

    assert [(r.name, r.status) for r in rows(three, *qkv())] == [
        ("(root)", "sparse"),
        ("(root)#1", "dense"),
        ("(root)#2", "sparse"),
    ]


def test_finding_and_deciding_leave_the_graph_alone():
    graph = graph_of(SPELLINGS["causal"], *qkv())
    before = graph.code
    for match in find(graph):
        decide(match, SPARSE)
    assert graph.code == before


def test_the_rewrite_replaces_one_node_by_one_and_adds_one_input():
    graph = clone(graph_of(SPELLINGS["causal"], *qkv()))
    nodes = len(graph.graph.nodes)
    (made,) = rewrite_graph(graph, SPARSE).threshold_inputs
    thresholds = made.values
    assert thresholds.shape == (4, 2) and thresholds.dtype == torch.float32
    assert len(graph.graph.nodes) == nodes + 1
    (new,) = graph.graph.find_nodes(op="call_function", target=OP)
    assert new.kwargs["is_causal"] is True and new.args[3].op == "placeholder"
    assert new.args[3] is graph.graph.find_nodes(op="placeholder")[-1]
    assert "example_value" in new.meta and new.meta["stack_trace"]


def test_unused_in_place_nodes_survive():
    def writes(q, k, v, buffer):
        buffer.add_(1)  # its result is unused, and it is not dead
        return F.scaled_dot_product_attention(q, k, v)

    compiled = torch.compile(writes, backend="sparge", options={"min_seq_len": 0, "inner": "eager"})
    buffer = torch.zeros(3)
    compiled(*qkv(), buffer)
    assert buffer.tolist() == [1, 1, 1]


def test_attention_inside_checkpointed_code():
    def inside(q, k, v):
        return checkpoint(
            F.scaled_dot_product_attention, q, k, v, use_reentrant=False
        ) + F.scaled_dot_product_attention(q, k, v)

    q, k, v = (x.requires_grad_() for x in qkv())
    assert [r.status for r in rows(inside, q, k, v)] == ["sparse", "sparse"]
    compiled = torch.compile(
        inside, backend="sparge", fullgraph=True, options={"min_seq_len": 0, "topk": 1.0, "inner": "aot_eager"}
    )
    got, want = compiled(q, k, v), inside(q, k, v)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_attention_inside_control_flow_is_named_and_stays():
    def branches(q, k, v):
        return torch.cond(
            q.sum() > 0, lambda q, k, v: F.scaled_dot_product_attention(q, k, v), lambda q, k, v: q + 0, (q, k, v)
        )

    (row,) = rows(branches, *qkv())
    assert (row.status, row.reason) == ("dense", Reason.CONTROL_FLOW)


def test_multi_head_attention_is_opened_only_where_no_weights_are_read():
    mha = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 100, 32)
    (row,) = rows(lambda x: mha(x, x, x)[0], x)  # the weights are computed by default, but nobody reads them
    assert (row.status, row.kind) == ("sparse", "mha")
    (row,) = rows(lambda x: mha(x, x, x), x)
    assert (row.status, row.reason) == ("dense", Reason.WEIGHTS_USED)
    (row,) = rows(lambda x: mha(x, x, x, attn_mask=torch.zeros(100, 100), need_weights=False)[0], x)
    assert (row.status, row.reason) == ("dense", Reason.ADDITIVE_MASK)


def test_export_and_plain_graphs_are_understood():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model()

        def forward(self, q, k, v):
            return self.inner(q, k, v)

    (match,) = find(torch.export.export(Wrapper(), qkv()).graph_module)
    assert match.site.name == "inner" and match.site.is_causal and match.site.length == 100
    assert decide(match, SPARSE).status == "sparse"
    (match,) = find(torch.fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)))
    assert decide(match, SPARSE).reason is Reason.NO_SHAPES


def test_min_seq_len_replaces_the_cost_model():
    function, args = SPELLINGS["positional"], qkv(keys=100)
    for least, status in ((0, "sparse"), (100, "sparse"), (101, "dense")):
        (row,) = rows(function, *args, options=Options(min_seq_len=least))
        assert row.status == status and row.decision.prediction is None


def test_the_cost_model_keeps_tiny_sequences_dense_and_says_what_it_predicted():
    function, costs = SPELLINGS["positional"], {"dense_base": 0, "dense_pair": 1e-9, "sparse_base": 0}
    even, high = ({**costs, "pool": 0, "select": 0, "sparse_pair": pair} for pair in (1e-9, 2e-9))
    for keys, given, reason in (
        (1024, even, Reason.PAYS),
        (1024, high, Reason.SLOWER),
        (1023, even, Reason.TOO_SHORT),  # a text that a video attends to, whatever it would gain
    ):
        (row,) = rows(function, *qkv(length=3000, keys=keys), options=Options(costs=given))
        assert row.reason is reason
        if reason is not Reason.TOO_SHORT:
            assert row.decision.prediction.speedup == pytest.approx(1e-9 / (Options().topp * given["sparse_pair"]))


def test_expected_density_is_an_upper_bound():
    """m leading blocks of n hold at least m/n of the mass, whatever the scores are."""
    from sparge_compile.kernels.reference import select

    for spread in (0.0, 0.1, 1.0, 10.0):
        scores = spread * torch.randn(1, 2, 50, 200)
        for topk, topp in ((0.05, 0.3), (0.5, 0.7), (0.3, 0.1)):
            kept = select(scores, torch.ones(1, dtype=torch.bool), torch.tensor([[topk, topp]] * 2))
            assert kept.float().mean() <= expected_density(((topk, topp),)) + 1 / 200


def test_calibration_reaches_sites_by_name_and_pattern():
    calibration = Calibration(
        {"(root)": [(0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0)], "(root)#*": [(0.125, 0.5)]}
    )

    def two(q, k, v):
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), k, v)

    options = Options(min_seq_len=0, calibration=calibration)
    graph = clone(graph_of(two, *qkv()))
    first, second = (made.values for made in rewrite_graph(graph, options).threshold_inputs)
    assert first[:, 0].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert second.tolist() == [[0.125, 0.5]] * 4


def test_the_signature_that_binds_arguments_is_the_one_torch_has():
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    assert [a.name for a in schema.arguments] == list(fused._SIGNATURE.parameters)
    defaults = [p.default for p in fused._SIGNATURE.parameters.values()][3:]
    assert [a.default_value for a in schema.arguments][3:] == defaults


def test_shared_code_is_decided_by_its_surroundings():
    """torch.func.grad once crashed inside our autograd formula; vmap works."""
    x = torch.randn(1, 2, 64, 8)

    def square(x):
        return F.scaled_dot_product_attention(x, x, x).square().sum()

    options = {"min_seq_len": 0, "topk": 1.0, "inner": "aot_eager", "on_unsupported": "dense"}
    grad = torch.func.grad(square)
    assert [row.reason for row in rows(grad, x)] == [Reason.TRANSFORM]
    torch.testing.assert_close(torch.compile(grad, backend="sparge", options=options)(x), grad(x))

    def both(x):
        return grad(x) + F.scaled_dot_product_attention(x, x, x)

    assert [row.status for row in rows(both, x)] == ["dense", "sparse"]
    torch.testing.assert_close(torch.compile(both, backend="sparge", options=options)(x), both(x))


def test_plain_graphs_with_multi_head_attention_are_named():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(
        F.multi_head_attention_forward, (x, x, x, 32, 4, None, None, None, None, False, 0.0, x, None)
    )
    graph.output(graph.call_function(operator.getitem, (y, 0)))
    (match,) = find(torch.fx.GraphModule({}, graph))
    assert decide(match, SPARSE).reason is Reason.NO_SHAPES


def test_a_dynamic_number_of_heads_stays_dense():
    q, k, v = qkv()
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 1)
    (row,) = rows(SPELLINGS["positional"], q, k, v)
    assert (row.status, row.reason) == ("dense", Reason.HEADS)


def test_additive_masks_are_replaced_only_where_that_is_asked_for():
    """By name, because sparse attention then ranks blocks by pooled scores that include the mask."""
    q, k, v = qkv(length=300, keys=300)
    bias = torch.randn(4, 300, 300)

    def biased(q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def written_out(q, k, v, bias):
        return (q @ k.mT * 0.25 + bias).softmax(-1) @ v

    for function in (biased, written_out):
        (row,) = rows(function, q, k, v, bias)
        assert (row.status, row.reason, row.site.mask) == ("dense", Reason.ADDITIVE_MASK, "additive")
        options = {"min_seq_len": 0, "additive_masks": True, "topk": 0.3, "topp": 0.0, "inner": "eager"}
        got = torch.compile(function, backend="sparge", options=options)(q, k, v, bias)
        want = attention(q, k, v, bias, topk=0.3)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        learned = bias.clone().requires_grad_()
        (row,) = rows(function, q, k, v, learned, options={**options})
        assert row.reason is Reason.LEARNED_BIAS


def written_out(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def _checkpointed(q, k, v):
    return checkpoint(written_out, q, k, v, use_reentrant=False)


def _autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return written_out(q, k, v)


def _autocast_left_for_the_softmax(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            weights = (q.float() @ k.float().mT * 0.25).softmax(-1)
        return weights @ v


def _scores_without_gradient(q, k, v):
    with torch.no_grad():
        scores = q @ k.mT * 0.25
    return scores.softmax(-1) @ v


def _twice_around_a_break(q, k, v):
    x = written_out(q, k, v)
    torch._dynamo.graph_break()
    return written_out(x, k, v)


SURROUNDINGS = {
    _checkpointed: [Reason.LONG_ENOUGH],
    _autocast: [Reason.LONG_ENOUGH],
    _autocast_left_for_the_softmax: [Reason.CONTEXT],
    _scores_without_gradient: [Reason.CONTEXT],
    _twice_around_a_break: [Reason.LONG_ENOUGH] * 2,
}


@pytest.mark.parametrize("function", SURROUNDINGS, ids=lambda f: f.__name__)
def test_the_surroundings_of_attention_written_out(function):
    args = [x.requires_grad_() for x in qkv()]
    assert [row.reason for row in rows(function, *args)] == SURROUNDINGS[function]
    options = {"min_seq_len": 0, "topk": 1.0, "inner": "aot_eager", "on_unsupported": "dense"}
    got, want = torch.compile(function, backend="sparge", options=options)(*args), function(*args)
    assert got.dtype == want.dtype
    bound = 1e-5 if want.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=bound, rtol=bound)
    if want.requires_grad:
        grads = [torch.autograd.grad(x.sum(), args, materialize_grads=True) for x in (got, want)]
        torch.testing.assert_close(*grads, atol=10 * bound, rtol=10 * bound)


def test_operands_are_read_on_their_device():
    """A copy from another device was once seen through, as a copy in another layout is."""
    graph, nodes = torch.fx.Graph(), {}
    with FakeTensorMode():
        for name in ("q", "k", "v"):
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = torch.empty(1, 2, 100, 16, device="cuda" if name == "q" else "cpu")
        for name in ("k", "v"):
            nodes[name] = graph.call_function(torch.ops.aten._to_copy.default, (nodes[name],), {"device": "cuda"})
            nodes[name].meta["val"] = torch.empty(1, 2, 100, 16, device="cuda")
        call = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, tuple(nodes.values()))
        call.meta["val"] = torch.empty(1, 2, 100, 16, device="cuda")
    graph.output(call)
    (match,) = find(torch.fx.GraphModule({}, graph))
    operands = (match.attention.query, match.attention.key, match.attention.value)
    assert [operand.node for operand in operands] == list(nodes.values())


def test_masks_of_long_histories_are_given_up_in_time():
    """As a sum it was read to the end of Python's stack, as a square twice at each step."""

    def long_sum(q, mask):
        for _ in range(300):
            mask = mask + 1.0
        return (q @ q.mT).masked_fill(mask > 400, -1e9).softmax(-1) @ q

    def squares(q, mask):
        for _ in range(60):
            mask = mask * mask
        return (q @ q.mT).masked_fill(mask > 1, -1e9).softmax(-1) @ q

    for function in (long_sum, squares):
        (row,) = rows(function, torch.randn(1, 2, 16, 8), torch.rand(16, 16))
        assert (row.status, row.site.mask) == ("sparse", "bool")


def test_attention_written_out_in_inference_mode():
    q, k, v = qkv()
    compiled = torch.compile(
        written_out, backend="sparge", options={"min_seq_len": 0, "topk": 1.0, "inner": "aot_eager"}
    )
    with torch.inference_mode():
        torch.testing.assert_close(compiled(q, k, v), written_out(q, k, v), atol=1e-5, rtol=1e-5)
