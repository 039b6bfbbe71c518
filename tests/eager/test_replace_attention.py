"""Attention in eager code is sparse while ``replace_attention`` is at work, and what it was before and after."""

from __future__ import annotations

import contextlib
import gc
import pickle
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from toys import Block, Stack

from sparge_compile import Calibration, Options, attach, attention, calibrate, explain, replace_attention
from sparge_compile.eager import door, replacement, sites
from sparge_compile.report import Reason

DENSE = {"topk": 1.0, "topp": 0.0, "min_seq_len": 0}
SPARSE = {"topk": 0.3, "topp": 0.0, "min_seq_len": 0}
SDPA = torch._C._nn.scaled_dot_product_attention


@pytest.fixture
def x():
    return torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack()


class Twice(nn.Module):
    """Two attentions in one module, of which the second attends to the first."""

    def forward(self, x):
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, F.scaled_dot_product_attention(q, q, q)).transpose(1, 2).flatten(2)


class Calls(nn.Module):
    """A module that calls SDPA with arguments of the test's choice."""

    def __init__(self, **how):
        super().__init__()
        self.how = how

    def forward(self, x):
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, **self.how)


def gradients(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])


def names(report):
    return [row.name for row in report]


def test_all_blocks_are_dense_attention_forward_and_backward(model, x):
    want = [model(x), *gradients(model, x)]
    with replace_attention(model, DENSE) as replaced:
        got = [model(x), *gradients(model, x)]
    assert len(replaced.report.sparse) == 2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_sparse_is_what_the_function_computes(x):
    q = x.unflatten(-1, (4, -1)).transpose(1, 2)
    with replace_attention(model := Calls(is_causal=True), SPARSE):
        got = model(x)
    assert torch.equal(got, attention(q, q, q, is_causal=True, topk=0.3, topp=0.0))
    assert not torch.equal(got, model(x))


def test_names_are_those_of_graphs(model, x):
    for each in (model, Twice(), nn.Sequential(Twice(), Twice())):
        with replace_attention(each, SPARSE) as replaced:
            for _ in range(2):  # each forward counts from the start
                each(x)
        assert names(replaced.report) == names(explain(each, SPARSE)(x))


def test_report_has_shapes_lines_and_calls(model, x):
    with replace_attention(model, SPARSE) as replaced:
        model(x)
    first = replaced.report.sites[0]
    assert first.shapes == dict(zip(first.shapes, (2, 4, 4, 300, 300, 8), strict=True))
    assert first.site.code is not None
    assert "toys.py:" in first.site.code
    assert str(replaced.report).startswith("sparge: 2 of 2 attention sites sparse, in 2 calls in eager code")
    assert replaced.report.to_dict()["calls"] == 2


def test_an_exception_ends_a_count_and_the_replacement(x):
    class Fails(Twice):
        fails = True

        def forward(self, x):
            out = super().forward(x)
            if self.fails:
                raise RuntimeError("of the model")
            return out

    model = Fails()
    with replace_attention(model, SPARSE) as replaced:
        with pytest.raises(RuntimeError, match="of the model"):
            model(x)
        model.fails = False
        model(x)
        assert names(replaced.report) == ["(root)", "(root)#1"]
    model.fails = True
    with pytest.raises(RuntimeError, match="of the model"), replace_attention(model, SPARSE):
        model(x)
    assert F.scaled_dot_product_attention is SDPA


def test_functions_that_were_imported_by_name(x):
    user = types.ModuleType("a_user")
    user.F, user.sdpa = F, F.scaled_dot_product_attention
    sys.modules["a_user"] = user

    class Named(nn.Module):
        def forward(self, x):
            return user.sdpa(x[:, None], x[:, None], x[:, None])

    try:
        model = Named()
        with replace_attention(model, SPARSE) as replaced:
            model(x)
        assert len(replaced.report.sparse) == 1
        assert user.sdpa is SDPA
    finally:
        del sys.modules["a_user"]


