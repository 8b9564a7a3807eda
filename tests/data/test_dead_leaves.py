"""Procedural images: the same by seed, of the network's form, and with the spectrum of photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qzoo.data.dead_leaves import dead_leaves
from qzoo.preprocessing import Preprocessing


def test_the_same_by_seed_whatever_their_number() -> None:
    preprocessing = Preprocessing((3, 40, 48))
    four = dead_leaves(preprocessing, images=4)
    assert four.shape == (4, 3, 40, 48)
    assert torch.equal(four[:2], dead_leaves(preprocessing, images=2))
    assert not torch.equal(four, dead_leaves(preprocessing, images=4, seed=1))
    assert len({image.numpy().tobytes() for image in four}) == 4


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 8, 8), (2, 17, 5)])
def test_images_are_preprocessed_levels(size: tuple[int, int, int]) -> None:
    channels = size[0]
    preprocessing = Preprocessing(size, mean=(0.4,) * channels, std=(0.2,) * channels)
    levels = (dead_leaves(preprocessing, images=8) * 0.2 + 0.4) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.min() >= -1e-3
    assert levels.max() <= 255 + 1e-3


def test_the_spectrum_falls_as_that_of_photographs() -> None:
    """Power over frequency falls with an exponent of about 2 (Field, 1987: 1.8 to 2.4 in photographs)."""
    images = (
        dead_leaves(Preprocessing((1, 128, 128), mean=(0.0,), std=(1.0,)), images=24)[:, 0].double().numpy()
    )
    window = np.hanning(128)[:, None] * np.hanning(128)[None]
    centred = (images - images.mean((1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])
    chosen = (frequency > 0.03) & (frequency < 0.3)
    slope = np.polyfit(np.log(frequency[chosen]), np.log(power[chosen]), 1)[0]
    assert -2.8 < slope < -1.6
