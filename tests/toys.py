"""The small models that tests share: attention alone, a block of it, and a stack of blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Bare(nn.Module):
    """Nothing but attention [B, H, L, D]: code of Inductor's for it takes no C++ compiler."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Self-attention with projections, added to its input [B, L, width]; attention stands in its own forward."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Equal blocks, one after the other."""

    def __init__(self, layers: int = 2, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(layers))

    def forward(self, x):  # no annotations: torch cannot pickle an FX graph that has them as text
        for block in self.blocks:
            x = block(x)
        return x
