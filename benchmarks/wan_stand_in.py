"""A stand-in for Wan2.1 in plain torch, for benchmarks: its attention calls, widths and checkpointing, random weights.

Time hangs on sizes alone, so neither weights nor diffusers are needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparge_compile import sharded_attention

TEXT, CHANNELS, HEAD = 512, 16, 128


class Attention(nn.Module):
    """Wan's: RMS norm over all heads of queries and keys, rotary positions where there are some.

    ``shared``: several processes have parts of the sequence, as ``sharded_attention`` takes it.
    """

    shared: dict[str, Any] | None = None

    def __init__(self, width: int, head_size: int = HEAD) -> None:
        super().__init__()
        self.heads = max(1, width // head_size)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_query, self.norm_key = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        query, key = self.norm_query(self.query(x)), self.norm_key(self.key(context))
        q, k, v = (y.unflatten(2, (self.heads, -1)) for y in (query, key, self.value(context)))  # [B, L, H, D]
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if self.shared is not None:
            out = sharded_attention(q, k, v, **self.shared)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions [L, 1, D/2] on [B, L, H, D]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def positions(length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, float32 [L, 1, D/2] each."""
    half = head_size // 2
    rates = 10000 ** (torch.arange(half, device=device) / half)
    angles = torch.arange(length, device=device)[:, None] / rates
    return angles.cos()[:, None], angles.sin()[:, None]


class Block(nn.Module):
    def __init__(self, width: int, ffn: int, head_size: int = HEAD) -> None:
        super().__init__()
        self.attn1, self.attn2 = (Attention(width, head_size) for _ in range(2))
        self.norm1, self.norm3 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU("tanh"), nn.Linear(ffn, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, x: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, 1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.attn1(y, y, (cos, sin)) * gate1
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ffn(self.norm3(x) * (1 + scale2) + shift2) * gate2


class _Gather(torch.autograd.Function):
    """The rows of all processes, [B, L, C]; each has the loss of the whole, so that its rows' gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, parts = group, [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group), 1)[dist.get_rank(ctx.group)], None


class Wan(nn.Module):
    """Latents [B, 16, T, H, W], a text [B, 512, width] and a time [B] to a velocity like the latents.

    ``group``: the processes that share the sequence; each computes its rows, and all have the whole velocity.
    """

    group: Any = None

    def __init__(self, layers: int, width: int, ffn: int, is_checkpointed: bool, head_size: int = HEAD) -> None:
        super().__init__()
        self.width, self.is_checkpointed = width, is_checkpointed
        self.patch = nn.Conv3d(CHANNELS, width, (1, 2, 2), (1, 2, 2))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, ffn, head_size) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4 * CHANNELS)

    def forward(self, latents: Tensor, text: Tensor, when: Tensor) -> Tensor:
        patches = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)
        frames, height, width = patches.shape[1:4]
        x = patches.flatten(4).flatten(1, 3)  # [B, L, 64]
        frequencies = torch.exp(-torch.arange(128, device=x.device) / 128 * 9.2)
        angles = when[:, None].float() * frequencies
        modulation = self.time(torch.cat((angles.sin(), angles.cos()), -1).to(x.dtype)).unflatten(1, (6, -1))
        cos, sin = positions(x.shape[1], self.width // self.blocks[0].attn1.heads, x.device)
        if self.group is not None:
            size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
            x, cos, sin = x.chunk(size, 1)[rank], cos.chunk(size)[rank], sin.chunk(size)[rank]
        x = F.linear(x, self.patch.weight.flatten(1), self.patch.bias)  # a convolution whose patches do not overlap
        for block in self.blocks:
            if self.is_checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, text, modulation, cos, sin, use_reentrant=False)
            else:
                x = block(x, text, modulation, cos, sin)
        x = self.head(self.norm(x))
        if self.group is not None:  # the gradient of a gather is a sum: each process has the loss of the whole
            x = _Gather.apply(x, self.group)
        x = x.unflatten(2, (CHANNELS, 1, 2, 2)).unflatten(1, (frames, height, width))
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3).clone()
