"""A small transformer that has learnt something: to clean a noisy picture of 2,048 tokens, in seconds on one core.

Two things help it: what lies near, and what has the same colour elsewhere. So its heads come to differ in what they
read, as those of large models do; random weights would read everything alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT, WIDTH = 32, 64
TOKENS = HEIGHT * WIDTH  # 32 key blocks, each a tile of 8 × 8
BAND = TOKENS // 4  # a row of tiles, what it is trained on at once
CHANNELS, HEADS, LAYERS = 64, 4, 2
SHARPNESS = (0.5, 4.0, 2.0, 16.0)  # of the heads, at the start


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS).view(HEADS, 1, 1))
        half = CHANNELS // 2
        with torch.no_grad():  # half of the heads begin with like colours, half with near places: saves most training
            query, key, _ = self.qkv.weight.unflatten(0, (3, CHANNELS))
            query.zero_()
            nn.init.orthogonal_(query[:half, :half])
            nn.init.orthogonal_(query[half:, half:])
            key.copy_(query)
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
    """[B, L, 3] noisy colours to [B, L, 3] clean ones, of a whole picture or of some of its tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Linear(3, CHANNELS // 2)
        self.place = nn.Linear(32, CHANNELS // 2)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(CHANNELS, 3)
        y, x = places()
        waves = 2 * torch.pi / (6 * 1.5 ** torch.arange(8))  # periods of 6 to 100 pixels
        angles = torch.cat([y[:, None] * waves, x[:, None] * waves], 1)
        self.register_buffer("waves", torch.cat([angles.sin(), angles.cos()], 1))

    def forward(self, noisy: Tensor, first: int = 0) -> Tensor:
        place = self.place(self.waves[first : first + noisy.shape[1]])
        x = torch.cat([self.colour(noisy), place.expand(len(noisy), -1, -1)], -1)
        for block in self.blocks:
            x = block(x)
        return noisy + self.head(x)


def places() -> tuple[Tensor, Tensor]:
    """The y and the x of each token, tile by tile."""
    down, right, y, x = torch.meshgrid(*map(torch.arange, (HEIGHT // 8, WIDTH // 8, 8, 8)), indexing="ij")
    return (down * 8 + y).flatten(), (right * 8 + x).flatten()


def picture(seed: int) -> tuple[Tensor, Tensor]:
    """A noisy picture [1, L, 3] of discs in few colours, and the clean one."""
    draw = torch.Generator().manual_seed(seed)
    y, x = places()
    colours = 1.5 * F.normalize(torch.randn(5, 3, generator=draw), dim=-1)
    clean = colours[0].expand(TOKENS, 3).clone()
    for _ in range(12):
        at_y, at_x, radius, which = (torch.rand(4, generator=draw) * torch.tensor([HEIGHT, WIDTH, 9, 5])).tolist()
        clean[(y - at_y) ** 2 + (x - at_x) ** 2 < (radius + 3) ** 2] = colours[int(which)]
    clean = clean.unsqueeze(0)
    return clean + 0.7 * torch.randn(clean.shape, generator=draw), clean


def train(steps: int) -> Cleaner:
    """A trained model, always the same on one machine. It learns from parts of pictures, which cost a tenth."""
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
