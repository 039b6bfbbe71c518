"""What a page draws by itself: colours of shares, block maps as tiny pictures, lines of a chart. Out: texts of HTML."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import torch
from torch import Tensor

from ..thresholds.calibration import Calibration
from .curves import Line, curves
from .needed import needed

WIDEST = 512  # blocks of a map that are drawn across or down; more are means
CHART = 340, 200  # its width and height
Colour = tuple[int, int, int]
_READ = (235, 241, 250), (17, 60, 140)  # of a block that no head reads, and one that all read
_SKIPPED = (233, 244, 239), (10, 104, 78)  # of a head that skips nothing, and one that skips all


def picture(shares: Tensor) -> str:
    """Return a picture of [Nq, Nk] shares, a pixel for a block, as a data URI."""
    images = needed("PIL.Image", "a block map")
    height, width = (min(n, WIDEST) for n in shares.shape)
    if (height, width) != tuple(shares.shape):
        shares = torch.nn.functional.adaptive_avg_pool2d(shares[None], (height, width))[0]
    content = bytes((shares * 255).round().to(torch.uint8).flatten().tolist())
    drawn = images.frombytes("P", (width, height), content)
    drawn.putpalette([channel for level in range(256) for channel in _mixed(*_READ, level / 255)])
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    return data_uri("png", file.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """Return a picture of this kind (png, gif) as the source of an img element."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _mixed(light: Colour, dark: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(light, dark, strict=True))
    return red, green, blue


def colour(share: float) -> str:
    """Return the colour of a sparsity, from light for 0 to dark for 1."""
    return "#{:02x}{:02x}{:02x}".format(*_mixed(*_SKIPPED, min(1.0, max(0.0, share))))


def chart(calibration: Calibration) -> dict[str, Any]:
    """Return the error by sparsity of a measured calibration, as points of an SVG; errors on a logarithmic scale."""
    width, height = CHART
    whole, sites = curves(calibration)
    errors = [error for line in (whole, *sites.values()) for _, error in line if error > 0]
    if not errors:
        errors = [0.01, 1.0]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    high = max(high, low + 1)

    def place(share: float, error: float) -> tuple[float, float]:
        return width * share, height * (high - math.log10(max(error, 10.0**low))) / (high - low)

    def path(line: Line) -> str:
        return " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)

    total = calibration.summary()
    dot = None if total is None or not total.mean_error else place(total.sparsity, total.mean_error)
    ticks = [(height * (high - power) / (high - low), f"{10.0**power:g}") for power in range(low, high + 1)]
    return {"whole": path(whole), "sites": [path(line) for line in sites.values()], "dot": dot, "ticks": ticks}
