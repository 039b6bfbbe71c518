"""Other front doors than torch.compile: exported programs and FX graphs, rewritten, saved, trained, compiled."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map
from toys import Bare, Stack

from sparge_compile import Calibration, Options, attach, attention, explain, rewrite
from sparge_compile.report import Reason

EXACT = {"min_seq_len": 0, "topk": 1.0, "topp": 0.0}
SPARSE = {**EXACT, "topk": 0.2}
OP = torch.ops.sparge.attention.default
LENGTH = 300


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.norm = nn.LayerNorm(32)
        self.register_buffer("gate", torch.ones(32), persistent=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(x + out * self.gate)


class Model(Stack):
    def __init__(self):
        super().__init__(2, Block)


def export(model, *args, **how):
    return torch.export.export(model, args, **how)


def exported(model, *args):
    return export(model, *args).module()


def pre_dispatch(model, *args):
    return make_fx(model, pre_dispatch=True)(*args)


def lowered(model, *args):
    return make_fx(model)(*args)


def dynamo(model, *args):
    caught = []
    torch.compile(model, backend=lambda graph, _: caught.append(graph) or graph.forward)(*args)
    return caught[0]


def traced(model, *args):
    return torch.fx.symbolic_trace(model)


def report_of(graph):
    return getattr(graph, "graph_module", graph).meta["sparge_report"]


def ops_in(graph):
    return [node for node in graph.graph.nodes if node.target is OP]


def near(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def sparse_model(model, x):
    """What the model gives with sparse attention, by the op as a function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attention(q, k, v, topk=0.2, topp=0.0))
        return model(x)