def test_what_was_imported_or_put_there_meanwhile(model, x):
    user = types.ModuleType("a_user")
    sys.modules["a_user"] = user

    def own(*args, **kwargs):
        return SDPA(*args, **kwargs)

    try:
        with replace_attention(model, DENSE):
            user.sdpa = F.scaled_dot_product_attention
            assert user.sdpa is SDPA is not torch._C._nn.scaled_dot_product_attention  # as the name in this module
            F.scaled_dot_product_attention = own
        assert user.sdpa is SDPA is torch._C._nn.scaled_dot_product_attention
        assert F.scaled_dot_product_attention is own
    finally:
        F.scaled_dot_product_attention = SDPA
        del sys.modules["a_user"]


def test_a_handle_and_several_models(model, x):
    other, alone = Stack(), Stack()
    want = alone(x)
    first, second = replace_attention(model, SPARSE), replace_attention(other, topk=0.5, topp=0.0, min_seq_len=0)
    try:
        model(x), other(x), other(x)
        assert torch.equal(alone(x), want)
        assert (first.report.calls, second.report.calls) == (2, 4)
        first.remove()
        first.remove()
        model(x), other(x)
        assert (first.report.calls, second.report.calls) == (2, 6)
        with pytest.raises(ValueError, match="is replaced, or calibrated, already"):
            replace_attention(nn.Sequential(other), SPARSE)
        with pytest.raises(ValueError, match="is replaced, or calibrated, already"):
            replace_attention()
    finally:
        first.remove()
        second.remove()
    assert F.scaled_dot_product_attention is SDPA


def test_without_a_model_every_call_is_meant(model, x):
    q = torch.randn(1, 2, 300, 8)
    with replace_attention(options=SPARSE) as replaced:
        model(x)
        F.scaled_dot_product_attention(q, q, q)
    assert names(replaced.report) == ["blocks.0", "blocks.1", "(root)"]


def test_calibrations_and_attached_thresholds_hold(model, x):
    table = Calibration({"blocks.0": ((1.0, 0.0),) * 4, "blocks.1": ((0.3, 0.0),) * 4})
    want = model(x)
    with replace_attention(model, calibration=table, min_seq_len=0):
        mixed = model(x)
    assert not torch.allclose(mixed, want, atol=1e-5)
    with attach(model, table) as attached, replace_attention(model, DENSE) as replaced:
        assert torch.equal(model(x), mixed)
        assert "thresholds attached" in replaced.report.sites[0].detail
        attached.set(topk=1.0, topp=0.0)
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
        attached.set(topk=0.3)
        attached.remove()
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)


