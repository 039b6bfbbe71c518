"""Spellings of the softmax, in its own or a wider dtype, and of dropout that does nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from spelling import ACTIVE_DROPOUT, OTHER_AXIS, RETURNED, SCALE, WEIGHTS_CHANGED, B, L, S, qkv, spelling
from torch import nn

# ---- the softmax

_softmax = nn.Softmax(dim=-1)
_softmax_of_queries = nn.Softmax(dim=-2)


@spelling(twin={"softmax": _softmax_of_queries}, why=OTHER_AXIS)
def softmax_module(q, k, v, softmax=_softmax):
    return softmax(q @ k.mT * SCALE) @ v


@spelling(twin={"dim": 2}, why=OTHER_AXIS)
def special_softmax(q, k, v, dim=-1):
    return torch.special.softmax(q @ k.mT * SCALE, dim) @ v


@spelling(twin={"dim": 2}, why=OTHER_AXIS)
def softmax_in_float32_named(q, k, v, dim=-1):
    return F.softmax(q @ k.mT * SCALE, dim=dim, dtype=torch.float32).to(q.dtype) @ v


@spelling(twin={"weights": True}, why=RETURNED, inputs=qkv(dtype=torch.bfloat16))
def bfloat16_softmax_in_float32(q, k, v, weights=False):
    w = torch.softmax(q @ k.mT * SCALE, -1, torch.float32).to(q.dtype)
    return (w @ v, w) if weights else w @ v


@spelling(twin={"dim": 2}, why=OTHER_AXIS, inputs=qkv(dtype=torch.float16))
def float16_upcast_and_back(q, k, v, dim=-1):
    return ((q @ k.mT).float() * SCALE).softmax(dim).type_as(q) @ v


@spelling(twin={"dim": 2}, why=OTHER_AXIS, inputs=qkv(dtype=torch.bfloat16))
def bfloat16_scores_in_float32(q, k, v, dim=-1):
    scores = q.float() @ k.float().mT
    return ((scores * SCALE).softmax(dim) @ v.float()).to(q.dtype)


@spelling(twin={"dim": 1}, why=OTHER_AXIS)
def safe_softmax(q, k, v, dim=-1):
    return torch.ops.aten._safe_softmax(q @ k.mT * SCALE, dim) @ v


# ---- written out


@spelling(twin={"dim": 2}, why=OTHER_AXIS)
def softmax_by_hand(q, k, v, dim=-1):
    scores = q @ k.mT * SCALE
    weights = (scores - scores.amax(dim, keepdim=True)).exp()
    return (weights / weights.sum(dim, keepdim=True)) @ v


@spelling(twin={"dim": 2}, why=OTHER_AXIS, inputs=qkv(dtype=torch.bfloat16))
def softmax_by_hand_in_float32(q, k, v, dim=-1):
    scores = (q @ k.mT).float() * SCALE
    weights = torch.exp(scores - scores.max(dim, keepdim=True).values.detach())
    return weights.div(weights.sum(dim).unsqueeze(dim)).to(q.dtype) @ v


@spelling(twin={"dim": 2}, why=OTHER_AXIS)
def exp_of_a_log_softmax(q, k, v, dim=-1):
    return F.log_softmax(q @ k.mT * SCALE, dim).exp() @ v


# ---- dropout that does nothing

_off = nn.Dropout(0.1).eval()
_on = nn.Dropout(0.1).train()


@spelling(twin={"p": 0.1}, why=ACTIVE_DROPOUT)
def dropout_of_nothing_in_training(q, k, v, p=0.0):
    return F.dropout((q @ k.mT * SCALE).softmax(-1), p, training=True) @ v


@spelling(twin={"training": True}, why=ACTIVE_DROPOUT)
def dropout_in_inference(q, k, v, training=False):
    return F.dropout((q @ k.mT * SCALE).softmax(-1), p=0.1, training=training) @ v


@spelling(twin={"train": True}, why=ACTIVE_DROPOUT)
def torch_dropout_in_inference(q, k, v, train=False):
    return torch.dropout((q @ k.mT * SCALE).softmax(-1), 0.1, train) @ v


@spelling(twin={"dropout": _on}, why=ACTIVE_DROPOUT)
def dropout_module_in_inference(q, k, v, dropout=_off):
    return dropout((q @ k.mT * SCALE).softmax(-1)) @ v


@spelling(twin={"inplace": True, "p": 0.1}, why=ACTIVE_DROPOUT)
def dropout_in_place(q, k, v, p=0.0, inplace=False):
    return F.dropout((q @ k.mT * SCALE).softmax(-1), p, True, inplace) @ v


# ---- queries that see no key: torch.softmax has NaN for them, attention 0


def pairs():
    """q, k, v and who sees what, bool [B, 1, L, S]; the first two queries see nothing."""
    m = torch.rand(B, 1, L, S) < 0.5
    m[:, :, :2] = False
    return *qkv()(), m


def same_pairs(attend, q, k, v, m):
    return attend(q, k, v, attn_mask=m, scale=SCALE)


PAIRS: dict[str, Any] = {"inputs": pairs, "same": same_pairs, "mask": "bool"}


@spelling(twin={"fill": 0.1}, why=WEIGHTS_CHANGED, **PAIRS)
def weights_of_empty_rows_filled(q, k, v, m, fill=0.0):
    """torch's own safe softmax."""
    scores = (q @ k.mT * SCALE).masked_fill(~m, -math.inf)
    w = torch.softmax(scores, -1)
    seen = torch.any(torch.logical_not(scores == -math.inf), -1, keepdim=True)
    return torch.where(torch.logical_not(seen), torch.full_like(w, fill), w) @ v


@spelling(twin={"columns": True}, why=WEIGHTS_CHANGED, **PAIRS)
def weights_of_hidden_keys_filled(q, k, v, m, columns=False):
    w = (q @ k.mT * SCALE).masked_fill(~m, -1e9).softmax(-1)
    hidden = ~m[..., :1].expand_as(m) if columns else ~m
    return w.masked_fill(hidden, 0.0) @ v


@spelling(twin={"fill": 0.1}, why=WEIGHTS_CHANGED, **PAIRS)
def weights_without_nan(q, k, v, m, fill=0.0):
    w = torch.where(m, q @ k.mT * SCALE, -math.inf).softmax(-1)
    return w.nan_to_num(fill) @ v
