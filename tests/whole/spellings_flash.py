"""Spellings by other libraries: calls of flash-attn 2 and 3, xformers and SageAttention. Inputs are [B, L, H, D]."""

from __future__ import annotations

import flash_2
import flash_3
import other_libraries as others
import torch
from spelling import GROUP, SCALE, B, D, H, L, S, blhd, sdpa_blhd, spelling

from sparge_compile.report import Reason

KV = H // GROUP
WINDOW, SOFTCAP, DROPOUT = (Reason.WINDOW,), (Reason.SOFTCAP,), (Reason.DROPOUT,)
READ = (Reason.OUTPUTS_USED,)
FLASH = {"kind": "flash_attn", "inputs": blhd, "same": sdpa_blhd}


def square(kv_heads=H, size=D):
    """q [B, L, H, D], k and v [B, L, Hk, D]."""
    return lambda: (torch.randn(B, L, H, size), *(torch.randn(B, L, kv_heads, size) for _ in "kv"))


def same(**how):
    def function(attend, *tensors):
        if len(tensors) < 3:
            tensors = (*tensors[:-1], *tensors[-1].unbind(2))
        return attend(*(x.transpose(1, 2) for x in tensors), **how).transpose(1, 2)

    return function


def last_queries_see_all(length=L, keys=S):
    return torch.ones(length, keys, dtype=torch.bool).tril(keys - length)


# Causality from the bottom right is not SDPA's, and as a mask it has another block map.
BOTTOM_RIGHT = {**FLASH, "same": same(scale=SCALE, attn_mask=last_queries_see_all()), "mask": None}
CAUSAL = {"same": same(scale=SCALE, is_causal=True), "length": L, "keys": L, "is_causal": True}


# ---- flash-attn 2


@spelling(twin={"softcap": 20.0}, why=SOFTCAP, **FLASH)
def flash_2_call(q, k, v, softcap=0.0):
    return flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, softcap=softcap)


@spelling(twin={"window": (64, -1)}, why=WINDOW, kind="flash_attn", inputs=blhd, same=same())
def flash_2_with_its_own_scale(q, k, v, window=(-1, -1)):
    return flash_2.flash_attn_func(q, k, v, window_size=window)


@spelling(twin={"window": (20, 0)}, why=WINDOW, kind="flash_attn", inputs=square(), **CAUSAL)
def flash_2_causal(q, k, v, window=(-1, -1)):
    return flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, causal=True, window_size=window)


@spelling(twin={"softcap": 20.0}, why=SOFTCAP, is_causal=True, **BOTTOM_RIGHT)
def flash_2_causal_from_the_bottom_right(q, k, v, softcap=0.0):
    return flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, causal=True, softcap=softcap)


@spelling(twin={"window": (-1, 3)}, why=WINDOW, is_causal=True, **BOTTOM_RIGHT)
def flash_2_window_that_ends_at_the_query(q, k, v, window=(-1, 0)):
    return flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, window_size=window)


@spelling(
    twin={"slopes": True},
    why=(Reason.ALIBI,),
    kind="flash_attn",
    inputs=square(size=12),
    same=same(scale=SCALE),
    length=L,
    keys=L,
    head_size=16,
)
def flash_2_pads_the_head_size(q, k, v, slopes=False):
    slopes = torch.arange(H, dtype=torch.float32) / 8 if slopes else None
    return flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, alibi_slopes=slopes)


@spelling(
    twin={"softcap": 20.0},
    why=SOFTCAP,
    kind="flash_attn",
    inputs=square(KV),
    same=same(scale=SCALE, enable_gqa=True),
    group=GROUP,
    length=L,
    keys=L,
)
def flash_2_grouped(q, k, v, softcap=0.0):
    return flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, softcap=softcap)


@spelling(
    twin={"softcap": 20.0},
    why=SOFTCAP,
    kind="flash_attn",
    inputs=square(1),
    same=same(scale=SCALE, enable_gqa=True),
    group=H,
    length=L,
    keys=L,
)
def flash_2_one_key_head(q, k, v, softcap=0.0):
    return flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, softcap=softcap)


@spelling(
    twin={"window": (9, 9)},
    why=WINDOW,
    kind="flash_attn",
    inputs=lambda: (torch.randn(B, L, 3, H, D),),
    same=same(scale=SCALE),
    length=L,
    keys=L,
)
def flash_2_qkv_packed(qkv, window=(-1, -1)):
    return flash_2.flash_attn_func(qkv, softmax_scale=SCALE, window_size=window)


@spelling(
    twin={"window": (9, 9)},
    why=WINDOW,
    kind="flash_attn",
    inputs=lambda: (torch.randn(B, L, H, D), torch.randn(B, S, 2, H, D)),
    same=same(scale=SCALE),
)
def flash_2_kv_packed(q, kv, window=(-1, -1)):
    return flash_2.flash_attn_func(q, kv, softmax_scale=SCALE, window_size=window)


@spelling(twin={"p": 0.1}, why=DROPOUT, **FLASH)
def flash_2_whose_statistics_nobody_reads(q, k, v, p=0.0):
    return flash_2.flash_attn_func(q, k, v, dropout_p=p, softmax_scale=SCALE, return_attn_probs=True)[0]


