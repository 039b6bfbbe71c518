"""Calls of flash-attn's functions in eager code become sparse, as those of SDPA do; official models call them."""

from __future__ import annotations

import functools
import inspect
import sys
import types

import flash_library
import other_libraries
import pytest
import torch
from torch import nn

from sparge_compile import calibrate, explain, replace_attention
from sparge_compile.report import Reason

DENSE = {"topk": 1.0, "topp": 0.0, "min_seq_len": 0}
OPTIONS = {"min_seq_len": 0}
SPARSE = {"topk": 0.2, "topp": 0.0, "min_seq_len": 0}
FUNCTIONS = [name for name in vars(flash_library) if name.startswith("flash_attn_")]


@pytest.fixture(autouse=True)
def flash_attn():
    with flash_library.installed() as package:
        yield package


class WanSelfAttention(nn.Module):
    """As in the official repository: lengths are read on the host, and sequences are packed for flash-attn."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, seq_lens):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, seq_lens).flatten(2))

    def attend(self, q, k, v, lens):
        from flash_attn import flash_attn_varlen_func

        b, length = q.shape[:2]
        q_lens = torch.tensor([length] * b, dtype=torch.int32)
        k, v = (torch.cat([u[: int(n.item())] for u, n in zip(x, lens, strict=True)]) for x in (k, v))
        starts = (torch.cat([n.new_zeros([1]), n]).cumsum(0, dtype=torch.int32) for n in (q_lens, lens))
        out = flash_attn_varlen_func(
            q=q.flatten(0, 1),
            k=k,
            v=v,
            cu_seqlens_q=next(starts),
            cu_seqlens_k=next(starts),
            max_seqlen_q=length,
            max_seqlen_k=length,
            causal=False,
            window_size=(-1, -1),
            deterministic=False,
        )
        return out.unflatten(0, (b, length))


class Wan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"self_attn": WanSelfAttention()}) for _ in range(2))

    def forward(self, x, seq_lens):
        for block in self.blocks:
            x = x + block["self_attn"](x, seq_lens)
        return x


@pytest.fixture
def wan():
    torch.manual_seed(0)
    return Wan(), (torch.randn(2, 600, 32), torch.tensor([600, 450], dtype=torch.int32))


def gradients(model, x, lens):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x, lens).sin().sum(), [x, *model.parameters()])


def test_an_official_wan_is_sparse_uncompiled(wan):
    model, inputs = wan
    want = [model(*inputs), *gradients(model, *inputs)]
    with replace_attention(model, DENSE) as replaced:
        got = [model(*inputs), *gradients(model, *inputs)]
    assert [(row.name, row.kind, row.status) for row in replaced.report] == [
        ("blocks.0.self_attn", "varlen", "sparse"),
        ("blocks.1.self_attn", "varlen", "sparse"),
    ]
    largest = max(float(x.abs().max()) for x in want)  # gradients are sums in which terms cancel
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * max(1.0, largest))
    with replace_attention(model, SPARSE):
        assert not torch.allclose(model(*inputs), want[0], atol=1e-4)
    assert torch.equal(model(*inputs), want[0])


def arguments(name, length=300, heads=2):
    """The arguments of a function by position, and which of them are differentiable."""
    torch.manual_seed(0)
    packed = "varlen" in name
    shape = (length,) if packed else (2, length)
    q, k, v = (torch.randn(*shape, heads, 16, requires_grad=True) for _ in range(3))
    tensors = (
        [torch.stack([q, k, v], -3)] if "qkv" in name else [q, torch.stack([k, v], -3)] if "kv" in name else [q, k, v]
    )
    tensors = [x.detach().requires_grad_() for x in tensors]
    if not packed:
        return tensors, []
    starts = torch.tensor([0, 200, length], dtype=torch.int32)
    return tensors, [starts, 200] if "qkv" in name else [starts, starts.clone(), 200, 200]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_of_flash_attn(flash_attn, name, causal):
    function = getattr(flash_attn, name)  # held by another name since before
    signature = inspect.signature(function)
    tensors, others = arguments(name)

    def results():
        out = function(*tensors, *others, causal=causal)
        return [out, *torch.autograd.grad(out.sin().sum(), tensors)]

    want = results()
    with replace_attention(options=DENSE) as replaced:
        assert inspect.signature(function) == signature
        got = results()
    assert [row.status for row in replaced.report] == ["sparse"], replaced.report
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    with replace_attention(options=SPARSE):
        assert not torch.allclose(results()[0], want[0], atol=1e-4)
    assert inspect.signature(function) == signature
    assert torch.equal(results()[0], want[0])


@pytest.mark.parametrize(
    "how, reason",
    [
        ({"dropout_p": 0.5}, Reason.DROPOUT),
        ({"window_size": (64, 64)}, Reason.WINDOW),
        ({"softcap": 30.0}, Reason.SOFTCAP),
        ({"alibi_slopes": torch.rand(2)}, Reason.ALIBI),
        ({"return_attn_probs": True}, Reason.OUTPUTS_USED),
    ],
)
def test_what_flash_attn_has_more_stays_dense(flash_attn, how, reason):
    tensors, _ = arguments("flash_attn_func")
    torch.manual_seed(1)
    want = flash_attn.flash_attn_func(*tensors, **how)
    torch.manual_seed(1)
    with replace_attention(options={**SPARSE, "on_unsupported": "dense"}) as replaced:
        got = flash_attn.flash_attn_func(*tensors, **how)
    assert [row.reason for row in replaced.report] == [reason]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_causality_is_aligned_to_the_bottom_right(flash_attn):
    q, k, v = torch.randn(1, 130, 2, 16), torch.randn(1, 300, 2, 16), torch.randn(1, 300, 2, 16)
    want = flash_attn.flash_attn_func(q, k, v, causal=True)
    with replace_attention(options=DENSE) as replaced:
        got = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert len(replaced.report.sparse) == 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_sage_attention(layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", other_libraries)
    q, k, v = torch.randn(3, 1, 2, 300, 16) if layout == "HND" else torch.randn(3, 1, 300, 2, 16)
    want = other_libraries.sageattn(q, k, v, tensor_layout=layout)
    with replace_attention(options=DENSE) as replaced:
        got = other_libraries.sageattn(q, k, v, tensor_layout=layout)
    assert [(row.kind, row.status) for row in replaced.report] == [("sage", "sparse")]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_calibration_measures_an_official_wan(wan):
    model, inputs = wan
    calibration = calibrate(model, [inputs], target_sparsity=0.4, options={"min_seq_len": 0})
    assert list(calibration.sites) == ["blocks.0.self_attn", "blocks.1.self_attn"]
    with replace_attention(model, calibration=calibration, min_seq_len=0) as replaced:
        model(*inputs)
    assert len(replaced.report.sparse) == 2


def test_explain_points_to_the_line_and_to_the_door(wan):
    model, inputs = wan
    for block in model.blocks:
        attention = block["self_attn"]
        attention.attend = torch.compiler.disable(attention.attend)
    report = explain(model)(*inputs)
    assert [(row.name, row.kind, row.reason) for row in report] == [
        ("blocks.0.self_attn", "flash_attn", Reason.OUTSIDE),
        ("blocks.1.self_attn", "flash_attn", Reason.OUTSIDE),
    ]
    assert "test_libraries.py" in str(report.sites[0].site.code)
    assert "replace_attention" in report.sites[0].detail


def test_compiled_code_is_compiled_once_for_all_doors():
    class Model(nn.Module):
        def forward(self, x):
            return flash_library.flash_attn_func(x, x, x)

    graphs, x = [], torch.randn(1, 300, 2, 16)
    compiled = torch.compile(Model(), backend=lambda graph, inputs: graphs.append(graph) or graph)
    for _ in range(4):
        with replace_attention(nn.Linear(1, 1), on_unsupported="dense"):
            compiled(x)
        compiled(x)
    assert len(graphs) == 2


def test_a_graph_break_inside_a_function_of_a_library_does_not_change_names():
    """Parts of a forward are told by the stack, on which is the code that takes the function's place meanwhile, too."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        torch._dynamo.graph_break()
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    class Model(nn.Module):
        def forward(self, x):
            return flash_library.flash_attn_func(x, x, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_library, "flash_attn_func", flash_attn_func)
        model, x = Model(), torch.randn(1, 512, 2, 16)
        names = [row.name for row in explain(model, OPTIONS)(x)]
        assert list(calibrate(model, [x], options=OPTIONS).sites) == names[:1]


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """With the signature of xformers', of [B, L, H, D]."""
    mask = attn_bias.mask if isinstance(attn_bias, Bias) else attn_bias
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale).transpose(1, 2)


