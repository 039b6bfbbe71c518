"""Which ops between exchanges have their heads take turns; what comes of it is in tests/parallel."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from sparge_compile.parallel import exchange  # noqa: F401  which defines the ops
from sparge_compile.passes.substitute import OP
from sparge_compile.passes.write.turns import LEAST_BYTES, between_exchanges

RANKS = (0, 2, "0")  # this one, how many, their group
LENGTH, SIZE = LEAST_BYTES // (8 * 64 * 4), 64


def op_in_a_graph(
    heads: int = 8, key_heads: int = 4, length: int = LENGTH, read: str = "", swap: bool = False, **given: Any
) -> Node:
    """Attention between exchanges; ``read`` says what is an output beside the result."""
    graph = Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    for node, number in ((q, heads), (k, key_heads), (v, key_heads)):
        node.meta["val"] = torch.empty(1, number, length, SIZE, device="meta")
    thresholds = graph.placeholder("thresholds")
    came = graph.call_function(torch.ops.sparge.to_heads, (q, k, v, None, *RANKS))
    parts = [graph.call_function(operator.getitem, (came, i)) for i in ((0, 2, 1) if swap else (0, 1, 2))]
    op = graph.call_function(OP, (*parts, thresholds), given)
    rows = graph.call_function(torch.ops.sparge.to_rows, (op, key_heads, None, *RANKS))
    graph.output((rows, *{"": [], "operand": parts[:1], "result": [op]}[read]))
    return op


@pytest.mark.parametrize(
    "how, turns",
    [({}, [1, 1]), ({"heads": 12, "key_heads": 12}, [3, 3]), ({"key_heads": 8, "heads": 8, "read": "result"}, [2, 2])],
)
def test_heads_take_turns(how, turns):
    found = between_exchanges(op_in_a_graph(**how))
    assert found is not None and found.turns == turns


def test_of_an_odd_number_the_first_turn_has_fewer():
    found = between_exchanges(op_in_a_graph(heads=10, key_heads=10))
    assert found is not None and found.turns == [2, 3]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"heads": 8, "key_heads": 2}, id="one key head"),
        pytest.param({"length": LENGTH - 1}, id="a short exchange"),
        pytest.param({"read": "operand"}, id="an operand that is read elsewhere"),
        pytest.param({"swap": True}, id="operands in another order"),
        pytest.param({"attn_mask": "mask"}, id="a mask"),
        pytest.param({"least_keys": 1024}, id="a limit"),
    ],
)
def test_others_do_not(how):
    assert between_exchanges(op_in_a_graph(**how)) is None