@spelling(twin={"lse": True}, why=READ, **FLASH)
def flash_2_whose_statistics_are_read(q, k, v, lse=False):
    out, statistics, _ = flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, return_attn_probs=True)
    return out + statistics.transpose(1, 2)[..., None] if lse else out


@spelling(
    twin={"softcap": 20.0},
    why=SOFTCAP,
    kind="flash_attn",
    inputs=lambda: (torch.randn(B, L, H * D), torch.randn(B, S, H * D), torch.randn(B, S, H * D)),
    same=lambda attend, *x: (
        attend(*(y.unflatten(2, (H, D)).transpose(1, 2) for y in x), scale=SCALE).transpose(1, 2).flatten(2)
    ),
)
def flash_2_in_a_layer(x, y, z, softcap=0.0):
    """Heads are [B, H, L, D] for the rotation, and transposed for the call; its result is viewed as [B, L, C]."""
    q, k, v = (w.view(B, -1, H, D).transpose(1, 2) * 1.0 for w in (x, y, z))
    q, k, v = (w.transpose(1, 2) for w in (q, k, v))
    return flash_2.flash_attn_func(q, k, v, softmax_scale=SCALE, softcap=softcap).reshape(B, L, H * D)


# ---- flash-attn 3


@spelling(twin={"softcap": 20.0}, why=SOFTCAP, **FLASH)
def flash_3_call(q, k, v, softcap=0.0):
    return flash_3.flash_attn_func(q, k, v, softmax_scale=SCALE, softcap=softcap)


@spelling(twin={"lse": True}, why=READ, **FLASH)
def flash_3_that_gives_a_tuple(q, k, v, lse=False):
    out, statistics = flash_3.flash_attn_func(q, k, v, softmax_scale=SCALE, num_splits=2, return_attn_probs=True)
    return out * statistics.exp().transpose(1, 2)[..., None] if lse else out


@spelling(twin={"window": (-1, 7)}, why=WINDOW, is_causal=True, **BOTTOM_RIGHT)
def flash_3_causal(q, k, v, window=None):
    causal = window is None
    return flash_3.flash_attn_func(q, k, v, softmax_scale=SCALE, causal=causal, window_size=window or (-1, -1))


@spelling(twin={"softcap": 20.0}, why=SOFTCAP, **FLASH)
def flash_3_of_memory_in_another_order(q, k, v, softcap=0.0):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return flash_3.flash_attn_func(q, k, v, softmax_scale=SCALE, softcap=softcap).view(B, L, H * D).view(B, L, H, D)


@spelling(
    twin={"softcap": 20.0},
    why=SOFTCAP,
    kind="flash_attn",
    inputs=blhd,
    same=sdpa_blhd,
)
def flash_3_of_diffusers(q, k, v, softcap=0.0):
    return flash_3.diffusers_flash_3(q, k, v, softmax_scale=SCALE, softcap=softcap)[0]


# ---- xformers


@spelling(twin={"p": 0.1}, why=DROPOUT, kind="xformers", inputs=blhd, same=sdpa_blhd)
def xformers_memory_efficient(q, k, v, p=0.0):
    return torch.ops.sparge_others.memory_efficient_attention_forward(q, k, v, None, p, SCALE)


@spelling(twin={"window": 30}, why=WINDOW, kind="xformers", inputs=blhd, same=sdpa_blhd)
def xformers_flash(q, k, v, window=-1):
    lengths = (None, None, None, L, S)
    return torch.ops.sparge_others.flash_fwd(q, k, v, *lengths, 0.0, SCALE, False, window, -1, False, None)[0]


@spelling(twin={"lse": True}, why=READ, kind="xformers", inputs=blhd, same=sdpa_blhd)
def xformers_by_the_efficient_kernel(q, k, v, lse=False):
    out, statistics = others.Efficient.apply(q, k, v, SCALE, 0)
    return out * statistics.exp().transpose(1, 2)[..., None] if lse else out


@spelling(
    twin={"lse": True},
    why=READ,
    kind="xformers",
    inputs=blhd,
    same=same(scale=SCALE, is_causal=True),
    is_causal=True,
)
def xformers_causal_from_the_top_left(q, k, v, lse=False):
    out, statistics = others.Efficient.apply(q, k, v, SCALE, 1)
    return out * statistics.exp().transpose(1, 2)[..., None] if lse else out


@spelling(twin={"lse": True}, why=READ, is_causal=True, **{**BOTTOM_RIGHT, "kind": "xformers"})
def xformers_causal_from_the_bottom_right(q, k, v, lse=False):
    out, statistics = others.Efficient.apply(q, k, v, SCALE, 2)
    return out * statistics.exp().transpose(1, 2)[..., None] if lse else out


# ---- SageAttention


@spelling(twin={"keep": (0.5,)}, why=(Reason.ARGUMENT,), kind="sage")
def sage_of_heads_first(q, k, v, keep=None):
    how = {} if keep is None else {"keep": keep}
    return others.sageattn(q, k, v, "HND", sm_scale=SCALE, **how)


@spelling(twin={"keep": (0.5,)}, why=(Reason.ARGUMENT,), kind="sage", inputs=square(), **CAUSAL)
def sage_of_rows_first(q, k, v, keep=None):
    how = {} if keep is None else {"keep": keep}
    return others.sageattn(q, k, v, tensor_layout="NHD", is_causal=True, sm_scale=SCALE, smooth_k=True, **how)
