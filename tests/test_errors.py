"""Bad input to the op: four parts in every message, and nothing is half done."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparge_compile import BlockMap, attention, varlen_attention
from sparge_compile.errors import type_error, value_error


def qkv(batch=2, heads=4, kv_heads=4, length=100, keys=100, head_size=16, dtype=torch.float32):
    shapes = [(batch, heads, length, head_size)] + 2 * [(batch, kv_heads, keys, head_size)]
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


def call(q=None, k=None, v=None, **options):
    defaults = qkv()
    return attention(
        *(given if given is not None else other for given, other in zip((q, k, v), defaults, strict=True)), **options
    )


CASES = {
    "topk 0": (lambda: call(topk=0.0), "topk", "(0, 1]"),
    "topk 1.5": (lambda: call(topk=1.5), "topk", "(0, 1]"),
    "topp -0.1": (lambda: call(topp=-0.1), "topp", "[0, 1]"),
    "topk per head": (lambda: call(topk=torch.ones(3)), "topk", "[4]"),
    "key and value": (lambda: call(v=torch.ones(2, 4, 99, 16)), "key and value", "equal shapes"),
    "batch": (lambda: call(q=torch.ones(1, 4, 100, 16)), "query and key", "equal batch"),
    "head size of key": (lambda: call(q=torch.ones(2, 4, 100, 8)), "query and key", "head size"),
    "rank": (lambda: call(q=torch.ones(4, 100, 16)), "rank", "[batch, heads, length, head size]"),
    "dtypes": (lambda: call(k=torch.ones(2, 4, 100, 16).half()), "dtypes differ", "one dtype"),
    "devices": (lambda: call(q=torch.ones(2, 4, 100, 16, device="meta")), "devices differ", "one device"),
    "heads": (lambda: call(q=torch.ones(2, 6, 100, 16), enable_gqa=True), "multiple", "n × key heads"),
    "gqa not asked for": (lambda: call(q=torch.ones(2, 8, 100, 16)), "heads", "enable_gqa=True"),
    "head size 300": (lambda: attention(*qkv(head_size=300)), "head size", "1 to 256"),
    "integers": (lambda: attention(*qkv(dtype=torch.int32)), "dtype", "bfloat16, float16, float32"),
    "float64": (lambda: attention(*qkv(dtype=torch.float64)), "dtype", "bfloat16, float16, float32"),
    "mask shape": (lambda: call(attn_mask=torch.ones(3, 100, dtype=torch.bool)), "attn_mask", "(2, 4, 100, 100)"),
    "mask rank": (lambda: call(attn_mask=torch.ones(1, 1, 1, 1, 100) > 0), "attn_mask", "broadcasts"),
    "mask dtype": (lambda: call(attn_mask=torch.ones(100, 100, dtype=torch.int64)), "attn_mask", "bool"),
    "mask gradient": (lambda: call(attn_mask=torch.ones(100, 100, requires_grad=True)), "gradient", "constant"),
    "dropout": (lambda: call(dropout_p=0.1), "dropout", "dropout_p=0"),
    "map and thresholds": (
        lambda: call(topk=0.5, block_map=BlockMap.from_dense(torch.ones(1, 1, 1, 2) > 0)),
        "two ways",
        "one of them",
    ),
    "map shape": (lambda: call(block_map=BlockMap.from_dense(torch.ones(2, 4, 2, 2) > 0)), "block_map", "128 rows"),
    "map dtype": (
        lambda: call(block_map=BlockMap(*(x.long() for x in BlockMap.from_dense(torch.ones(2, 4, 1, 2) > 0)))),
        "block_map",
        "int32",
    ),
    "tile without a grid": (lambda: call(tile=(2, 4, 8)), "tile without a grid", "grid=(frames, height, width)"),
    "thresholds of other heads": (
        lambda: torch.ops.sparge.attention(*qkv(), torch.ones(3, 2)),
        "thresholds",
        "(4, 2)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_four_parts(case):
    make, what, allowed = CASES[case]
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert what in message and "got " in message and "allowed: " in message and allowed in message, message


@pytest.mark.parametrize("given", [{"q": "q"}, {"v": [1.0]}, {"attn_mask": [[True]]}, {"scale": "0.1"}])
def test_operands_of_another_type_are_refused_in_four_parts(given):
    with pytest.raises(TypeError, match=r"attention: .* got .*; allowed: (torch\.Tensor|a number; .*)\. \w"):
        call(**given)


@pytest.mark.parametrize("scale", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)], ids=["32", "64", "tensor"])
def test_a_scale_is_any_number_that_sdpa_takes(scale):
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    assert torch.equal(attention(q, k, v, scale=scale), attention(q, k, v, scale=0.5))


def test_packed_operands_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"varlen_attention: key is no tensor: got list; allowed: torch\.Tensor\. \w"):
        varlen_attention(torch.ones(4, 1, 16), [1.0], torch.ones(4, 1, 16), *2 * [torch.tensor([0, 4])], 4, 4)


@pytest.mark.parametrize("make, kind", [(value_error, ValueError), (type_error, TypeError)])
def test_a_message_has_four_parts_in_one_order(make, kind):
    error = make("topk is out of range", given=2, allowed="a share in (0, 1]", todo="Use 1 to keep all.")
    assert type(error) is kind
    assert str(error) == "topk is out of range: got 2; allowed: a share in (0, 1]. Use 1 to keep all."


def test_wrong_type_of_threshold():
    with pytest.raises(TypeError, match="a number"):
        call(topk="0.5")


@pytest.mark.parametrize("given", [3, torch.ones(2, 4, 1, 2) > 0, (1, 2)])
def test_wrong_type_of_block_map(given):
    with pytest.raises(TypeError, match=r"block_map has the wrong type: got \w+; allowed: .*BlockMap\.from_dense"):
        call(block_map=given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_one_broken_head_leaves_the_others_untouched(bad, where):
    tensors = [torch.randn(2, 4, 200, 16) for _ in range(3)]
    clean = attention(*tensors, topk=0.5, topp=0.3)
    tensors[where][0, 1, 70, 3] = bad
    out = attention(*tensors, topk=0.5, topp=0.3)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[0, 1] = True
    assert torch.equal(out[~touched], clean[~touched])
    assert not out[0, 1].isfinite().all(), "a broken head must not look healthy"


@pytest.mark.parametrize("length, keys", [(0, 100), (100, 0), (0, 0)])
@pytest.mark.parametrize("grad", [False, True])
def test_zero_lengths_give_zeros(length, keys, grad):
    q, k, v = (x.requires_grad_(grad) for x in qkv(length=length, keys=keys))
    out, lse = attention(q, k, v, topk=0.5, topp=0.2, return_lse=True)
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()
    if grad:
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_zero_batch():
    assert attention(*qkv(batch=0), topk=0.5).shape == (0, 4, 100, 16)


def test_rows_that_see_nothing_give_zeros():
    mask = torch.ones(2, 1, 100, 100, dtype=torch.bool)
    mask[0, :, :50] = False
    mask[1] = False
    q, k, v = (x.requires_grad_() for x in qkv())
    out = attention(q, k, v, mask, topk=0.5)
    assert (out[0, :, :50] == 0).all() and (out[1] == 0).all() and (out[0, :, 50:] == 1).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
