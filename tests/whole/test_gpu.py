"""The op and the backend on a GPU: opcheck, no synchronisation, CUDA graphs, models. Kernels: test_kernels_gpu.py."""

from __future__ import annotations

import pytest
import spellings_heads  # noqa: F401  importing it registers its spellings
import spellings_masks  # noqa: F401
import spellings_scores  # noqa: F401
import spellings_softmax  # noqa: F401
import torch
import torch.nn.functional as F
from spelling import SPELLINGS
from torch.library import opcheck

from sparge_compile import Calibration, attention, explain, host, sums
from sparge_compile.kernels import reference
from sparge_compile.passes import pipeline
from sparge_compile.passes.write import few_keys
from sparge_compile.report import Reason

pytestmark = pytest.mark.gpu
sparge = torch.ops.sparge


def qkv(heads=4, kv_heads=4, length=700, keys=700, head_size=64, dtype=torch.bfloat16, grad=False):
    """Projections as models make them: [B, L, H, D] memory seen as [B, H, L, D]."""
    shapes = [(2, length, heads, head_size)] + 2 * [(2, keys, kv_heads, head_size)]
    return [torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2).detach().requires_grad_(grad) for s in shapes]


def thresholds(heads=4, topk=0.3, topp=0.2):
    return torch.tensor([[topk, topp]] * heads, device="cuda")


