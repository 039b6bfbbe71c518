"""How Inductor adds up beside sparse attention: which sums are taken in parts, and that they stay the same."""

from __future__ import annotations

import sys

import pytest
import torch
from graphs import Builder, targets
from torch._dynamo.utils import counters
from torch._inductor.choices import InductorChoices
from torch._inductor.utils import fresh_cache
from torch._inductor.virtualized import V
from torch.fx import GraphModule

from sparge_compile import inner, sums
from sparge_compile.options import Options
from sparge_compile.rows import WholeRows
from sparge_compile.sums import split_columns

aten = torch.ops.aten
ROWS, COLUMNS = 32760, 8960


@pytest.fixture(autouse=True)
def _an_h200(monkeypatch):
    monkeypatch.setattr(sums, "multiprocessors", lambda device: 132)


def a_sum(*shape: int, dims=(0,), keeps=True, of=torch.bfloat16, turned=False, dtype=None, **how) -> GraphModule:
    """A graph after autograd that sums up its input."""
    b = Builder()
    x = b.input("x", *shape, dtype=of, **{"device": "cuda", **how})
    given = {} if dtype is None else {"dtype": dtype}
    if turned:
        x = b.call(aten.t.default, x)
    graph_module = b.module(b.call(aten.sum.dim_IntList, x, dims and list(dims), keeps, **given))
    for node in graph_module.graph.nodes:
        node.meta["val"] = node.meta.get("example_value")
    return graph_module


@pytest.mark.parametrize("keeps", [True, False])
def test_a_sum_over_many_rows_of_many_columns_is_taken_in_parts(keeps):
    graph_module = a_sum(ROWS, COLUMNS, keeps=keeps)
    before = graph_module.graph.find_nodes(op="output")[0].args[0][0].meta["val"]
    assert split_columns(graph_module.graph) == 1
    graph_module.graph.lint()
    shapes = [tuple(x.meta["val"].shape) for x in graph_module.graph.nodes if "val" in x.meta and x.op != "output"]
    assert (15, ROWS // 15, COLUMNS) in shapes and targets(graph_module).count(aten.sum.dim_IntList) == 2
    after = graph_module.graph.find_nodes(op="output")[0].args[0][0].meta["val"]
    assert (after.shape, after.dtype) == (before.shape, before.dtype)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"shape": (ROWS, 1536)}, id="few columns, which Inductor splits"),
        pytest.param({"shape": (4095, COLUMNS)}, id="few rows"),
        pytest.param({"shape": (32749, COLUMNS)}, id="a prime number of rows"),
        pytest.param({"shape": (ROWS, COLUMNS), "dims": (1,)}, id="along rows"),
        pytest.param({"shape": (1, ROWS, COLUMNS), "dims": (1,)}, id="three dimensions"),
        pytest.param({"shape": (ROWS, COLUMNS), "dims": None}, id="over all dimensions"),
        pytest.param({"shape": (ROWS, COLUMNS), "dtype": torch.float64}, id="in another dtype"),
        pytest.param({"shape": (ROWS, COLUMNS), "of": torch.float64}, id="of float64"),
        pytest.param({"shape": (ROWS, COLUMNS), "of": torch.int64}, id="of whole numbers"),
        pytest.param({"shape": (COLUMNS, ROWS), "turned": True}, id="of rows that lie one number after the other"),
        pytest.param({"shape": (ROWS, COLUMNS), "dynamic": (0,)}, id="of any number of rows"),
        pytest.param({"shape": (ROWS, COLUMNS), "dynamic": (1,)}, id="of any number of columns"),
        pytest.param({"shape": (ROWS, COLUMNS), "device": "cpu"}, id="on a CPU"),
    ],
)
def test_other_sums_stay_as_they_are(how):
    how = dict(how)
    graph_module = a_sum(*how.pop("shape"), **how)
    before = targets(graph_module)
    assert split_columns(graph_module.graph) == 0 and targets(graph_module) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_in_parts_are_no_less_exact(dtype, monkeypatch):
    monkeypatch.setattr(sums, "_parts_of", lambda node: 16)
    graph_module = a_sum(4096, 8, device="cpu", keeps=False, of=dtype)
    assert split_columns(graph_module.graph) == 1
    graph_module.recompile()
    torch.manual_seed(0)
    x = torch.randn(4096, 8).to(dtype)
    (found,) = graph_module(x)
    assert found.dtype == dtype
    # Within half a unit of its dtype of the sum, and float32's error of what cancels in it.
    error = (found.double() - x.double().sum(0)).abs()
    cancels = x.double().abs().sum(0)
    assert (error <= torch.finfo(dtype).eps / 2 * found.double().abs() + 2**-24 * 16 * cancels).all()


def test_a_graph_is_compiled_so_and_what_was_before_comes_back():
    before, seen = V.choices, []
    graph_module = a_sum(ROWS, COLUMNS)
    sums.in_pieces(lambda given, x: seen.append((given, x, V.choices)))(graph_module, 1)
    assert seen[0][:2] == (graph_module, 1) and isinstance(seen[0][2], WholeRows) and V.choices is before
    assert "[15, 2184, 8960]" in graph_module.code
    with pytest.raises(ZeroDivisionError):
        sums.in_pieces(lambda given: 1 / 0)(graph_module)
    assert V.choices is before


def test_choices_of_a_user_stay():
    class Own(InductorChoices):
        pass

    with V.set_choices_handler(Own()), sums.whole_rows():
        assert type(V.choices) is Own


def test_an_inductor_without_such_choices_adds_up_as_ever(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.choices", None)
    monkeypatch.delitem(sys.modules, "sparge_compile.rows")
    with sums.whole_rows():
        assert type(V.choices) is InductorChoices


def test_code_that_adds_up_otherwise_is_not_taken_from_inductors_caches(monkeypatch):
    """The same graph, compiled by Inductor alone, beside sparse attention, and not beside it: three entries."""

    def compiled(how):
        torch._dynamo.reset()
        counters.clear()
        torch.compile(torch.sin, backend=how)(x)
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    def ours(sparse):
        def backend(graph_module, inputs):
            monkeypatch.setattr(inner, "has_op_of_ours", lambda graph_module: sparse)
            return inner.compile_graph(graph_module, inputs, Options())

        return backend

    x = torch.randn(8, 8)
    with fresh_cache():
        for how in ("inductor", ours(False), ours(True)):
            assert compiled(how) == (0, 1)
        for how in ("inductor", ours(False), ours(True)):
            assert compiled(how) == (1, 0)
