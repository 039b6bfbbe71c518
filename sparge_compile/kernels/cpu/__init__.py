"""The face of the CPU: the functions of the op schemas (ops.py), with the same arguments as those of the GPU, ``code``,
and the two halves of ``block_map``, for a sequence of which several processes hold parts.

The last arguments of each are the fields of a :class:`How`. What is given by name serves the GPU, where it saves a
launch (``counter``) or a copy (``bits``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import allocate, eight_bits, rule
from .. import block_map as forms
from ..how import How
from . import attention, packed

__all__ = ["backward", "block_map", "centred", "code", "forward", "means", "pack", "select"]


def block_map(
    query: Tensor,
    key: Tensor,
    thresholds: Tensor,
    *how: Any,
    counter: Tensor | None = None,
    bits: Tensor | None = None,
    pooled: Any = None,
) -> forms.BlockMap:
    """The block map of query [B, H, L, D] over key [B, Hk, S, D], by the rule (rule.py)."""
    made = _place(how).block_map(query, key, thresholds, How(*how))
    _ = bits is None or pack(*made, bits=bits)
    return made


def means(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [B, H, Nq, D] and [B, Hk, Nk, D]: the means of all blocks, of which ``select`` takes some."""
    return rule.pool(query, forms.QUERY_BLOCK), rule.pool(key, forms.KEY_BLOCK)


def select(q_mean: Tensor, k_mean: Tensor, thresholds: Tensor, scale: float) -> forms.BlockMap:
    """The block map by means [B, H, Nq, D] and [B, Hk, Nk, D], where nothing is masked."""
    return attention.select(q_mean, k_mean, thresholds, scale)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    *how: Any,
    counter: Tensor | None = None,
    codes: Any = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept keys: out [B, H, L, Dv] and lse [B, H, L].

    In eight bits the operands are rounded, and the weights of the keys are not.
    """
    given = How(*how)
    if not given.eight_bits:
        return _place(how).forward(query, key, value, counts, indices, given)
    x = eight_bits.centred(query, key, value, given)
    out, lse = _place(how).forward(x.q, x.k, x.v, counts, indices, given)
    return allocate.laid_out(out, query), lse + x.lift


def centred(query: Tensor, key: Tensor, value: Tensor, lse: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of :func:`eight_bits.centred`, in the order of what was given, and lse without its lift."""
    x = eight_bits.centred(query, key, value, how)
    q, k, v = map(allocate.laid_out, (x.q, x.k, x.v), (query, key, value))
    return q, k, v, lse - x.lift


def code(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[None, None]:
    """What the GPU makes with the map, for the map and the forward: here neither takes it."""
    return None, None


def pack(counts: Tensor, indices: Tensor, *, bits: Tensor | None = None) -> Tensor:
    """int32 [B, H, Nq, ceil(Nk / 32)] from the lists of a map, int32 [B, H, Nq] and [B, H, Nq, Nk].

    They are written to ``bits``, if it is given: int32 with room to spare in rows and words, where zeros go. Of the
    maps of more than one sequence, there may be room for others, too.
    """
    made = forms.pack(forms.BlockMap(counts, indices).to_dense())
    if bits is None:
        return made
    batch = len(made) if len(made) > 1 else len(bits)
    bits.zero_()[:batch, :, : made.shape[2], : made.shape[3]] = made
    return bits


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    bits: Tensor,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in its tensor's shape, dtype and order of strides."""
    return _place(how).backward(grad_out, query, key, value, out, lse, grad_lse, bits, How(*how))


def _place(how: tuple[Any, ...]) -> Any:
    """The module that computes a call: packed sequences one after the other, or whole tensors."""
    return packed if How(*how).packed else attention
