"""Block maps and attention under them on a CPU, from torch code that skips the dropped blocks.

In: queries, keys, values, thresholds, masks. Out: block maps, ``out`` and ``lse``, and the gradients.
Query blocks that keep about as many key blocks are batched (batches.py); their keys are gathered into dense memory
and the CPU kernel behind SDPA does the arithmetic, the one that dense attention runs too, so speeds and errors compare.
float64 stays float64; every other dtype is computed in float32. That kernel knows one head size: where keys and values
have different ones, the narrower rows are filled up with zeros. Letters and shapes: see rule.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...keeping import beside_longest
from .. import allocate, rule
from ..block_map import (
    KEY_BLOCK,
    QUERY_BLOCK,
    BlockMap,
    ceil_div,
    diagonal_blocks,
    unpack,
    visible_blocks,
)
from ..how import How
from ..kept import Always, always_read
from .batches import (
    Heads,
    Part,
    batches,
    from_blocks,
    gather,
    head_parts,
    over_heads,
    to_blocks,
    wide_dtype,
)

# The public function gives no log-sum-exp and its backward takes none. What these give for a row that a mask hides
# whole differs between torch versions, so such rows are overwritten below.
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SCORES_AT_ONCE = 1 << 18  # block scores that are ranked together; ranking takes near 100 bytes for each


def block_map(query: Tensor, key: Tensor, thresholds: Tensor, how: How) -> BlockMap:
    """The block map of query [B, H, L, D] over key [B, Hk, S, D], by the rule (rule.py).

    ``thresholds`` is float32 [H, 2 or 6]. Scratch memory does not grow with the number of heads and query blocks.
    """
    attn_mask, is_causal, scale, *_ = how
    length, diagonal = query.shape[2], how.diagonal(query.shape[2], key.shape[2])
    out = allocate.new_block_map(query, key, how)
    n_query, n_key = out.indices.shape[-2:]
    if out.indices.numel() == 0:
        return BlockMap(out.counts.zero_(), out.indices)
    visible = visible_blocks(n_query, n_key, length, is_causal, query.device, diagonal)
    forced = diagonal_blocks(n_query, n_key, query.device, diagonal) if is_causal else torch.zeros_like(visible)
    anchor = rule.needs_anchor(attn_mask, is_causal)
    thresholds = thresholds.expand(query.shape[1], -1)
    slots = how.slots_q, how.slots_k
    always = always_read(thresholds, length, key.shape[2], beside_longest(how.parts), *slots)
    attn_mask = None if attn_mask is None else rule.without_copies(attn_mask)
    counted = rule.counted_rows(attn_mask, length, key.shape[2], is_causal, query.device, diagonal)

    for at_q, at_k in head_parts(query, key):
        keys, queries = (None if x is None else for_heads(x, at_q) for x in counted)
        q_mean = rule.pool(query[at_q], QUERY_BLOCK, queries) * scale
        k_mean = rule.pool_keys(key[at_k], q_mean.shape[1], keys)
        step = max(1, SCORES_AT_ONCE // max(1, q_mean.shape[:2].numel() * n_key))
        for i in range(0, n_query, step):
            some = slice(i, min(i + step, n_query))
            scores = q_mean[:, :, some] @ k_mean.mT  # [b, h, some of Nq, Nk]
            seen, fixed = visible[some], forced[some]
            if attn_mask is not None:
                pooled = rule.pool_mask(for_heads(attn_mask, at_q), length, is_causal, some, diagonal)
                scores, seen, fixed = rule.apply_pooled_mask(scores, seen, fixed, *pooled)
            here = None if always is None else Always(always.keys[at_q[1]], always.queries[at_q[1], some])
            kept = rule.select(scores, seen, thresholds[at_q[1]], fixed, anchor, here)
            counts, indices = BlockMap.from_dense(kept)
            out.counts[at_q][:, :, some] = counts
            out.indices[at_q][:, :, some] = indices
    return out


def select(q_mean: Tensor, k_mean: Tensor, thresholds: Tensor, scale: float) -> BlockMap:
    """The block map by means [B, H, Nq, D] and [B, Hk, Nk, D], where nothing is masked."""
    heads, n_query, n_key = q_mean.shape[1], q_mean.shape[2], k_mean.shape[2]
    scores = (q_mean * scale) @ k_mean.repeat_interleave(heads // k_mean.shape[1], dim=1).mT
    visible = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device)
    thresholds = thresholds.expand(heads, -1)
    always = always_read(thresholds, 0, n_key * KEY_BLOCK, beside_longest(None))
    if always is not None:  # no row is dense: queries and keys are not one sequence here
        always = Always(always.keys, torch.zeros_like(always.keys[:, :, :1]))
    return BlockMap.from_dense(rule.select(scores, visible, thresholds, always=always))


def for_heads(x: Tensor, at: Heads) -> Tensor:
    """The part of x [B or 1, H or 1, ...] for some heads: [b or 1, h or 1, ...]."""
    return x[tuple(slice(None) if size == 1 else some for size, some in zip(x.shape, at, strict=False))]


def forward(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, how: How
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept keys: out [B, H, L, Dv] in the query's dtype and order of strides, and lse.

    ``counts`` and ``indices`` are a :class:`BlockMap`, of which B and H may be 1. lse [B, H, L] (natural logarithm) is
    float32, or float64 for float64. A row that sees no key gives zeros and -inf.
    """
    out, lse = allocate.new_out(query, value), allocate.new_lse(query).to(wide_dtype(query))
    if 0 in query.shape or 0 in key.shape:
        return out.zero_(), lse.fill_(-math.inf)
    counts, indices = (over_heads(x, query) for x in (counts, indices))
    attn_mask = None if how.attn_mask is None else over_heads(how.attn_mask, query)

    width = max(query.shape[-1], value.shape[-1])
    for at_q, at_k in head_parts(query, key, value):
        some_q, some_k, some_v = (widen(x, width) for x in (query[at_q], key[at_k], value[at_k]))
        lists = BlockMap(counts[at_q], indices[at_q])
        part = Part.of(lists, None if attn_mask is None else attn_mask[at_q], how, some_q, some_k)
        attend = attend_all if part.keeps_all() else attend_listed
        some_out, lse[at_q] = attend(some_q, some_k, some_v, part, how.scale)
        out[at_q] = some_out[..., : out.shape[-1]]
    return out, lse


