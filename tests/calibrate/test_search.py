"""Search: fronts, aims, and how thresholds carry over."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparge_compile.calibrate.curves import TOPK, TOPP, Sums
from sparge_compile.calibrate.record import Batch, Sample
from sparge_compile.calibrate.search import search, table
from sparge_compile.thresholds.fronts import (
    DENSE,
    Point,
    Unit,
    pareto,
    sparsest,
    spread,
    thin,
)
from sparge_compile.thresholds.measured import Origin

ABOUT = {
    "model": "M",
    "created_with": "torch",
    "device": "cpu",
    "query_block": 128,
    "key_block": 64,
    "by": "worst",
    "mode": "hybrid",
    "seed": 0,
    "query_blocks": 32,
    "batches": 1,
    "complete": True,
}

shares = st.floats(0.01, 1).map(lambda x: round(x, 3))
points = st.lists(st.builds(Point, shares, shares, shares, shares, shares), max_size=12)


@given(points)
def test_a_front_is_what_no_other_point_beats(some):
    front = pareto(some, "worst")
    for point in some:
        beaten = any(f.density <= point.density and f.worst <= point.worst for f in front)
        assert beaten or point in front
    assert all(a.density < b.density and a.worst > b.worst for a, b in itertools.pairwise(front))


@given(points, shares)
def test_a_bound_on_the_error_is_kept_with_the_fewest_blocks(some, bound):
    chosen = sparsest(some, bound, "mean")
    assert chosen.mean <= bound
    assert all(p.density >= chosen.density for p in some if p.mean <= bound)
    assert sparsest([], bound, "mean") == DENSE


def total(units, chosen):
    cost = sum(u.cost for u in units)
    kept = sum(u.cost * p.density for u, p in zip(units, chosen, strict=True)) / cost
    return kept, sum(u.cost * p.worst**2 for u, p in zip(units, chosen, strict=True)) / cost


@given(st.lists(st.tuples(points, st.integers(1, 4)), min_size=1, max_size=3), st.floats(0, 0.9))
def test_a_sparsity_is_reached_nearly_where_it_hurts_least(given_units, sparsity):
    units = [Unit(front, cost) for front, cost in given_units]
    choices = [pareto((*unit.front, DENSE), "worst") for unit in units]
    every = [total(units, combination) for combination in itertools.product(*choices)]
    reachable = [hurt for kept, hurt in every if kept <= 1 - sparsity]
    if not reachable:
        with pytest.raises(ValueError, match="out of reach"):
            spread(units, sparsity, "worst")
        return
    kept, hurt = total(units, spread(units, sparsity, "worst"))
    assert kept <= 1 - sparsity + 1e-6
    # Optimal among what keeps no more blocks than it does, up to the last step of a single head.
    least_step = max(unit.cost for unit in units) / sum(unit.cost for unit in units)
    assert hurt <= min(reachable) + least_step + 1e-9
    if len(units) > 1:
        same = [h for k, h in every if k <= kept + 1e-12]
        assert hurt <= min(same) + least_step


def test_a_sparsity_falls_on_the_head_that_minds_least():
    robust = tuple(Point(d, 0.0, d, 0.1 * (1 - d), 0.0) for d in (0.1, 0.3, 0.5, 0.7))
    fragile = tuple(Point(d, 0.0, d, 1 - d, 0.0) for d in (0.1, 0.3, 0.5, 0.7))
    easy, hard = spread([Unit(robust, 1.0), Unit(fragile, 1.0)], 0.4, "worst")
    assert easy.density < hard.density and (easy.density + hard.density) / 2 <= 0.6
    # A head that counts for more blocks is worth more.
    heavy, light = spread([Unit(fragile, 9.0), Unit(robust, 1.0)], 0.4, "worst")
    assert 0.9 * heavy.density + 0.1 * light.density <= 0.6


def test_thinning_keeps_the_ends_and_what_was_chosen():
    front = [Point(i / 100, 0.0, i / 100, 2.0 ** (-i / 10), 0.0) for i in range(1, 100)]
    kept = thin(front, 8, {front[41]}, "worst")
    assert len(kept) <= 9 and {front[0], front[-1], front[41]} <= set(kept)
    assert list(kept) == sorted(kept, key=lambda p: p.density)


def sample(site, call, error, *, heads=2, noise=0.0, blocks=4.0):
    """A sample in which what both thresholds drop hurts as ``error`` says: a function of the share kept."""
    topk, topp = torch.tensor(TOPK).view(-1, 1), torch.tensor(TOPP).view(1, -1)
    share = torch.maximum(topk, topp * 0.7 + 0.05 * torch.rand(1)).clamp(max=1).expand(heads, -1, -1)
    factor = 1 + noise * torch.rand(heads, 1, 1)
    return Sample(
        site,
        call,
        64,
        blocks,
        Sums(error(share) * factor * 100, share * 50, torch.full((heads,), 100.0), torch.full((heads,), 50.0)),
    )


def found(batches, starts=(), **changes):
    origin = Origin(**{**ABOUT, "batches": len(batches), **changes})
    return search(table(dict(enumerate(batches)), starts), list(starts), origin)


def easy(share):
    return 0.1 * (1 - share) ** 2


def hard(share):
    return 2 * (1 - share)


def test_heads_that_cannot_keep_the_bound_stay_dense():
    batches = [
        Batch([sample("easy", 0, easy), sample("hard", 0, lambda share: hard(share) + 0.5 * (share < 1))], [0])
    ] * 4
    calibration = found(batches, target_error=0.05)
    assert calibration.sites["hard"] == ((1.0, 0.0),) * 2
    assert all(max(pair) < 1 for pair in calibration.sites["easy"])
    summary = calibration.summary()
    assert summary.dense_heads == 2 and summary.worst_error <= 0.05


@pytest.mark.parametrize("by", ["worst", "mean"])
def test_the_hybrid_is_never_worse_than_one_threshold_alone(by):
    torch.manual_seed(0)
    batches = [Batch([sample(s, 0, e, noise=1.0) for s, e in (("a", easy), ("b", hard))], [0]) for _ in range(5)]
    for aim in ({"target_error": 0.08}, {"target_error": 0.4}):
        modes = found(batches, by=by, **aim).origin.modes
        assert modes["hybrid"] >= max(modes["topk"], modes["topp"])
    alone = found(batches, by=by, mode="topk", target_error=0.08)
    assert all(topp == 0 or (topk, topp) == DENSE[:2] for pairs in alone.sites.values() for topk, topp in pairs)


def test_a_bound_is_tightened_until_samples_that_were_left_out_keep_it():
    torch.manual_seed(0)
    noisy = [Batch([sample("a", 0, easy, heads=8, noise=1.0)], [0]) for _ in range(12)]
    calibration = found(noisy, target_error=0.05)
    assert calibration.origin.margin < 1 and calibration.origin.held_out["within"] >= 0.99
    assert calibration.origin.held_out["worst_error"] <= 0.05
    assert calibration.summary().worst_error <= 0.05 * calibration.origin.margin
    quiet = [Batch([sample("a", 0, easy, heads=8)], [0])] * 12
    torch.manual_seed(0)
    assert found(quiet, target_error=0.05).origin.margin == 1.0
    assert found(noisy[:3], target_error=0.05).origin.held_out == {}


def test_aiming_anew_gives_the_same_thresholds_for_the_same_aim_and_keeps_others():
    torch.manual_seed(0)
    batches = [Batch([sample(s, 0, e, noise=0.5) for s, e in (("a", easy), ("b", hard))], [0]) for _ in range(5)]
    calibration = found(batches, target_error=0.08)
    assert calibration.at(target_error=0.08).sites == calibration.sites
    assert calibration.at(target_error=0.02).summary().worst_error <= 0.02
    for share in (0.2, 0.6, 0.8):
        assert calibration.at(target_sparsity=share).summary().sparsity >= share - 1e-3
    assert calibration.at(target_sparsity=0.6).origin.target_error is None
    looser = [calibration.at(target_error=e, by="mean").summary().sparsity for e in (0.02, 0.08, 0.5)]
    assert looser == sorted(looser) and looser[0] < looser[-1]


def test_phases_have_their_own_thresholds_and_share_one_sparsity():
    calls = [sample("a", i, hard if i < 2 else easy) for i in range(10)]
    calibration = found([Batch(calls, list(range(10)))], starts=(0.2,), target_sparsity=0.5)
    first, later = calibration.sites["a"], calibration.phases[0.2]["a"]
    assert all(max(a) > max(b) for a, b in zip(first, later, strict=True))
    assert calibration.summary().sparsity >= 0.5 - 1e-3
    assert found([Batch(calls[:1], list(range(10)))], starts=(0.2,), target_error=0.9).phases[0.2]["a"], (
        "a phase without samples"
    )


@pytest.mark.parametrize(
    "aim",
    [
        {"target_error": 1.5},
        {"target_sparsity": -0.1},
        {},
        {"target_error": 0.1, "target_sparsity": 0.1},
        {"target_error": float("nan")},
        {"target_error": "0.1"},
    ],
)
def test_an_aim_that_is_none_is_refused(aim):
    calibration = found([Batch([sample("a", 0, easy)], [0])], target_error=0.05)
    with pytest.raises(ValueError, match=r"aim|range"):
        calibration.at(**aim)
    with pytest.raises(ValueError, match="without measurements"):
        type(calibration)({"a": [(0.5, 0.0)]}).at(target_error=0.1)
