"""How Inductor adds up beside sparse attention: which sums are taken in parts, and that they stay the same."""

from __future__ import annotations

import pytest
import torch
from graphs import Builder, targets
from torch.fx import GraphModule

from sparge_compile import sums
from sparge_compile.sums import split_columns

aten = torch.ops.aten
ROWS, COLUMNS = 32760, 8960


@pytest.fixture(autouse=True)
def _an_h200(monkeypatch):
    monkeypatch.setattr(sums, "multiprocessors", lambda device: 132)


def a_sum(*shape: int, dims: tuple[int, ...] = (0,), keeps: bool = True, device: str = "cuda", **given) -> GraphModule:
    """A graph after autograd that sums up its input."""
    b = Builder()
    x = b.input("x", *shape, dtype=torch.bfloat16, device=device)
    graph_module = b.module(b.call(aten.sum.dim_IntList, x, list(dims), keeps, **given))
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
        pytest.param({"shape": (ROWS, COLUMNS), "dtype": torch.float64}, id="in another dtype"),
        pytest.param({"shape": (ROWS, COLUMNS), "device": "cpu"}, id="on a CPU"),
    ],
)
def test_other_sums_stay_as_they_are(how):
    how = dict(how)
    graph_module = a_sum(*how.pop("shape"), **how)
    before = targets(graph_module)
    assert split_columns(graph_module.graph) == 0 and targets(graph_module) == before


def test_sums_in_parts_are_no_less_exact(monkeypatch):
    monkeypatch.setattr(sums, "_parts_of", lambda node: 16)
    graph_module = a_sum(4096, 8, device="cpu", keeps=False)
    assert split_columns(graph_module.graph) == 1
    graph_module.recompile()
    torch.manual_seed(0)
    x = torch.randn(4096, 8).bfloat16()
    (found,) = graph_module(x)
    # Within half a unit of bfloat16 of the sum, and float32's error of what cancels in it.
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=2**-8, atol=4096 * 4 * 2**-24)
