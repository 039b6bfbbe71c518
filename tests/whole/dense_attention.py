"""Plain dense attention in the layouts and with the options of other libraries, for stand-ins of their ops."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

NEGATIVE = float("-inf")


def dense_weights(q, k, scale, causal="", window=(-1, -1), softcap=0.0, slopes=None):
    """Weights [B, H, L, S] and log-sum-exp [B, H, L] of q [B, L, H, D], k [B, S, Hk, D]; 0 where no key is seen."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("blhd,bshd->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    length, keys = scores.shape[-2:]
    shift = 0 if causal == "top_left" else keys - length
    distance = torch.arange(keys) - torch.arange(length)[:, None] - shift  # of the key from the query
    scores = torch.tanh(scores / softcap) * softcap if softcap > 0 else scores
    scores = scores if slopes is None else scores - slopes.view(-1, 1, 1) * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = (distance > right) & (right >= 0) | (distance < -left) & (left >= 0)
    scores = scores.masked_fill(hidden, NEGATIVE)
    return scores.softmax(-1).nan_to_num(0), scores.logsumexp(-1)


def dense(q, k, v, scale, causal="", p=0.0, **how):
    """The output [B, L, H, D] and the log-sum-exp of dense attention."""
    weights, lse = dense_weights(q, k, scale, causal, **how)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhls,bshd->blhd", F.dropout(weights, p), v).contiguous(), lse.float()


def dense_backward(grad, q, k, v, scale, causal=""):
    """The gradients of q, k and v, written out: an op runs below autograd."""
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = dense_weights(q, k, scale, causal)[0]
    wide_k, wide_v = (x.repeat_interleave(group, 2) for x in (k, v))
    grad_v = torch.einsum("bhls,blhd->bshd", weights, grad)
    of_weights = torch.einsum("blhd,bshd->bhls", grad, wide_v)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
    grad_q = torch.einsum("bhls,bshd->blhd", of_scores, wide_k)
    grad_k = torch.einsum("bhls,blhd->bshd", of_scores, q)
    return grad_q, *(x.unflatten(2, (-1, group)).sum(3) for x in (grad_k, grad_v))


def each_sequence(cu_q, cu_k, *tensors):
    """The rows of each packed sequence, as a batch of one; the first tensor has queries, the others keys."""
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        yield tuple(x[a:b][None] if i == 0 else x[c:d][None] for i, x in enumerate(tensors))


def dense_packed(q, k, v, cu_q, cu_k, scale, causal="", **how):
    """The same for packed sequences [T, H, D]; what lies behind the last one stays 0."""
    out, lse = torch.zeros(*q.shape[:2], v.shape[-1]), torch.zeros(q.shape[1], q.shape[0])
    starts = cu_q.tolist()
    for n, operands in enumerate(each_sequence(starts, cu_k.tolist(), q, k, v)):
        rows = slice(starts[n], starts[n + 1])
        got = dense(*operands, scale, causal, **how)
        out[rows], lse[:, rows] = got[0][0], got[1][0]
    return out, lse


def dense_packed_backward(grad, q, k, v, cu_q, cu_k, scale, causal=""):
    """The gradients of packed q, k and v."""
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    cu_q, cu_k = cu_q.tolist(), cu_k.tolist()
    pieces = zip(each_sequence(cu_q, cu_k, q, k, v), each_sequence(cu_q, cu_k, grad, k), strict=True)
    for n, (operands, (piece, _)) in enumerate(pieces):
        rows, columns = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        parts = dense_backward(piece, *operands, scale, causal)
        for whole, where, part in zip(grads, (rows, columns, columns), parts, strict=True):
            whole[where] = part[0]
    return tuple(grads)


def bottom_right(causal: bool) -> str:
    """The alignment of flash-attn."""
    return "bottom_right" if causal else ""
