"""Spellings of heads: how a projection is split into them, and how keys are repeated for grouped queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import GROUP, OTHER_AXIS, RETURNED, SCALE, B, D, H, L, S, qkv, sdpa, spelling

from sparge_compile.report import Reason

C = H * D
KV = H // GROUP
SPLIT = {"length": L, "keys": L}
GROUPED = {"inputs": qkv(kv_heads=KV), "same": sdpa(scale=SCALE, enable_gqa=True), "group": GROUP}


def fused():
    """The output of one projection to queries, keys and values, [B, L, 3C]."""
    return (torch.randn(B, L, 3 * C),)


def merged(out):
    return out.transpose(1, 2).flatten(2)


def same_fused(attend, x):
    q, k, v = x.view(B, L, 3, H, D).permute(2, 0, 3, 1, 4)
    return merged(attend(q, k, v, scale=SCALE))


FUSED = {"inputs": fused, "same": same_fused, **SPLIT}


def attend(q, k, v, dim=-1):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(dim) @ v


# ---- split


@spelling(twin={"dim": 1}, why=OTHER_AXIS, **FUSED)
def chunk_and_view(x, dim=-1):
    q, k, v = (y.view(B, L, H, D).transpose(1, 2) for y in x.chunk(3, dim=-1))
    return attend(q, k, v, dim).transpose(1, 2).contiguous().view(B, L, C)


@spelling(twin={"dim": -2}, why=OTHER_AXIS, **FUSED)
def split_and_unflatten(x, dim=-1):
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in x.split(C, dim=2))
    return attend(q, k, v, dim).transpose(1, 2).flatten(2)


@spelling(twin={"dim": 2}, why=OTHER_AXIS, **FUSED)
def permute_and_unbind(x, dim=-1):
    q, k, v = x.reshape(B, L, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    q = q * SCALE
    return (q @ k.transpose(-2, -1)).softmax(dim=dim).matmul(v).transpose(1, 2).reshape(B, L, C)


@spelling(twin={"dim": 2}, why=OTHER_AXIS, **FUSED)
def permute_and_index(x, dim=-1):
    y = x.reshape(B, L, 3, H, D).permute(2, 0, 3, 1, 4)
    return merged(attend(y[0], y[1], y[2], dim))


@spelling(twin={"weights": True}, why=RETURNED, heads=None, **FUSED)
def heads_folded_into_the_batch(x, weights=False):
    q, k, v = (y.reshape(B, L, H, D).permute(0, 2, 1, 3).reshape(B * H, L, D) for y in torch.tensor_split(x, 3, dim=-1))
    w = torch.softmax(torch.einsum("bid,bjd->bij", q, k) * SCALE, dim=-1)
    out = torch.einsum("bij,bjd->bid", w, v).reshape(B, H, L, D).permute(0, 2, 1, 3).reshape(B, L, C)
    return (out, w) if weights else out


@spelling(twin={"dim": 1}, why=OTHER_AXIS, **FUSED)
def slices(x, dim=-1):
    q, k, v = x[..., :C], x[..., C : 2 * C], x[:, :, 2 * C :]
    q, k, v = (y.view(B, L, H, D).swapaxes(1, 2) for y in (q, k, v))
    return merged(attend(q, k, v, dim))


@spelling(
    twin={"dim": 1},
    why=OTHER_AXIS,
    inputs=lambda: (torch.randn(B, L, C), torch.randn(B, 33, C)),
    same=lambda attend, x, y: merged(attend(*(z.view(B, -1, H, D).transpose(1, 2) for z in (x, y, y)), scale=SCALE)),
    keys=33,
)
def attention_to_another_sequence(x, y, dim=-1):
    q, k, v = (z.view(z.shape[0], z.shape[1], H, D).transpose(1, 2) for z in (x, y, y))
    return merged(attend(q, k, v, dim))


@spelling(twin={"dim": 1}, why=OTHER_AXIS, inputs=qkv(value_size=24))
def values_of_another_size(q, k, v, dim=-1):
    return attend(q, k, v, dim)


# ---- keys and values repeated


def repeat_kv(x, times):
    batch, heads, length, size = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, length, size)
    return x.reshape(batch, heads * times, length, size)


@spelling(twin={"dim": 1}, why=OTHER_AXIS, **GROUPED)
def keys_repeated_by_expand_and_reshape(q, k, v, dim=-1):
    return attend(q, repeat_kv(k, GROUP), repeat_kv(v, GROUP), dim)


@spelling(twin={"weights": True}, why=RETURNED, **GROUPED)
def keys_repeated_by_repeat_interleave(q, k, v, weights=False):
    k, v = k.repeat_interleave(GROUP, dim=1), torch.repeat_interleave(v, GROUP, 1)
    w = torch.matmul(q, k.transpose(2, 3)).mul(SCALE).softmax(-1)
    return (w @ v, w) if weights else w @ v


@spelling(twin={"dim": 1}, why=OTHER_AXIS, **GROUPED)
def keys_repeated_by_expand_and_flatten(q, k, v, dim=-1):
    k, v = (x.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).flatten(1, 2) for x in (k, v))
    return attend(q, k, v, dim)


@spelling(twin={"dim": 1}, why=OTHER_AXIS, **GROUPED)
def keys_repeated_in_another_layout(q, k, v, dim=-1):
    """[B, S, Hk, D] is repeated before it is transposed."""
    k, v = (x.transpose(1, 2).repeat_interleave(GROUP, dim=2).transpose(1, 2) for x in (k, v))
    return attend(q, k, v, dim)


@spelling(twin={"dim": 1}, why=OTHER_AXIS, **GROUPED)
def grouped_by_broadcasting(q, k, v, dim=-1):
    q = q.view(B, KV, GROUP, -1, D)
    return attend(q, k.unsqueeze(2), v.unsqueeze(2), dim).flatten(1, 2)


@spelling(
    twin={"dim": 2},
    why=OTHER_AXIS,
    inputs=lambda: (torch.randn(B, KV, GROUP, L, D), torch.randn(B, KV, S, D), torch.randn(B, KV, S, D)),
    same=lambda attend, q, k, v: attend(q.flatten(1, 2), k, v, scale=SCALE, enable_gqa=True).unflatten(1, (KV, GROUP)),
    group=GROUP,
)
def grouped_einsum(q, k, v, dim=-1):
    w = (torch.einsum("bgrld,bgsd->bgrls", q, k) * SCALE).softmax(dim)
    return torch.einsum("bgrls,bgsd->bgrld", w, v)


@spelling(twin={"dim": 1}, why=OTHER_AXIS, inputs=qkv(kv_heads=1), same=sdpa(scale=SCALE, enable_gqa=True), group=H)
def one_key_head_for_all(q, k, v, dim=-1):
    return attend(q, k, v, dim)


@spelling(
    twin={"dim": 1},
    why=OTHER_AXIS,
    inputs=qkv(kv_heads=KV),
    same=lambda attend, q, k, v: attend(q, k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1), scale=SCALE),
)
def keys_tiled(q, k, v, dim=-1):
    """Head h reads key head h mod Hk, which is not the grouping of GQA: the copies must stay."""
    return attend(q, k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1), dim)


@spelling(
    twin={"dim": 1},
    why=OTHER_AXIS,
    inputs=lambda: (*qkv(kv_heads=KV)()[:2], torch.randn(B, H, S, D)),
    same=lambda attend, q, k, v: attend(q, k.repeat_interleave(GROUP, 1), v, scale=SCALE),
)
def keys_repeated_and_values_not(q, k, v, dim=-1):
    return attend(q, repeat_kv(k, GROUP), v, dim)


@spelling(twin={"p": 0.1}, why=(Reason.DROPOUT,), kind="sdpa", **GROUPED)
def sdpa_of_expanded_keys(q, k, v, p=0.0):
    return F.scaled_dot_product_attention(q, repeat_kv(k, GROUP), repeat_kv(v, GROUP), dropout_p=p, scale=SCALE)


@spelling(twin={"p": 0.1}, why=(Reason.DROPOUT,), kind="sdpa", **GROUPED)
def sdpa_of_interleaved_keys(q, k, v, p=0.0):
    k, v = k.repeat_interleave(GROUP, dim=1), v.repeat_interleave(GROUP, dim=1)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=SCALE)


@spelling(
    twin={"p": 0.1},
    why=(Reason.DROPOUT,),
    kind="sdpa",
    inputs=qkv(kv_heads=KV),
    same=lambda attend, q, k, v: attend(q, k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1), scale=SCALE),
)
def sdpa_of_tiled_keys(q, k, v, p=0.0):
    k, v = k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=SCALE)
