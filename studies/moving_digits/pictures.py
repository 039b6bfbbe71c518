"""Clips as pictures: rows of frames, and variants side by side in motion. Clips are [n, T, side, side] in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

EVERY = 3  # frames of a clip that a sheet shows
RATE = 12  # frames a second
LINE, GAP, GROUND = 16, 4, 40  # pixels of a name and between pictures; grey around them


def in_bytes(clips: Tensor) -> Tensor:
    """The greys of clips, 0 to 255."""
    return ((clips.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def enlarged(frame: Tensor, times: int) -> Image.Image:
    """A frame [side, side] as a grey picture."""
    return Image.fromarray(in_bytes(frame).cpu().numpy()).resize(
        (frame.shape[1] * times, frame.shape[0] * times), Image.Resampling.NEAREST
    )


def sheet(videos: dict[str, Tensor], times: int = 1, every: int = EVERY) -> Image.Image:
    """Frames in rows under their names: the first clip of each variant, then the second of each."""
    clips = next(iter(videos.values()))
    font, side = ImageFont.load_default(), clips.shape[-1] * times
    shown = range(0, clips.shape[1], every)
    picture = Image.new("L", (len(shown) * (side + GAP) - GAP, len(clips) * len(videos) * (LINE + side)), GROUND)
    rows = ((name, video[number]) for number in range(len(clips)) for name, video in videos.items())
    for row, (name, clip) in enumerate(rows):
        top = row * (LINE + side)
        ImageDraw.Draw(picture).text((4, top + 2), name, 255, font)
        for column, i in enumerate(shown):
            picture.paste(enlarged(clip[i], times), (column * (side + GAP), top + LINE))
    return picture


def animate(videos: dict[str, Tensor], path: Path, times: int = 4) -> None:
    """Write a GIF of the first clip of each variant, side by side."""
    clips = next(iter(videos.values()))
    font, side = ImageFont.load_default(), clips.shape[-1] * times
    pictures = []
    for i in range(clips.shape[1]):
        picture = Image.new("L", (len(videos) * (side + GAP) - GAP, LINE + side), GROUND)
        for column, (name, video) in enumerate(videos.items()):
            ImageDraw.Draw(picture).text((column * (side + GAP) + 4, 2), name, 255, font)
            picture.paste(enlarged(video[0, i], times), (column * (side + GAP), LINE))
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / RATE), loop=0)
