"""Operands in eight bits: what ``precision="fp8"`` makes of queries, keys and values, in torch.

In: q, k, v. Out: :class:`Codes`, and the operands that these stand for. Scores are products of int8, since e4m3, with
three bits of mantissa, has five times their error; weights and values are e4m3, whose range of seventeen octaves the
weights need. The rule:

1. Queries and keys are rotated: each 16 entries by a Hadamard matrix, which leaves their products as they are and
   spreads an outlier of one entry over sixteen.
2. A constant is subtracted from all keys of a head, the mean of 32 of them: no softmax changes, and a bias of a
   channel, which trained models have, takes no bits. The log-sum-exp gets it back (``lift``).
3. Queries have a scale for each row, keys for each block of 64, values a power of two for each head: what the largest
   of 32 rows asks for, with a hundredfold of room. What lies beyond saturates.
4. The weight of a key is 2^(score - ⌈top⌉ + 8) in e4m3, where top is the running maximum in log2: since the maximum is
   rounded up to a whole number, what is rounded does not depend on the order of the keys. Out is the mean of the values
   by the rounded weights, so that equal values give themselves.

What is broken (NaN, infinite) stays broken. A CPU rounds the operands and not the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launch
from .block_map import KEY_BLOCK
from .how import TOP_LEFT, How

GROUP = 16  # entries of a row that are rotated together
LEAST_CAPABILITY = (8, 9)  # of GPUs whose tensor cores multiply e4m3
SAMPLES = 32  # rows of keys and values that tell their constant and their scale
INT8, E4M3 = 127, 448  # the largest numbers
LANES = 32  # how often the scale of a key block is written: 128 bytes, which TMA copies
LEAST = 1e-15  # of steps and scales: their product is a number, which a hidden score of -inf may be multiplied by
LOG2_E = 1.4426950408889634


class Codes(NamedTuple):
    """Queries, keys and values in eight bits. On a GPU values are transposed, block by block, as products want them."""

    q: Tensor  # int8 [B, H, L, D]
    q_scale: Tensor  # float32 [B, H, L], the softmax scale and log2(e) included
    lift: Tensor  # float32 [B, H, L]: what the constant adds to all scores of a row, in log2
    k: Tensor  # int8 [B, Hk, S, D]
    k_scale: Tensor  # float32 [B, Hk, Nk, 32]: so many times the same, which TMA copies
    v: Tensor  # float8_e4m3fn [B, Hk, S, Dv], or [B, Hk, Nk, Dv, 64]
    v_scale: Tensor  # float32 [B, Hk]


def refusal(device: torch.device, head_size: Any, value_size: Any) -> str:
    """Why attention without a mask keeps the dtype of its operands; empty where there are kernels in eight bits."""
    if any(not isinstance(size, int) or size % GROUP for size in (head_size, value_size)):
        return f"head sizes {head_size} and {value_size} are no multiples of {GROUP}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "no NVIDIA GPU"
    if device.type == "cuda" and launch.compute_capability(device) < LEAST_CAPABILITY:
        return f"compute capability {'.'.join(map(str, launch.compute_capability(device)))} is below 8.9"
    return ""


def rotate(x: Tensor) -> Tensor:
    """Each 16 entries of the rows of x by the Hadamard matrix of entries ±1/4. Twice is not at all.

    Four times each sum and difference of neighbours, put so that the next neighbours are others: no product, whose
    dtype autocast or TF32 would change.
    """
    x = x * 0.25
    for _ in range(4):
        even, odd = x.unflatten(-1, (-1, GROUP // 2, 2)).unbind(-1)
        x = torch.stack((even + odd, even - odd), -2).flatten(-3)
    return x


def seen_keys(how: How, length: int, keys: int) -> int:
    """The keys that some query may see: none is looked at beyond them."""
    return min(length, keys) if how.causality == TOP_LEFT else keys


def samples(x: Tensor, seen: int) -> Tensor:
    """The rows of x [B, Hk, S, D] that tell its constant or its scale, with 0 for what is no finite number."""
    rows = x[:, :, torch.arange(SAMPLES, device=x.device) * seen // SAMPLES].float()
    return torch.where(rows.isfinite(), rows, 0.0)


def constant(key: Tensor, seen: int) -> Tensor:
    """What is subtracted from all keys of a head [B, Hk, 1, D]."""
    return samples(key, seen).mean(2, keepdim=True)


def power_below(x: Tensor) -> Tensor:
    """Half of the largest power of two that is not above x; 1 for what is as good as 0."""
    return torch.where(x < LEAST, 1.0, torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 2))


def code(query: Tensor, key: Tensor, value: Tensor, how: How) -> Codes:
    """The codes of q [B, H, L, D], k [B, Hk, S, D] and v [B, Hk, S, Dv]."""
    q, step = _code_queries(query)
    k, k_scale, center = _code_keys(key, seen_keys(how, query.shape[2], key.shape[2]))
    v, v_scale = _code_values(value, seen_keys(how, query.shape[2], key.shape[2]))
    q_scale = step * (abs(how.scale) * LOG2_E)
    q = -q if how.scale < 0 else q
    lift = (q * center.repeat_interleave(query.shape[1] // key.shape[1], 1)).sum(-1) * q_scale
    return Codes(q.to(torch.int8), q_scale, lift, k.to(torch.int8), k_scale, v, v_scale)


class Rounded(NamedTuple):
    """Operands in their own dtype, as the codes have them: keys without the constant that all of them share."""

    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hk, S, D]
    v: Tensor  # [B, Hk, S, Dv]
    center: Tensor  # float32 [B, H, 1, D]: the constant, for each query head
    lift: Tensor  # float32 [B, H, L]: what it adds to all scores of a row, and so to their log-sum-exp


def centred(query: Tensor, key: Tensor, value: Tensor, how: How) -> Rounded:
    """What a forward in eight bits attends with.

    Attention of these, whose log-sum-exp is less by ``lift``, recomputes the weights as that forward had them, in
    the operands' own dtype: a constant that is large beside what keys differ by is in no product.
    """
    if key.numel() == 0:
        zeros = query.new_zeros(query.shape[:3], dtype=torch.float32)
        return Rounded(query, key, value, zeros[:, :, :1, None].expand(-1, -1, 1, query.shape[3]), zeros)
    seen = seen_keys(how, query.shape[2], key.shape[2])
    q, step = _code_queries(query)
    k, k_scale, center = _code_keys(key, seen)
    v, v_scale = _code_values(value, seen)
    scale_of_rows = k_scale[..., :1].repeat_interleave(KEY_BLOCK, 2)[:, :, : key.shape[2]]
    q, k = rotate(q * step.unsqueeze(-1)), rotate(k * scale_of_rows)
    center = rotate(center).repeat_interleave(query.shape[1] // key.shape[1], 1)
    v = v.float() * v_scale[..., None, None]
    lift = how.scale * (q * center).sum(-1)
    return Rounded(q.to(query.dtype), k.to(key.dtype), v.to(value.dtype), center, lift)


def rounded(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor]:
    """The operands that the codes stand for, in the dtype of q, k, v: those of :func:`centred` with the constant."""
    found = centred(query, key, value, how)
    k = found.k.float() + found.center[:, :: query.shape[1] // max(1, key.shape[1])]
    return found.q, k.to(key.dtype), found.v


def rounded_top(top: Tensor) -> Tensor:
    """Maxima of scores (natural units), rounded up to whole numbers in log2."""
    return (top * LOG2_E).ceil() / LOG2_E


def rounded_weights(weights: Tensor) -> Tensor:
    """Weights [...] in [0, 1] as a forward in eight bits rounds them."""
    return (weights * 2**8).to(torch.float8_e4m3fn).to(weights.dtype) / 2**8


def _code_queries(query: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [B, H, L, D] and the step between them [B, H, L]."""
    q = rotate(query.float())
    step = (q.abs().amax(-1) / INT8).clamp(min=LEAST)
    return (q / step.unsqueeze(-1)).round(), step


def _code_keys(key: Tensor, seen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers [B, Hk, S, D], the step between them [B, Hk, Nk, 32], and the rotated constant [B, Hk, 1, D]."""
    center = rotate(constant(key, seen))
    k = rotate(key.float()) - center
    k = torch.where(torch.arange(k.shape[2], device=k.device)[:, None] < seen, k, 0.0)
    blocks = F.pad(k, (0, 0, 0, -k.shape[2] % KEY_BLOCK)).unflatten(2, (-1, KEY_BLOCK))
    step = (blocks.abs().amax((-1, -2), keepdim=True) / INT8).clamp(min=LEAST)  # [B, Hk, Nk, 1, 1]
    k = (blocks / step).round().flatten(2, 3)[:, :, : key.shape[2]]
    return k, step.squeeze(-1).expand(*step.shape[:3], LANES), center


def _code_values(value: Tensor, seen: int) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [B, Hk, S, Dv] and the scale [B, Hk]."""
    scale = power_below(samples(value, seen).abs().amax((2, 3)))
    v = value.float() / scale[..., None, None]
    return torch.where(v.isfinite(), v.clamp(-E4M3, E4M3), torch.nan).to(torch.float8_e4m3fn), scale
