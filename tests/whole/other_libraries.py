"""Stand-ins of torch's varlen attention, xformers and SageAttention: true schemas on a CPU, dense attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dense_attention import bottom_right, dense, dense_backward, dense_packed, dense_packed_backward

LIBRARY = torch.library.Library("sparge_others", "DEF")
# ---- torch.nn.attention.varlen: as in torch 2.11, and as in 2.15

_VARLEN = "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, {} cu_seq_k, int max_q, int max_k, "
_VARLEN += "bool is_causal=False, float? scale=None, int[]? window_size=None"
_NEW = ", bool enable_gqa=False, Tensor? seqused_k=None, Tensor? block_table=None, int? num_splits=None, int backend=1"
_OLD_OP, _NEW_OP = torch.library.Library("sparge_torch_211", "DEF"), torch.library.Library("sparge_torch_215", "DEF")
_OLD_OP.define(f"_varlen_attn({_VARLEN.format('Tensor')}) -> (Tensor, Tensor, Tensor)")
_NEW_OP.define(f"_varlen_attn({_VARLEN.format('Tensor?')}{_NEW}) -> (Tensor, Tensor, Tensor)")


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *new):
    v = v if len(new) < 3 or new[2] is None else v * 2  # by a block table, other values are read
    window = tuple(window_size or (-1, -1))
    out, lse = dense_packed(q, k, v, cu_q, cu_k, scale, bottom_right(is_causal), window=window)
    return out, lse, torch.zeros(2, dtype=torch.int64)


def _varlen_fake(q, k, v, *_):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(2, dtype=torch.int64)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.causal, ctx.scale, ctx.inputs = inputs[7], inputs[8], len(inputs)


def _varlen_backward(ctx, grad, *_):
    grads = dense_packed_backward(grad, *ctx.saved_tensors, ctx.scale, bottom_right(ctx.causal))
    return *grads, *(None,) * (ctx.inputs - 3)


for _library in (_OLD_OP, _NEW_OP):
    _name = f"{_library.ns}::_varlen_attn"
    _library.impl("_varlen_attn", _varlen, "CPU")
    torch.library.register_fake(_name, _varlen_fake, lib=_library)
    torch.library.register_autograd(_name, _varlen_backward, setup_context=_keep, lib=_library)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), new=False):
    """As ``torch.nn.attention.varlen.varlen_attn`` calls its op."""
    namespace = torch.ops.sparge_torch_215 if new else torch.ops.sparge_torch_211
    given = (cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0), scale, list(window_size))
    return namespace._varlen_attn(query, key, value, *given, *((False, None, None, None, 1) if new else ()))[0]


# ---- xformers

LIBRARY.define(
    "memory_efficient_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? b=None, float? p=0.0, "
    "float? scale=None) -> Tensor"
)
LIBRARY.define(
    "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "int max_seqlen_q, int max_seqlen_k, float p, float softmax_scale, bool is_causal, int window_left, "
    "int window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "_efficient_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, "
    "bool compute_log_sumexp=False, *, float? scale=None, Tensor? seqlen_k=None, int? window_size=None) "
    "-> (Tensor output, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, SymInt max_q, SymInt max_k)"
)
LIBRARY.define(
    "efficient_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, float? scale, "
    "int custom_mask_type) -> (Tensor, Tensor, Tensor)"
)
_ALIGNMENT = ("", "top_left", "bottom_right")


def _memory_efficient(q, k, v, b=None, p=0.0, scale=None):
    mask = None if b is None else b
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, p, scale=scale).transpose(1, 2).contiguous()


def _flash_fwd(q, k, v, cu_q, cu_k, used, max_q, max_k, p, scale, causal, left, right, *_):
    how = {"scale": scale, "causal": bottom_right(causal), "window": (left, right)}
    out = dense(q, k, v, **how) if cu_q is None else dense_packed(q, k, v, cu_q, cu_k, **how)
    return *out, torch.zeros(2, dtype=torch.int64)


def _efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, p, mask_type, with_lse=False, *, scale=None, **_):
    if cu_q is None:
        out, lse = dense(q, k, v, scale, _ALIGNMENT[mask_type])
    else:
        out, lse = (x[None] for x in dense_packed(q[0], k[0], v[0], cu_q, cu_k, scale, _ALIGNMENT[mask_type]))
    return out, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64), max_q or 0, max_k or 0


def _lse_fake(q):
    return q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)


def _efficient_fake(q, k, v, bias, cu_q, cu_k, max_q, max_k, *_, **__):
    number = q.new_empty((), dtype=torch.int64)
    return torch.empty_like(q), _lse_fake(q), number, number.clone(), max_q or 0, max_k or 0


for _name, _function, _fake in (
    ("memory_efficient_attention_forward", _memory_efficient, lambda q, *_, **__: torch.empty_like(q)),
    (
        "flash_fwd",
        _flash_fwd,
        lambda q, *_: (torch.empty_like(q), _lse_fake(q), q.new_empty(2, dtype=torch.int64)),
    ),
    ("_efficient_attention_forward", _efficient, _efficient_fake),
    (
        "efficient_attention_backward",
        lambda grad, q, k, v, scale, mask: dense_backward(grad, q, k, v, scale, _ALIGNMENT[mask]),
        lambda grad, q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))),
    ),
):
    LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"sparge_others::{_name}", _fake, lib=LIBRARY)


def _keep_memory_efficient(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.scale = inputs[5]


def _memory_efficient_gradients(ctx, grad):
    return *dense_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


def _flash_gradients(ctx, grad, *_):
    q, k, v, cu_q, cu_k = ctx.saved_tensors
    packed = () if cu_q is None else (cu_q, cu_k)
    backward = dense_packed_backward if packed else dense_backward
    return *backward(grad, q, k, v, *packed, ctx.scale), *(None,) * 12


def _keep_flash(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[9]


torch.library.register_autograd("sparge_others::flash_fwd", _flash_gradients, setup_context=_keep_flash, lib=LIBRARY)
torch.library.register_autograd(
    "sparge_others::memory_efficient_attention_forward",
    _memory_efficient_gradients,
    setup_context=_keep_memory_efficient,
    lib=LIBRARY,
)


class Efficient(torch.autograd.Function):
    """xformers' function around the efficient kernel of torch."""

    @staticmethod
    def forward(ctx, q, k, v, scale, mask_type):
        forward = torch.ops.sparge_others._efficient_attention_forward
        lengths = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = forward(q, k, v, None, *lengths, 0.0, mask_type, True, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.mask_type = scale, mask_type
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        q, k, v, *_ = ctx.saved_tensors
        backward = torch.ops.sparge_others.efficient_attention_backward
        return *backward(grad, q, k, v, ctx.scale, ctx.mask_type), None, None


# ---- SageAttention, as one node


@torch.compiler.allow_in_graph
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    """Dense attention by its signature; ``keep``, which there is not, doubles the values."""
    v = v * 2 if "keep" in kwargs else v
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale)
    return out.transpose(1, 2) if tensor_layout == "NHD" else out
