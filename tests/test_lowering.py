"""Inductor's code calls our kernels themselves, unless somebody waits for the op."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Stack

from sparge_compile import lowering
from sparge_compile.kernels import direct

OPTIONS = {"topk": 0.5, "min_seq_len": 0}


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def call() -> Any:
    return direct.directly(lambda *given: "op", lambda *given: "kernel")(SimpleNamespace(is_cuda=True), 1)


def test_the_kernel_is_called_where_nobody_waits_for_the_op():
    with torch.no_grad():
        assert call() == "kernel"
    assert call() == "op"  # a gradient may be wanted


def test_a_mode_and_a_profiler_see_the_op():
    with torch.no_grad():
        with Mode():
            assert call() == "op"
        with torch.profiler.profile():
            assert call() == "op"
        assert call() == "kernel"


def test_a_cpu_has_no_direct_kernel():
    q, thresholds = torch.randn(1, 2, 256, 8), torch.tensor([[0.5, 0.0]] * 2)
    arguments = (q, q, q, thresholds, None, False, 0.25)
    with torch.no_grad():
        assert torch.equal(torch.ops.sparge.attend.direct(*arguments), torch.ops.sparge.attend(*arguments))


def test_lines_have_a_kernel_each_and_are_bounded(monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(direct, "_line", lambda kernel, layouts: made.append(layouts) or kernel)
    monkeypatch.setattr(direct, "LINES", 2)
    at = direct.at_a_line(None, lambda *given: "kernel")
    with torch.no_grad():
        for name in "abacab":  # c takes the place of a, a that of b, b that of c
            assert at(name, f"layouts of {name}")(SimpleNamespace(is_cuda=True)) == "kernel"
    assert made == [f"layouts of {name}" for name in "abcab"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_code_of_inductor_names_the_kernels(training: bool, dynamic: bool):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k, v)

    inputs = [torch.randn(1, 2, 256, 8, requires_grad=training) for _ in range(3)]
    for x in inputs if dynamic else ():
        torch._dynamo.mark_dynamic(x, 2)
    compiled = torch.compile(attend, backend="sparge", options=OPTIONS)
    run = (lambda: compiled(*inputs).sum().backward()) if training else (lambda: compiled(*inputs))
    _, code = run_and_get_code(run)
    names = ("attend_for_backward", "backward") if training else ("attend",)
    text, way = "".join(code), "direct(" if dynamic else "at('"
    assert all(text.count(f" torch.ops.sparge.{name}.{way}") == 1 for name in names)
    assert not any(f" torch.ops.sparge.{name}.default(" in text for name in names)
    # Results of one form are looked at in the first call; of others, in each, as Inductor does.
    asserted = [line for line in text.splitlines() if " assert_" in line and "sparge.attend_for_backward" in line]
    assert bool(asserted) == (dynamic and training)


@pytest.mark.parametrize("training", [False, True])
def test_where_all_stays_dense_the_code_is_that_of_inductor(training: bool):
    """So a model in which no attention pays to be sparse takes exactly the time that it takes without us."""
    model, x, codes = Stack(1), torch.randn(1, 300, 32), {}
    for backend in ("inductor", "sparge"):
        torch.compiler.reset()
        compiled = torch.compile(model, backend=backend)
        with torch.set_grad_enabled(training):
            made = run_and_get_code(lambda: compiled(x).sum().backward() if training else compiled(x))[1]  # noqa: B023
        lines = [line for line in "\n".join(made).splitlines() if not line.lstrip().startswith("#")]
        assert any("scaled_dot_product" in line for line in lines)
        codes[backend] = "\n".join(lines)
    assert codes["sparge"] == codes["inductor"]


def test_other_insides_of_inductor_leave_the_ops(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.delattr("torch._inductor.lowering.tag_to_layout_constraint")
    with caplog.at_level("INFO", "sparge_compile"):
        lowering.call_directly.__wrapped__()
    assert "through the dispatcher" in caplog.text
