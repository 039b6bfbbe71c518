"""A small transformer that has learnt something: to clean a noisy picture of 2,048 tokens, in seconds on one core.

Two things help it: what lies near, and what has the same colour elsewhere. So its heads come to differ in what they
read, as those of large models do; random weights would read everything alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT, WIDTH = 32, 64
TOKENS = HEIGHT * WIDTH  # 32 key blocks
BAND = TOKENS // 4  # what it is trained on at once
CHANNELS, HEADS, LAYERS = 64, 4, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.sharpness = nn.Parameter(torch.tensor([1.0, 2.0, 4.0, 8.0]).view(HEADS, 1, 1))
        with torch.no_grad():  # like attends to like from the start, which saves most of the training
            nn.init.orthogonal_(self.qkv.weight[:CHANNELS])
            self.qkv.weight[CHANNELS : 2 * CHANNELS] = self.qkv.weight[:CHANNELS]
            self.qkv.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q * self.sharpness, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(2))
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Cleaner(nn.Module):
    """[B, L, 3] noisy colours to [B, L, 3] clean ones, of a whole picture or of a band of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Linear(3, CHANNELS)
        self.place = nn.Linear(32, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(CHANNELS, 3)
        y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
        waves = 2.0 ** -torch.arange(8) * torch.pi
        angles = torch.cat([y.flatten()[:, None] * waves, x.flatten()[:, None] * waves], 1)
        self.register_buffer("waves", torch.cat([angles.sin(), angles.cos()], 1))

    def forward(self, noisy: Tensor, first: int = 0) -> Tensor:
        x = self.colour(noisy) + self.place(self.waves[first : first + noisy.shape[1]])
        for block in self.blocks:
            x = block(x)
        return noisy + self.head(x)


def picture(seed: int) -> tuple[Tensor, Tensor]:
    """A noisy picture [1, L, 3] of discs in few colours, and the clean one."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    colours = 1.5 * F.normalize(torch.randn(5, 3, generator=draw), dim=-1)
    clean = colours[0].expand(HEIGHT, WIDTH, 3).clone()
    for _ in range(12):
        at_y, at_x, radius, which = (torch.rand(4, generator=draw) * torch.tensor([HEIGHT, WIDTH, 9, 5])).tolist()
        clean[(y - at_y) ** 2 + (x - at_x) ** 2 < (radius + 3) ** 2] = colours[int(which)]
    clean = clean.view(1, TOKENS, 3)
    return clean + 0.7 * torch.randn(clean.shape, generator=draw), clean


def train(steps: int) -> Cleaner:
    """A trained model, always the same on one machine. It learns from bands of pictures, which cost a tenth."""
    torch.manual_seed(0)
    model = Cleaner()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, steps)
    for step in range(steps):
        noisy, clean = picture(step)
        first = step % (TOKENS // BAND) * BAND
        band = slice(first, first + BAND)
        loss = F.mse_loss(model(noisy[:, band], first), clean[:, band])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return model.eval()
