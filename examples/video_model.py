"""The model of the small examples: a transformer over the tokens of a video, with a text beside it.

Its weights are random, but its heads look at tokens that are like their own, some sharply and some vaguely, as trained
heads do; wholly random ones would look everywhere alike, and no block could be left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRAMES, HEIGHT, WIDTH = 4, 16, 32  # 2,048 tokens: 32 blocks of 64 keys
WORDS, WIDE, HEADS = 16, 128, 4
SHARPNESS = (1.0, 2.0, 4.0, 8.0)  # of the heads


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDE, WIDE, bias=False) for _ in range(4))
        with torch.no_grad():
            nn.init.orthogonal_(self.to_k.weight)
            sharpness = torch.tensor(SHARPNESS).repeat_interleave(WIDE // HEADS)
            self.to_q.weight.copy_(sharpness[:, None] * self.to_k.weight)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)  # [B, L, C], [B, S, C]
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, L, D]
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDE), nn.LayerNorm(WIDE)
        self.attn1, self.attn2 = Attention(), Attention()  # to the video itself, and to the text

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        return x + self.attn2(self.norm2(x), text)


class VideoModel(nn.Module):
    """Tokens [B, L, C] and words [B, S, C] to tokens [B, L, C]."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


def clip(seed: int) -> tuple[Tensor, Tensor]:
    """A video in which near tokens are alike, [1, L, C], and a text, [1, S, C]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, WIDE, 2, 4, 4, generator=generator)
    video = F.interpolate(coarse, (FRAMES, HEIGHT, WIDTH), mode="trilinear").flatten(2).mT
    return video.contiguous(), torch.randn(1, WORDS, WIDE, generator=generator)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """The mean absolute error as a share of the mean absolute value."""
    return ((x - exact).abs().sum() / exact.abs().sum()).item()
