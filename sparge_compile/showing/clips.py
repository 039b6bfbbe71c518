"""Clips side by side as a GIF, pictures as a PNG. In: frames by name. Out: a file."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import value_error
from ..thresholds.json_file import write_atomically
from .needed import needed

RATE = 12.0  # frames a second
LINE, GAP, GROUND = 18, 6, (24, 26, 30)  # pixels of a name and between clips; the colour around them
_FRAMES = "frames [T, H, W] or [T, H, W, 3 or 1], uint8 or floats from 0 to 1; or a list of pictures"


def side_by_side(
    clips: Mapping[str, Any], path: str | os.PathLike[str], *, rate: float = RATE, height: int | None = None
) -> Path:
    """Write clips beside each other, each under its name, as a GIF that repeats; a single frame may be a PNG.

    Args:
        clips: by name, a tensor or array [T, H, W] or [T, H, W, C] with 1 or 3 channels, uint8 or floats in [0, 1]; or
            a list of PIL pictures. A shorter clip holds its last frame.
        path: where to write: a GIF, or if the name ends in ``.png``, and each clip is one frame, a PNG, in all colours.
        rate: frames a second.
        height: of each clip in pixels; default: as it is, small ones enlarged by whole times up to about 256.

    Raises:
        ValueError: no clips, or what is none.
        ImportError: there is no pillow.
    """
    target = Path(path)
    pictures = _pictures(clips, rate, height)
    is_still = target.suffix.lower() == ".png"
    if is_still and len(pictures) > 1:
        raise value_error(
            "clips side by side: a PNG is one picture",
            given=f"{len(pictures)} frames",
            allowed="one frame of each clip, or a GIF",
            todo=f"Write to {target.with_suffix('.gif').name!r}.",
        )
    write_atomically(target, _png(pictures[0]) if is_still else _gif(pictures, rate))
    return target


def gif(clips: Mapping[str, Any], *, highest: int | None = None) -> bytes:
    """Return the bytes of a GIF, as :func:`side_by_side` writes it; clips that are higher than ``highest`` get that
    height."""
    return _gif(_pictures(clips, RATE, None, highest), RATE)


def _png(picture: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def _gif(pictures: list[Any], rate: float) -> bytes:
    content = io.BytesIO()
    more = {"append_images": pictures[1:], "duration": round(1000 / rate), "loop": 0}
    pictures[0].save(content, "GIF", save_all=True, **more)
    return content.getvalue()


def _pictures(clips: Mapping[str, Any], rate: float, height: int | None, highest: int | None = None) -> list[Any]:
    """PIL pictures, one for each moment, with the clips beside each other."""
    images = needed("PIL.Image", "a GIF")
    draw, fonts = needed("PIL.ImageDraw", "a GIF"), needed("PIL.ImageFont", "a GIF")
    shown = {name: [images.fromarray(frame) for frame in _frames(name, clip)] for name, clip in clips.items()}
    if not shown or not rate > 0:
        raise value_error(
            "clips side by side", given=f"{len(shown)} clips at {rate} frames", allowed=_FRAMES, todo=_TODO
        )
    for name, clip in shown.items():
        own = highest if highest is not None and clip[0].height > highest else height
        shown[name] = [_sized(frame, own, images) for frame in clip]
    font = fonts.load_default()
    widths = [max(clip[0].width, round(font.getlength(name)) + GAP) for name, clip in shown.items()]
    size = sum(widths) + GAP * (len(widths) - 1), LINE + max(clip[0].height for clip in shown.values())
    pictures = []
    for i in range(max(map(len, shown.values()))):
        picture, left = images.new("RGB", size, GROUND), 0
        for (name, clip), width in zip(shown.items(), widths, strict=True):
            draw.Draw(picture).text((left + 2, 3), name, (255, 255, 255), font)
            picture.paste(clip[min(i, len(clip) - 1)], (left, LINE))
            left += width + GAP
        pictures.append(picture)
    return pictures


def frames_of(output: Any) -> Any:
    """The first clip or picture in what a diffusers pipeline gave, as :func:`side_by_side` takes it; None if none."""
    single = getattr(output, "frames", None) is None
    frames = getattr(output, "images" if single else "frames", None)
    if frames is None or not len(frames) or (isinstance(frames, Tensor) and frames.dim() != 5 - single):
        return None  # latents, perhaps
    first = frames[0]
    if isinstance(first, Tensor) and first.dim() == 4 - single and first.shape[-3] in (1, 3):  # channels before rows
        first = first.movedim(-3, -1)
    return [first] if single else first


def clips_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first clip of each output by name; nothing where one of them has none."""
    found = {name: frames_of(output) for name, output in outputs.items()}
    return found if all(frames is not None for frames in found.values()) else {}


def _frames(name: str, clip: Any) -> list[Any]:
    """uint8 arrays [H, W, 3]."""
    if isinstance(clip, (list, tuple)) and clip and hasattr(clip[0], "convert"):
        clip = [_of_picture(picture) for picture in clip]
    try:
        frames = torch.stack([torch.as_tensor(x) for x in clip]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _wrong(name, type(clip).__name__) from error
    if frames.dim() == 3:
        frames = frames.unsqueeze(-1)
    if frames.dim() != 4 or frames.shape[-1] not in (1, 3) or not frames.numel():
        raise _wrong(name, f"{list(frames.shape)}")
    if frames.is_floating_point():
        frames = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if frames.dtype != torch.uint8:
        raise _wrong(name, str(frames.dtype))
    return list(frames.expand(*frames.shape[:3], 3).contiguous().numpy())


def _of_picture(picture: Any) -> Tensor:
    """uint8 [H, W, 3] of a PIL picture."""
    content = bytearray(picture.convert("RGB").tobytes())
    return torch.frombuffer(content, dtype=torch.uint8).view(picture.height, picture.width, 3)


def _sized(frame: Any, height: int | None, images: Any) -> Any:
    """A picture of this height; without one, enlarged by whole times so that small ones can be seen."""
    if height is None:
        times = max(1, 256 // max(frame.size))
        return frame.resize((frame.width * times, frame.height * times), images.Resampling.NEAREST)
    width = max(1, round(frame.width * height / frame.height))
    return frame.resize((width, height), images.Resampling.LANCZOS)


_TODO = 'As side_by_side({"dense": frames, "sparse": others}, "clips.gif").'


def _wrong(name: str, given: str) -> ValueError:
    return value_error(f"clip {name!r}", given=given, allowed=_FRAMES, todo=_TODO)
