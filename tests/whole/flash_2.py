"""A stand-in of flash-attn 2: its ops with their true schemas on a CPU, and functions that call them as it does.

The namespace is ours, as a build from the Hub has one of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dense_attention import bottom_right, dense, dense_backward, dense_packed, dense_packed_backward
from torch import Tensor


def random_state() -> Tensor:
    return torch.zeros(2, dtype=torch.int64)


@torch.library.custom_op("sparge_flash_2_3f9a1c::_flash_attn_forward", mutates_args=())
def flash_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = {"window": (window_size_left, window_size_right), "softcap": softcap, "slopes": alibi_slopes}
    out, lse = dense(q, k, v, softmax_scale, bottom_right(causal), p=dropout_p, **how)
    return out, lse, q.new_empty(0), random_state()


@flash_2.register_fake
def _(q, k, v, *args, **kwargs):
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


@torch.library.custom_op("sparge_flash_2_3f9a1c::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def flash_2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    causal: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    grads = dense_backward(dout, q, k, v, softmax_scale, bottom_right(causal))
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)
    return torch.zeros_like(softmax_lse)


@flash_2_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, *args, **kwargs):
    return torch.empty_like(softmax_lse)


@torch.library.custom_op("sparge_flash_2_3f9a1c::_flash_attn_varlen_forward", mutates_args=())
def flash_2_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = {"window": (window_size_left, window_size_right), "softcap": softcap, "slopes": alibi_slopes, "p": dropout_p}
    out, lse = dense_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, bottom_right(causal), **how)
    return out, lse, q.new_empty(0), random_state()


@flash_2_varlen.register_fake
def _(q, k, v, *args, **kwargs):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


@torch.library.custom_op("sparge_flash_2_3f9a1c::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def flash_2_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    packed = (cu_seqlens_q, cu_seqlens_k, softmax_scale, bottom_right(causal))
    for into, grad in zip((dq, dk, dv), dense_packed_backward(dout, q, k, v, *packed), strict=True):
        into.copy_(grad)
    return torch.zeros_like(softmax_lse)


@flash_2_varlen_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, *args, **kwargs):
    return torch.empty_like(softmax_lse)


_forward = torch.ops.sparge_flash_2_3f9a1c._flash_attn_forward
_varlen_forward = torch.ops.sparge_flash_2_3f9a1c._flash_attn_varlen_forward
_backward = torch.ops.sparge_flash_2_3f9a1c._flash_attn_backward
_varlen_backward = torch.ops.sparge_flash_2_3f9a1c._flash_attn_varlen_backward


def padded(size, *tensors):
    """Head sizes are padded to a multiple of 8."""
    return tuple(F.pad(x, [0, 8 - size % 8]) for x in tensors) if size % 8 else tensors


class Flash(torch.autograd.Function):
    """Of q, k, v, of q and kv, or of qkv; packed sequences where ``cu_q`` is given."""

    @staticmethod
    def forward(ctx, p, scale, causal, window, softcap, slopes, with_softmax, max_q, max_k, cu_q, cu_k, q, k, v):
        packed, operands = cu_q is not None, 1 if k is None else 2 if v is None else 3
        axis = 1 if packed else 2
        if operands == 1:
            q, k, v = q.select(axis, 0).detach(), q.select(axis, 1).detach(), q.select(axis, 2).detach()
        elif operands == 2:
            k, v = k.select(axis, 0).detach(), k.select(axis, 1).detach()
        size = q.shape[-1]
        scale = size**-0.5 if scale is None else scale
        q, k, v = padded(size, q, k, v)
        how = {"causal": causal, "window_size_left": window[0], "window_size_right": window[1], "softcap": softcap}
        how |= {"alibi_slopes": slopes, "return_softmax": with_softmax and p > 0}
        if packed:
            given = (cu_q, cu_k, max_q, max_k, p, scale)
            out, lse, weights, state = _varlen_forward(q, k, v, *given, **how, block_table=None)
            ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        else:
            out, lse, weights, state = _forward(q, k, v, p, scale, **how)
            ctx.save_for_backward(q, k, v, out, lse, state)
        ctx.scale, ctx.causal, ctx.operands, ctx.packed = scale, causal or window == (-1, 0), operands, packed
        out = out[..., :size]
        return (out, lse, weights) if with_softmax else out

    @staticmethod
    def backward(ctx, grad, *_):
        q, k, v, out, lse, *rest = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        size = grad.shape[-1]
        (grad,) = padded(size, grad)
        if ctx.packed:
            _varlen_backward(grad, q, k, v, out, lse, dq, dk, dv, *rest, ctx.scale, ctx.causal)
        else:
            _backward(grad, q, k, v, out, lse, dq, dk, dv, ctx.scale, ctx.causal, *rest)
        dq, dk, dv = dq[..., :size], dk[..., :size], dv[..., :size]
        if ctx.operands == 1:
            return *(None,) * 11, torch.stack([dq, dk, dv], -3), None, None
        return *(None,) * 11, dq, *((torch.stack([dk, dv], -3), None) if ctx.operands == 2 else (dk, dv))


def _call(tensors, cu_q, cu_k, max_q, max_k, p, scale, causal, window, softcap, slopes, probs):
    none = (None,) * (3 - len(tensors))
    return Flash.apply(p, scale, causal, window, softcap, slopes, probs, max_q, max_k, cu_q, cu_k, *tensors, *none)


def flash_attn_func(
    *tensors,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    return_attn_probs=False,
):
    """flash_attn_func, flash_attn_kvpacked_func and flash_attn_qkvpacked_func, by the number of tensors."""
    how = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _call(tensors, None, None, None, None, *how)


def flash_attn_varlen_func(
    *tensors,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    return_attn_probs=False,
):
    """The same for packed sequences."""
    how = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _call(tensors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *how)
