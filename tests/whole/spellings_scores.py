"""Spellings of the two products and of the scale between them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import (
    FINITE,
    OTHER_AXIS,
    RETURNED,
    SCALE,
    B,
    D,
    H,
    L,
    S,
    blhd,
    qkv,
    sdpa,
    sdpa_blhd,
    spelling,
)

from sparge_compile.report import Reason

ALONG_KEYS = {"scale": torch.linspace(0.1, 0.5, S)}
SCORES_CHANGED = (Reason.SCORES_CHANGED,)

# ---- the products


@spelling(twin={"dim": -2}, why=OTHER_AXIS)
def torch_matmul(q, k, v, dim=-1):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * SCALE, dim), v)


@spelling(twin=ALONG_KEYS, why=SCORES_CHANGED)
def at_operator(q, k, v, scale=SCALE):
    return (q @ k.mT * scale).softmax(-1) @ v


@spelling(twin={"weights": True}, why=RETURNED)
def methods(q, k, v, weights=False):
    w = q.matmul(k.permute(0, 1, 3, 2)).mul(SCALE).softmax(dim=-1)
    return (w.matmul(v), w) if weights else w.matmul(v)


@spelling(twin={"dim": 1}, why=OTHER_AXIS)
def swapaxes(q, k, v, dim=3):
    return ((q @ k.swapaxes(2, 3)) * SCALE).softmax(dim) @ v


@spelling(twin={"dim": 0}, why=OTHER_AXIS)
def movedim(q, k, v, dim=-1):
    return F.softmax(torch.matmul(q, torch.movedim(k, -1, -2)) * SCALE, dim=dim) @ v


@spelling(
    twin={"dim": 1},
    why=OTHER_AXIS,
    inputs=blhd,
    same=lambda attend, *x: attend(*(y.transpose(1, 2) for y in x), scale=SCALE),
)
def permute_of_queries_keys_and_values(q, k, v, dim=-1):
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    return (q @ k * SCALE).softmax(dim) @ v


@spelling(twin={"dim": 1}, why=OTHER_AXIS, heads=None)
def bmm_on_folded_heads(q, k, v, dim=-1):
    q, k, v = q.reshape(B * H, L, D), k.reshape(B * H, S, D), v.reshape(B * H, S, D)
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(dim), v).view(B, H, L, D)


@spelling(twin={"weights": True}, why=RETURNED, heads=None)
def bmm_on_flattened_heads(q, k, v, weights=False):
    q, k, v = q.flatten(0, 1), k.flatten(end_dim=1), v.flatten(0, 1)
    w = F.softmax(q.bmm(k.transpose(1, 2)) * SCALE, dim=-1)
    out = w.bmm(v).unflatten(0, (B, H))
    return (out, w) if weights else out


@spelling(
    twin={"beta": 1}, why=FINITE, heads=None, inputs=lambda: (*qkv()(), torch.randn(B * H, L, S))
)  # with beta = 0 the first argument is not read
def baddbmm_without_input(q, k, v, bias, beta=0):
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=beta, alpha=SCALE)
    return torch.bmm(scores.softmax(dim=-1), v).view(B, H, L, D)


@spelling(twin={"dim": -2}, why=OTHER_AXIS, heads=None)
def baddbmm_of_empty(q, k, v, dim=-1):
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(dim=dim), v).view(B, H, L, D)


@spelling(
    twin={"fill": -1.0},
    why=FINITE,
    heads=None,
    mask="bool",
    same=sdpa(scale=SCALE, attn_mask=(torch.arange(S) < 99).view(1, 1, 1, S)),
)
def baddbmm_of_a_mask(q, k, v, fill=-math.inf):
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    bias = torch.zeros(S).masked_fill(torch.arange(S) >= 99, fill).expand(B * H, L, S)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1, alpha=SCALE)
    return torch.bmm(scores.softmax(dim=-1), v).view(B, H, L, D)


@spelling(twin={"dim": -2}, why=OTHER_AXIS)
def einsum_bhqd(q, k, v, dim=-1):
    w = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE, dim=dim)
    return torch.einsum("bhqk,bhkd->bhqd", w, v)


@spelling(twin={"dim": 1}, why=OTHER_AXIS, inputs=blhd, same=sdpa_blhd)
def einsum_blhd(q, k, v, dim=-1):
    w = torch.softmax(SCALE * torch.einsum("blhd,bshd->bhls", q, k), dim=dim)
    return torch.einsum("bhls,bshe->blhe", w, v)


@spelling(twin={"dim": 2}, why=OTHER_AXIS, inputs=blhd, same=sdpa_blhd)
def einsum_heads_behind_queries(q, k, v, dim=-1):
    w = (torch.einsum("bqhd,bkhd->bqhk", q, k) * SCALE).softmax(dim)
    return torch.einsum("bqhk,bkhd->bqhd", w, v)


@spelling(twin={"dim": -3}, why=OTHER_AXIS)
def einsum_ellipsis(q, k, v, dim=-1):
    w = (torch.einsum("...qd,...kd->...qk", q, k) * SCALE).softmax(dim)
    return torch.einsum("...qk,...kd->...qd", w, v)


@spelling(twin={"dim": -1}, why=OTHER_AXIS)
def einsum_keys_before_queries(q, k, v, dim=-2):
    w = (torch.einsum("bhkd,bhqd->bhkq", k, q) * SCALE).softmax(dim)
    return torch.einsum("bhkq,bhke->bhqe", w, v)


@spelling(twin={"dim": 2}, why=OTHER_AXIS)
def einsum_with_spaces_and_capitals(q, k, v, dim=3):
    w = F.softmax(torch.einsum("B H L D, B H S D -> B H L S", q, k).mul(SCALE), dim=dim)
    return torch.einsum("B H L S, B H S D -> B H L D", w, v)


@spelling(
    twin={"dim": 2},
    why=OTHER_AXIS,
    same=lambda attend, q, k, v: attend(q, k, v, scale=SCALE).transpose(1, 2).flatten(2),
)
def einsum_that_merges_heads(q, k, v, dim=3):
    w = torch.einsum("bhid,bhjd->bhij", [q, k]).mul(SCALE).softmax(dim)
    return torch.einsum("bhij,bhjd->bihd", [w, v]).reshape(B, L, H * D)


@spelling(twin={"dim": -1}, why=OTHER_AXIS)
def scores_transposed(q, k, v, dim=-2):
    """Softmax over the last but one axis, and attention all the same."""
    w = (k @ q.transpose(-1, -2) * SCALE).softmax(dim)
    return w.transpose(-1, -2) @ v


def _pixels():
    return tuple(torch.randn(B, D, 10, 15) for _ in range(3))


@spelling(
    twin={"order": (0, 1, 2)},
    why=OTHER_AXIS,
    inputs=_pixels,
    same=lambda attend, *x: attend(*(y.flatten(2).mT.unsqueeze(1) for y in x)).squeeze(1).mT.reshape(B, D, 10, 15),
    product=B,
    heads=None,
    length=150,
    keys=150,
)
def attention_block_of_an_autoencoder(q, k, v, order=(0, 2, 1)):
    b, c, h, w = q.shape
    q = q.reshape(b, c, h * w).permute(0, 2, 1)
    weights = torch.bmm(q, k.reshape(b, c, h * w)) * (int(c) ** (-0.5))
    weights = F.softmax(weights, dim=2).permute(*order)
    return torch.bmm(v.reshape(b, c, h * w), weights).reshape(b, c, h, w)


@spelling(
    twin={"dim": 1},
    why=OTHER_AXIS,
    inputs=lambda: (torch.randn(B, L, D), torch.randn(B, S, D), torch.randn(B, S, D)),
    same=lambda attend, *x: attend(*(y.unsqueeze(1) for y in x), scale=SCALE).squeeze(1),
    product=B,
    heads=None,
)
def one_head_in_three_dimensions(q, k, v, dim=-1):
    return torch.softmax(q @ k.transpose(1, 2) * SCALE, dim=dim) @ v


@spelling(
    twin={"dim": 2},
    why=OTHER_AXIS,
    inputs=lambda: tuple(torch.randn(B, 3, H, 130, D) for _ in range(3)),
    same=lambda attend, *x: attend(*(y.flatten(0, 1) for y in x), scale=SCALE).unflatten(0, (B, 3)),
    product=B * 3 * H,
    heads=None,
    length=130,
    keys=130,
)
def windows_in_five_dimensions(q, k, v, dim=-1):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(dim) @ v


# ---- the scale


@spelling(twin={"weights": True}, why=RETURNED)
def scale_on_q(q, k, v, weights=False):
    q = q * SCALE
    w = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return (w @ v, w) if weights else w @ v


@spelling(twin={"dim": -2}, why=OTHER_AXIS)
def scale_on_k(q, k, v, dim=-1):
    return torch.matmul(torch.matmul(q, (k * SCALE).transpose(-2, -1)).softmax(dim), v)


@spelling(twin={"cap": 5.0}, why=SCORES_CHANGED, same=sdpa())
def scale_on_both(q, k, v, cap=None):
    scale = D**-0.25
    scores = (q * scale) @ (k * scale).mT
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    return scores.softmax(-1) @ v


@spelling(twin={"scale": torch.linspace(1.0, 5.0, S)}, why=SCORES_CHANGED, same=sdpa(scale=1 / 3))
def scale_by_division(q, k, v, scale=3.0):
    return torch.div(q @ k.mT, scale).softmax(-1) @ v


@spelling(twin={"dim": 1}, why=OTHER_AXIS, same=sdpa())
def scale_by_math_sqrt(q, k, v, dim=-1):
    return ((q @ k.transpose(-1, -2)) / math.sqrt(q.size(-1))).softmax(dim=dim) @ v


@spelling(twin={"dim": 1}, why=OTHER_AXIS, same=sdpa())
def scale_by_a_tensor_constant(q, k, v, dim=-1):
    return ((q @ k.transpose(-1, -2)) / torch.sqrt(torch.tensor(D, dtype=q.dtype))).softmax(dim) @ v


@spelling(twin={"size": (S,)}, why=SCORES_CHANGED)
def scale_by_torch_full(q, k, v, size=()):
    scale = torch.full(size, SCALE, dtype=q.dtype, device=q.device)
    if size:
        scale = scale.cumsum(0)
    return (q @ k.mT).mul(scale).softmax(-1) @ v


@spelling(twin={"dim": 1}, why=OTHER_AXIS, same=sdpa())
def scale_from_the_shape(q, k, v, dim=-1):
    return ((q @ k.mT) * (q.size(-1) ** -0.5)).softmax(dim) @ v


@spelling(twin={"dim": 1}, why=OTHER_AXIS, same=sdpa(scale=math.log(S) / 20))
def scale_from_the_length(q, k, v, dim=-1):
    return (q @ k.mT * (math.log(k.shape[-2]) / 20)).softmax(dim) @ v


@spelling(twin=ALONG_KEYS, why=SCORES_CHANGED)
def scale_in_place(q, k, v, scale=SCALE):
    scores = q @ k.mT
    scores *= scale
    return scores.softmax(-1) @ v


@spelling(twin={"dim": 1}, why=OTHER_AXIS)
def scale_on_q_in_place(q, k, v, dim=-1):
    q = q.clone()
    q *= SCALE
    return (q @ k.mT).softmax(dim) @ v


@spelling(twin=ALONG_KEYS, why=SCORES_CHANGED)
def scale_by_a_method_whose_result_is_unused(q, k, v, scale=SCALE):
    scores = q @ k.mT
    scores.mul_(scale)
    return scores.softmax(-1) @ v


@spelling(
    twin={"order": (2, 1, 0)},
    why=SCORES_CHANGED,
    inputs=lambda: (*qkv(length=S)(), torch.rand(H, 1, 1).repeat(1, 1, 1) + 0.1),
    same=lambda attend, q, k, v, t: attend(q * t, k, v, scale=1.0),
    length=S,
)
def temperature_of_each_head(q, k, v, temperature, order=(0, 1, 2)):
    """In its twin the same tensor is expanded along the keys."""
    if order != (0, 1, 2):
        temperature = temperature.permute(order).repeat(1, 1, S // H)
    return (q @ k.transpose(-2, -1) * temperature).softmax(dim=-1) @ v


@spelling(
    twin={"dim": 1},
    why=OTHER_AXIS,
    inputs=lambda: (*qkv()(), torch.log(10 * torch.rand(H, 1, 1) + 1)),
    same=lambda attend, q, k, v, t: attend(
        F.normalize(q, dim=-1) * t.clamp(max=math.log(100)).exp(), F.normalize(k, dim=-1), v, scale=1.0
    ),
)
def cosine_attention(q, k, v, logit_scale, dim=-1):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (scores * torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp()).softmax(dim) @ v


@spelling(twin={"dim": -2}, why=OTHER_AXIS, same=sdpa(scale=1.0))
def no_scale(q, k, v, dim=-1):
    return (q @ k.mT).softmax(dim) @ v


@spelling(twin=ALONG_KEYS, why=SCORES_CHANGED, same=sdpa(scale=-SCALE / 2))
def scale_in_three_places(q, k, v, scale=1.0):
    return ((-q @ (k / 2).mT) * scale * SCALE).softmax(-1) @ v
