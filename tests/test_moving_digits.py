"""The trained example: its data are fixed, its weights draw and read digits, its measures measure."""

from __future__ import annotations

import digits
import measures
import pytest
import torch
import transformer

MIB = 2**20


def test_the_split_of_digits_is_fixed_and_has_no_image_twice() -> None:
    train, held_out = (digits.digit_images(which, torch.device("cpu"))[0] for which in (False, True))
    assert len(train) == 1500 and len(held_out) == 297
    assert torch.cdist(held_out.flatten(1), train.flatten(1)).min() > 0


@pytest.mark.parametrize("shifted", [False, True])
def test_clips_depend_on_their_arguments_alone(shifted: bool) -> None:
    video, classes = digits.clips(3, 5, shifted=shifted, frames=6)
    again, _ = digits.clips(3, 5, shifted=shifted, frames=6)
    other, _ = digits.clips(3, 6, shifted=shifted, frames=6)
    assert video.shape == (3, 6, 64, 64) and video.abs().max() <= 1
    assert torch.equal(video, again) and not torch.equal(video, other)
    assert classes.sum(1).tolist() == [2 + shifted] * 3


def test_a_digit_stays_within_the_frame_and_keeps_its_ink() -> None:
    """Where digits bounce, nothing of them is lost at a wall: ink varies by what they overlap, never to half."""
    video, _ = digits.clips(8, 1)
    ink = (video + 1).sum((2, 3))
    assert (ink.amin(1) > 0.5 * ink.amax(1)).all()


def test_a_noisy_clip_and_its_velocity_give_the_clip_back() -> None:
    video, _ = digits.clips(4, 2, frames=2)
    mixed, time, velocity = digits.noisy(video, 3)
    assert torch.allclose(mixed - time[:, None, None, None] * velocity, video, atol=1e-5)


def test_the_weights_are_small_enough_to_ship() -> None:
    assert all(path.stat().st_size <= 16 * MIB for path in transformer.WEIGHTS.glob("*.safetensors"))


@torch.no_grad()
def test_the_trained_model_finds_held_out_digits_in_noise() -> None:
    """At t = 0.7 the clip that the model sees behind the noise is far nearer to the truth than a black one is."""
    video, classes = digits.clips(1, 4, held_out=True, frames=12)
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.7])
    mixed = torch.lerp(video, noise, 0.7)
    seen = mixed - 0.7 * transformer.load()(mixed, time, classes)
    assert (seen - video).square().mean() < 0.25 * (-1 - video).square().mean()


def test_the_classifier_reads_held_out_digits() -> None:
    video, classes = digits.clips(24, 7, held_out=True, frames=4)
    classifier = measures.load_classifier()
    assert measures.accuracy(classifier, video, classes).mean() > 0.8
    assert measures.accuracy(classifier, torch.zeros_like(video), classes).mean() < 0.5


def test_measures_of_known_differences() -> None:
    video, _ = digits.clips(2, 8, frames=4)
    assert torch.allclose(measures.psnr(video, video + 0.2), torch.full((2,), 20.0), atol=1e-3)  # 10 log10(4 / 0.04)
    assert torch.allclose(measures.ssim(video, video), torch.ones(2), atol=1e-5)
    assert (measures.ssim(video, -video) < 0.5).all()
    assert torch.allclose(measures.velocity_error(1.1 * video, video), torch.full((2,), 0.01), atol=1e-5)
    assert torch.equal(measures.flicker(torch.ones(2, 5, 64, 64)), torch.zeros(2))
    assert (measures.flicker(torch.randn(2, 5, 64, 64)) > measures.flicker(video[:, :1].expand(-1, 5, -1, -1))).all()
