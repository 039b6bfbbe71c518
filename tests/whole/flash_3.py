"""A stand-in of flash-attn 3: its op with its true schema on a CPU, its functions, and diffusers' op."""

from __future__ import annotations

import torch
from dense_attention import bottom_right, dense, dense_backward, dense_packed, dense_packed_backward
from torch import Tensor

LIBRARY = torch.library.Library("sparge_flash_3", "DEF")
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, Tensor? out_=None"
_LENGTHS = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
_LENGTHS += "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None"
_CACHE = "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
_CACHE += "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None"
_HOW = "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
_HOW += "bool causal=False, int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, "
_HOW += "float softcap=0.0, bool rotary_interleaved=True, Tensor? scheduler_metadata=None, int num_splits=1, "
_HOW += "bool? pack_gqa=None, int sm_margin=0"
LIBRARY.define(
    f"_flash_attn_forward({_TENSORS}, {_LENGTHS}, {_CACHE}, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor)",
)
LIBRARY.define(
    "_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "float? softmax_scale, bool is_causal) -> (Tensor, Tensor, Tensor)"
)


def _forward(*args, **kwargs):
    given = {**dict(zip((x.name for x in op._schema.arguments), args, strict=False)), **kwargs}
    q, k, v, *lengths = (given.get(name) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
    lengths[1] = lengths[0] if lengths[1] is None else lengths[1]
    how = {"causal": bottom_right(given.get("causal", False)), "softcap": given.get("softcap", 0.0)}
    how["window"] = (given.get("window_size_left", -1), given.get("window_size_right", -1))
    if lengths[0] is None:
        out, lse = dense(q, k, v, given.get("softmax_scale"), **how)
    else:
        out, lse = dense_packed(q, k, v, *lengths, given.get("softmax_scale"), **how)
    return out, lse, q.new_empty(0), q.new_empty(0)


def _fake(q, k, v, *rest, **how):
    lse = q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse, q.new_empty(0), q.new_empty(0)


def _backward(dout, q, k, v, cu_q, cu_k, scale, causal):
    if cu_q is None:
        return dense_backward(dout, q, k, v, scale, bottom_right(causal))
    return dense_packed_backward(dout, q, k, v, cu_q, cu_k, scale, bottom_right(causal))


LIBRARY.impl("_flash_attn_forward", _forward, "CPU")
LIBRARY.impl("_flash_attn_backward", _backward, "CPU")
torch.library.register_fake("sparge_flash_3::_flash_attn_forward", _fake, lib=LIBRARY)
torch.library.register_fake(
    "sparge_flash_3::_flash_attn_backward",
    lambda dout, q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))),
    lib=LIBRARY,
)
op = torch.ops.sparge_flash_3._flash_attn_forward.default


class Flash(torch.autograd.Function):
    """Packed sequences where ``cu_q`` is given."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window, softcap, used_k, splits, with_lse):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        lengths = (cu_q, cu_k, None, None, used_k, max_q, max_k)
        none = (None,) * 6
        how = {"window_size_left": window[0], "window_size_right": window[1], "softcap": softcap, "num_splits": splits}
        out, lse, *_ = op(q, k, v, *(None,) * 4, *lengths, *none, *(None,) * 3, scale, causal=causal, **how)
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        ctx.scale, ctx.causal = scale, causal
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, grad, *_):
        q, k, v, cu_q, cu_k = ctx.saved_tensors
        grads = torch.ops.sparge_flash_3._flash_attn_backward(grad, q, k, v, cu_q, cu_k, ctx.scale, ctx.causal)
        return *grads, *(None,) * 11


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, num_splits=1, return_attn_probs=False
):
    """Fixed lengths."""
    how = (softmax_scale, causal, window_size, softcap, None, num_splits, return_attn_probs)
    return Flash.apply(q, k, v, None, None, None, None, *how)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    seqused_k=None,
):
    """Packed sequences."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return Flash.apply(q, k, v, *lengths, softmax_scale, causal, window_size, softcap, seqused_k, 1, False)


@torch.library.custom_op("_sparge_diffusers_flash_attn_3::_flash_attn_forward", mutates_args=())
def diffusers_flash_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    out, lse = dense(q, k, v, softmax_scale, bottom_right(causal), softcap=softcap)
    return out, lse.permute(0, 2, 1).contiguous()


@diffusers_flash_3.register_fake
def _(q, k, v, *args, **how):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.scale, ctx.causal = inputs[3:5]


def _gradients(ctx, grad, *_):
    return *dense_backward(grad, *ctx.saved_tensors, ctx.scale, bottom_right(ctx.causal)), *(None,) * 12


diffusers_flash_3.register_autograd(_gradients, setup_context=_keep)