class Bias:
    """As xformers' classes of biases: no tensor."""

    mask = torch.ones(300, 300, dtype=torch.bool).tril()


def test_xformers(monkeypatch):
    package = types.ModuleType("xformers.ops")
    package.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers.ops", package)
    q, k, v = torch.randn(3, 1, 300, 2, 16)
    want = memory_efficient_attention(q, k, v, scale=0.2)
    with replace_attention(options={**DENSE, "on_unsupported": "dense"}) as replaced:
        got = memory_efficient_attention(q, k, v, scale=0.2)
        memory_efficient_attention(q, k, v, Bias())
    # The call of SDPA inside is part of the call that was refused.
    assert [row.reason for row in replaced.report] == [Reason.LONG_ENOUGH, Reason.ARGUMENT]
    assert replaced.report.sites[1].detail == "attn_bias is a Bias"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_function_that_always_gives_the_log_sum_exp_stays_dense(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1)):
        """As FlashAttention 3 was at first."""
        return flash_library.flash_attn_func(q, k, v, softmax_scale=softmax_scale, return_attn_probs=True)[:2]

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    tensors, _ = arguments("flash_attn_func")
    want = flash_attn_func(*tensors)
    with replace_attention(options={**SPARSE, "on_unsupported": "dense"}) as replaced:
        got = flash_attn_func(*tensors)  # a closure of this function, as a decorated one is
    assert [row.reason for row in replaced.report] == [Reason.OUTPUTS_USED]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_decorated_functions_and_tables_of_functions(flash_attn):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    flash_attn.flash_attn_func = decorate(flash_library.flash_attn_func)
    table = {"flash": functools.partial(flash_attn.flash_attn_func, causal=True)}
    tensors, _ = arguments("flash_attn_func")
    want = table["flash"](*tensors)
    with replace_attention(options=DENSE) as replaced:
        got = table["flash"](*tensors)
    assert (len(replaced.report.sparse), replaced.report.calls) == (1, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_compiled_code_around_a_function_is_left(flash_attn):
    tensors, _ = arguments("flash_attn_func")
    compiled = torch.compile(lambda *x: 2 * flash_attn.flash_attn_func(*x), backend="eager")
    want = compiled(*tensors)
    with replace_attention(options={**SPARSE, "on_unsupported": "dense"}) as replaced:
        torch.testing.assert_close(compiled(*tensors), want, rtol=0, atol=1e-6)
        fresh = torch.compile(lambda *x: 3 * flash_attn.flash_attn_func(*x), backend="eager")
        torch.testing.assert_close(fresh(*tensors), 1.5 * want, rtol=0, atol=1e-5)
    assert not replaced.report.sites