def widen(x: Tensor, width: int) -> Tensor:
    """x in the dtype of the arithmetic, its rows as the kernel wants them: of one width, and in adjacent memory."""
    x = x.to(wide_dtype(x))
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def attend_all(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of heads that keep every visible block: dense attention."""
    k, v = (x.repeat_interleave(part.group, dim=1) if part.group > 1 else x for x in (k, v))
    return _attention(q, k, v, is_causal=part.is_causal, scale=scale)


def attend_listed(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of heads by their lists of key blocks."""
    queries = to_blocks(q, part.query_rows)  # [N, rows, D]
    keys, values = to_blocks(k, part.key_rows), to_blocks(v, part.key_rows)
    out, lse = merge(*(attend_piece(queries, keys, values, piece, scale) for piece in part.pieces()))
    return from_blocks(out, q), from_blocks(lse, q[..., :1]).squeeze(-1)


def attend_piece(queries: Tensor, keys: Tensor, values: Tensor, piece: Part, scale: float) -> tuple[Tensor, Tensor]:
    """out [N, rows, D] and lse [N, rows, 1] over the blocks that one piece lists."""
    out = torch.zeros_like(queries)
    lse = out.new_full((*queries.shape[:2], 1), -math.inf)
    for row, block, mask in batches(piece, queries):
        query, key, value = queries[row].unsqueeze(1), gather(keys, block), gather(values, block)
        if mask is not None:  # a score of NaN stays NaN under -inf: a key that all rows are denied is not looked at
            key.masked_fill_((mask == -math.inf).all(-2).unsqueeze(-1), 0.0)
        some_out, some_lse = _attention(query, key, value, attn_mask=for_rows(mask, query), scale=scale)
        some_lse = some_lse.unsqueeze(-1)
        if mask is not None:
            sees_none = mask.amax(-1, keepdim=True) == -math.inf
            some_out, some_lse = some_out.masked_fill(sees_none, 0.0), some_lse.masked_fill(sees_none, -math.inf)
        out[row], lse[row] = some_out.squeeze(1), some_lse.squeeze(1)
    return out, lse


def merge(first: tuple[Tensor, Tensor], *more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from (out, lse) over parts of them."""
    out, lse = first
    for other, other_lse in more:
        both = torch.logaddexp(lse, other_lse)
        base = both.masked_fill(both == -math.inf, 0.0)
        out = out.mul_((lse - base).exp()).add_(other.mul_((other_lse - base).exp()))
        lse = both
    return out, lse


def for_rows(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A view of mask [c, 1, 1 or rows, n] for every row of query."""
    return None if mask is None else mask.expand(-1, -1, query.shape[2], -1)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    bits: Tensor,
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in its tensor's shape, dtype and order of strides.

    ``bits`` is the packed block map, int32 [B or 1, H or 1, Nq, words]; ``grad_lse`` [B, H, L] is the gradient of lse.
    """
    grads = dq, dk, dv = allocate.dense_like(query), allocate.dense_like(key), allocate.dense_like(value)
    if 0 in query.shape or 0 in key.shape:
        return dq.zero_(), dk.zero_(), dv.zero_()
    width = max(query.shape[-1], value.shape[-1])
    bits = over_heads(bits, query)
    attn_mask = None if how.attn_mask is None else over_heads(how.attn_mask, query)

    for at_q, at_k in head_parts(query, key, value):
        q_like = [widen(x[at_q], width) for x in (grad_out, query, out)]
        k_like = [widen(x[at_k], width) for x in (key, value)]
        some_lse = lse[at_q]
        sees_none = some_lse == -math.inf
        if grad_lse is not None:
            q_like, k_like = with_dlse(grad_lse[at_q].masked_fill(sees_none, 0.0), *q_like, *k_like)
        some_lse = some_lse.masked_fill(sees_none, 0.0).to(q_like[0].dtype)  # exp(-inf - 0): its weights are zeros

        lists = BlockMap.from_dense(unpack(bits[at_q], ceil_div(key.shape[2], KEY_BLOCK)))
        part = Part.of(lists, None if attn_mask is None else attn_mask[at_q], how, query[at_q], key[at_k])
        grads_of: Callable[..., tuple[Tensor, ...]] = grads_of_all if part.keeps_all() else grads_of_listed
        some_grads = grads_of(*q_like, *k_like, some_lse, part, how.scale)
        for grad, at, some in zip(grads, (at_q, at_k, at_k), some_grads, strict=True):
            grad[at] = some[..., : grad.shape[-1]]
    return dq, dk, dv


def with_dlse(
    dlse: Tensor, dout: Tensor, q: Tensor, out: Tensor, k: Tensor, v: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """One more column, by which rowsum(dout * out), all that the kernel knows, is rowsum(dout * out) - dlse."""
    q, k, v = (F.pad(x, (0, 1)) for x in (q, k, v))
    dout = torch.cat([dout, -dlse.unsqueeze(-1).to(dout.dtype)], -1)
    return [dout, q, F.pad(out, (0, 1), value=1.0)], [k, v]


def grads_of_all(
    dout: Tensor, q: Tensor, out: Tensor, k: Tensor, v: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of heads that keep every visible block."""
    if part.group > 1:
        k, v = (x.repeat_interleave(part.group, dim=1) for x in (k, v))
    dq, dk, dv = _attention_backward(dout, q, k, v, out, lse, 0.0, part.is_causal, scale=scale)
    return dq, *(x.unflatten(1, (-1, part.group)).sum(2) for x in (dk, dv))


def grads_of_listed(
    dout: Tensor, q: Tensor, out: Tensor, k: Tensor, v: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of heads by their lists of key blocks."""
    q_like = [to_blocks(x, part.query_rows) for x in (dout, q, out, lse.unsqueeze(-1))]
    keys, values = to_blocks(k, part.key_rows), to_blocks(v, part.key_rows)
    dq, dk, dv = (torch.zeros_like(x) for x in (q_like[1], keys, values))
    for piece in part.pieces():  # with the lse of the whole, the gradients of the pieces add up
        for row, block, mask in batches(piece, q_like[1]):
            some_dout, query, some_out, some_lse = (x[row].unsqueeze(1) for x in q_like)
            given = (some_dout, query, gather(keys, block), gather(values, block), some_out, some_lse.squeeze(-1))
            some = _attention_backward(*given, 0.0, False, attn_mask=for_rows(mask, query), scale=scale)
            dq.index_add_(0, row, some[0].squeeze(1))
            for total, grad in zip((dk, dv), some[1:], strict=True):
                total.index_add_(0, block.flatten(), grad.reshape(-1, *total.shape[1:]))
    return from_blocks(dq, q), from_blocks(dk, k), from_blocks(dv, v)
