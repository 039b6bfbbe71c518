"""An order of tokens that is made once is a permutation: beside kept tokens, dynamic shapes and compiled autograd."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Block

from sparge_compile import attention
from sparge_compile.kernels.order import Grid, make_order

WIDTH = 32
OPTIONS = {"token_order": "tiles", "tile": (2, 4, 8), "min_seq_len": 0, "topk": 0.2, "topp": 0.0}


class Joint(nn.Module):
    """A video and a text in one sequence, text first, through two blocks; the video's tokens are given back."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.text = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 2) for _ in range(2))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        joint = torch.cat([self.text(text), x], 1)
        for block in self.blocks:
            joint = block(joint)
        return joint[:, -x.shape[1] :]


def permuted(model: Joint, video: Tensor, text: Tensor, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the model gives where attention takes its tokens in the order of blocks, and no pass of ours runs."""
    words, (frames, rows, columns) = text.shape[1], video.shape[2:]
    slots, places = make_order(Grid(words, frames, rows // 2, columns // 2, 0), OPTIONS["tile"], torch.device("cpu"))
    kept: dict[str, Any] = {"keep_keys": words, "dense_queries": True} if keeps else {}

    def attend(*qkv: Tensor) -> Tensor:
        out = attention(*(x[:, :, slots.long()] for x in qkv), topk=0.2, topp=0.0, **kept)
        return out[:, :, places.long()]

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        return model(video, text)


@pytest.mark.parametrize("way", ["kept and dynamic", "compiled autograd"])
def test_results_and_gradients_are_those_of_a_permutation(way: str, monkeypatch, caplog) -> None:
    model, keeps = Joint(), "kept" in way
    more = {"keep_keys": "text", "dense_queries": True, "inner": "eager"} if keeps else {"inner": "aot_eager"}
    options = {**OPTIONS, **more}
    compiled = torch.compile(model, backend="sparge", fullgraph=True, dynamic=keeps or None, options=options)
    traced = torch._dynamo.config.patch(compiled_autograd=True) if way == "compiled autograd" else nullcontext()
    for batch, frames, rows, columns, words in ((1, 3, 8, 12, 40), (2, 2, 5, 9, 30))[: 1 + keeps]:
        given = torch.randn(batch, 4, frames, 2 * rows, 2 * columns), torch.randn(batch, words, WIDTH)
        found = []
        for call in (compiled, lambda *x: permuted(model, *x, keeps, monkeypatch)):
            model.zero_grad()
            with caplog.at_level("INFO", "sparge_compile"), traced if call is compiled else nullcontext():
                out = call(*given)
                out.square().sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
        for got, want in zip(*found, strict=True):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert "made by 2 gathers for 2 sites, which would be 8 there" in caplog.text
