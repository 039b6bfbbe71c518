"""Which heads go to which rank."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparge_compile import Calibration, Ranks
from sparge_compile.parallel.heads import balanced, imbalance
from sparge_compile.parallel.models import _sites


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=40), st.sampled_from([1, 2, 4]))
def test_every_head_goes_to_one_rank_and_no_rank_is_worse_off(costs, ranks):
    costs = costs[: len(costs) // ranks * ranks] or [1.0] * ranks
    order = balanced(costs, ranks)
    assert sorted(order) == list(range(len(costs)))
    assert imbalance(costs, order, ranks) <= imbalance(costs, range(len(costs)), ranks) + 1e-9


@pytest.mark.parametrize("costs", [[0.9, 0.8, 0.1, 0.1, 0.3, 0.2], [1.0, 0.05, 0.05, 0.05, 0.5, 0.45]])
def test_of_few_heads_it_is_the_best_there_is(costs):
    best = min(imbalance(costs, order, 2) for order in permutations(range(6)))
    assert imbalance(costs, balanced(costs, 2), 2) == pytest.approx(best)


def test_grouped_heads_go_together_and_repeated_ones_alone():
    """Some models of diffusers repeat key heads before they attend; which, is known when they do."""
    calibration = Calibration({"*": [(share, 0.0) for share in (0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1)]})
    module = SimpleNamespace(num_heads=8, num_kv_heads=4)
    grouped, alone = _sites("blocks.0", module, Ranks(0, 2, "none"), calibration)
    assert grouped.costs == pytest.approx([0.7, 0.3, 0.2, 0.2]) and sorted(grouped.order) == [0, 1, 2, 3]
    assert grouped.expected < grouped.unbalanced and len(alone.order) == 8
    assert [len(x.order) for x in _sites("blocks.0", SimpleNamespace(heads=8), Ranks(0, 4, "none"), calibration)] == [8]
    assert _sites("blocks.0", SimpleNamespace(heads=8, kv_heads=3), Ranks(0, 3, "none"), calibration) == []


def test_costs_are_those_of_a_calibration():
    pairs = [(0.1, 0.0), (0.2, 0.6)]
    assert Calibration({"blocks.*": pairs}).densities("blocks.3", 2) == [0.1, 0.6]
    assert Calibration({"blocks.*": [(0.1, 0.0)]}).densities("blocks.3", 3) == [0.1] * 3
    assert Calibration({"blocks.*": pairs}).densities("other", 2) is None
    phases = {0.5: {"blocks.*": [(0.3, 0.0), (0.2, 0.0)]}}
    assert Calibration({"blocks.*": pairs}, phases=phases).densities("blocks.0", 2) == pytest.approx([0.2, 0.4])
