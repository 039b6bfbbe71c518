"""Videos of handwritten digits that move, bounce and overlap: the data of the example, rendered when asked for.

The digits are the 1,797 scans of 8 × 8 that scikit-learn bundles, 297 of them held out. A clip is [24, 64, 64] in
[-1, 1] and comes with a 0/1 vector of the ten classes. ``shifted`` clips are of another distribution: three small,
fast, turning digits, dark on a gradient. Equal arguments give equal clips on any device.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FRAMES, SIDE, CLASSES = 24, 64, 10
HELD_OUT = 297
SHIFT = 12.0  # of times towards noise: a digit of 7,000 pixels, counted over all frames, is seen through much noise
BANK_SIDE = 32  # digits are enlarged once; smaller and turned ones are read from there


@functools.cache
def digit_images(held_out: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Digits [n, 32, 32] in [0, 1], and their classes [n]; the split is fixed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    chosen = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    images = torch.tensor(bunch.images, dtype=torch.float32)[chosen, None] / 16
    images = F.interpolate(F.pad(images, (1, 1, 1, 1)), (BANK_SIDE, BANK_SIDE), mode="bicubic", align_corners=False)
    images = torch.sigmoid(12 * (images - 0.45))[:, 0]  # strokes with an edge
    return images.to(device), torch.tensor(bunch.target, dtype=torch.int64)[chosen]


def clips(
    count: int,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    held_out: bool = False,
    shifted: bool = False,
    frames: int = FRAMES,
) -> tuple[Tensor, Tensor]:
    """Some clips [count, frames, 64, 64] in [-1, 1], and the classes in them [count, 10], 0 or 1."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    bank, classes = digit_images(held_out, device)
    digits = 3 if shifted else 2
    labels = torch.rand(count, CLASSES, generator=generator).argsort(-1)[:, :digits]  # different classes in a clip
    fits = classes == labels[..., None]  # [count, digits, n]
    which = torch.where(fits, torch.rand(fits.shape, generator=generator), -1).argmax(-1)  # [count, digits]

    size = (15 + 5 * _rand(count, digits, generator)) if shifted else (24 + 8 * _rand(count, digits, generator))
    speed = (2 + 2 * _rand(count, digits, generator)) if shifted else (0.5 + 1.5 * _rand(count, digits, generator))
    heading, turn, tilt = (2 * torch.pi * _rand(count, digits, generator) for _ in range(3))
    start = torch.rand(count, digits, 2, generator=generator)
    spin = (turn / torch.pi - 1) * 0.3 if shifted else torch.zeros_like(turn)  # radians a frame
    tilt = tilt if shifted else torch.zeros_like(tilt)
    slope = 0.3 * torch.rand(count, 2, generator=generator)

    when = torch.arange(frames, dtype=torch.float32)
    velocity = speed[..., None] * torch.stack((heading.cos(), heading.sin()), -1)  # [count, digits, 2], pixels a frame
    room = (SIDE - size)[..., None, None]
    travelled = start[:, :, None] * 2 * room + velocity[:, :, None] * when[:, None]  # [count, digits, frames, 2]
    corner = room - (travelled.remainder(2 * room) - room).abs()  # to and fro between the walls
    angle = tilt[..., None] + spin[..., None] * when  # [count, digits, frames]
    drawn = _draw(bank[which.to(device)], size.to(device), corner.to(device), angle.to(device)).amax(1)

    if shifted:
        ramp = torch.linspace(0, 1, SIDE, device=device)
        slope = slope.to(device)[..., None, None]
        ground = 0.35 + slope[:, 0] * ramp[:, None] + slope[:, 1] * (1 - ramp)  # [count, 64, 64]
        drawn = ground[:, None] * (1 - drawn)
    return drawn * 2 - 1, F.one_hot(labels, CLASSES).sum(1).float().to(device)


def _rand(count: int, digits: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, digits, generator=generator)


def _draw(images: Tensor, size: Tensor, corner: Tensor, angle: Tensor) -> Tensor:
    """Each digit [count, digits, 32, 32] on black frames [count, digits, frames, 64, 64], at its places."""
    count, digits, frames = angle.shape
    pixel = torch.arange(SIDE, device=images.device) + 0.5
    apart = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), -1)  # [64, 64, 2] of x, y
    centre = corner + size[..., None, None] / 2
    apart = (apart - centre[..., None, None, :]) * 2 / size[..., None, None, None, None]  # [-1, 1] inside the digit
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    x, y = apart.unbind(-1)
    grid = torch.stack((cos * x + sin * y, cos * y - sin * x), -1)  # [count, digits, frames, 64, 64, 2]
    images = images[:, :, None, None].expand(-1, -1, frames, 1, -1, -1)
    drawn = F.grid_sample(images.flatten(0, 2), grid.flatten(0, 2), align_corners=False)
    return drawn.view(count, digits, frames, SIDE, SIDE)


def noisy(video: Tensor, seed: int, shift: float = SHIFT) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching's training triple of clips [B, T, 64, 64]: the mixture (1 − t) x + t ε, t [B], and ε − x.

    t is logit-normal, moved towards noise by ``shift``, as Stable Diffusion 3 does (arXiv 2403.03206, equation 23).
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(video.shape, generator=generator).to(video.device)
    time = torch.sigmoid(torch.randn(len(video), generator=generator))
    time = (shift * time / (1 + (shift - 1) * time)).to(video.device)
    return torch.lerp(video, noise, time[:, None, None, None]), time, noise - video
