"""A small video diffusion transformer on plain PyTorch modules: RMS-normed q and k, 3-D RoPE, one shared adaLN.

It predicts the velocity of flow matching (arXiv 2210.02747) from a noisy clip, its time and the classes in it. Its
blocks are as in DiT (arXiv 2212.09748), their modulation as in PixArt (arXiv 2310.00426): one projection for all blocks
and a learned table for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from setups import CLASSES, PATCH, SMALL, Setup
from torch import Tensor, nn

GUIDANCE = 3.0  # of sampling: how far beyond the velocity without classes
ROPE_BASE = 100.0  # positions are few: 32 frames of 28 × 28 tokens at most


class VideoTransformer(nn.Module):
    """Clips [B, T, side, side], times [B] in [0, 1] and classes [B, 10] to velocities [B, T, side, side].

    A token is a patch of 4 × 4 pixels of one frame; tokens are in raster order (T, H, W). Classes of zeros: any.
    """

    def __init__(self, width: int = 256, layers: int = 8, heads: int = 4, patch: int = PATCH) -> None:
        super().__init__()
        self.patch, self.head_size = patch, width // heads
        self.enter = nn.Linear(patch * patch, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Linear(CLASSES, width, bias=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, patch * patch)
        for layer in (self.modulation, self.last_modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, video: Tensor, time: Tensor, classes: Tensor) -> Tensor:
        dtype, width = self.enter.weight.dtype, self.enter.out_features
        batch, frames, rows, columns = (*video.shape[:2], *(side // self.patch for side in video.shape[2:]))
        x = video.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))  # [B, T, h, p, w, p]
        x = self.enter(x.transpose(3, 4).reshape(batch, -1, self.patch**2).to(dtype))  # [B, L, width]
        x = x.to(dtype)  # as the blocks give it under autocast: one graph serves all of them

        angles = 1000 * time[:, None] * torch.exp(torch.linspace(0, -9.2, width // 2, device=video.device))
        condition = self.time(torch.cat((angles.cos(), angles.sin()), -1).to(dtype))
        condition = F.silu(condition + self.classes(classes.to(dtype)))
        modulation = self.modulation(condition).unflatten(-1, (6, 1, -1))  # [B, 6, 1, width]
        places = rope(frames, rows, columns, self.head_size, video.device)
        for block in self.blocks:
            x = block(x, modulation, places)

        shift, scale = self.last_modulation(condition).unsqueeze(1).chunk(2, -1)
        x = self.leave(F.layer_norm(x, (width,)) * (1 + scale) + shift)
        x = x.view(batch, frames, rows, columns, self.patch, self.patch).transpose(3, 4)
        return x.reshape(video.shape).to(video.dtype)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 1, width))
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU("tanh"), nn.Linear(3 * width, width))

    def forward(self, x: Tensor, modulation: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table).unbind(1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, places)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_query, self.norm_key = nn.RMSNorm(width // heads, 1e-6), nn.RMSNorm(width // heads, 1e-6)

    def forward(self, x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, L, head_size]
        q, k = rotate(self.norm_query(q), places).to(v.dtype), rotate(self.norm_key(k), places).to(v.dtype)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rope(frames: int, rows: int, columns: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, head_size / 2]: a quarter of the pairs turn with time, three eighths each with
    row and column."""
    pairs = head_size // 2
    shares = (pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8)
    places = torch.meshgrid(*(torch.arange(n, device=device) for n in (frames, rows, columns)), indexing="ij")
    angles = [
        place.reshape(-1, 1) * ROPE_BASE ** -torch.linspace(0, 1, share, device=device)
        for place, share in zip(places, shares, strict=True)
    ]
    turned = torch.cat(angles, -1)
    return turned.cos(), turned.sin()


def rotate(x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of [B, heads, L, head_size]: entry i is paired with i + head_size / 2."""
    cos, sin = places
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def load(
    name: str = "teacher",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    setup: Setup = SMALL,
) -> VideoTransformer:
    """The trained model; ``student``: with the weights that distillation at high sparsity changed."""
    from safetensors.torch import load_file

    model = VideoTransformer(*setup.sizes)
    weights = setup.weights / "teacher.safetensors"
    if not weights.exists():
        raise FileNotFoundError(f"{weights} is not there: train it with studies/moving_digits/train.py --setup {setup}")
    state = load_file(weights)
    if name != "teacher":
        state.update(load_file(setup.weights / f"{name}.safetensors"))
    model.load_state_dict(state)
    return model.to(device, dtype).eval()


def compiled(model: VideoTransformer, **how: Any) -> VideoTransformer:
    """The model with its blocks compiled: one graph serves all of them. ``how`` goes to torch.compile."""
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, **how)
    return model


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    noise: Tensor,
    classes: Tensor,
    steps: int = 20,
    guidance: float = GUIDANCE,
    shift: float = SMALL.shift,
) -> Tensor:
    """Clips in [-1, 1] from noise [B, T, side, side]: Euler's method on times moved towards noise,
    classifier-free guidance: each step calls the model once on 2 B clips, with classes and without.
    """
    times = torch.linspace(1, 0, steps + 1)
    times = shift * times / (1 + (shift - 1) * times)
    both, video = torch.cat((classes, torch.zeros_like(classes))), noise
    for time, following in itertools.pairwise(times):
        given, free = model(torch.cat((video, video)), time.expand(len(both)).to(noise.device), both).chunk(2)
        velocity = free + guidance * (given - free)
        video = video + (following - time) * velocity
    return video.clamp(-1, 1)
