"""What observers stand on: a graph that runs as it is or tapped, and calls that are led through and put back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Builder
from torch import nn

from sparge_compile.passes.write.taps import listening
from sparge_compile.running.graph import open_graph
from sparge_compile.running.observe import Observer, Watched, calls_through, uncompiled

H, L, D = 2, 70, 4


def two_sites():
    b = Builder()
    x = b.input("x", 1, H, L, D)
    y = b.call(F.scaled_dot_product_attention, x, x, x)
    return b.module(b.call(F.scaled_dot_product_attention, y, x, x))


def test_a_watched_graph_runs_as_it_is():
    graph, x = two_sites(), torch.randn(1, H, L, D)
    watched = Watched(open_graph(graph, None))
    assert [m.site.name for m in watched.matches] == ["(root)", "(root)#1"] and len(watched.slots) == 2
    assert watched.marked == set()
    assert torch.equal(watched.run([x])[0], graph(x)[0])


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1), ()], ids=str)
def test_a_tapped_run_hands_over_the_sites_that_are_asked_for(numbers):
    graph, x = two_sites(), torch.randn(1, H, L, D)
    watched, heard = Watched(open_graph(graph, None)), []
    with listening(lambda number, *operands: heard.append(number)):
        result = watched.run_tapped([x], dict.fromkeys(numbers, "site"))
    assert heard == list(numbers) and torch.equal(result[0], graph(x)[0])


def test_a_tapped_graph_is_made_once_and_leaves_the_plain_one_alone():
    watched, x = Watched(open_graph(two_sites(), None)), torch.randn(1, H, L, D)
    with listening(lambda *args: None):
        watched.run_tapped([x], {0: "site"})
        tapped = watched._tapped[0,]
        watched.run_tapped([x], {0: "site"})
    assert watched._tapped == {(0,): tapped}
    watched.run([x])  # nobody listens, and no tap is there


def test_an_observer_knows_the_names_of_a_model_and_none_of_a_function():
    model = nn.Sequential(nn.Linear(2, 2))
    assert Observer(model).names.root is model and Observer(lambda x: x).names is None


class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x


def test_calls_of_a_model_go_through_and_inside_it_is_itself():
    model, seen = Doubles(), []

    def call(*args):
        seen.append(args)
        return model(*args) + 1

    with calls_through(model, call):
        assert model(3) == 7 and model(4) == 9
    assert seen == [(3,), (4,)] and model(3) == 6


def test_calls_are_put_back_after_an_error():
    model = Doubles()

    def fails(*args):
        raise KeyError

    with calls_through(model, fails):
        with pytest.raises(KeyError):
            model(3)
        with pytest.raises(KeyError):
            model(3)  # still led through
    assert model(3) == 6 and model._compiled_call_impl is None


def test_blocks_that_are_compiled_run_plain_meanwhile():
    model = nn.Sequential(Doubles(), Doubles())
    model[0]._compiled_call_impl = lambda x: 100
    assert model(1) == 200
    with pytest.raises(KeyError), uncompiled(model):
        assert model(1) == 4
        raise KeyError
    assert model(1) == 200
    with uncompiled(lambda x: x):
        pass  # a function has no blocks
