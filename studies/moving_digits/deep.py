"""Clips of the large model: digits that come near and go away, the near covering the far, before a textured ground.

The ground is a sum of plane waves that drifts: what it looks like is told by all frames, near and far.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from bank import choose, draw, multi_hot, rand
from setups import Setup
from torch import Tensor

NEAR, FAR = 0.52, 0.2  # sizes of digits, as shares of the frame
WAVES = 4
HALO = 5  # pixels across: strokes stand before a dark edge, so that one sees which digit is nearer


def deep_clips(
    count: int,
    generator: torch.Generator,
    device: torch.device,
    setup: Setup,
    held_out: bool,
    shifted: bool,
    frames: int,
) -> tuple[Tensor, Tensor]:
    """Clips [count, frames, side, side] in [-1, 1], and their classes [count, 10]. ``shifted``: turned, in negative."""
    images, labels = choose(count, setup.digits, generator, held_out, device)
    when = torch.arange(frames, dtype=torch.float32)

    def random(low: float, high: float) -> Tensor:
        return (low + (high - low) * rand(count, setup.digits, generator))[..., None]  # [count, digits, 1]

    middle, breadth = random(math.log(0.26), math.log(0.42)), random(0.1, 0.3)
    phase, pulse = random(0, 2 * math.pi), random(0.06, 0.2)  # radians a frame: 30 to 100 frames to and fro
    share = (middle + breadth * torch.sin(phase + pulse * when)).exp().clamp(FAR, NEAR)  # [count, digits, frames]
    size = setup.side * share
    speed, heading = random(0.8, 2.4), random(0, 2 * math.pi)  # pixels a frame
    start = torch.stack((random(0, 2), random(0, 2)), -1)
    velocity = torch.stack((heading.cos(), heading.sin()), -1) * (speed / (0.66 * setup.side))[..., None]
    place = 1 - ((start + velocity * when[:, None]).remainder(2) - 1).abs()  # to and fro between the walls, in [0, 1]
    corner = place * (setup.side - size)[..., None]
    tilt = random(-0.6, 0.6) if shifted else torch.zeros(count, setup.digits, 1)
    angle = tilt.expand(-1, -1, frames)

    back_to_front = share.argsort(1).to(device)[..., None, None]
    ink = draw(images, size.to(device), corner.to(device), angle.to(device), setup.side)
    ink = ink.take_along_dim(back_to_front, 1)
    light = 0.6 + 0.4 * ((share - FAR) / (NEAR - FAR)).to(device)[..., None, None].take_along_dim(back_to_front, 1)
    picture = ground(count, generator, frames, setup.side, device)
    for digit in range(setup.digits):
        edge = F.max_pool2d(ink[:, digit], HALO, stride=1, padding=HALO // 2)
        picture = torch.lerp(picture * (1 - 0.85 * edge), light[:, digit], ink[:, digit])
    return (1 - 2 * picture if shifted else 2 * picture - 1), multi_hot(labels).to(device)


def ground(count: int, generator: torch.Generator, frames: int, side: int, device: torch.device) -> Tensor:
    """A drifting texture [count, frames, side, side] in [0, 0.4]."""

    def random(low: float, high: float, waves: int = WAVES) -> Tensor:
        return (low + (high - low) * torch.rand(count, waves, generator=generator)).to(device)

    wave = 2 * math.pi / torch.exp(random(math.log(10), math.log(48)))  # radians a pixel: 10 to 48 pixels long
    heading, phase, drift = random(0, 2 * math.pi), random(0, 2 * math.pi), random(-0.8, 0.8, 2)
    across = torch.stack((heading.cos(), heading.sin()), -1) * wave[..., None]  # [count, waves, 2]
    pixel, when = (torch.arange(n, device=device, dtype=torch.float32) for n in (side, frames))
    pace = (across * drift[:, None]).sum(-1)  # [count, waves], radians a frame
    turns = across[..., 0, None, None, None] * pixel + across[..., 1, None, None, None] * pixel[:, None]
    turns = turns + (phase[..., None] - pace[..., None] * when)[..., None, None]  # [count, waves, frames, side, side]
    return 0.2 + 0.2 * turns.sin().mean(1)
