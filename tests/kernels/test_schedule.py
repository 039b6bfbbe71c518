"""The order in which Hopper's kernels take their items."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparge_compile.kernels import launch
from sparge_compile.kernels.how import How


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ],
    autouse=True,
)
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.device(request.param):
        yield


def longest_last(counts: Tensor, group: int, reverse: bool, tail: int) -> Tensor:
    """The definition: numbers of the last items, longest first, equally long ones by number."""
    lengths = counts.unflatten(1, (-1, group)).sum(2)
    lengths = (lengths.flip(2) if reverse else lengths).flatten()
    first = max(0, len(lengths) - tail)
    return first + lengths[first:].sort(descending=True, stable=True).indices


@pytest.mark.parametrize(
    "batch, heads, group, n, reverse",
    [(1, 3, 1, 700, False), (2, 4, 2, 90, False), (1, 1, 1, 1, False), (1, 2, 1, 40, True), (2, 6, 3, 400, True)],
)
def test_the_last_items_go_longest_first(batch: int, heads: int, group: int, n: int, reverse: bool) -> None:
    from sparge_compile.kernels.triton.schedule import TAIL, Lists, schedule

    one = Lists(torch.randint(0, 30, (batch, heads, n), dtype=torch.int32), group, reverse)
    other = Lists(torch.randint(0, 9, (1, 1, 1100), dtype=torch.int32).expand(1, 2, -1))  # a map that heads share
    for lists in ((one, other), (one,)):
        for given, found in zip(lists, schedule(*lists), strict=True):
            want = longest_last(given.counts, given.group, given.reverse, TAIL)
            assert found[0] == 0 and torch.equal(found[1 : 1 + len(want)].long(), want)


@pytest.mark.parametrize(
    "heads, n_key, forward, backward",
    [(12, 512, True, True), (24, 72, False, True), (8, 40, False, False), (40, 1182, False, False)],
)
def test_where_a_launch_of_its_own_pays(
    heads: int, n_key: int, forward: bool, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long lists and few rounds: else a forward goes by the counter that it was given, or makes one."""
    from sparge_compile.kernels.triton.schedule import TAIL, counter_of_forward, pays_backward

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    counts, counter = torch.ones(1, heads, n_key // 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    found = counter_of_forward(counts, n_key, False, counter)
    assert len(found) == 1 + TAIL if forward else found is counter
    assert counter_of_forward(counts, n_key, False, None)[0] == 0
    q, readers = torch.empty(1, heads, 1, 1), torch.ones(1, heads, n_key, dtype=torch.int32)
    assert pays_backward(readers, q, q, How(None, False, 1.0)) == backward