TRACERS = {
    "module": (exported, ["blocks.0", "blocks.1"]),
    "pre_dispatch": (pre_dispatch, ["(root)", "(root)#1"]),
    "lowered": (lowered, ["(root)", "(root)#1"]),
    "symbolic_trace": (traced, ["blocks.0", "blocks.1"]),
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_graphs_of_every_tracer(tracer):
    """The result is a copy of the same class that gives what the model gives with the op in it."""
    trace, names = TRACERS[tracer]
    model, x = Model(), torch.randn(2, LENGTH, 32)
    graph = trace(model, x)
    before, state = graph.code, set(graph.state_dict())
    given = {"example_inputs": (x,)} if trace is traced else {}
    new = rewrite(graph, SPARSE, **given)
    assert [(row.name, row.status) for row in report_of(new)] == [(name, "sparse") for name in names]
    assert len(ops_in(new)) == 2 and "scaled_dot_product" not in new.code
    assert type(new).__mro__[1] is type(graph).__mro__[1] and new is not graph
    assert graph.code == before and set(graph.state_dict()) == state
    buffers = {name for name in new.state_dict() if name.startswith("sparge_thresholds.")}
    assert len(buffers) == 2 and set(new.state_dict()) - buffers == state
    assert all(new.state_dict()[name].shape == (4, 2) for name in buffers)
    near(new(x), sparse_model(model, x))
    assert (new(x) - model(x)).abs().max() > 1e-3
    near(rewrite(graph, EXACT, **given)(x), model(x))


@pytest.mark.parametrize("tracer", TRACERS)
def test_graphs_whose_sites_stay_dense_are_copied_as_they_are(tracer):
    trace, _ = TRACERS[tracer]
    model, x = Model(), torch.randn(2, LENGTH, 32)
    graph = trace(model, x)
    given = {"example_inputs": (x,)} if trace is traced else {}
    new = rewrite(graph, {**EXACT, "min_seq_len": LENGTH + 1}, **given)
    assert {row.reason for row in report_of(new)} == {Reason.TOO_SHORT}
    assert new.code == graph.code and set(new.state_dict()) == set(graph.state_dict())
    near(new(x), model(x))


@pytest.mark.parametrize("tracer", ["module", "symbolic_trace", "pre_dispatch"])
def test_rewritten_modules_are_copied_moved_and_compiled(tracer):
    trace, _ = TRACERS[tracer]
    model, x = Model(), torch.randn(2, LENGTH, 32)
    new = rewrite(trace(model, x), SPARSE, **({"example_inputs": (x,)} if trace is traced else {}))
    want = new(x)
    copies = [copy.deepcopy(new), new.to("cpu")]
    if trace is not exported:  # torch's own cannot be pickled: their hooks are lambdas
        copies.append(pickle.loads(pickle.dumps(new)))
    for other in copies:
        assert set(other.state_dict()) == set(new.state_dict())
        near(other(x), want)
    compiled = dynamo(new, x)
    assert len(ops_in(compiled)) == 2
    near(torch.compile(new, backend="aot_eager", fullgraph=True)(x), want)


def test_inductor_compiles_a_rewritten_module():
    qkv = torch.randn(3, 1, 4, LENGTH, 8)
    new = rewrite(exported(Bare(), *qkv), SPARSE)
    near(torch.compile(new)(*qkv), new(*qkv))


@pytest.mark.skipif(
    not hasattr(getattr(torch.compiler, "precompile", None), "capture"), reason="torch captures nothing ahead of time"
)
def test_a_rewritten_module_is_precompiled(tmp_path):
    """torch takes no backend but its own there; the op goes through them."""

    def run(model, x):
        return model(x)

    model, x = Model().requires_grad_(False), torch.randn(2, LENGTH, 32)
    new = rewrite(exported(model, x), SPARSE)
    paths = {"artifact_path": tmp_path / "model.py", "cache_path": tmp_path / "model.cache"}
    with torch.compiler.precompile.capture(run, backend="eager", **paths) as captured:
        near(captured(new, x), new(x))
    near(torch.compiler.precompile.load(*paths.values())(new, x), new(x))
    with pytest.raises(ValueError, match="sparge"), torch.compiler.precompile.capture(run, backend="sparge", **paths):
        pass


def test_a_rewritten_module_in_lower_precision():
    """The thresholds are buffers, and are cast with the module."""
    model, x = Model(), torch.randn(2, LENGTH, 32)
    new = rewrite(traced(model), {**EXACT, "topk": 0.25}, example_inputs=(x,)).to(torch.bfloat16)
    assert new.sparge_thresholds.blocks_0.dtype == torch.bfloat16
    assert new(x.bfloat16()).dtype == torch.bfloat16


def test_thresholds_are_run_time_tensors():
    model, x = Model(), torch.randn(2, LENGTH, 32)
    new = rewrite(exported(model, x), SPARSE)
    new.sparge_thresholds.blocks_0[:, 0] = 1.0
    assert (new(x) - model(x)).abs().max() > 1e-3
    new.sparge_thresholds.blocks_1[:, 0] = 1.0
    near(new(x), model(x))


class Masked(Model):
    """Under a mask, a causal one, or none."""

    def forward(self, x, mask=None, is_causal=False):
        for block in self.blocks:
            q, k, v = block.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
            x = x + out.transpose(1, 2).flatten(2)
        return x


def empty_rows(mask):
    """A mask in which the first queries see no key."""
    return torch.cat([torch.full_like(mask[:3], 0 if mask.dtype == torch.bool else -torch.inf), mask[3:]])


PAIRS = torch.arange(LENGTH)[:, None] * 7 % 11 < torch.arange(LENGTH) % 13
MASKS = {
    "no mask": {},
    "boolean": {"mask": PAIRS},
    "boolean, empty rows": {"mask": empty_rows(PAIRS)},
    "padding": {"mask": torch.arange(LENGTH).expand(2, 1, 1, -1) < 200},
    "no key at all": {"mask": torch.arange(2).view(2, 1, 1, 1).expand(2, 1, 1, LENGTH) > 0},
    "additive": {"mask": torch.zeros(LENGTH, LENGTH).masked_fill(PAIRS, -0.5)},
    "additive, empty rows": {"mask": empty_rows(torch.zeros(LENGTH, LENGTH).masked_fill(PAIRS, -torch.inf))},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("case", MASKS)
def test_decomposed_programs_are_rewritten_too(case):
    """torch decomposes SDPA into a softmax that gives 0 to queries that see no key: the sparse op gives the same."""
    model, x, how = Masked(), torch.randn(2, LENGTH, 32), MASKS[case]
    program = torch.export.export(model, (x,), how).run_decompositions()
    assert "scaled_dot_product" not in str(program.graph)
    options = {**EXACT, "additive_masks": True, "on_unsupported": "error"}
    new = rewrite(program, options)
    assert [row.status for row in report_of(new)] == ["sparse"] * 2 and "softmax" not in str(new.graph)
    outputs, grads = [], []
    for module in (new.module(), model):
        outputs.append(module(x, **how))
        weight = dict(module.named_parameters())["blocks.0.qkv.weight"]
        grads += torch.autograd.grad(outputs[-1].square().sum(), weight)
    near(*outputs)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softmax_in_float32_is_found_behind_the_assertions_of_export(dtype, decomposed):
    """torch.export puts one before each cast, and so a reader of the scores and of the weights: they once stayed."""

    class Upcast(nn.Module):
        def forward(self, q, k, v):
            return ((q @ k.mT).float() * 0.3).softmax(-1, torch.float32).to(q.dtype) @ v

    q, k, v = (torch.randn(2, 4, LENGTH, 16, dtype=dtype) for _ in range(3))
    program = export(Upcast(), q, k, v)
    assert "_assert_tensor_metadata" in str(program.graph)
    new = rewrite(program.run_decompositions() if decomposed else program, {**EXACT, "on_unsupported": "error"})
    assert [row.status for row in report_of(new)] == ["sparse"]
    assert not any(name in str(new.graph) for name in ("softmax", "_assert_tensor_metadata"))
    want = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(new.module()(q, k, v), want, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=0)


def test_a_decomposed_program_of_any_length():
    model, x = Model(), torch.randn(2, LENGTH, 32)
    length = torch.export.Dim("length", min=200, max=4000)
    program = export(model, x, dynamic_shapes={"x": {1: length}}).run_decompositions()
    module = rewrite(program, SPARSE).module()
    for size in (200, 777):
        near(module(y := torch.randn(2, size, 32)), sparse_model(model, y))


def test_names_of_an_exported_program_are_those_of_torch_compile():
    model, x = (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 2),
        torch.randn(2, 90, 32),
    )
    for case, args in ((Model(), x), (model, x), (model.eval(), x)):
        with torch.set_grad_enabled(case.training):
            names = [row.name for row in explain(case, EXACT)(args)]
            assert [row.name for row in report_of(rewrite(export(case, args), EXACT))] == names
            assert len(names) == 2


def test_an_exported_program_is_saved_loaded_run_and_trained():
    model, x = Model(), torch.randn(2, LENGTH, 32)
    program = export(model, x)
    before = str(program)
    new = rewrite(program, SPARSE)
    assert str(program) == before
    assert set(new.state_dict) - set(program.state_dict) == {"sparge_thresholds.blocks_0", "sparge_thresholds.blocks_1"}
    assert list(new.graph_signature.buffers[-2:]) == ["sparge_thresholds.blocks_0", "sparge_thresholds.blocks_1"]
    assert new.graph_signature.non_persistent_buffers == program.graph_signature.non_persistent_buffers
    want = sparse_model(model, x)
    file = io.BytesIO()
    torch.export.save(new, file)
    file.seek(0)
    for program in (new, torch.export.load(file), new.run_decompositions(), copy.deepcopy(new)):
        module = program.module()
        near(module(x), want)
        assert torch.equal(module.sparge_thresholds.blocks_1, torch.tensor([[0.2, 0.0]] * 4))
    module = new.module()
    weights = [dict(m.named_parameters())["blocks.0.qkv.weight"] for m in (module, model)]
    got = torch.autograd.grad(module(x).square().sum(), weights[0])
    near(got, torch.autograd.grad(sparse_model(model, x).square().sum(), weights[1]))


def test_dynamic_shapes_stay_dynamic():
    model, x = Model(), torch.randn(2, LENGTH, 32)
    length = torch.export.Dim("length", min=200, max=4000)
    program = export(model, x, dynamic_shapes={"x": {1: length}})
    new = rewrite(program, EXACT)
    assert str(new.range_constraints) == str(program.range_constraints)
    assert [row.site.length for row in report_of(new)] == [row.site.keys for row in report_of(new)] != [LENGTH] * 2
    for module in (new.module(), new.run_decompositions().module()):
        for size in (200, 777):
            y = torch.randn(2, size, 32)
            near(module(y), model(y))
        with pytest.raises(AssertionError, match="Guard failed"):
            module(torch.randn(2, 100, 32))


class Outer(nn.Module):
    """Attention is the output itself, below a module whose signature is kept, under no_grad and under autocast."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, q):
        with torch.no_grad():
            first = F.scaled_dot_product_attention(q, q, q)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second = F.scaled_dot_product_attention(first, q, q)
        return self.inner(q), first, second


class Inner(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q)


def test_outputs_preserved_modules_and_nested_graphs():
    q = torch.randn(1, 2, LENGTH, 8)
    program = export(Outer(), q, preserve_module_call_signature=("inner",))
    new = rewrite(program, EXACT)
    assert [(row.name, row.status) for row in report_of(new)] == [
        ("(root)", "sparse"),
        ("(root)#1", "sparse"),
        ("inner", "sparse"),
    ]
    assert new.graph_signature.user_outputs[0] == ops_in(new)[0].name
    for module in (new.module(), torch.export.unflatten(new)):
        for got, want in zip(module(q), Outer()(q), strict=True):
            torch.testing.assert_close(got, want, atol=1e-2 if want.dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_a_dynamo_graph_inside_a_backend_of_ones_own():
    model, x = Model(), torch.randn(2, LENGTH, 32)
    seen = []

    def backend(graph, inputs):
        seen.append(rewrite(graph, SPARSE))
        return compile_fx(seen[0], inputs)

    near(torch.compile(model, backend=backend, fullgraph=True)(x), sparse_model(model, x))
    assert len(ops_in(seen[0])) == 2


def test_without_shapes_all_stays_and_the_report_says_what_to_do():
    graph = traced(Model())
    new = rewrite(graph, {**SPARSE, "on_unsupported": "dense"})
    assert {(row.status, row.reason) for row in report_of(new)} == {("dense", Reason.NO_SHAPES)}
    assert "example_inputs" in str(report_of(new)) and new.code == graph.code


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, inputs):
        q = self.norm(inputs["q"].flatten(2)).unflatten(-1, (LENGTH, 8))
        return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("fake", [True, False])
def test_shapes_are_propagated_without_a_trace(fake):
    """Layers that write to their buffers once counted the batch that only had a shape."""
    model = Normed()
    graph, inputs = traced(model), ({"q": torch.randn(3, 2, LENGTH, 8)},)
    examples = tree_map(FakeTensorMode().from_tensor, inputs) if fake else inputs
    new = rewrite(graph, EXACT, example_inputs=examples)
    assert [row.status for row in report_of(new)] == ["sparse"]
    assert model.norm.num_batches_tracked == 0 and model.norm.running_mean.abs().max() == 0
    assert not any("val" in node.meta for node in graph.graph.nodes)
    near(new.eval()(*inputs), model.eval()(*inputs))


class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(32, 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 2)
        self.read = nn.MultiheadAttention(32, 4, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True)

    def forward(self, x):
        y = self.encoder(self.first(x, x, x)[0])
        y, weights = self.read(y, y, y)
        return self.decoder(y, x), weights


OPENED = ["first", "encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
DECODER = ["decoder.self_attn", "decoder.multihead_attn"]


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_leaves_of_symbolic_trace_are_opened(training):
    model, x = Leaves().train(training), torch.randn(2, LENGTH, 32)
    graph = traced(model)
    new = rewrite(graph, EXACT, example_inputs=(x,))
    rows = {row.name: row for row in report_of(new)}
    assert list(rows) == [*OPENED, "read", *DECODER]
    assert rows.pop("read").reason is Reason.WEIGHTS_USED
    assert {row.status for row in rows.values()} == {"sparse"}
    assert [node.target for node in new.graph.nodes if node.op == "call_module"] == ["read"]
    assert [row.name for row in explain(model, {**EXACT, "on_unsupported": "dense"})(x)] == [
        row.name for row in report_of(new)
    ]
    for y in (x, torch.randn(3, 411, 32)):  # the example's sizes are no others' sizes
        for got, want in zip(new(y), model(y), strict=True):
            near(got, want)
    assert set(new.state_dict()) - set(graph.state_dict()) == {
        f"sparge_thresholds.{name.replace('.', '_')}" for name in (*OPENED, *DECODER)
    }
    near(pickle.loads(pickle.dumps(new))(x)[0], new(x)[0])


def test_leaves_stay_whole_where_nothing_in_them_becomes_sparse():
    model, x = Leaves(), torch.randn(2, LENGTH, 32)
    graph = traced(model)
    names = ("dense_base", "dense_pair", "sparse_base", "pool", "select", "sparse_pair")
    never = {**EXACT, "min_seq_len": None, "costs": {**dict.fromkeys(names, 0.0), "sparse_base": 1.0}}
    none = rewrite(graph, never, example_inputs=(x,))
    assert none.code == graph.code and {row.status for row in report_of(none)} == {"dense"}
    unknown = rewrite(graph, {**EXACT, "on_unsupported": "dense"})
    assert [(row.name, row.reason) for row in report_of(unknown)] == [
        ("first", Reason.NO_SHAPES),
        ("encoder", Reason.NO_SHAPES),
        ("read", Reason.WEIGHTS_USED),
        ("decoder", Reason.NO_SHAPES),
    ]


class Functional(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(32, 4)

    def forward(self, x):
        projections = self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0
        out = self.out_proj.weight, self.out_proj.bias
        return F.multi_head_attention_forward(x, x, x, 32, 4, *projections, *out, need_weights=False)[0]


class Undecided(nn.Module):
    """A decoder that asks at run time whether its mask is causal, and attention before it."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True), 1)

    def forward(self, x, mask):
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return self.decoder(x, x, tgt_mask=mask)


def test_shapes_are_known_up_to_what_depends_on_data():
    x, mask = torch.randn(2, LENGTH, 32), torch.ones(LENGTH, LENGTH).triu(1) > 0
    graph = traced(Undecided())
    new = rewrite(graph, {**EXACT, "on_unsupported": "dense"}, example_inputs=(x, mask))
    assert [(row.name, row.reason) for row in report_of(new)] == [
        ("(root)", Reason.LONG_ENOUGH),
        ("decoder", Reason.NO_SHAPES),
    ]
    near(new(x, mask), graph(x, mask))


def test_multi_head_attention_as_a_function_keeps_to_no_example():
    """Opened with an example's sizes, a later batch of other sizes would be folded wrongly."""
    model = Functional()
    x = torch.randn(LENGTH, 2, 32)
    new = rewrite(traced(model), EXACT, example_inputs=(x,))
    assert len(ops_in(new)) == 1
    for y in (x, torch.randn(150, 4, 32), torch.randn(77, 3, 32)):
        near(new(y), model(y))


KERNELS = {
    "flash_for_cpu": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True),
    "flash_for_cpu scale": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, scale=0.1
    ),
    "math": lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, True, scale=0.1),
    "overrideable": lambda q, k, v: torch.ops.aten._scaled_dot_product_fused_attention_overrideable(q, k, v),
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.1),
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=0.1),
    "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True),
}


