"""Videos of handwritten digits that move, bounce and overlap: the data of the study, rendered when asked for.

A clip is [frames, side, side] in [-1, 1] and comes with a 0/1 vector of the ten classes. ``shifted`` clips are of
another distribution; of the small model three small, fast, turning digits, dark on a gradient. Equal arguments give
equal clips on any device.
"""

from __future__ import annotations

import torch
from bank import choose, draw, multi_hot, rand
from deep import deep_clips
from setups import CLASSES, SMALL, Setup
from torch import Tensor

HELD_OUT_SEED = 20_000_000  # clips of training have the seeds below, those of fine-tuning the ones from FINE_TUNE_SEED
FINE_TUNE_SEED = 30_000_000
OTHER = 500_000_000  # further on in the seeds: other numbers than those that the clip was drawn with


def clips(
    count: int,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    setup: Setup = SMALL,
    held_out: bool = False,
    shifted: bool = False,
    frames: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Some clips [count, frames, side, side] in [-1, 1], and the classes in them [count, 10], 0 or 1."""
    scene = deep_clips if setup.is_deep else flat_clips
    generator = torch.Generator().manual_seed(seed)
    return scene(count, generator, torch.device(device), setup, held_out, shifted, frames or setup.frames)


def flat_clips(
    count: int,
    generator: torch.Generator,
    device: torch.device,
    setup: Setup,
    held_out: bool,
    shifted: bool,
    frames: int,
) -> tuple[Tensor, Tensor]:
    """Digits of constant size on black, as bright as the brighter where they overlap."""
    digits = 3 if shifted else setup.digits
    images, labels = choose(count, digits, generator, held_out, device)

    size = (15 + 5 * rand(count, digits, generator)) if shifted else (24 + 8 * rand(count, digits, generator))
    speed = (2 + 2 * rand(count, digits, generator)) if shifted else (0.5 + 1.5 * rand(count, digits, generator))
    heading, turn, tilt = (2 * torch.pi * rand(count, digits, generator) for _ in range(3))
    start = torch.rand(count, digits, 2, generator=generator)
    spin = (turn / torch.pi - 1) * 0.3 if shifted else torch.zeros_like(turn)  # radians a frame
    tilt = tilt if shifted else torch.zeros_like(tilt)
    slope = 0.3 * torch.rand(count, 2, generator=generator)

    when = torch.arange(frames, dtype=torch.float32)
    velocity = speed[..., None] * torch.stack((heading.cos(), heading.sin()), -1)  # [count, digits, 2], pixels a frame
    room = (setup.side - size)[..., None, None]
    travelled = start[:, :, None] * 2 * room + velocity[:, :, None] * when[:, None]  # [count, digits, frames, 2]
    corner = room - (travelled.remainder(2 * room) - room).abs()  # to and fro between the walls
    angle = tilt[..., None] + spin[..., None] * when  # [count, digits, frames]
    size = size[..., None].expand_as(angle)
    drawn = draw(images, size.to(device), corner.to(device), angle.to(device), setup.side).amax(1)

    if shifted:
        ramp = torch.linspace(0, 1, setup.side, device=device)
        slope = slope.to(device)[..., None, None]
        ground = 0.35 + slope[:, 0] * ramp[:, None] + slope[:, 1] * (1 - ramp)  # [count, 64, 64]
        drawn = ground[:, None] * (1 - drawn)
    return drawn * 2 - 1, multi_hot(labels).to(device)


def noisy(
    video: Tensor, seed: int, shift: float = SMALL.shift, within: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching's training triple of clips [B, T, side, side]: the mixture (1 − t) x + t ε, t [B], and ε − x.

    t is logit-normal, moved towards noise by ``shift``, as Stable Diffusion 3 does (arXiv 2403.03206, equation 23), and
    drawn anew until it is within these.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(video.shape, generator=generator).to(video.device)
    time = torch.full((len(video),), torch.inf)
    while (is_out := (time < within[0]) | (time > within[1])).any():
        drawn = torch.sigmoid(torch.randn(len(video), generator=generator))
        time = torch.where(is_out, shift * drawn / (1 + (shift - 1) * drawn), time)
    time = time.to(video.device)
    return torch.lerp(video, noise, time[:, None, None, None]), time, noise - video


def batch(
    number: int,
    size: int,
    device: torch.device | str,
    setup: Setup = SMALL,
    *,
    free: float = 0.0,
    within: tuple[float, float] = (0.0, 1.0),
    **kind: int | bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy clips, times, velocities and classes. ``kind`` goes to ``clips``; of a share ``free`` of the clips the
    classes are left out, as sampling with guidance asks for both; times are ``within`` these."""
    video, classes = clips(size, number, device, setup=setup, **kind)
    if free:
        left_out = torch.rand(size, generator=torch.Generator().manual_seed(OTHER + number)) < free
        classes = classes * ~left_out[:, None].to(device)
    return *noisy(video, number, setup.shift, within), classes


def noise_of(
    setup: Setup, seed: int, count: int, device: torch.device | str, frames: int | None = None
) -> tuple[Tensor, Tensor]:
    """Noise to draw clips from, and classes that are wanted in them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(setup.shape(count, frames), generator=generator)
    wanted = torch.rand(count, CLASSES, generator=generator).argsort(-1)[:, : setup.digits]
    return noise.to(device), multi_hot(wanted).to(device)
