"""The minimum cut beside all cuts that there are."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sparge_compile.passes.hoist.cut import NEVER, Cut

SOURCE, SINK = 0, 5
vertices = st.integers(SOURCE, SINK)
edges = st.lists(st.tuples(vertices, vertices, st.integers(0, 9), st.integers(0, 9)), max_size=14)


@given(edges)
def test_it_is_the_least_of_all_and_the_smallest_of_these(edges):
    edges = [edge for edge in edges if edge[0] != edge[1]]
    cut = Cut(SOURCE, SINK)
    for edge in edges:
        cut.join(*edge)

    def cost(side: frozenset[int]) -> int:
        forth = sum(there for a, b, there, _ in edges if a in side and b not in side)
        return forth + sum(back for a, b, _, back in edges if b in side and a not in side)

    inner = range(SOURCE + 1, SINK)
    sides = [frozenset({SOURCE, *some}) for n in range(5) for some in itertools.combinations(inner, n)]
    least = min(map(cost, sides))
    found = cut.near_source()
    assert cost(frozenset(found)) == least
    assert all(found <= side for side in sides if cost(side) == least)


def test_what_must_not_be_cut_is_not():
    cut = Cut("in", "out")
    cut.join("in", "a", 7)
    cut.join("a", "b", NEVER, NEVER)
    cut.join("b", "out", 5)
    assert cut.near_source() == {"in", "a", "b"}
