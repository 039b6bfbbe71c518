"""Whether kernels compute the rule: each one against the reference, on problems that take a moment.

Goes in: what is checked, as functions with the arguments of the op schemas. Comes out: what is wrong, as a sentence, or
nothing. Truth is computed in float64 on the CPU, so that it shares neither code nor device with what it judges.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div

ROUNDINGS = 3  # how many roundings of its dtype an entry may be off, at the size of the largest entry
LSE_ERROR = 1e-3
EXACT_SCALE = 0.125  # a power of two: integers stay exact under it
DENSITY = 0.4
THRESHOLDS = ((0.3, 0.5), (0.1, 0.9))  # (topk, topp) of the first two heads, and so on


class Problem(NamedTuple):
    """Sizes of one problem: no block divides the lengths, and two query heads read each key head."""

    head_size: int
    dtype: torch.dtype
    is_causal: bool
    length: int = 700
    keys: int = 830
    batch: int = 1
    heads: int = 4
    key_heads: int = 2

    def __str__(self) -> str:
        return f"D = {self.head_size}, {str(self.dtype).removeprefix('torch.')}{', causal' if self.is_causal else ''}"

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return self.head_size**-0.5

    def random(self, device: torch.device) -> tuple[list[Tensor], BlockMap]:
        """q, k, v, dout and a map of random lists, some of them empty; always the same numbers."""
        numbers = torch.Generator().manual_seed(0)
        heads = ((self.heads, self.length), (self.key_heads, self.keys), (self.key_heads, self.keys))
        tensors = [
            torch.randn(self.batch, h, n, self.head_size, generator=numbers).to(device, self.dtype)
            for h, n in (*heads, heads[0])
        ]
        n_query, n_key = ceil_div(self.length, QUERY_BLOCK), ceil_div(self.keys, KEY_BLOCK)
        kept = torch.rand(self.batch, self.heads, n_query, n_key, generator=numbers) < DENSITY
        kept[:, 0, 0] = False
        return tensors, BlockMap.from_dense(kept.to(device))

    def countable(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """q and k of integers, equal in all rows of a block, and thresholds: scores are exact, and ties are ties."""
        numbers = torch.Generator().manual_seed(0)

        def integers(heads: int, length: int, block: int) -> Tensor:
            shape = (self.batch, heads, ceil_div(length, block), self.head_size)
            blocks = torch.randint(-1, 2, shape, generator=numbers)
            return blocks.repeat_interleave(block, 2)[:, :, :length].to(device, self.dtype)

        thresholds = torch.tensor([THRESHOLDS[h % len(THRESHOLDS)] for h in range(self.heads)], device=device)
        q, k = integers(self.heads, self.length, QUERY_BLOCK), integers(self.key_heads, self.keys, KEY_BLOCK)
        return q, k, thresholds


def wrong_map(block_map: Any, problem: Problem, device: torch.device) -> str:
    """What is wrong with the map that ``block_map`` makes; empty if it is the rule's."""
    q, k, thresholds = problem.countable(device)
    how = None, problem.is_causal, EXACT_SCALE
    found = BlockMap(*block_map(q, k, thresholds, *how)).to_dense().cpu()
    true = reference.block_map(q.double().cpu(), k.double().cpu(), thresholds.cpu(), *how).to_dense()
    differ = (found != true).sum().item()
    return f"{differ} of {found.numel()} blocks differ from the rule's ({problem})" if differ else ""


def wrong_forward(forward: Any, problem: Problem, device: torch.device) -> str:
    """What is wrong with the output and log-sum-exp of ``forward``; empty if they are the reference's to rounding."""
    (q, k, v, _), block_map = problem.random(device)
    out, lse = forward(q, k, v, *block_map, None, problem.is_causal, problem.scale)
    true, true_lse, _ = _truth(problem, q, k, v, block_map)
    return _wrong("out", out, true, problem) or _wrong_lse(lse, true_lse, problem)


def wrong_backward(face: Any, problem: Problem, device: torch.device) -> str:
    """What is wrong with the gradients that a device's face gives; empty if they are the reference's to rounding."""
    (q, k, v, dout), block_map = problem.random(device)
    how = None, problem.is_causal, problem.scale
    out, lse = face.forward(q, k, v, *block_map, *how)
    grads = face.backward(dout, q, k, v, out, lse, None, face.pack(*block_map), *how)
    _, _, true = _truth(problem, q, k, v, block_map, dout)
    faults = [_wrong(name, x, y, problem) for name, x, y in zip(("dq", "dk", "dv"), grads, true, strict=True)]
    return next(filter(None, faults), "")


def _truth(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, dout: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output, log-sum-exp, and the gradients that ``dout`` gives, if there is one: float64, on the CPU."""
    q, k, v = (x.double().cpu().requires_grad_(dout is not None) for x in (q, k, v))
    lists = BlockMap(*(x.cpu() for x in block_map))
    with torch.enable_grad():
        out, lse = reference.attention(q, k, v, lists, None, problem.is_causal, problem.scale)
    grads = () if dout is None else torch.autograd.grad(out, (q, k, v), dout.double().cpu())
    return out.detach(), lse.detach(), grads


def _wrong(name: str, found: Tensor, true: Tensor, problem: Problem) -> str:
    error, size = (found.double().cpu() - true).abs().amax().item(), true.abs().amax().item()
    allowed = (ROUNDINGS * torch.finfo(problem.dtype).eps + 1e-5) * size
    return "" if error <= allowed else f"{name} is off by {error:.1e}, rounding explains {allowed:.1e} ({problem})"


def _wrong_lse(found: Tensor, true: Tensor, problem: Problem) -> str:
    found = found.double().cpu()
    if torch.allclose(found, true, atol=LSE_ERROR, rtol=0):  # -inf where a row sees no key
        return ""
    return f"the log-sum-exp is off by {(found - true).nan_to_num().abs().amax().item():.1e} ({problem})"
