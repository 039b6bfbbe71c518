"""Spellings of packed sequences: [T, H, D] with the rows where they begin, by flash-attn, torch and xformers."""

from __future__ import annotations

import flash_2
import flash_3
import other_libraries as others
import torch
from dense_attention import each_sequence
from spelling import GROUP, SCALE, D, H, spelling

from sparge_compile.report import Reason

LENGTHS_Q, LENGTHS_K = (70, 0, 131, 9), (140, 20, 131, 64)
T_Q, T_K = sum(LENGTHS_Q), sum(LENGTHS_K)
KV = H // GROUP
WINDOW, SOFTCAP = (Reason.WINDOW,), (Reason.SOFTCAP,)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(kv_heads=H, lengths=(LENGTHS_Q, LENGTHS_K)):
    """q [Tq, H, D], k and v [Tk, Hk, D], and where the sequences begin, in queries and in keys."""
    rows, keys = map(sum, lengths)
    return lambda: (
        torch.randn(rows, H, D),
        torch.randn(keys, kv_heads, D),
        torch.randn(keys, kv_heads, D),
        *map(starts, lengths),
    )


def same(causal=False, **how):
    """Sequence by sequence; causality is of sequences whose queries and keys are as many."""

    def function(attend, q, k, v, cu_q, cu_k, *_):
        out = [
            attend(*(x.transpose(1, 2) for x in each), scale=SCALE, is_causal=causal, **how)[0].transpose(0, 1)
            for each in each_sequence(cu_q.tolist(), cu_k.tolist(), q, k, v)
            if each[0].shape[1]
        ]
        return torch.cat(out)

    return function


def from_the_bottom_right(attend, q, k, v, cu_q, cu_k):
    out = []
    for each in each_sequence(cu_q.tolist(), cu_k.tolist(), q, k, v):
        length, keys = each[0].shape[1], each[1].shape[1]
        mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
        if length:
            out.append(attend(*(x.transpose(1, 2) for x in each), mask, scale=SCALE)[0].transpose(0, 1))
    return torch.cat(out)


SHAPE = {"product": H, "length": T_Q, "keys": max(LENGTHS_K)}  # keys: of the longest sequence
PACKED = {"kind": "varlen", "inputs": packed(), "same": same(), **SHAPE}
EQUAL = {
    "kind": "varlen",
    "inputs": packed(lengths=(LENGTHS_K, LENGTHS_K)),
    "product": H,
    "length": T_K,
    "keys": max(LENGTHS_K),
}
BOTTOM_RIGHT = {"kind": "varlen", "inputs": packed(), "same": from_the_bottom_right, "mask": None, **SHAPE}
LONGEST = (max(LENGTHS_Q), max(LENGTHS_K))


def lengths(cu_q, cu_k, longest=LONGEST):
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (cu_q, cu_k, *longest), strict=True))


@spelling(twin={"softcap": 20.0}, why=SOFTCAP, **PACKED)
def flash_2_varlen(q, k, v, cu_q, cu_k, softcap=0.0):
    return flash_2.flash_attn_varlen_func(q, k, v, **lengths(cu_q, cu_k), softmax_scale=SCALE, softcap=softcap)


@spelling(twin={"window": (8, 0)}, why=WINDOW, **BOTTOM_RIGHT)
def flash_2_varlen_causal(q, k, v, cu_q, cu_k, window=(-1, -1)):
    how = {"softmax_scale": SCALE, "causal": True, "window_size": window}
    return flash_2.flash_attn_varlen_func(q, k, v, **lengths(cu_q, cu_k), **how)


@spelling(
    twin={"softcap": 20.0},
    why=SOFTCAP,
    kind="varlen",
    inputs=packed(KV),
    same=same(enable_gqa=True),
    group=GROUP,
    **SHAPE,
)
def flash_2_varlen_grouped(q, k, v, cu_q, cu_k, softcap=0.0):
    return flash_2.flash_attn_varlen_func(q, k, v, **lengths(cu_q, cu_k), softmax_scale=SCALE, softcap=softcap)


@spelling(
    twin={"window": (5, 5)},
    why=WINDOW,
    **{
        **EQUAL,
        "inputs": lambda: (torch.randn(T_K, 3, H, D), starts(LENGTHS_K), starts(LENGTHS_K)),
        "same": lambda attend, qkv, *cu: same()(attend, *qkv.unbind(1), *cu),
    },
)
def flash_2_varlen_qkv_packed(qkv, cu_q, cu_k, window=(-1, -1)):
    longest = (max(LENGTHS_K), max(LENGTHS_K))
    how = {"softmax_scale": SCALE, "window_size": window}
    return flash_2.flash_attn_varlen_func(qkv, **lengths(cu_q, cu_k, longest), **how)


