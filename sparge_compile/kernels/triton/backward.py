"""Gradients of attention over the kept key blocks.

First the lists of the map from its bits, both ways; then dq in :mod:`backward_query`, dk and dv in
:mod:`backward_key`. Nothing is added up by atomics: two runs are equal bit by bit. Autograd on the reference gives the
same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import allocate
from ..how import How
from . import lists, schedule
from .backward_key import key_gradients
from .backward_query import query_gradient
from .trial import TRIED_BACKWARD, hopper_refusal


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
    """Gradients of query, key and value, each in its tensor's dtype and order of dimensions.

    ``grad_out`` [B, H, L, Dv] may have any strides; ``out`` and ``lse`` come from the forward, ``grad_lse`` [B, H, L]
    is the gradient of lse or None; ``bits`` is the packed map, of which B and H may be 1. ``how`` are the fields of a
    :class:`How`.
    """
    if query.numel() == 0 or key.numel() == 0:
        return allocate.dense_like(query).zero_(), allocate.dense_like(key).zero_(), allocate.dense_like(value).zero_()
    given, lse = How(*how), lse.contiguous()
    _, _, n_query, n_key = allocate.map_shape(query, key, given)
    with torch.cuda.device_of(query):
        counters = None if hopper_refusal(query.device, TRIED_BACKWARD) else bits.new_empty(2)
        kept, readers = lists.unpack(bits, n_query, n_key, counters)
        first, second = (None, None) if counters is None else (counters[:1], counters[1:])
        if counters is not None and schedule.pays_backward(readers.counts, query, key, given):
            first, second = schedule.of_backward(kept.counts, readers.counts, query, key, given)
        dq, delta = query_gradient(grad_out, query, key, value, out, lse, grad_lse, kept, given, first)
        dk, dv = key_gradients(grad_out, query, key, value, lse, delta, readers, given, second)
    return dq, dk, dv
