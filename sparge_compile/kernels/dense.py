"""Dense attention by torch's own kernels, below a limit: SDPA for inference, flash kernels where a backward follows.

These give the log-sum-exp that the op promises, and their backward takes it: so an op may be dense at run time, in a
graph that was compiled for both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import allocate
from .how import How

# Of wider heads not every GPU has a flash backward.
_WIDEST = 192


def is_sdpa(query: Tensor, key: Tensor, how: How) -> bool:
    """Whether dense attention is a call of SDPA, which aligns causality to the top left."""
    aligned = not how.is_causal or how.diagonal(query.shape[2], key.shape[2]) == 0
    return aligned and how.attn_mask is None and not how.packed


def attend(query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
    """What torch takes for the fastest dense attention, where the op promises it."""
    shared = query.shape[1] != key.shape[1]
    found = F.scaled_dot_product_attention(
        query, key, value, is_causal=how.is_causal, scale=how.scale, enable_gqa=shared
    )
    return _placed(found, allocate.new_out(query, value))


def has_backward(query: Tensor, key: Tensor, value: Tensor, how: How) -> bool:
    """Whether torch's flash kernels take a call, forward and backward."""
    head_size, value_head_size = query.shape[3], value.shape[3]
    if not is_sdpa(query, key, how) or head_size != value_head_size or not query.numel() or not key.numel():
        return False
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return False
    if query.device.type == "cpu":
        return query.shape[1] == key.shape[1]
    if head_size > _WIDEST or head_size % 8 or torch.version.hip is not None:
        return False
    shared = query.shape[1] != key.shape[1]
    given = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, how.is_causal, shared)
    return torch.backends.cuda.can_use_flash_attention(given)


def attend_for_backward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], log-sum-exp [B, H, L]) of a call that :func:`has_backward` lets through."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    else:
        flash = aten._scaled_dot_product_flash_attention.default
    out, lse, *_ = flash(query, key, value, 0.0, how.is_causal, scale=how.scale)
    return _placed(out, allocate.new_out(query, value)), _placed(lse, allocate.new_lse(query))


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    aten, saved = torch.ops.aten, (query, key, value, out, lse)
    if query.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        grads = flash(grad_out, *saved, 0.0, how.is_causal, scale=how.scale)
    else:
        flash = aten._scaled_dot_product_flash_attention_backward.default
        random = torch.empty(2, dtype=torch.uint64, device=query.device)  # read where there is dropout
        lengths = None, None, query.shape[2], key.shape[2]
        grads = flash(grad_out, *saved, *lengths, 0.0, how.is_causal, random, random, scale=how.scale)
    dq, dk, dv = (_placed(x, allocate.dense_like(like)) for x, like in zip(grads, (query, key, value), strict=True))
    return dq, dk, dv


def _placed(found: Tensor, room: Tensor) -> Tensor:
    """A result with the strides, and of the dtype, that the op promises."""
    return found if (found.stride(), found.dtype) == (room.stride(), room.dtype) else room.copy_(found)
