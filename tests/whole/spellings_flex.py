"""Spellings of flex_attention: by score_mod, mask_mod and block mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from spelling import SCALE, B, H, L, S, blhd, qkv, sdpa, sdpa_blhd, spelling
from torch import Tensor
from torch.nn.attention.flex_attention import (
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)

from sparge_compile.report import Reason

LENGTHS = torch.tensor([S, 77])
DOCUMENTS = torch.arange(S) // 70  # which the keys belong to, and the queries
WINDOW, PREFIX, CHUNK = 40, 30, 48
SLOPES = 2.0 ** -torch.arange(1, H + 1)
CHANGED = (Reason.SCORES_CHANGED,)


def causal(b, h, i, j):
    return i >= j


def padded(b, h, i, j):
    return j < LENGTHS[b]


def documents(b, h, i, j):
    return DOCUMENTS[i] == DOCUMENTS[j]


def window(b, h, i, j):
    return (i - j).abs() < WINDOW


def prefix(b, h, i, j):
    return j < PREFIX


def bottom_right(b, h, i, j):
    return i + (S - L) >= j


def chunks(b, h, i, j):
    """Frames see themselves and earlier ones, as in video models that generate frame by frame."""
    return j // CHUNK <= i // CHUNK


def first_heads_look_back(b, h, i, j):
    return (h >= H // 2) | (j <= i)


def block_mask(mask_mod: Any, batch: int | None = None, heads: int | None = None, size: int = 128) -> Any:
    return create_block_mask(mask_mod, batch, heads, L, S, device="cpu", BLOCK_SIZE=size)


def pairs(mask_mod: Any) -> Tensor:
    """bool [B, H, L, S], asked one by one."""
    index = torch.meshgrid(*map(torch.arange, (B, H, L, S)), indexing="ij")
    return mask_mod(*index)


def same(mask_mod: Any, scale: float = SCALE) -> dict[str, Any]:
    """What SDPA would be for a mask_mod."""
    visible = pairs(mask_mod)
    return {"same": sdpa(attn_mask=visible, scale=scale)}


def capped(score, b, h, i, j):
    return 2 * torch.tanh(score / 2)


def biased(score, b, h, i, j):
    return score - SLOPES[h] * (i - j).abs()


def squared(score, b, h, i, j):
    return score * score.abs()


FLEX: dict[str, Any] = {"kind": "flex"}
MASKED: dict[str, Any] = {**FLEX, "mask": "bool"}
CAPPED: dict[str, Any] = {"twin": {"score_mod": capped}, "why": CHANGED}


# ---- scores


@spelling(**CAPPED, **FLEX)
def flex_alone(q, k, v, score_mod=None):
    return flex_attention(q, k, v, score_mod=score_mod, scale=SCALE)


@spelling(twin={"score_mod": squared}, why=CHANGED, same=sdpa(), **FLEX)
def flex_with_the_default_scale(q, k, v, score_mod=None):
    return flex_attention(q, k, v, score_mod)


@spelling(twin={"cap": 2.0}, why=CHANGED, **FLEX)
def flex_scaled_by_a_score_mod(q, k, v, cap=None):
    def score_mod(score, b, h, i, j):
        return score / 2 if cap is None else torch.tanh(score / cap)

    return flex_attention(q, k, v, score_mod=score_mod, scale=2 * SCALE)


@spelling(twin={"lowest": -2.0}, why=CHANGED, same=sdpa(scale=SCALE, is_causal=True), is_causal=True, **FLEX)
def flex_causal_by_a_score_mod(q, k, v, lowest=-math.inf):
    def score_mod(score, b, h, i, j):
        return torch.where(i >= j, score, lowest)

    return flex_attention(q, k, v, score_mod=score_mod, scale=SCALE)


@spelling(
    twin={"score_mod": biased},
    why=(Reason.ADDITIVE_MASK,),
    inputs=qkv(kv_heads=2),
    same=sdpa(scale=SCALE, enable_gqa=True),
    group=2,
    **FLEX,
)
def flex_grouped(q, k, v, score_mod=None):
    return flex_attention(q, k, v, score_mod=score_mod, scale=SCALE, enable_gqa=True)


@spelling(**CAPPED, inputs=blhd, same=sdpa_blhd, **FLEX)
def flex_on_transposed(q, k, v, score_mod=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, score_mod=score_mod, scale=SCALE).transpose(1, 2)


@spelling(**CAPPED, inputs=qkv(dtype=torch.bfloat16), **FLEX)
def flex_in_bfloat16(q, k, v, score_mod=None):
    return flex_attention(q, k, v, score_mod=score_mod, scale=SCALE)


# ---- masks

CAUSAL = block_mask(causal)
SMALL_BLOCKS = block_mask(causal, size=32)
PADDED = block_mask(padded, B)
DOCUMENT_CAUSAL = block_mask(and_masks(documents, causal))
WINDOW_OR_PREFIX = block_mask(or_masks(window, prefix))
BOTTOM_RIGHT = block_mask(bottom_right)
CHUNKS = block_mask(chunks)
BY_HEAD = block_mask(first_heads_look_back, None, H)


def masked(mask: Any) -> Any:
    """A call with a block mask that was made outside, as most models have it; a score_mod makes its twin."""

    def function(q, k, v, score_mod=None):
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=SCALE)

    function.__name__ = "flex_" + next(name for name, each in globals().items() if each is mask).lower()
    return function


spelling(**CAPPED, **MASKED, **same(causal))(masked(CAUSAL))
spelling(**CAPPED, **MASKED, **same(causal))(masked(SMALL_BLOCKS))
spelling(**CAPPED, **MASKED, **same(padded))(masked(PADDED))
spelling(**CAPPED, **MASKED, **same(and_masks(documents, causal)))(masked(DOCUMENT_CAUSAL))
spelling(**CAPPED, **MASKED, **same(or_masks(window, prefix)))(masked(WINDOW_OR_PREFIX))
spelling(**CAPPED, **MASKED, **same(bottom_right))(masked(BOTTOM_RIGHT))
spelling(**CAPPED, **MASKED, **same(chunks))(masked(CHUNKS))
spelling(**CAPPED, **MASKED, **same(first_heads_look_back))(masked(BY_HEAD))


def with_documents() -> tuple[Tensor, ...]:
    return *qkv()(), torch.stack([DOCUMENTS, DOCUMENTS.flip(0)])


def same_documents(attend, q, k, v, ids):
    return attend(q, k, v, attn_mask=ids[:, None, :L, None] == ids[:, None, None, :], scale=SCALE)


@spelling(**CAPPED, **MASKED, inputs=with_documents, same=same_documents)
def flex_block_mask_of_an_input(q, k, v, ids, score_mod=None):
    def mask_mod(b, h, i, j):
        return ids[b, i] == ids[b, j]

    mask = create_block_mask(mask_mod, B, None, L, S, device="cpu")
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=SCALE)