def kernel_graph(call, outputs):
    """A graph of one call of an SDPA kernel that this machine need not have."""
    shape = (1, 2, LENGTH, 8)
    graph = torch.fx.Graph()
    with FakeTensorMode():
        fakes = [torch.empty(shape) for _ in range(3)]
        lse = torch.empty(shape[:3])
    inputs = [graph.placeholder(name) for name in "qkv"]
    for node, fake in zip(inputs, fakes, strict=True):
        node.meta["val"] = fake
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    packet = call(*(torch.fx.Proxy(node, tracer) for node in inputs)).node
    packet.target = packet.target.default
    packet.meta["val"] = (fakes[0], lse)
    reads = [graph.call_function(operator.getitem, (packet, i)) for i in (0, 1)]
    graph.output(tuple(reads[i] for i in outputs))
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lowered_kernels_mean_what_sdpa_means(kernel):
    graph = kernel_graph(KERNELS[kernel], [0])
    new = rewrite(graph, EXACT)
    (op,) = ops_in(new)
    causal, scale = kernel in ("flash_for_cpu", "math", "flash", "cudnn"), None
    if kernel in ("flash_for_cpu scale", "math", "flash", "efficient"):
        scale = 0.1
    assert (op.kwargs["is_causal"], op.kwargs["scale"], op.kwargs["attn_mask"]) == (causal, scale, None)
    q, k, v = (torch.randn(1, 2, LENGTH, 8) for _ in range(3))
    near(new(q, k, v)[0], F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale))


