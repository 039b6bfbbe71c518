"""What a spelling of attention is: code of a few lines, what SDPA would be instead, and what the report must say.

Its twin is the same code with one argument changed, and must stay as it is. Spellings are registered by a decorator, in
spellings_scores.py, spellings_masks.py and spellings_heads.py; code that only looks like attention is in lookalikes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparge_compile.report import Reason

# Queries and keys differ in number, so that nobody confuses them; no block divides either.
B, H, L, S, D = 2, 4, 150, 200, 16
SCALE = 0.3  # not D ** -0.5, which is what a scale that was overlooked would become
GROUP = 2  # query heads to a key head, where keys are repeated

# Reasons that the report may give, where code can be seen in more than one way.
RETURNED = (Reason.WEIGHTS_USED,)
ACTIVE_DROPOUT = (Reason.DROPOUT,)
# The softmax of scores over another axis than the keys: no attention, or scores that are not used as they should be.
OTHER_AXIS = (Reason.NOT_ATTENTION, Reason.SCORES_CHANGED)
# The weights are changed on their way to the values: not plain attention, and a use of the weights.
WEIGHTS_CHANGED = (Reason.NOT_ATTENTION, Reason.WEIGHTS_USED, Reason.SCORES_CHANGED)
# A finite number at masked places: a changed score or an additive mask, as one likes to see it.
FINITE = (Reason.ADDITIVE_MASK, Reason.SCORES_CHANGED)

Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Spelling:
    """One way to write attention.

    ``same(attend, *inputs)`` computes what ``function(*inputs)`` does with a call of ``attend``, which has SDPA's
    signature. ``product`` is batch × heads, which code may fold; ``heads`` None where it may be either. ``mask`` is
    None where the report may say one thing or another.
    """

    name: str
    function: Callable[..., Tensor]
    inputs: Inputs
    same: Callable[..., Tensor]
    twin: Callable[..., Any]
    why: tuple[Reason, ...]  # reasons that the report may give for the twin
    product: int = B * H
    heads: int | None = H
    group: int = 1
    length: int = L
    keys: int = S
    head_size: int = D
    kind: str = "decomposed"
    reason: Reason = Reason.LONG_ENOUGH  # the answer to min_seq_len = 0
    mask: str | None = "none"
    is_causal: bool = False

    @property
    def sparse(self) -> bool:
        return self.reason.sparse


SPELLINGS: list[Spelling] = []


def qkv(
    kv_heads: int = H, length: int = L, keys: int = S, value_size: int = D, dtype: torch.dtype = torch.float32
) -> Inputs:
    """q [B, H, L, D], k [B, Hk, S, D] and v [B, Hk, S, value_size]."""
    return lambda: (
        torch.randn(B, H, length, D).to(dtype),
        torch.randn(B, kv_heads, keys, D).to(dtype),
        torch.randn(B, kv_heads, keys, value_size).to(dtype),
    )


def blhd() -> tuple[Tensor, ...]:
    """q [B, L, H, D], k and v [B, S, H, D]."""
    return torch.randn(B, L, H, D), torch.randn(B, S, H, D), torch.randn(B, S, H, D)


def sdpa(**how: Any) -> Callable[..., Tensor]:
    """``same`` for inputs [B, H, L, D]; what follows them is not used."""
    return lambda attend, q, k, v, *_: attend(q, k, v, **how)


def sdpa_blhd(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``same`` for inputs and an output [B, L, H, D]."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), scale=SCALE).transpose(1, 2)


def spelling(
    *, twin: Mapping[str, Any], why: tuple[Reason, ...], inputs: Inputs | None = None, same: Any = None, **expected: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a spelling; with the arguments ``twin`` it becomes its own twin."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*tensors: Tensor) -> Any:
            return function(*tensors, **twin)

        name = function.__name__
        assert name not in {s.name for s in SPELLINGS}, name
        how = same or sdpa(scale=SCALE)
        SPELLINGS.append(Spelling(name, function, inputs or qkv(), how, changed, why, **expected))
        return function

    return register
