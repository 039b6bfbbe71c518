"""Spellings of masks: padding, causality and windows, added, filled in or chosen by where."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from spelling import FINITE, OTHER_AXIS, RETURNED, SCALE, SPELLINGS, B, H, L, S, Spelling, qkv, sdpa, spelling
from torch import nn

from sparge_compile.report import Reason

LOWEST = torch.finfo(torch.float32).min
CAUSAL: dict[str, Any] = {"inputs": qkv(length=S), "length": S, "is_causal": True}
CAUSAL["same"] = sdpa(scale=SCALE, is_causal=True)


def lengths() -> torch.Tensor:
    return torch.tensor([S, 77])


def padded():
    """q, k, v and which keys exist, bool [B, S]."""
    return *qkv()(), torch.arange(S) < lengths()[:, None]


def padded_float():
    """The same with 1.0 and 0.0."""
    *x, m = padded()
    return *x, m.float()


def same_padded(attend, q, k, v, m):
    return attend(q, k, v, attn_mask=m.bool().view(B, 1, 1, S), scale=SCALE)


PADDED: dict[str, Any] = {"inputs": padded, "same": same_padded, "mask": "bool"}
PADDED_FLOAT: dict[str, Any] = {**PADDED, "inputs": padded_float}


def causal_pairs(rows: int = S, keys: int = S) -> torch.Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril()


# ---- key padding


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED)
def masked_fill(q, k, v, m, fill=-math.inf):
    scores = (q @ k.mT * SCALE).masked_fill(~m[:, None, None, :], fill)
    return scores.softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED_FLOAT)
def masked_fill_where_zero(q, k, v, m, fill=-1e9):
    return torch.softmax((q @ k.mT * SCALE).masked_fill(m[:, None, None] == 0, fill), dim=-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED)
def masked_fill_in_place(q, k, v, m, fill=-math.inf):
    scores = q @ k.mT * SCALE
    scores.masked_fill_(m.logical_not().view(B, 1, 1, S), fill)
    return scores.softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED)
def masked_fill_of_a_tensor(q, k, v, m, fill=-math.inf):
    value = torch.full((), fill, dtype=q.dtype, device=q.device)
    scores = (q @ k.mT).div(1 / SCALE)
    return torch.softmax(scores.masked_fill((m == 0).view(B, 1, 1, S).expand_as(scores), value), dim=-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED)
def where(q, k, v, m, fill=-math.inf):
    return torch.where(m[:, None, None, :], q @ k.mT * SCALE, fill).softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED)
def where_with_a_tensor(q, k, v, m, fill=LOWEST):
    scores = q @ k.mT * SCALE
    value = torch.full([], fill, dtype=scores.dtype, device=scores.device)
    return torch.where(m[:, None, None], scores, value).softmax(-1) @ v


@spelling(twin={"dim": -2}, why=OTHER_AXIS, **PADDED)
def where_turned_round(q, k, v, m, dim=-1):
    return torch.where(~m[:, None, None], -math.inf, q @ k.mT * SCALE).softmax(dim) @ v


@spelling(twin={"lowest": -2.0}, why=FINITE, **PADDED)
def inverted_and_multiplied(q, k, v, m, lowest=LOWEST):
    bias = (1.0 - m[:, None, None, :].to(q.dtype)) * lowest
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling(twin={"lowest": -2.0}, why=FINITE, **{**PADDED_FLOAT, "mask": "additive"}, reason=Reason.ADDITIVE_MASK)
def inverted_floats_multiplied(q, k, v, m, lowest=LOWEST):
    """Floats that are given may be other numbers than 0 and 1."""
    bias = (1.0 - m[:, None, None, :]) * lowest
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling(twin={"lowest": -2.0}, why=FINITE, **PADDED_FLOAT)
def inverted_and_filled(q, k, v, m, lowest=LOWEST):
    inverted = 1.0 - m[:, None, None, :].expand(B, 1, L, S)
    bias = inverted.masked_fill(inverted.to(torch.bool), lowest)
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED)
def zeros_filled_and_added(q, k, v, m, fill=-math.inf):
    bias = torch.zeros(B, 1, 1, S, dtype=q.dtype).masked_fill_(~m[:, None, None], fill)
    scores = q @ k.mT * SCALE
    scores += bias
    return scores.softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED)
def where_of_two_numbers_added(q, k, v, m, fill=LOWEST):
    return (q @ k.mT * SCALE + torch.where(m[:, None, None], 0.0, fill)).softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **PADDED)
def masked_before_it_is_scaled(q, k, v, m, fill=-math.inf):
    scores = (q @ k.mT).masked_fill(~m[:, None, None], fill)
    return (scores * SCALE).softmax(-1) @ v


@spelling(
    twin={"fill": -2.0},
    why=FINITE,
    mask="bool",
    inputs=lambda: (*qkv()(), lengths()),
    same=lambda attend, q, k, v, n: same_padded(attend, q, k, v, torch.arange(S) < n[:, None]),
)
def padding_from_lengths(q, k, v, n, fill=-math.inf):
    hidden = torch.arange(k.shape[2], device=k.device)[None, :] >= n[:, None]
    return (q @ k.mT * SCALE).masked_fill(hidden[:, None, None], fill).softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, heads=None, **PADDED)
def padding_repeated_for_folded_heads(q, k, v, m, fill=-math.inf):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * SCALE
    scores = scores.masked_fill(~m[:, None].repeat_interleave(H, dim=0), fill)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(B, H, L, -1)


@spelling(twin={"fill": -2.0}, why=FINITE, heads=None, **PADDED)
def unfolded_for_the_mask_alone(q, k, v, m, fill=LOWEST):
    scores = torch.bmm(q.view(B * H, L, -1), k.reshape(B * H, S, -1).transpose(1, 2)) * SCALE
    scores = scores.view(B, H, L, S) + torch.where(m[:, None, None], 0.0, fill)
    weights = torch.softmax(scores.view(B * H, L, S), dim=-1)
    return torch.bmm(weights, v.reshape(B * H, S, -1)).view(B, H, L, -1)


# ---- causal


class Buffered(nn.Module):
    """A lower triangle kept as a buffer and cut to length, as in nanoGPT."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill
        self.register_buffer("bias", torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256))

    def forward(self, q, k, v):
        length = q.size(2)
        att = (q @ k.transpose(-2, -1)) * SCALE
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, self.fill)
        return torch.nn.functional.softmax(att, dim=-1) @ v