@pytest.mark.parametrize("kernel", KERNELS)
def test_lowered_kernels_stay_where_the_log_sum_exp_is_read(kernel):
    graph = kernel_graph(KERNELS[kernel], [0, 1])
    new = rewrite(graph, {**EXACT, "on_unsupported": "dense"})
    assert [row.reason for row in report_of(new)] == [Reason.OUTPUTS_USED]
    assert new.code == graph.code


def test_a_traced_backward_keeps_its_forward():
    def step(q):
        q = q.detach().requires_grad_()
        return torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).square().sum(), q)[0]

    q = torch.randn(1, 2, LENGTH, 8)
    new = rewrite(make_fx(step)(q), {**EXACT, "on_unsupported": "dense"})
    assert [row.reason for row in report_of(new)] == [Reason.OUTPUTS_USED]
    near(new(q), step(q))


def test_a_graph_can_be_rewritten_twice():
    """The second time nothing is left to do, or what was dense before: buffers get names of their own."""

    def two(q, long):
        return F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(long, long, long)

    args = torch.randn(1, 2, 100, 8), torch.randn(1, 2, LENGTH, 8)
    first = rewrite(pre_dispatch(two, *args), {**EXACT, "min_seq_len": 200})
    assert [row.status for row in report_of(first)] == ["dense", "sparse"]
    second = rewrite(first, EXACT)
    assert [row.status for row in report_of(second)] == ["sparse"] and len(ops_in(second)) == 2
    assert [len(module.state_dict()) for module in (first, second)] == [1, 2]
    for got, want in zip(second(*args), two(*args), strict=True):
        near(got, want)