def test_entries_that_no_call_used_are_told_of(model, x):
    table = Calibration({"blocks.0": [(1.0, 0.0)], "blocks.7": [(0.3, 0.0)]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with replace_attention(model, calibration=table, min_seq_len=0):
            model(x)
    assert any("in eager code of Stack, no attention used" in str(w.message) for w in caught)


def test_a_calibration_for_another_model_is_refused(model, x):
    other = calibrate(nn.Sequential(nn.Sequential(Calls())), [x], options={"min_seq_len": 0})
    with pytest.raises(ValueError, match="for another model"), replace_attention(model, SPARSE, calibration=other):
        model(x)


@pytest.mark.parametrize(
    "how, options, reason",
    [
        ({}, {"min_seq_len": None}, Reason.TOO_SHORT),
        ({"dropout_p": 0.5}, {}, Reason.DROPOUT),
        ({"attn_mask": torch.randn(300, 300)}, {}, Reason.ADDITIVE_MASK),
        ({"scale": torch.tensor(0.5)}, {}, Reason.ARGUMENT),
    ],
)
def test_what_stays_dense_is_called_as_it_was(x, how, options, reason):
    model = Calls(**how)
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with replace_attention(model, {**SPARSE, **options}) as replaced:
            got = model(x)
    assert [row.reason for row in replaced.report] == [reason]
    assert torch.equal(got, want)


def test_unsupported_calls_warn_or_raise(x):
    model = Calls(dropout_p=0.5)
    with pytest.warns(UserWarning, match="dropout is active"), replace_attention(model, SPARSE):
        model(x)
    with (
        pytest.raises(ValueError, match=r"dropout is active"),
        replace_attention(model, SPARSE, on_unsupported="error"),
    ):
        model(x)
    with pytest.warns(UserWarning, match="met no attention in Linear"), replace_attention(nn.Linear(2, 2)):
        pass


def test_calls_that_are_no_graph(x):
    q = x.unflatten(-1, (4, -1)).transpose(1, 2)
    nested = torch.nested.nested_tensor([q[0], q[1]])
    with replace_attention(options={**SPARSE, "on_unsupported": "dense"}) as replaced:
        F.scaled_dot_product_attention(nested, nested, nested)
        torch.func.vmap(F.scaled_dot_product_attention)(q[None], q[None], q[None])
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(q)
    assert {row.reason for row in replaced.report} >= {Reason.NESTED, Reason.TRANSFORM}


def test_forward_mode_derivatives_are_those_of_dense_attention(x):
    model = Calls()
    tangent = torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.func.jvp(model, (x,), (tangent,))[1]
        with replace_attention(model, SPARSE, on_unsupported="dense") as replaced:
            torch.testing.assert_close(torch.func.jvp(model, (x,), (tangent,))[1], want)
            with forward_ad.dual_level():
                torch.testing.assert_close(
                    forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent, want
                )
    assert {row.reason for row in replaced.report} == {Reason.TRANSFORM}


def test_bad_arguments():
    with pytest.raises(TypeError, match="bad model"):
        replace_attention("model")
    with pytest.raises(ValueError, match="says how to compile"):
        replace_attention(inner="eager")
    with pytest.raises(ValueError, match="topq"):
        replace_attention(topq=0.5)
    for options in ({"topk": 0.4}, Options(topk=0.4)):
        with pytest.raises(ValueError, match="given twice: got topk"):
            replace_attention(None, options, topk=0.2)
    assert F.scaled_dot_product_attention is SDPA


def test_function_modes_see_calls_first(model, x):
    class Sees(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += func is F.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    with replace_attention(model, SPARSE) as replaced, Sees() as sees:
        model(x)
    assert sees.seen == 2
    assert len(replaced.report.sparse) == 2


def test_compiled_code_inside_is_left_and_named(model, x):
    model.blocks[0].compile(backend="eager")
    want = model(x)
    with replace_attention(model, DENSE) as replaced:
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
    assert names(replaced.report) == ["blocks.1"]
    assert replaced.report.notes == ["not looked at: compiled code of blocks.0, in which its own backend decides"]
    assert str(replaced.report).endswith(replaced.report.notes[0])


def test_what_breaks_out_of_a_graph_is_seen(x):
    class Disabled(Block):
        @torch.compiler.disable
        def forward(self, x):
            return super().forward(x)

    model = Stack(block=Disabled)
    with replace_attention(model, SPARSE) as replaced:
        torch.compile(model, backend="eager")(x)
    assert names(replaced.report) == ["blocks.0", "blocks.1"]


@pytest.fixture
def readings(monkeypatch):
    """The calls that were read, as graphs or to find out where they stand."""
    read = []
    of, chain = door.Call.of, sites.module_calls
    monkeypatch.setattr(door.Call, "of", lambda *given: read.append("call") or of(*given))
    monkeypatch.setattr(sites, "module_calls", lambda frame: read.append("stack") or chain(frame))
    return read


@pytest.mark.parametrize("grad", [False, True])
def test_calls_that_are_alike_are_read_once(model, x, readings, grad):
    with replace_attention(model, SPARSE) as replaced, torch.set_grad_enabled(grad):
        want = model(x)
        assert sorted(readings) == ["call"] * 2 + ["stack"] * 2
        for _ in range(3):
            assert torch.equal(model(x), want)
        assert len(readings) == 4 and replaced.report.calls == 8
        model(x[:, :200])
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert readings.count("call") == 6 and readings.count("stack") == 2


def test_calls_that_look_alike_and_are_not(x):
    q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (x, x.sin(), x.cos()))

    class Ways(nn.Module):
        def forward(self, *args, **kwargs):
            return F.scaled_dot_product_attention(*args, **kwargs)

    ways = [
        ((q, k, v), {}),
        ((q, q, v), {}),
        ((q, k, k), {}),
        ((q,), {"value": v, "key": k}),
        ((q, k, v, None, 0.0), {}),
    ]
    ways += [((q, k, v), {"is_causal": causal, "scale": scale}) for causal in (False, True) for scale in (1, 0.5)]
    model = Ways()
    with replace_attention(model, SPARSE):
        for _ in range(2):
            for args, kwargs in ways:
                given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
                assert torch.equal(model(*args, **kwargs), attention(**given, topk=0.3, topp=0.0))


def test_the_table_of_calls_is_bounded(model, x, monkeypatch):
    monkeypatch.setattr(replacement, "_MOST_PLANS", 3)
    with replace_attention(model, SPARSE) as replaced:
        for n in (260, 270, 280, 290, 260):
            model(x[:, :n])
            assert len(replaced._plans) <= 3 and len(replaced._ready) <= 3


def test_token_order_in_eager_code(x):
    q = x[:, :240].unflatten(-1, (4, -1)).transpose(1, 2)
    with replace_attention(model := Calls(), SPARSE, token_order="tiles", grid=(3, 8, 10)):
        found = [model(x[:, :240]) for _ in range(2)]
    want = attention(q, q, q, topk=0.3, topp=0.0, grid=(3, 8, 10))
    assert all(torch.equal(each, want) for each in found)


def test_other_threads_and_checkpoints(model, x):
    def step(model, x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    plain = types.SimpleNamespace(blocks=model.blocks)
    x.requires_grad_()
    with replace_attention(model, SPARSE) as replaced:
        want = torch.autograd.grad(model(x).sum(), x)
        got = torch.autograd.grad(step(plain, x).sum(), x)
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
    assert torch.equal(got[0], want[0])
    assert names(replaced.report) == ["blocks.0", "blocks.1"]
    assert replaced.report.calls == 2 + 2 + 2 + 2  # once more for the backward of the checkpoints


@pytest.mark.parametrize("reentrant", [False, True, None])
def test_checkpoints_do_not_see_how_a_first_call_is_read(model, x, reentrant):
    def step(x):
        for block in model.blocks:
            x = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        return x.sum()

    x.requires_grad_()
    around = torch.autograd.graph.disable_saved_tensors_hooks("") if reentrant is None else contextlib.nullcontext()
    with replace_attention(model, SPARSE), around:
        step(x).backward()
    got, x.grad = x.grad, None
    with replace_attention(model, SPARSE):
        model(x).sum().backward()
    assert torch.equal(got, x.grad)


def test_functions_are_pickled_as_what_they_stand_for(model):
    with replace_attention(model, SPARSE):
        pickled = pickle.dumps([F.scaled_dot_product_attention, model])
        assert pickle.loads(pickled)[0] is F.scaled_dot_product_attention
    assert pickle.loads(pickled)[0] is SDPA


def test_a_replacement_that_was_removed_does_nothing_and_says_so(model):
    replaced = replace_attention(model, SPARSE)
    replaced.remove()
    replaced.remove()
    with pytest.raises(ValueError, match="removed"), replaced:
        raise AssertionError


@pytest.mark.parametrize("for_all", [False, True])
def test_a_replacement_that_was_removed_holds_no_model(x, for_all):
    model = Stack()
    model.blocks[1].compile(backend="eager")
    with replace_attention(None if for_all else model, SPARSE) as replaced:
        model(x)
        notes = replaced.report.notes
        assert bool(notes) != for_all
    held = weakref.ref(model)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert held() is None
    assert names(replaced.report) == ["blocks.0"] and replaced.report.notes == notes


def test_modules_that_a_model_got_since(model, x):
    with replace_attention(model, SPARSE) as replaced:
        model.blocks.append(Block())
        model(x)
    assert names(replaced.report) == ["blocks.0", "blocks.1", "blocks.2"]


def test_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        with replace_attention(model, DENSE) as replaced:
            got = model(x)
    assert got.dtype == want.dtype
    assert len(replaced.report.sparse) == 2
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grad", [False, True])
def test_attention_of_torch_nn(x, grad):
    model = nn.TransformerEncoderLayer(32, 4, batch_first=True, dropout=0.0).train(grad)
    with torch.set_grad_enabled(grad):
        want = model(x)
        with replace_attention(model, DENSE) as replaced:
            got = model(x)
    assert names(replaced.report.sparse) == ["self_attn"]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
