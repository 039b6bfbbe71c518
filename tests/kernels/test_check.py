"""The check of kernels on the spot passes what is right, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparge_compile.kernels import check, cpu

CPU = torch.device("cpu")
PROBLEMS = [
    check.Problem(64, torch.float32, False),
    check.Problem(128, torch.bfloat16, True),
    check.Problem(40, torch.float16, True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_right_kernels_pass(problem):
    assert check.wrong_map(cpu.block_map, problem, CPU) == ""
    assert check.wrong_forward(cpu.forward, problem, CPU) == ""
    assert check.wrong_backward(cpu, problem, CPU) == ""


def test_nothing_of_the_callers_random_numbers_is_used():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check.wrong_forward(cpu.forward, PROBLEMS[0], CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_map_that_lacks_one_block_is_wrong():
    def short(*args):
        counts, indices = cpu.block_map(*args)
        counts[0, 1, 2] -= 1
        return counts, indices

    assert "1 of" in check.wrong_map(short, PROBLEMS[0], CPU)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("fault", ["element", "nan", "lse", "unmasked", "empty row"])
def test_a_forward_with_one_fault_is_wrong(problem, fault):
    def broken(q, k, v, counts, indices, mask, is_causal, scale):
        if fault == "unmasked" and is_causal:
            is_causal = False
        elif fault == "unmasked":
            counts = counts.clamp(max=1)
        out, lse = cpu.forward(q, k, v, counts, indices, mask, is_causal, scale)
        if fault == "element":
            out[0, 1, 300, 5] += 1.0
        if fault == "nan":
            out[0, 1, 300, 5] = torch.nan
        if fault == "lse":
            lse[0, 2, 699] += 0.01
        if fault == "empty row":
            lse[0, 0, 0] = 0.0  # a row that sees no key has -inf
        return out, lse

    assert str(problem) in check.wrong_forward(broken, problem, CPU)


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_a_backward_with_one_wrong_gradient_is_wrong(name):
    def broken(*args):
        grads = dict(zip(("dq", "dk", "dv"), cpu.backward(*args), strict=True))
        grads[name] = grads[name] * 1.05
        return tuple(grads.values())

    face = SimpleNamespace(forward=cpu.forward, pack=cpu.pack, backward=broken)
    assert check.wrong_backward(face, PROBLEMS[0], CPU).startswith(name)
