"""The inference kernels of torch.nn written out compute what the kernels compute, and have their signatures."""

from __future__ import annotations

import inspect

import pytest
import torch

from sparge_compile.passes.mha import plain_torch

B, L, H, C = 2, 5, 2, 8


def weights(*shapes):
    return [torch.randn(*shape) * 0.3 for shape in shapes]


def masks(kind):
    if kind is None:
        return None, None
    if kind == plain_torch.ATTENTION_MASK:
        return torch.ones(L, L, dtype=torch.bool).triu(1), kind
    if kind == plain_torch.KEY_PADDING:
        return torch.arange(L).expand(B, L) >= torch.tensor([[L], [3]]), kind
    return torch.ones(B, H, L, L, dtype=torch.bool).triu(2), kind


KINDS = {"none": None, "pairs": plain_torch.ATTENTION_MASK, "padding": plain_torch.KEY_PADDING, "full": 2}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_native_attention(kind):
    x, mask = torch.randn(B, L, C), masks(kind)
    arguments = (x, x, x, C, H, *weights((3 * C, C), (3 * C,), (C, C), (C,)), mask[0], False, True, mask[1])
    want = torch._native_multi_head_attention(*arguments)[0]
    torch.testing.assert_close(plain_torch.native_multi_head_attention(*arguments), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_native_attention_of_other_keys_projects_each_by_its_part():
    x, y = torch.randn(B, L, C), torch.randn(B, L, C)
    given = weights((3 * C, C), (3 * C,), (C, C), (C,))
    want = torch._native_multi_head_attention(x, y, y, C, H, *given, need_weights=False)[0]
    torch.testing.assert_close(
        plain_torch.native_multi_head_attention(x, y, y, C, H, *given), want, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("gelu", [False, True], ids=["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@torch.no_grad()
def test_encoder_layer(norm_first, gelu, kind):
    x = torch.randn(B, L, C)
    attention = weights((3 * C, C), (3 * C,), (C, C), (C,))
    rest = weights((C,), (C,), (C,), (C,), (16, C), (16,), (C, 16), (C,))
    arguments = (x, C, H, *attention, gelu, norm_first, 1e-5, *rest, *masks(kind))
    want = torch._transformer_encoder_layer_fwd(*arguments)
    torch.testing.assert_close(plain_torch.transformer_encoder_layer(*arguments), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "written, kernel",
    [
        (plain_torch.native_multi_head_attention, torch.ops.aten._native_multi_head_attention.default),
        (plain_torch.transformer_encoder_layer, torch.ops.aten._transformer_encoder_layer_fwd.default),
    ],
    ids=["attention", "layer"],
)
def test_signatures_are_those_of_the_kernels(written, kernel):
    mine = inspect.signature(written).parameters
    theirs = {argument.name: argument for argument in kernel._schema.arguments}
    assert [name.lower() for name in mine] == [name.lower() for name in theirs]
    for name, argument in theirs.items():
        default = mine[name].default
        assert (default is inspect.Parameter.empty) == (not argument.has_default_value())
        if argument.has_default_value():
            assert default == argument.default_value
