"""varlen_attention: packed sequences by flash-attn's arguments; the ops below it as torch sees them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from sparge_compile import attention, varlen_attention

sparge = torch.ops.sparge
LENGTHS, KEYS = (200, 1, 130), (150, 70, 260)


def starts(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def problem(lengths=LENGTHS, keys=KEYS, grad=False):
    """q [T, H, D], k and v [Tk, Hk, D]; and what comes after them."""
    shapes = ((sum(lengths), 4, 16), (sum(keys), 2, 16), (sum(keys), 2, 16))
    qkv = [torch.randn(shape, requires_grad=grad) for shape in shapes]
    return qkv, (starts(lengths), starts(keys), max(lengths), max(keys))


def parts(x, lengths):
    """[1, heads, rows, D] of each sequence."""
    return [part.transpose(0, 1).unsqueeze(0) for part in x.split(lengths)]


def joined(found):
    return torch.cat([x.squeeze(0).transpose(0, 1) for x in found])


@pytest.mark.parametrize("causal", ["", "top_left", "bottom_right"])
def test_with_all_blocks_it_is_dense_attention_of_each_sequence(causal):
    qkv, packing = problem(grad=True)
    out = varlen_attention(*qkv, *packing, causal=causal)
    want = []
    for q, k, v in zip(parts(qkv[0], LENGTHS), *(parts(x, KEYS) for x in qkv[1:]), strict=True):
        length, keys = q.shape[2], k.shape[2]
        mask = torch.ones(length, keys, dtype=torch.bool)
        mask = mask.tril(keys - length if causal == "bottom_right" else 0) if causal else mask
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        want.append(dense.masked_fill(~mask.any(-1, keepdim=True), 0.0))
    want = joined(want)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), qkv) for x in (out, want)), strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0.0), atol=1e-4, rtol=1e-4)


def test_it_is_sparse_attention_of_each_sequence():
    qkv, packing = problem(grad=True)
    thresholds = {"topk": torch.tensor([0.2, 0.3, 0.5, 0.9]), "topp": 0.4}
    out, lse, sparsity = varlen_attention(*qkv, *packing, **thresholds, return_lse=True, return_sparsity=True)
    each = [
        attention(*x, **thresholds, enable_gqa=True, return_lse=True)
        for x in zip(parts(qkv[0], LENGTHS), *(parts(x, KEYS) for x in qkv[1:]), strict=True)
    ]
    want, want_lse = joined([x for x, _ in each]), torch.cat([x.squeeze(0) for _, x in each], 1)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    assert 0.1 < sparsity < 0.9 and out.shape == (331, 4, 16) and lse.shape == (4, 331)
    weights = torch.randn_like(out), torch.randn_like(lse)
    grads = (torch.autograd.grad(x, qkv, weights) for x in ((out, lse), (want, want_lse)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal):
    (q, k, v), packing = problem()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    thresholds, how = torch.tensor([[0.3, 0.4]] * 4), (None, causal, 0.25, causal, *packing)
    opcheck(sparge.block_map.default, (q, k, thresholds, *how))
    lists = sparge.block_map(q, k, thresholds, *how)
    opcheck(sparge.forward.default, (*(x.requires_grad_() for x in (q, k, v)), *lists, *how))
    for op in (sparge.attend, sparge.attend_for_backward):
        operands = (x.detach().requires_grad_(op is not sparge.attend) for x in (q, k, v))
        opcheck(op.default, (*operands, thresholds, *how[:3], 0, [], *how[3:]))
    with torch.no_grad():
        out, lse = sparge.forward(q, k, v, *lists, *how)
        bits = sparge.pack(*lists)
    opcheck(sparge.backward.default, (*(x.detach() for x in (out, q, k, v, out, lse)), None, bits, *how))


def test_compiled_whole_with_lengths_that_change():
    """One graph for other lengths in the same buffer: nobody reads them while tracing."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    def call(q, k, v, cu_seqlens):
        return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 300, 300, topk=0.3, causal="top_left")

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for lengths in ((200, 131), (31, 300)):
        (q, k, v), (cu_seqlens, *_) = problem(lengths, lengths)
        torch.testing.assert_close(compiled(q, k, v, cu_seqlens), call(q, k, v, cu_seqlens))
    assert len(graphs) == 1


def test_one_training_graph_for_any_number_of_sequences():
    """Of one sequence, too: nothing that the backward keeps is as long as there are sequences."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def call(q, k, v, cu_seqlens, longest):
        return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, topk=0.3)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((200, 131), (90,), (31, 300, 70)):
        qkv, (cu_seqlens, *_) = problem(lengths, lengths, grad=True)
        for x in (*qkv, cu_seqlens):
            torch._dynamo.mark_dynamic(x, 0)
        given = (*qkv, cu_seqlens, max(lengths))
        found, want = (torch.autograd.grad(f(*given).square().sum(), qkv) for f in (compiled, call))
        torch.testing.assert_close(found, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "change, error",
    [
        ({"causal": True}, "causal is not an alignment"),
        ({"max_seqlen_q": 0}, "the longest sequence has no row"),
        ({"max_seqlen_k": torch.tensor(300)}, "the longest sequence has no row"),
        ({"max_seqlen_k": 100}, "cu_seqlens_k does not fit"),
        ({"cu_seqlens_q": starts(LENGTHS).long()}, "cu_seqlens do not fit"),
        ({"cu_seqlens_q": starts((331,))}, "cu_seqlens do not fit"),
        ({"cu_seqlens_q": torch.stack([starts(LENGTHS)] * 2, 1)[:, 0]}, "cu_seqlens do not fit"),
        ({"query": torch.zeros(1, 4, 331, 16)}, "wrong rank"),
    ],
)
def test_what_does_not_fit_is_said(change, error):
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    qkv, packing = problem()
    with pytest.raises(ValueError, match=error):
        varlen_attention(**(dict(zip(names, (*qkv, *packing), strict=True)) | change))


def test_a_mask_does_not_go_with_packed_sequences():
    (q, k, v), packing = problem()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mask = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
    with pytest.raises(ValueError, match="packed sequences do not go with"):
        sparge.attention(q, k, v, torch.ones(4, 2), mask, False, None, 0, [], False, *packing)