# A mask that lies in a buffer is data to the graph; that it is causal may be seen or not, and both are right.
SPELLINGS.append(
    Spelling(
        "buffer_cut_to_length",
        Buffered(-math.inf),
        qkv(length=S),
        sdpa(scale=SCALE, attn_mask=causal_pairs().view(1, 1, S, S)),
        Buffered(-2.0),
        FINITE,
        length=S,
        mask="bool",
    )
)


@spelling(twin={"fill": -2.0}, why=FINITE, **CAUSAL)
def tril_filled(q, k, v, fill=-math.inf):
    size = q.size(2)
    hidden = torch.tril(torch.ones(size, size, device=q.device)) == 0
    return (q @ k.mT * SCALE).masked_fill(hidden, fill).softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **CAUSAL)
def triu_added(q, k, v, fill=-math.inf):
    bias = torch.triu(torch.full((S, S), fill, device=q.device), diagonal=1)
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling(twin={"fill": -2.0}, why=FINITE, **CAUSAL)
def triu_of_booleans(q, k, v, fill=-math.inf):
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.mT * SCALE
    scores.masked_fill_(hidden[None, None], fill)
    return scores.softmax(-1) @ v


@spelling(twin={"weights": True}, why=RETURNED, **CAUSAL)
def arange_compared(q, k, v, weights=False):
    rows, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    w = torch.where(rows[:, None] >= keys[None, :], q @ k.mT * SCALE, LOWEST).softmax(-1)
    return (w @ v, w) if weights else w @ v


@spelling(twin={"dim": -2}, why=OTHER_AXIS, **CAUSAL)
def arange_added(q, k, v, dim=-1):
    rows, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    allowed = keys[None, None, None, :] <= rows[None, None, :, None]
    bias = torch.zeros(1, 1, S, S).masked_fill(~allowed, LOWEST)
    return ((q @ k.mT) * SCALE + bias).softmax(dim) @ v


WINDOW = causal_pairs().triu(-40)


@spelling(
    twin={"fill": -2.0},
    why=FINITE,
    inputs=qkv(length=S),
    same=sdpa(scale=SCALE, attn_mask=WINDOW.view(1, 1, S, S)),
    length=S,
    mask="bool",
)
def sliding_window(q, k, v, fill=-math.inf):
    rows, keys = torch.arange(S)[:, None], torch.arange(S)[None, :]
    allowed = (keys <= rows) & (keys > rows - 41)
    return (q @ k.mT * SCALE).masked_fill(~allowed, fill).softmax(-1) @ v


def _causal_and_padded(attend, q, k, v, m):
    if attend is F.scaled_dot_product_attention:  # which takes causality or a mask
        return attend(q, k, v, attn_mask=m.view(B, 1, 1, S) & causal_pairs(), scale=SCALE)
    return attend(q, k, v, attn_mask=m.view(B, 1, 1, S), is_causal=True, scale=SCALE)


_CAUSAL_AND_PADDED: dict[str, Any] = {
    "twin": {"fill": -2.0},
    "why": FINITE,
    "inputs": lambda: (*qkv(length=S)(), torch.arange(S) < lengths()[:, None]),
    "same": _causal_and_padded,
    "length": S,
    "mask": None,  # one mask, or causality and a mask of the keys
}


@spelling(**_CAUSAL_AND_PADDED)
def causal_and_padded(q, k, v, m, fill=LOWEST):
    allowed = torch.ones(S, S, dtype=torch.bool).tril()[None, None] & m[:, None, None, :]
    return (q @ k.mT * SCALE + torch.where(allowed, 0.0, fill)).softmax(-1) @ v


@spelling(**_CAUSAL_AND_PADDED)
def causal_then_padded(q, k, v, m, fill=-math.inf):
    scores = q @ k.mT * SCALE
    scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), fill)
    scores = scores.masked_fill(~m[:, None, None, :], fill)
    return scores.softmax(-1) @ v
