"""Calls of other libraries that must stay: another meaning, results that are read, more in a function than a call."""

from __future__ import annotations

import flash_2
import flash_3
import torch
from lookalikes import lookalike
from spelling import SCALE, D, H, blhd
from spellings_packed import LONGEST, lengths, packed
from torch import Tensor

from sparge_compile.report import Reason

NAMED, GIVEN = {"kinds": ("op",)}, {"kinds": ("flash_attn", "varlen", "sage")}
FIXED = {"inputs": blhd}
LIBRARY = torch.library.Library("sparge_named", "DEF")


def define(schema: str) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, lambda *x: x[0] + 0, "CPU")
    torch.library.register_fake(f"sparge_named::{name}", lambda *x: torch.empty_like(x[0]), lib=LIBRARY)


define("_flash_attn_forward(Tensor q, Tensor k, Tensor v) -> Tensor")
define("na2d_forward(Tensor query, Tensor key, Tensor value, int[] kernel_size) -> Tensor")
define("fused_attn_fwd(Tensor Q, Tensor K, Tensor V, float attn_scale) -> Tensor")
define("sol_attn(Tensor q, Tensor k, Tensor v, float tau) -> Tensor")
define("unified_attention(Tensor query, Tensor key, Tensor value, str layer_name) -> Tensor")
define("fastvideo_block_sparse_attn_bshd(Tensor q, Tensor k, Tensor v, float sparsity) -> Tensor")
named = torch.ops.sparge_named


@lookalike(Reason.CUSTOM_OP, **FIXED, **NAMED)
def an_op_of_that_name_with_other_arguments(q, k, v):
    return named._flash_attn_forward(q, k, v)


@lookalike(Reason.CUSTOM_OP, **FIXED, **NAMED)
def natten(q, k, v):
    return named.na2d_forward(q, k, v, [3, 3])


@lookalike(Reason.CUSTOM_OP, **FIXED, **NAMED)
def transformer_engine(q, k, v):
    return named.fused_attn_fwd(q, k, v, SCALE)


@lookalike(Reason.CUSTOM_OP, **FIXED, **NAMED)
def comfy(q, k, v):
    return named.sol_attn(q, k, v, 0.8)


@lookalike(Reason.CUSTOM_OP, **FIXED, **NAMED)
def vllm(q, k, v):
    return named.unified_attention(q, k, v, "layers.0") + named.fastvideo_block_sparse_attn_bshd(q, k, v, 0.9)


@lookalike(Reason.OUTPUTS_USED, **FIXED, **GIVEN)
def two_halves_of_the_keys_are_merged(q, k, v):
    """Ring attention: each half with its log-sum-exp."""
    parts = [
        flash_2.flash_attn_func(q, k[:, half], v[:, half], return_attn_probs=True)[:2]
        for half in (slice(0, 100), slice(100, None))
    ]
    (a, lse_a), (b, lse_b) = parts
    share = torch.sigmoid(lse_a - lse_b).transpose(1, 2)[..., None]
    return a * share + b * (1 - share)


@lookalike(Reason.ARGUMENT, inputs=packed(), **GIVEN)
def keys_that_are_used_in_part(q, k, v, cu_q, cu_k):
    used = (cu_k[1:] - cu_k[:-1]) // 2
    return flash_3.flash_attn_varlen_func(q, k, v, **lengths(cu_q, cu_k), seqused_k=used)


@lookalike(Reason.ARGUMENT, inputs=packed(), **GIVEN)
def lengths_in_another_dtype(q, k, v, cu_q, cu_k):
    return flash_2.flash_attn_varlen_func(q, k, v, **lengths(cu_q.long(), cu_k.long()))


@lookalike(Reason.ARGUMENT, inputs=packed(), **GIVEN)
def lengths_of_the_queries_alone(q, k, v, cu_q, cu_k):
    return flash_3.op(q, k[: q.shape[0]], v[: q.shape[0]], cu_seqlens_q=cu_q, max_seqlen_q=LONGEST[0])[0]


@lookalike(Reason.ARGUMENT, **FIXED, **GIVEN)
def operands_that_are_scaled_back(q, k, v):
    return flash_3.op(q, k, v, q_descale=torch.ones(1), softmax_scale=SCALE)[0]


@lookalike(Reason.ARGUMENT, **FIXED, **GIVEN)
def chunked_attention(q, k, v):
    return flash_3.op(q, k, v, softmax_scale=SCALE, causal=True, attention_chunk=64)[0]


@lookalike(Reason.ARGUMENT, **FIXED, **GIVEN)
def new_keys_for_a_cache(q, k, v):
    return flash_3.op(q, k, v, k_new=k[:, :1], v_new=v[:, :1], softmax_scale=SCALE)[0]


class OfItsOwn(torch.autograd.Function):
    """Attention in a function of somebody's own: what surrounds it, and its backward, are not the call's."""

    @staticmethod
    def forward(ctx, q, k, v, factor, gradients):
        out, *_ = flash_3.op(q * factor if factor != 1 else q, k, v, softmax_scale=SCALE)
        ctx.save_for_backward(q, k, v)
        ctx.gradients = gradients
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        if ctx.gradients == "straight through":
            return grad * 2, None, None, None, None
        dq, dk, dv = torch.ops.sparge_flash_3._flash_attn_backward(grad, q, k, v, None, None, SCALE, False)
        if ctx.gradients == "scaled":
            dk = dk * 0.5
        if ctx.gradients == "filled":
            dk = torch.empty_like(dk)
            dk[:, :10] = grad[:, :10]
        return None if ctx.gradients == "without the query's" else dq, dk, dv, None, None


def with_gradients() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 150, H, D, requires_grad=True) for _ in "qkv")


@lookalike(Reason.CUSTOM_OP, inputs=with_gradients, **NAMED)
def a_function_that_scales_the_query(q, k, v):
    return OfItsOwn.apply(q, k, v, 2.0, "all")


@lookalike(Reason.CUSTOM_OP, inputs=with_gradients, **NAMED)
def a_function_with_another_backward(q, k, v):
    return OfItsOwn.apply(q, k, v, 1, "straight through")


@lookalike(Reason.CUSTOM_OP, inputs=with_gradients, **NAMED)
def a_function_that_scales_a_gradient(q, k, v):
    return OfItsOwn.apply(q, k, v, 1, "scaled")


@lookalike(Reason.CUSTOM_OP, inputs=with_gradients, **NAMED)
def a_function_that_fills_a_gradient(q, k, v):
    return OfItsOwn.apply(q, k, v, 1, "filled")


@lookalike(Reason.CUSTOM_OP, inputs=with_gradients, **NAMED)
def a_function_that_keeps_a_gradient_back(q, k, v):
    return OfItsOwn.apply(q, k, v, 1, "without the query's")


@lookalike(Reason.OUTPUTS_USED, inputs=with_gradients, **GIVEN)
def statistics_of_a_function_that_are_read(q, k, v):
    out, lse = flash_3.flash_attn_func(q, k, v, return_attn_probs=True)
    return out + lse.mean()


@lookalike(Reason.WINDOW, Reason.SOFTCAP, inputs=with_gradients, **GIVEN)
def a_window_and_a_softcap_in_training(q, k, v):
    out = flash_3.flash_attn_func(q, k, v, window_size=(30, 0))
    return out + flash_2.flash_attn_func(q, k, v, softcap=15.0)