def key_mask(keys=700):
    return torch.arange(keys, device="cuda").view(1, 1, 1, -1) < torch.tensor([keys, 333], device="cuda").view(
        -1, 1, 1, 1
    )


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (False, True)])
def test_opcheck(causal, masked):
    q, k, v = qkv(kv_heads=2)
    how = (key_mask() if masked else None, causal, 0.125)
    opcheck(sparge.block_map.default, (q, k, thresholds(), *how))
    lists = sparge.block_map(q, k, thresholds(), *how)
    opcheck(sparge.pack.default, lists, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    opcheck(sparge.forward.default, (*[x.requires_grad_() for x in (q, k, v)], *lists, *how))
    with torch.no_grad():
        out, lse = sparge.forward(q, k, v, *lists, *how)
        bits = sparge.pack(*lists)
    detached = [x.detach() for x in (torch.randn_like(out), q, k, v, out, lse)]
    opcheck(sparge.backward.default, (*detached, None, bits, *how))


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_waits_for_the_gpu(masked):
    q, k, v = qkv(grad=True)
    mask, weight = key_mask() if masked else None, torch.randn_like(q)

    def step():
        out, sparsity = attention(q, k, v, mask, topk=0.3, topp=0.2, return_sparsity=True)
        return out, sparsity, *torch.autograd.grad(out, (q, k, v), weight)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_and_backward_in_a_cuda_graph():
    q, k, v = qkv(grad=True)
    limits, weight = thresholds(), torch.randn_like(q)

    def step():
        out = sparge.attention(q, k, v, limits)
        return out, *torch.autograd.grad(out, (q, k, v), weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for topk in (0.1, 1.0):
        with torch.no_grad():
            for x in (q, k, v):
                x.copy_(torch.randn_like(x))
            limits[:, 0] = topk
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


class Model(torch.nn.Module):
    def __init__(self, layers=2, width=256, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x):
        for qkv in self.qkv:
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_model(mode, dynamic):
    model = Model().cuda()
    options = {"min_seq_len": 0, "topk": 1.0, "inductor_mode": mode}
    compiled = torch.compile(model, backend="sparge", fullgraph=True, dynamic=dynamic, options=options)
    parameters = list(model.parameters())
    for length in (700, 1001):
        x = torch.randn(2, length, 256, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        got, want = compiled(x), model(x)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        weight = torch.randn_like(x)
        for a, b in zip(
            torch.autograd.grad(got, parameters, weight), torch.autograd.grad(want, parameters, weight), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)


def test_compiled_sparse_model_is_the_op_and_reads_thresholds_at_run_time(monkeypatch, opened_graphs):
    model, x = Model().cuda().bfloat16(), torch.randn(2, 1500, 256, device="cuda", dtype=torch.bfloat16)
    options = {"min_seq_len": 0, "calibration": Calibration({"*": [(0.2, 0.1)]}), "inductor_mode": "reduce-overhead"}
    compiled = torch.compile(model, backend="sparge", fullgraph=True, options=options)
    with torch.no_grad():
        for _ in range(3):  # warms up, records, replays
            sparse = compiled(x).clone()
        for made in opened_graphs[0].threshold_inputs:
            made.values[:, 0] = 1.0
        dense = compiled(x).clone()
        torch.testing.assert_close(dense, model(x), atol=6e-2, rtol=6e-2)
        assert len(opened_graphs) == 1 and (sparse - dense).abs().max() > 0.1
        calls = lambda q, k, v, **how: attention(q, k, v, topk=0.2, topp=0.1, **how)  # noqa: E731
        monkeypatch.setattr(F, "scaled_dot_product_attention", calls)
        torch.testing.assert_close(sparse, model(x), atol=6e-2, rtol=6e-2)


class Modulated(torch.nn.Module):
    """A block of Wan's kind: norms whose scales and shifts are slices of one parameter, on both sides of attention."""

    def __init__(self, width=1536, heads=12):
        super().__init__()
        self.heads, self.table = heads, torch.nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, x):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.table.chunk(6, 1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        heads = y.unflatten(2, (self.heads, -1)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2) * gate1
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + F.silu(y) * gate2


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_gradients_of_slices_of_one_parameter(mode):
    """Inductor alone leaves some of them out before torch 2.15."""
    model = Modulated().cuda().bfloat16()
    x = torch.randn(1, 16_384, 1536, device="cuda", dtype=torch.bfloat16)
    options = {"topk": 1.0 if mode == "dense" else 0.1, "topp": 0.0}
    found = {}
    for inner in ("aot_eager", "inductor"):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="sparge", options={**options, "inner": inner})
        for _ in range(2):  # memory that held other numbers is used again
            model.zero_grad(set_to_none=True)
            compiled(x).square().mean().backward()
        found[inner] = model.table.grad.float()
    error = (found["inductor"] - found["aot_eager"]).norm() / found["aot_eager"].norm()
    assert error < 2e-2


class Layer(torch.nn.Module):
    """A layer of a video transformer: attention to itself and to a text, and layers between that are wider."""

    def __init__(self):
        super().__init__()
        self.qkv, self.query, self.text = (torch.nn.Linear(1536, 1536 * n) for n in (3, 1, 2))
        self.norm = torch.nn.LayerNorm(1536)
        self.ffn = torch.nn.Sequential(torch.nn.Linear(1536, 8960), torch.nn.SiLU(), torch.nn.Linear(8960, 1536))

    def forward(self, x, text):
        def heads(y):
            return y.unflatten(2, (12, 128)).transpose(1, 2)

        q, k, v = (heads(y) for y in self.qkv(self.norm(x)).chunk(3, 2))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        k, v = (heads(y) for y in self.text(text).chunk(2, 2))
        x = x + F.scaled_dot_product_attention(heads(self.query(x)), k, v).transpose(1, 2).flatten(2)
        return x + self.ffn(self.norm(x))


def test_training_beside_sparse_attention(monkeypatch):
    """Attention to a text takes its queries in parts, and sums are taken in parts: gradients stay those of eager."""
    torch.manual_seed(0)
    model = Layer().cuda().bfloat16()
    x, text = (torch.randn(1, n, 1536, device="cuda", dtype=torch.bfloat16) for n in (16_384, 512))
    made = {"queries": [], "sums": []}
    for name, module, function in (("queries", few_keys, "take_in_parts"), ("sums", sums, "split_columns")):
        plain = getattr(module, function)
        monkeypatch.setattr(
            pipeline if name == "queries" else module,
            function,
            lambda given, plain=plain, name=name: made[name].append(plain(given)) or made[name][-1],
        )
    found = []
    for run in (model, torch.compile(model, backend="sparge", options={"topk": 1.0, "topp": 0.0, "min_seq_len": 1024})):
        model.zero_grad(set_to_none=True)
        run(x, text).square().mean().backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert made["queries"] == [1] and sum(made["sums"]) == 1
    assert (found[1] - found[0]).norm() / found[0].norm() < 2e-2


def test_autocast():
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got, want = sparge.attention(q, k.bfloat16(), v, thresholds(topk=1.0)), F.scaled_dot_product_attention(q, k, v)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_the_report_predicts_a_gain_for_long_sequences_and_none_for_short_ones():
    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    long, short = (explain(call)(*qkv(heads=8, kv_heads=8, length=n, keys=n)).sites[0] for n in (20000, 200))
    assert long.status == "sparse" and long.decision.prediction.speedup > 1.1
    assert short.status == "dense" and short.reason is Reason.TOO_SHORT


def test_the_host_is_timed_but_not_in_a_capture(monkeypatch):
    monkeypatch.setattr(host, "_measured", {})
    device, x = torch.device("cuda", torch.cuda.current_device()), torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert host.slowness(device) == 1 and not host._measured
        x.add_(1)
    assert 1 / 32 < host.slowness(device) < 32 and device in host._measured


def test_both_devices_keep_the_same_blocks():
    q, k, _ = (torch.randint(-4, 5, x.shape, device="cuda").to(torch.float32) for x in qkv())  # sums are exact
    gpu, cpu = (
        sparge.block_map(q, k, thresholds(topp=0.0), None, True, 0.25),
        reference.block_map(q.cpu(), k.cpu(), thresholds(topp=0.0).cpu(), None, True, 0.25),
    )
    assert torch.equal(gpu[0].cpu(), cpu.counts)
    assert torch.equal(type(cpu)(*gpu).to_dense().cpu(), cpu.to_dense())


# Under a default device, torch 2.11 traces these with some tensors of their own on the CPU, or breaks the graph.
OWN_TENSORS = {
    "arange_compared",
    "bmm_on_flattened_heads",
    "arange_added",
    "sliding_window",
    "baddbmm_of_a_mask",
    "buffer_cut_to_length",
}
WRITTEN_OUT = [s for s in SPELLINGS if s.sparse and s.name not in OWN_TENSORS]


@pytest.mark.parametrize("spelling", WRITTEN_OUT, ids=lambda s: s.name)
def test_attention_written_out_is_replaced(spelling):
    """The table of spellings on a GPU. Float32 products of eager mode are exact there unless TF32 is asked for."""
    with torch.device("cuda"):
        inputs = spelling.inputs()
        for x in inputs:
            x.requires_grad_(x.is_floating_point() and x.dim() != 2)
        options = {"min_seq_len": 0, "topk": 1.0, "inner": "aot_eager"}
        report = explain(spelling.function, options)(*inputs)
        assert [row.status for row in report] == ["sparse"], str(report)
        got = torch.compile(spelling.function, backend="sparge", options=options, fullgraph=True)(*inputs)
        want = spelling.function(*inputs)
        leaves = [x for x in inputs if x.requires_grad]
        weight = torch.randn_like(want)
        gots, wants = (torch.autograd.grad(x, leaves, weight, materialize_grads=True) for x in (got, want))
    bound = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}[want.dtype]
    for a, b in zip((got, *gots), (want, *wants), strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= bound * b.abs().max()
