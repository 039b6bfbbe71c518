"""Spellings of shapes: SDPA of other dimensions than four, what broadcasts, and tokens that the module stores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import FINITE, RETURNED, SCALE, B, D, H, L, S, qkv, spelling
from torch import nn

from sparge_compile.report import Reason

FRAMES = 3
NO_ATTENTION = (Reason.NOT_ATTENTION,)
DROPPED = (Reason.DROPOUT,)


def shaped(query, key):
    """Inputs q, k, v of these leading dimensions."""
    return lambda: (torch.randn(*query, L, D), torch.randn(*key, S, D), torch.randn(*key, S, D))


def call(q, k, v, **how):
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE, **how)


# ---- dimensions


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=shaped((B * H,), (B * H,)),
    same=lambda attend, q, k, v: attend(*(x.unsqueeze(1) for x in (q, k, v)), scale=SCALE).squeeze(1),
    heads=None,
    kind="sdpa",
)
def sdpa_of_three_dimensions(q, k, v, p=0.0):
    return call(q, k, v, dropout_p=p)


@spelling(twin={"p": 0.1}, why=DROPPED, kind="sdpa")
def sdpa_of_folded_heads(q, k, v, p=0.0):
    """The heads are told from how they were folded into the batch."""
    return call(*(x.flatten(0, 1) for x in (q, k, v)), dropout_p=p).unflatten(0, (B, H))


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=shaped((B, FRAMES, H), (B, FRAMES, H)),
    same=lambda attend, q, k, v: attend(*(x.flatten(0, 1) for x in (q, k, v)), scale=SCALE).unflatten(0, (B, FRAMES)),
    product=B * FRAMES * H,
    kind="sdpa",
)
def sdpa_of_five_dimensions(q, k, v, p=0.0):
    return call(q, k, v, dropout_p=p)


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=lambda: (torch.randn(B, L, FRAMES, H, D), *(torch.randn(B, S, FRAMES, H, D) for _ in "kv")),
    same=lambda attend, q, k, v: attend(
        *(x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q, k, v)), scale=SCALE
    ).reshape(B * FRAMES, H * L, D),
    product=B * FRAMES * H,
    kind="sdpa",
)
def sdpa_of_five_permuted_dimensions(q, k, v, p=0.0):
    """Its result is contiguous, whatever the inputs are, and a view may count on that."""
    out = call(*(x.permute(0, 2, 3, 1, 4) for x in (q, k, v)), dropout_p=p)
    return out.view(B * FRAMES, H * L, D)


# ---- broadcast


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=shaped((B, H), (1, H)),
    same=lambda attend, q, k, v: attend(q, k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1), scale=SCALE),
    kind="sdpa",
)
def keys_of_one_for_the_whole_batch(q, k, v, p=0.0):
    return call(q, k, v, dropout_p=p)


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=shaped((1, H), (B, H)),
    same=lambda attend, q, k, v: attend(q.expand(B, -1, -1, -1), k, v, scale=SCALE),
    kind="sdpa",
)
def queries_of_one_for_the_whole_batch(q, k, v, p=0.0):
    return call(q, k, v, dropout_p=p)


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=shaped((B, 1), (B, H)),
    same=lambda attend, q, k, v: attend(q.expand(-1, H, -1, -1), k, v, scale=SCALE),
    kind="sdpa",
)
def one_head_of_queries(q, k, v, p=0.0):
    return call(q, k, v, dropout_p=p)


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=lambda: (torch.randn(B, H, L, D), torch.randn(H, S, D), torch.randn(B, 1, S, D)),
    same=lambda attend, q, k, v: attend(q, k.expand(B, -1, -1, -1), v.expand(-1, H, -1, -1), scale=SCALE),
    kind="sdpa",
)
def keys_without_a_batch_and_values_without_heads(q, k, v, p=0.0):
    return call(q, k, v, dropout_p=p)


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=lambda: (*shaped((B, FRAMES, H), (B, FRAMES, H))(), torch.rand(FRAMES, 1, 1, S) < 0.7),
    same=lambda attend, q, k, v, mask: attend(
        *(x.flatten(0, 1) for x in (q, k, v)), attn_mask=mask.repeat(B, 1, 1, 1), scale=SCALE
    ).unflatten(0, (B, FRAMES)),
    product=B * FRAMES * H,
    kind="sdpa",
    mask="bool",
)
def mask_of_four_dimensions_for_five(q, k, v, mask, p=0.0):
    return call(q, k, v, attn_mask=mask, dropout_p=p)


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    inputs=lambda: (*qkv()(), torch.rand(L, S) < 0.7),
    same=lambda attend, q, k, v, mask: attend(q, k, v, attn_mask=mask, scale=SCALE),
    kind="sdpa",
    mask="bool",
)
def mask_of_two_dimensions(q, k, v, mask, p=0.0):
    return call(q, k, v, attn_mask=mask, dropout_p=p)


# ---- learned tokens

_memory = nn.Parameter(torch.randn(H, 60, D))
_queries = nn.Parameter(torch.randn(H, L, D))


@spelling(
    twin={"keys": _memory},
    why=NO_ATTENTION,
    inputs=shaped((B, H), (B, H)),
    same=lambda attend, q, k, v: attend(_queries.expand(B, -1, -1, -1), k, v, scale=SCALE),
)
def learned_queries(q, k, v, keys=None):
    """Of a Perceiver. The twin asks the stored rows with what is given."""
    if keys is None:
        return (_queries @ k.mT * SCALE).softmax(-1) @ v
    return (q @ keys.mT * SCALE).softmax(-1) @ keys


@spelling(
    twin={"alone": True},
    why=NO_ATTENTION,
    same=lambda attend, q, k, v: attend(
        q, *(torch.cat([_memory.expand(B, -1, -1, -1), x], 2) for x in (k, v)), scale=SCALE
    ),
    keys=S + 60,
)
def memory_tokens_joined(q, k, v, alone=False):
    """Registers, sinks, a learned prefix. The twin leaves the given keys away."""
    k, v = ((_memory if alone else torch.cat([_memory.expand(B, -1, -1, -1), x], 2)) for x in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    same=lambda attend, q, k, v: attend(q, *[_memory.expand(B, -1, -1, -1)] * 2, scale=SCALE),
    keys=60,
    kind="sdpa",
)
def sdpa_with_stored_keys(q, k, v, p=0.0):
    """A call of SDPA says itself that it is attention."""
    return call(q, _memory, _memory, dropout_p=p)


# ---- weights that nobody reads


@spelling(twin={"returned": True}, why=RETURNED)
def weights_averaged_for_nobody(q, k, v, returned=False):
    weights = (q @ k.mT * SCALE).softmax(-1)
    mean = weights.mean(1)
    return (weights @ v, mean) if returned else weights @ v


@spelling(twin={"returned": True}, why=RETURNED)
def weights_viewed_back_and_forth(q, k, v, returned=False):
    """As in older BERT and BART: a view of the weights is kept for who might ask for them."""
    weights = (q.flatten(0, 1) @ k.flatten(0, 1).mT * SCALE).softmax(-1)
    kept = weights.view(B, H, L, S)
    out = (kept.view(B * H, L, S) @ v.flatten(0, 1)).view(B, H, L, D)
    return (out, kept) if returned else out


@spelling(
    twin={"returned": True},
    why=RETURNED,
    inputs=lambda: (torch.randn(B, L, H * D),),
    same=lambda attend, x: _mha_by_hand(attend, x),
    length=L,
    keys=L,
    kind="mha",
)
def weights_that_a_module_returns_dropped(x, returned=False):
    """nn.MultiheadAttention gives its weights unless it is told not to."""
    out, weights = _attention(x, x, x)
    return (out, weights) if returned else out


_attention = nn.MultiheadAttention(H * D, H, batch_first=True).requires_grad_(False)


def _mha_by_hand(attend, x):
    q, k, v = F.linear(x, _attention.in_proj_weight, _attention.in_proj_bias).unflatten(-1, (3, H, D)).unbind(2)
    out = attend(*(y.transpose(1, 2) for y in (q, k, v)))
    return _attention.out_proj(out.transpose(1, 2).flatten(2))


# ---- masks of texts, from what is true or false


def text():
    """And a mask [B, S] of padding behind the texts, its first key seen."""
    return (*qkv()(), torch.arange(S) < torch.tensor([[130], [77]]))


def masked_same(attend, q, k, v, mask):
    return attend(q, k, v, attn_mask=mask[:, None, None], scale=SCALE)


TEXT = {"inputs": text, "same": masked_same, "mask": "bool"}
LOWERED = (Reason.ADDITIVE_MASK,)
LEAST = torch.finfo(torch.float32).min


@spelling(twin={"low": -1.0}, why=LOWERED, **TEXT)
def text_mask_of_ten_thousand(q, k, v, mask, low=-10000.0):
    return (q @ k.mT * SCALE + (1 - mask[:, None, None].to(q.dtype)) * low).softmax(-1) @ v


@spelling(twin={"low": -1.0}, why=LOWERED, kind="sdpa", **TEXT)
def text_mask_of_the_least_number(q, k, v, mask, low=LEAST):
    return call(q, k, v, attn_mask=torch.rsub(mask.float(), 1)[:, None, None] * low)


@spelling(twin={"low": -1.0}, why=LOWERED, **TEXT)
def text_mask_of_a_comparison(q, k, v, mask, low=-1e9):
    """Token ids are compared with that of padding."""
    hidden = 1 - (mask.long() != 0).long()
    return (q @ k.mT * SCALE + hidden[:, None, None] * low).softmax(-1) @ v


# ---- causality of other lengths


def lower_right(attend, q, k, v):
    return attend(q, k, v, attn_mask=torch.ones(L, S, dtype=torch.bool).tril(S - L), scale=SCALE)


@spelling(twin={"p": 0.1}, why=DROPPED, same=lower_right, kind="sdpa", mask=None)
def causal_lower_right(q, k, v, p=0.0):
    """What SDPA makes of torch.nn.attention.bias.causal_lower_right, which breaks the graph where it is built."""
    later = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril(diagonal=S - L)
    return call(q, k, v, attn_mask=later, dropout_p=p)


@spelling(twin={"low": -1.0}, why=FINITE, same=lower_right, mask=None)
def causal_by_positions_of_a_cache(q, k, v, low=-torch.inf):
    """The last L of S positions ask."""
    positions = torch.arange(L) + (S - L)
    later = torch.arange(S)[None, :] > positions[:, None]
    return (q @ k.mT * SCALE).masked_fill(later, low).softmax(-1) @ v


@spelling(
    twin={"p": 0.1},
    why=DROPPED,
    same=lambda attend, *x: attend(*x, is_causal=True, scale=SCALE),
    kind="sdpa",
    is_causal=True,
)
def causal_upper_left(q, k, v, p=0.0):
    return call(q, k, v, is_causal=True, dropout_p=p)