@spelling(
    twin={"window": (5, 5)},
    why=WINDOW,
    **{
        **PACKED,
        "inputs": lambda: (torch.randn(T_Q, H, D), torch.randn(T_K, 2, H, D), starts(LENGTHS_Q), starts(LENGTHS_K)),
        "same": lambda attend, q, kv, *cu: same()(attend, q, *kv.unbind(1), *cu),
    },
)
def flash_2_varlen_kv_packed(q, kv, cu_q, cu_k, window=(-1, -1)):
    how = {"softmax_scale": SCALE, "window_size": window}
    return flash_2.flash_attn_varlen_func(q, kv, **lengths(cu_q, cu_k), **how)


@spelling(twin={"softcap": 20.0}, why=SOFTCAP, **PACKED)
def flash_3_varlen(q, k, v, cu_q, cu_k, softcap=0.0):
    return flash_3.flash_attn_varlen_func(q, k, v, **lengths(cu_q, cu_k), softmax_scale=SCALE, softcap=softcap)


@spelling(twin={"window": (9, 0)}, why=WINDOW, **BOTTOM_RIGHT)
def flash_3_varlen_causal(q, k, v, cu_q, cu_k, window=(-1, -1)):
    how = {"softmax_scale": SCALE, "causal": True, "window_size": window}
    return flash_3.flash_attn_varlen_func(q, k, v, **lengths(cu_q, cu_k), **how)


@spelling(
    twin={"window": (9, 9)},
    why=WINDOW,
    kind="varlen",
    inputs=lambda: tuple(torch.randn(2, 150, H, D) for _ in "qkv"),
    same=lambda attend, *x: attend(*(y.transpose(1, 2) for y in x), scale=SCALE).transpose(1, 2),
    product=H,
    length=300,
    keys=150,
)
def flash_3_varlen_of_a_batch(q, k, v, window=(-1, -1)):
    """Wan folds the batch into the rows, and counts the lengths in the graph."""
    batch, length = q.shape[:2]
    counts = torch.tensor([length] * batch, dtype=torch.int32)
    cu_q, cu_k = (torch.cat([counts.new_zeros([1]), counts]).cumsum(0, dtype=torch.int32) for _ in "qk")
    how = {"softmax_scale": SCALE, "window_size": window}
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_3.flash_attn_varlen_func(q, k, v, **lengths(cu_q, cu_k, (length, length)), **how)
    return out.unflatten(0, (batch, length))


@spelling(twin={"window": (11, 11)}, why=WINDOW, **PACKED)
def torch_varlen(q, k, v, cu_q, cu_k, window=(-1, -1)):
    return others.varlen_attn(q, k, v, cu_q, cu_k, *LONGEST, scale=SCALE, window_size=window)


@spelling(twin={"window": (11, 11)}, why=WINDOW, **BOTTOM_RIGHT)
def torch_varlen_causal(q, k, v, cu_q, cu_k, window=(-1, 0)):
    return others.varlen_attn(q, k, v, cu_q, cu_k, *LONGEST, scale=SCALE, window_size=window)


@spelling(twin={"window": (11, 11)}, why=WINDOW, **PACKED)
def torch_varlen_with_a_choice_of_backends(q, k, v, cu_q, cu_k, window=(-1, -1)):
    return others.varlen_attn(q, k, v, cu_q, cu_k, *LONGEST, scale=SCALE, window_size=window, new=True)


@spelling(twin={"window": (11, 0)}, why=WINDOW, **{**EQUAL, "same": same(causal=True), "is_causal": True})
def torch_varlen_of_one_list_of_lengths(q, k, v, cu_q, cu_k, window=(-1, 0)):
    longest = max(LENGTHS_K)
    return others.varlen_attn(q, k, v, cu_q, cu_q, longest, longest, scale=SCALE, window_size=window, new=True)


@spelling(twin={"window": 30}, why=WINDOW, **{**PACKED, "kind": "xformers"})
def xformers_flash_of_block_diagonal_lengths(q, k, v, cu_q, cu_k, window=-1):
    given = (cu_q, cu_k, None, *LONGEST, 0.0, SCALE, False, window, -1, False, None)
    return torch.ops.sparge_others.flash_fwd(q, k, v, *given)[0]


@spelling(
    twin={"pages": True},
    why=(Reason.PAGED,),
    **{**PACKED, "inputs": lambda: (*packed()(), torch.zeros(4, 2, dtype=torch.int32))},
)
def torch_varlen_without_pages(q, k, v, cu_q, cu_k, table, pages=False):
    given = (cu_q, cu_k, *LONGEST, False, SCALE, [-1, -1], False, None, table if pages else None, None, 1)
    out = torch.ops.sparge_torch_215._varlen_attn(q, k, v, *given)[0]
    return out
