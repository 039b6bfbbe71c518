"""Attention modules as official repositories write them, with flash-attn: found, replaced, and trained."""

from __future__ import annotations

import pytest
import torch
from official import OFFICIAL

import sparge_compile

DENSE = {"min_seq_len": 0, "topk": 1.0, "topp": 0.0, "inner": "aot_eager"}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_module_is_sparse(name, gradients):
    build, make, kind = OFFICIAL[name]
    model, inputs = build(), make()
    with torch.set_grad_enabled(gradients):
        (row,) = sparge_compile.explain(model, DENSE)(*inputs)
        assert (row.kind, row.status) == (kind, "sparse")
        got = torch.compile(model, backend="sparge", fullgraph=True, options=DENSE)(*inputs)
        want = model(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if gradients:
        parameters = list(model.parameters())
        pairs = zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (got, want)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
