"""Calls with padding between their tokens on a CPU: it is blanked, and hidden by a mask.

In: rows in the order of blocks, and how many rows of each run of 64 hold tokens (``sizes_q``, ``sizes_k`` of
:class:`How`). Out: maps in which blocks without tokens are invisible; zeros and -inf where the padding is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import allocate
from ..block_map import BlockMap
from ..how import How
from ..order import held_slots
from . import attention


def block_map(query: Tensor, key: Tensor, thresholds: Tensor, how: How) -> BlockMap:
    """The block map, in which no padding has a part."""
    query, key = _blank(query, how.sizes_q), _blank(key, how.sizes_k)
    return attention.block_map(query, key, thresholds, _hidden(how, query, key))


def forward(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, how: How
) -> tuple[Tensor, Tensor]:
    """out [B, H, L, Dv] and lse [B, H, L]."""
    held = _held(how.sizes_q, query)
    key, value = (_blank(x, how.sizes_k) for x in (key, value))
    out, lse = attention.forward(_blank(query, how.sizes_q), key, value, counts, indices, _hidden(how, query, key))
    if held is not None:
        out.masked_fill_(~held.unsqueeze(-1), 0.0), lse.masked_fill_(~held, -math.inf)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    bits: Tensor,
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, 0 in padding."""
    grad_out, query, out = (_blank(x, how.sizes_q) for x in (grad_out, query, out))
    key, value = (_blank(x, how.sizes_k) for x in (key, value))
    return attention.backward(grad_out, query, key, value, out, lse, grad_lse, bits, _hidden(how, query, key))


def _held(sizes: Tensor | None, x: Tensor) -> Tensor | None:
    """bool [L]: the rows of x [B, H, L, D] that hold tokens; None where all do."""
    return None if sizes is None else held_slots(sizes)[: x.shape[2]]


def _blank(x: Tensor, sizes: Tensor | None) -> Tensor:
    """x [B, H, L, D] with zeros in padding."""
    held = _held(sizes, x)
    return x if held is None else torch.where(held.unsqueeze(-1), x, x.new_zeros(()), out=allocate.dense_like(x))


def _hidden(how: How, query: Tensor, key: Tensor) -> How:
    """The same with a mask that hides padding, from padding, too, where each row has its own mask."""
    mask, rows, keys = how.attn_mask, _held(how.sizes_q, query), _held(how.sizes_k, key)
    if mask is not None and mask.shape[2] > 1 and rows is not None:
        mask = _closed(mask, rows.unsqueeze(-1))
    if keys is not None:
        mask = keys.view(1, 1, 1, -1) if mask is None else _closed(mask, keys)
    return how._replace(attn_mask=mask, sizes_k=None)


def _closed(mask: Tensor, seen: Tensor) -> Tensor:
    """A mask that lets no pair through beside those of ``seen``."""
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