def test_options_that_have_no_meaning_are_refused():
    graph = traced(Inner())
    for name, value in (("inner", "eager"), ("inductor", {}), ("inductor_mode", "default")):
        with pytest.raises(ValueError, match=f"mean nothing to rewrite.*'{name}'"):
            rewrite(graph, {name: value})
    with pytest.raises(ValueError, match="'inner'"):
        rewrite(graph, Options(inner="eager"))
    with pytest.raises(ValueError, match="unknown option"):
        rewrite(graph, {"tpok": 1})
    with pytest.raises(TypeError, match=r"not a graph.*Inner"):
        rewrite(Inner())
    q = torch.randn(1, 2, LENGTH, 8)
    with pytest.raises(ValueError, match="example_inputs"):
        rewrite(export(Inner(), q), example_inputs=(q,))


def test_on_unsupported_is_obeyed():
    graph = make_fx(lambda q: F.scaled_dot_product_attention(q, q, q), pre_dispatch=True)(
        torch.randn(1, 2, 64, 8).double()
    )
    with pytest.warns(UserWarning, match="stays dense"):
        rewrite(graph, {"min_seq_len": 0})
    with pytest.raises(ValueError, match="cannot be replaced"):
        rewrite(graph, {"min_seq_len": 0, "on_unsupported": "error"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewrite(graph, {"on_unsupported": "dense"})


class Builtins(Block):
    """Inputs named as Python's own functions, or as what a rewrite adds."""

    def forward(self, input, id, sparge_thresholds_0, filter=None):
        return super().forward(input) + id + sparge_thresholds_0 + (0 if filter is None else filter)


def test_inputs_may_have_any_name():
    """torch.export calls an input as the model does; a copy of the graph once called it otherwise."""
    args = tuple(torch.randn(2, LENGTH, 32) for _ in range(4))
    model = Builtins()
    for options in (EXACT, {**EXACT, "min_seq_len": LENGTH + 1}):
        program = export(model, *args)
        new = rewrite(program, options)
        assert new.graph_signature.user_inputs == program.graph_signature.user_inputs
        near(new.module()(*args), model(*args))
        near(rewrite(program.module(), options)(*args), model(*args))
    near(rewrite(traced(model), EXACT, example_inputs=args)(*args), model(*args))


class Taken(Block):
    """A model whose own tensor or module has the name of the module that holds our buffers."""

    def __init__(self, held):
        super().__init__()
        self.sparge_thresholds = held

    def forward(self, x):
        bias = self.sparge_thresholds
        return super().forward(bias(x) if isinstance(bias, nn.Module) else x + bias)


@pytest.mark.parametrize("held", [nn.Parameter(torch.randn(32)), nn.Linear(32, 32)], ids=["parameter", "module"])
@pytest.mark.parametrize("trace", [exported, traced, export])
def test_names_of_the_model_stay_its_own(held, trace):
    model, x = Taken(held), torch.randn(2, LENGTH, 32)
    graph = trace(model, x)
    new = rewrite(graph, EXACT, **({"example_inputs": (x,)} if trace is traced else {}))
    given, made = (getattr(g, "module", lambda g=g: g)() for g in (graph, new))
    assert len(made.state_dict()) == len(given.state_dict()) + 1 and set(given.state_dict()) < set(made.state_dict())
    near(made(x), model(x))


def sdpa_kept(program):
    """Decomposed as for a compiler that has attention of its own."""
    table = torch.export.default_decompositions()
    return program.run_decompositions({op: how for op, how in table.items() if "scaled_dot_product" not in str(op)})


ATTACHED = {
    "program": export,
    "strict": lambda *args: export(*args, strict=True),
    "module": exported,
    "decomposed": lambda *args: sdpa_kept(export(*args)),
    "decomposed module": lambda *args: sdpa_kept(export(*args)).module(),
}


@pytest.mark.parametrize("how", ATTACHED)
def test_attached_thresholds_travel_with_an_exported_model(how):
    """They are the buffers that attach made, in a graph without markers too, and may be changed at run time."""
    model, x = Model().requires_grad_(False), torch.randn(2, LENGTH, 32)
    pairs = {"blocks.0": [(0.3, 0.0)], "blocks.1": [(0.1 * i, 0.0) for i in range(1, 5)]}
    attach(model, Calibration(pairs))
    new = rewrite(ATTACHED[how](model, x), SPARSE)
    assert [(row.status, "attached" in row.decision.detail) for row in report_of(new)] == [("sparse", True)] * 2
    module = getattr(new, "module", lambda: new)()
    assert set(module.state_dict()) == set(model.state_dict())
    assert not [node for node in module.graph.nodes if "mark" in str(node.target)]
    near(module(x), torch.compile(model, backend="sparge", options={"min_seq_len": 0, "inner": "eager"})(x))
    for i in (0, 1):
        module.get_buffer(f"blocks.{i}.sparge.thresholds")[:, 0] = 1.0
    near(module(x), model(x))


class ByName(Model):
    def forward(self, x):
        for block in self.blocks:
            x = block(x=x)
        return x


def test_attached_thresholds_travel_through_symbolic_trace():
    model, x = Model().requires_grad_(False), torch.randn(2, LENGTH, 32)
    attach(model, Calibration({"blocks.0": [(0.3, 0.0)], "blocks.1": [(0.1 * i, 0.0) for i in range(1, 5)]}))
    graph = traced(model)
    assert set(model.state_dict()) <= set(graph.state_dict())
    near(graph(x), model(x))
    new = rewrite(graph, SPARSE, example_inputs=(x,))
    assert ["attached" in row.decision.detail for row in report_of(new)] == [True] * 2
    near(new(x), torch.compile(model, backend="sparge", options={"min_seq_len": 0, "inner": "eager"})(x))
    new.get_buffer("blocks.0.sparge.thresholds")[:, 0] = 1.0
    new.get_buffer("blocks.1.sparge.thresholds")[:, 0] = 1.0
    near(new(x), model(x))


def test_attached_thresholds_that_symbolic_trace_cannot_see_are_warned_of():
    model, x = ByName(), torch.randn(2, LENGTH, 32)
    attach(model, Calibration({"blocks.1": [(0.3, 0.0)]}))
    with pytest.warns(UserWarning, match="symbolic_trace does not see the attached thresholds"):
        traced(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_fx(model, pre_dispatch=True)(x)
        model(x)


def test_attached_thresholds_for_some_sites():
    model, x = Model(), torch.randn(2, LENGTH, 32)
    attach(model, Calibration({"blocks.1": [(1.0, 0.0)]}))
    new = rewrite(export(model, x), EXACT)
    assert set(new.state_dict) - set(model.state_dict()) == {"sparge_thresholds.blocks_0"}
    near(new.module()(x), model(x))


@pytest.mark.slow
def test_aot_inductor_packages_a_rewritten_program(tmp_path):
    """It loads in a process that has the ops, with thresholds that can still be changed, and in no other."""
    model, x = Model().requires_grad_(False), torch.randn(2, LENGTH, 32)
    program = export(model, x, dynamic_shapes={"x": {1: torch.export.Dim("length", min=200, max=4000)}})
    new = rewrite(program, SPARSE)
    package = torch._inductor.aoti_compile_and_package(new, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for y in (x, torch.randn(2, 411, 32)):
        near(loaded(y), new.module()(y))
    dense = {f"sparge_thresholds.blocks_{i}": torch.tensor([[1.0, 0.0]] * 4) for i in (0, 1)}
    loaded.load_constants(dense, check_full_update=False)
    near(loaded(x), model(x))
    load = f"import torch\ntorch._inductor.aoti_load_package({package!r})"
    for first, fine in (("import sparge_compile.ops", True), ("", False)):
        done = subprocess.run([sys.executable, "-c", f"{first}\n{load}"], capture_output=True, text=True)
        assert (done.returncode == 0) == fine and ("Could not find schema for sparge" in done.stderr) != fine


@pytest.mark.parametrize("trace", [lambda model, x: torch.export.export(model, (x,)), None], ids=["program", "module"])
@pytest.mark.parametrize(
    ("options", "missed"),
    [
        ({"calibration": Calibration({"bloks.*": [(0.1, 0.0)]})}, "gave for 'bloks.*'"),
        ({"dense_layers": ["bloks.0", "blocks.1"]}, "'dense_layers' names 'bloks.0'"),
        ({"calibration": Calibration({"*": [(0.1, 0.0)]}), "dense_layers": 1}, None),
    ],
)
def test_names_that_fit_no_site_of_the_graph_are_told_of(trace, options, missed):
    model, x = Stack(2), torch.randn(1, 300, 32)
    given = trace(model, x) if trace else torch.export.export(model, (x,)).module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rewrite(given, {"min_seq_len": 0, **options})
    texts = [str(w.message) for w in caught if "in the graph that was given" in str(w.message)]
    assert len(texts) == (missed is not None)
    assert all(missed in text and "near are 'blocks." in text for text in texts)


def test_dense_steps_are_refused():
    """A graph is not told which step it is: it would be sparse in all of them."""
    program = torch.export.export(Stack(1), (torch.randn(1, 300, 32),))
    with pytest.raises(ValueError, match=r"means nothing to rewrite: got dense_steps=2"):
        rewrite(program, {"min_seq_len": 0, "dense_steps": 2})
