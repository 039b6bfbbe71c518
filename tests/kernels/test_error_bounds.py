"""The bounds that the kernels are tested by let rounding through, and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, Problem, Results, assert_results_bounded, random_map, random_problem, summed_terms

CASES = [
    Case(1, 1, 16),
    Case(70, 1, 16),
    Case(200, 129, 40, is_causal=True),
    Case(150, 190, 16, mask="full", key_heads=1),
    Case(300, 500, 64, scale=-0.1),
]


def by_formula(problem: Problem, fault: str | None = None) -> Results:
    """Attention and its gradients written out in float32, with one fault."""
    q, k, v, _, _, _, scale, dout, dlse = problem
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    allowed = problem.allowed()
    scores = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    out = p @ v
    delta = (dout * out).sum(-1)
    if fault == "no delta":
        delta = torch.zeros_like(delta)
    if fault != "no gradient of lse":
        delta = delta - dlse
    if fault == "gradient of lse added":
        delta = delta + 2 * dlse
    ds = p * (dout @ v.mT - delta.unsqueeze(-1))
    dq = ds @ k if fault == "no scale" else ds @ k * scale
    dk, dv = ((x.mT @ y).unflatten(1, (-1, group)).sum(2) for x, y in ((ds, q), (p, dout)))
    results = Results(out, lse, dq, dk * scale, dv)
    if fault in Results._fields:  # one part in a thousand of what is summed up, in one element
        terms, i = getattr(summed_terms(problem), fault), Results._fields.index(fault)
        results[i].view(-1)[terms.argmax()] += 1e-3 * terms.max().float()
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rounding_is_let_through(case: Case) -> None:
    problem = random_problem(case, random_map(case, density=1.0))
    assert_results_bounded(by_formula(problem), problem)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "fault", ["no delta", "no gradient of lse", "gradient of lse added", "no scale", *Results._fields]
)
def test_a_fault_is_caught(case: Case, fault: str) -> None:
    problem = random_problem(case, random_map(case, density=1.0))
    with pytest.raises(AssertionError, match="error"):
        assert_results_bounded(by_formula(problem, fault), problem)


def test_where_one_key_is_seen_rounding_is_that_of_what_cancels() -> None:
    """dS is zero there; a kernel on another processor gave 7e-8, and a bound taken from the zero refused it."""
    case = Case(1, 1, 16)
    problem = random_problem(case, random_map(case, density=1.0), with_dlse=False)
    right = by_formula(problem._replace(dlse=torch.zeros(1, 2, 1)))
    assert_results_bounded(right._replace(dq=right.dq + 7e-8), problem)
    with pytest.raises(AssertionError, match="dq: error"):
        assert_results_bounded(right._replace(dq=right.dq + 1e-4), problem)
