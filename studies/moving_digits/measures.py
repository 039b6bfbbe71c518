"""Quality without a download: velocity error, PSNR, SSIM, what a small classifier reads, flicker.

Videos are [B, T, side, side] in [-1, 1].
"""

from __future__ import annotations

import itertools
import statistics

import torch
import torch.nn.functional as F
from digits import clips
from setups import CLASSES, PATCH, SMALL, Setup
from torch import Tensor, nn

import sparge_compile


def velocity_error(velocity: Tensor, teacher: Tensor) -> Tensor:
    """‖u − v‖² ÷ ‖v‖² of each sample [B]."""
    u, v = velocity.float().flatten(1), teacher.float().flatten(1)
    return (u - v).square().sum(1) / v.square().sum(1)


def psnr(video: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video [B], in dB; the range of a pixel is 2."""
    error = (video.float() - other.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def ssim(video: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of each video [B] (Wang et al. 2004), mean over frames: 11 × 11 Gaussian of σ 1.5."""
    x, y = (each.float().flatten(0, 1).unsqueeze(1) for each in (video, other))
    offset = torch.arange(-5, 6, device=x.device) ** 2
    bell = torch.exp(offset / (-2 * 1.5**2))
    window = (bell[:, None] * bell / bell.sum() ** 2)[None, None]

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar = similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similar.flatten(1).mean(1).view(video.shape[:2]).mean(1)


def measured_sparsity(model: nn.Module, calibration: sparge_compile.Calibration, inputs: tuple[Tensor, ...]) -> float:
    """The mean over the layers of one forward of the uncompiled model, with sparse attention put in by hand."""
    names = iter([name for name, each in model.named_modules() if name.endswith(".attention")])
    dense_attention, found = F.scaled_dot_product_attention, []
    _, frames, height, width = inputs[0].shape
    grid = (frames, height // PATCH, width // PATCH)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        name = next(names)
        pairs = calibration.lookup(name, query.shape[1], query.shape[3])
        if pairs is None:
            raise ValueError(f"the calibration has no thresholds for {name}: calibrate this model anew")
        topk, topp = torch.tensor(pairs, device=query.device).unbind(1)
        tile = calibration.tile_of(name)
        order = {} if tile is None else {"grid": grid, "tile": tile}
        sparse, sparsity = sparge_compile.attention(
            query, key, value, topk=topk, topp=topp, return_sparsity=True, **order
        )
        found.append(sparsity.item())
        return sparse

    F.scaled_dot_product_attention = attention
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        F.scaled_dot_product_attention = dense_attention
    return statistics.mean(found)


def flicker(video: Tensor) -> Tensor:
    """Mean of |x(t − 1) − 2 x(t) + x(t + 1)| of each video [B]: what moves steadily has little of it, what appears and
    vanishes much."""
    return (video[:, :-2] - 2 * video[:, 1:-1] + video[:, 2:]).float().abs().flatten(1).mean(1)


def seams(video: Tensor, side: int = 4 * PATCH) -> Tensor:
    """How much more neighbouring pixels of each video [B] differ across borders of tiles of this side than across
    those of other patches: 1 where the tiles do not show."""
    found = []
    for axis in (2, 3):
        after = torch.arange(1, video.shape[axis], device=video.device)
        step = video.float().diff(dim=axis).abs().mean([i for i in (1, 2, 3) if i != axis])  # [B, side - 1]
        on_tile, on_patch = after % side == 0, (after % PATCH == 0) & (after % side != 0)
        found.append(step[:, on_tile].mean(1) / step[:, on_patch].mean(1))
    return torch.stack(found).mean(0)


def grain(video: Tensor, darkest: float = -0.2) -> Tensor:
    """Mean of |4 x - its four neighbours| of each video [B], where it is as dark as the ground."""
    x = video.float()
    middle = x[:, :, 1:-1, 1:-1]
    around = x[:, :, :-2, 1:-1] + x[:, :, 2:, 1:-1] + x[:, :, 1:-1, :-2] + x[:, :, 1:-1, 2:]
    is_ground = middle < darkest
    return ((4 * middle - around).abs() * is_ground).sum((1, 2, 3)) / is_ground.sum((1, 2, 3)).clamp(min=1)


class Classifier(nn.Module):
    """Frames [n, side, side] to the logits [n, 10] of the classes in them."""

    def __init__(self, widths: tuple[int, ...] = SMALL.reader) -> None:
        super().__init__()
        stages = [
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            )
            for a, b in itertools.pairwise((1, *widths))
        ]
        self.stages = nn.Sequential(*stages, nn.Conv2d(widths[-1], CLASSES, 1))

    def forward(self, frames: Tensor) -> Tensor:
        return self.stages(frames.unsqueeze(1)).amax((2, 3))  # a digit is where it is


def load_classifier(device: torch.device | str = "cpu", setup: Setup = SMALL) -> Classifier:
    from safetensors.torch import load_file

    model = Classifier(setup.reader)
    model.load_state_dict(load_file(setup.weights / "classifier.safetensors"))
    return model.to(device).eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, video: Tensor, classes: Tensor) -> Tensor:
    """Share of the classes [B, 10] of each video [B] that are the classifier's first choices, mean over frames."""
    logits = classifier(video.float().flatten(0, 1))
    count = classes.sum(1).long().repeat_interleave(video.shape[1])
    place = logits.argsort(1, descending=True).argsort(1)
    right = (place < count[:, None]) * classes.repeat_interleave(video.shape[1], 0)
    return (right.sum(1) / count).view(video.shape[:2]).mean(1)


def train_classifier(device: torch.device, setup: Setup = SMALL, steps: int = 3000, batch: int = 512) -> Classifier:
    """Trained on frames of both distributions, with noise of any small strength. Each batch has both: reading takes the
    norms' averages over batches, which fit neither distribution where batches have one of them."""
    torch.manual_seed(0)
    model = Classifier(setup.reader).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        both = (clips(batch // 8, 10_000_000 + step, device, setup=setup, shifted=s, frames=4) for s in (False, True))
        video, classes = (torch.cat(each) for each in zip(*both, strict=True))
        noise = torch.randn_like(video) * 0.3 * torch.rand(len(video), 1, 1, 1, device=device)
        logits = model((video + noise).flatten(0, 1))
        loss = F.binary_cross_entropy_with_logits(logits, classes.repeat_interleave(4, 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()
