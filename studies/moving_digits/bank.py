"""Handwritten digits, and how they are drawn into frames: the 1,797 scans of 8 × 8 that scikit-learn bundles.

297 of them are held out. What is drawn depends on its arguments alone, on any device.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from setups import CLASSES
from torch import Tensor

HELD_OUT = 297
BANK_SIDE = 32  # digits are enlarged once; other sizes and turned ones are read from there


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


def choose(
    count: int, digits: int, generator: torch.Generator, held_out: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images [count, digits, 32, 32] of as many different classes in each clip, and these [count, digits]."""
    bank, classes = digit_images(held_out, device)
    labels = torch.rand(count, CLASSES, generator=generator).argsort(-1)[:, :digits]
    fits = classes == labels[..., None]  # [count, digits, n]
    which = torch.where(fits, torch.rand(fits.shape, generator=generator), -1).argmax(-1)
    return bank[which.to(device)], labels


def multi_hot(labels: Tensor) -> Tensor:
    """Classes [count, digits] as 0/1 vectors [count, 10]."""
    return F.one_hot(labels, CLASSES).sum(1).float()


def rand(count: int, digits: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, digits, generator=generator)


def draw(images: Tensor, size: Tensor, corner: Tensor, angle: Tensor, side: int) -> Tensor:
    """Each digit [count, digits, 32, 32] on black frames [count, digits, frames, side, side], in [0, 1].

    ``size`` and ``angle`` are [count, digits, frames], ``corner`` is [count, digits, frames, 2].
    """
    count, digits, frames = angle.shape
    pixel = torch.arange(side, device=images.device) + 0.5
    apart = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), -1)  # [side, side, 2] of x, y
    centre = corner + size[..., None] / 2
    apart = (apart - centre[..., None, None, :]) * 2 / size[..., None, None, None]  # [-1, 1] inside the digit
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    x, y = apart.unbind(-1)
    grid = torch.stack((cos * x + sin * y, cos * y - sin * x), -1)  # [count, digits, frames, side, side, 2]
    images = images[:, :, None, None].expand(-1, -1, frames, 1, -1, -1)
    drawn = F.grid_sample(images.flatten(0, 2), grid.flatten(0, 2), align_corners=False)
    return drawn.view(count, digits, frames, side, side)
