"""Procedural images, "dead leaves": what a network is calibrated on where its data can't be had.

Papers: "Occlusion Models for Natural Images: A Statistical Study of a Scale-Invariant Dead Leaves Model" (Lee, Mumford
and Huang, 2001, International Journal of Computer Vision 41): shapes that cover each other, their number falling as a
power of their radius, have the edges and the scale invariance of photographs. "Learning to See by Looking at Noise"
(Baradad et al., 2021, arXiv:2106.05963): such images, and 1/f noise, teach a network much of what photographs do.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qzoo.preprocessing import Preprocessing

Floats = NDArray[np.float32]


def dead_leaves(preprocessing: Preprocessing, images: int = 64, seed: int = 0) -> Tensor:
    """Draw procedural images, as a network reads them: of its size, with 256 levels, normalized.

    Ellipses, boxes and triangles lie on top of each other. Number, sizes, colours, contrast and texture of the shapes
    are drawn anew for every image, so that some are calm and some are crowded.

    Args:
        preprocessing: size, mean and standard deviation of the network's images.
        images: how many; image ``i`` is the same whatever their number.
        seed: of the draw.

    Returns:
        [images, C, H, W], float32.

    Example:
        >>> from qzoo.data.dead_leaves import dead_leaves
        >>> from qzoo.preprocessing import Preprocessing
        >>> dead_leaves(Preprocessing((3, 32, 32)), images=2).shape
        torch.Size([2, 3, 32, 32])
    """
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    drawn = [_image(np.random.default_rng((seed, i)), *preprocessing.input_size) for i in range(images)]
    levels = torch.from_numpy(np.rint(np.clip(np.stack(drawn), 0, 1) * 255).astype(np.float32))
    return (levels / 255 - mean) / std


def _image(random: np.random.Generator, channels: int, height: int, width: int) -> Floats:
    """One image, [C, H, W], about 0..1: leaves are laid one after the other, the last on top."""
    size = max(height, width)
    leaves = int(math.exp(random.uniform(math.log(5), math.log(800))))
    radii = _radii(random, leaves, low=min(2.0, size / 16), high=random.uniform(0.2, 0.8) * size)
    colours = _colours(random, leaves, channels)
    roughness = random.random(leaves) * random.uniform(0, 0.4)
    texture = _texture(random, channels, size)
    canvas = colours[0] + np.float32(random.uniform(0, 0.2)) * texture[:, :height, :width]
    for radius, colour, rough in zip(radii, colours, roughness, strict=True):
        _lay(canvas, random, radius, colour, np.float32(rough), texture)
    return canvas


def _radii(random: np.random.Generator, count: int, low: float, high: float) -> NDArray[np.float64]:
    """Draws of a density r^-p between two radii; p = 3 is the scale-invariant one, lower ones have larger leaves."""
    power = 1 - random.uniform(1.01, 3)
    uniform = random.random(count)
    return np.asarray((low**power + uniform * (high**power - low**power)) ** (1 / power))


def _colours(random: np.random.Generator, count: int, channels: int) -> Floats:
    """[count, channels, 1, 1], from grey to gaudy, with an image's own contrast."""
    saturation, contrast = random.random(), random.uniform(0.5, 1.5)
    grey, bright = random.random((count, 1)), random.random((count, channels))
    colours = 0.5 + contrast * ((1 - saturation) * grey + saturation * bright - 0.5)
    return colours.astype(np.float32)[:, :, None, None]


def _texture(random: np.random.Generator, channels: int, size: int) -> Floats:
    """1/f noise of standard deviation 1, [channels, size, size]: its power falls with the square of the frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    draws = random.standard_normal((2, channels, *frequency.shape))
    noise = np.fft.irfft2((draws[0] + 1j * draws[1]) / frequency, s=(size, size))
    return np.asarray(noise / np.maximum(noise.std(axis=(1, 2), keepdims=True), 1e-9), np.float32)


def _lay(
    canvas: Floats,
    random: np.random.Generator,
    radius: float,
    colour: Floats,
    roughness: np.float32,
    texture: Floats,
) -> None:
    """Lay one leaf onto the canvas, in place; its edge is smooth within a pixel, as a camera's is."""
    height, width = canvas.shape[1:]
    y, x, angle = random.random() * height, random.random() * width, random.random() * math.pi
    aspect = math.exp(random.uniform(-0.35, 0.35))
    a, b = radius * aspect, radius / aspect
    reach = math.hypot(a, b) + 1
    rows = slice(max(0, int(y - reach)), min(height, int(y + reach) + 2))
    columns = slice(max(0, int(x - reach)), min(width, int(x + reach) + 2))
    down = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(y)
    right = np.arange(columns.start, columns.stop, dtype=np.float32)[None] - np.float32(x)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u, v = cos * right + sin * down, cos * down - sin * right
    shape = random.integers(3)
    if shape == 0:  # pixels from the edge, inside positive
        inside = (1 - np.sqrt((u / a) ** 2 + (v / b) ** 2)) * min(a, b)
    elif shape == 1:
        inside = np.minimum(a - np.abs(u), b - np.abs(v))
    else:
        inside = 0.8 * b - np.maximum(np.maximum(-v, 0.5 * v + 0.87 * u), 0.5 * v - 0.87 * u)
    cover = np.clip(inside + 0.5, 0, 1).astype(np.float32)
    under = canvas[:, rows, columns]
    under += cover * (colour + roughness * texture[:, rows, columns] - under)
