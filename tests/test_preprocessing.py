"""Preprocessing against PIL with NumPy, and against timm's own pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from qzoo.errors import DataError
from qzoo.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some noise, so that resampling filters differ."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=-1)
    return Image.fromarray(np.uint8(np.clip(128 + 90 * waves + rng.normal(0, 20, waves.shape), 0, 255)))


def by_hand(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """The same with PIL and NumPy alone; the short side of the image is given by its height here."""
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    long = int(p.resize * image.width / image.height)
    image = image.resize((long, p.resize), filters[p.interpolation])
    size = p.input_size[1]
    left, top = round((long - size) / 2), round((p.resize - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return ((pixels - np.float32(p.mean)) / np.float32(p.std)).transpose(2, 0, 1)


CASES = [
    Preprocessing(),
    Preprocessing((3, 240, 240), 0.882, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    Preprocessing((3, 64, 64), 1.0, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
]


@pytest.mark.parametrize("preprocessing", CASES)
def test_transform_equals_pil_and_numpy(preprocessing: Preprocessing) -> None:
    image = photo(320, 290)
    actual = preprocessing.transform()(image)
    assert actual.dtype == torch.float32
    assert actual.shape == preprocessing.input_size
    np.testing.assert_allclose(actual.numpy(), by_hand(image, preprocessing), rtol=0, atol=1e-6)


@pytest.mark.parametrize("preprocessing", CASES)
def test_transform_equals_timms(preprocessing: Preprocessing) -> None:
    create_transform = pytest.importorskip("timm.data").create_transform
    theirs = create_transform(
        preprocessing.input_size,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
    )
    for size in ((320, 290), (200, 333)):
        image = photo(*size)
        assert torch.equal(preprocessing.transform()(image), theirs(image))


def test_one_channel() -> None:
    preprocessing = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.25,), (0.5,))
    gray = Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28))
    expected = (np.asarray(gray, np.float32)[None] / 255 - 0.25) / 0.5
    np.testing.assert_allclose(preprocessing.transform()(gray).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "crop_pct", "resize"),
    [
        (224, 0.875, 256),
        (240, 0.882, 272),
        (260, 0.89, 292),
        (300, 0.904, 331),
        (224, 0.965, 232),
        (28, 1.0, 28),
    ],
)
def test_resize(size: int, crop_pct: float, resize: int) -> None:
    assert Preprocessing((3, size, size), crop_pct).resize == resize


@pytest.mark.parametrize("preprocessing", CASES)
def test_json_and_back(preprocessing: Preprocessing) -> None:
    text = json.dumps(preprocessing.to_dict())
    again = Preprocessing.from_dict(json.loads(text))
    assert again == preprocessing
    assert hash(again) == hash(preprocessing)  # tuples again, not lists


def test_defaults_are_torchvisions() -> None:
    assert Preprocessing() == Preprocessing((3, 224, 224), 0.875, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mean": (0.5,)}, "one entry for each of 3 channels"),
        ({"std": (0.5, 0.5)}, "one entry for each of 3 channels"),
        ({"interpolation": "lanczos"}, "'lanczos'"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.5}, "crop_pct"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocessing(**arguments)


def test_images_that_the_resize_would_blow_up_are_refused() -> None:
    with pytest.raises(DataError, match="60000 x 1 pixels; the long side"):
        Preprocessing().transform()(Image.new("L", (60_000, 1)))
    wide = Image.new("RGB", (100, 1))
    assert Preprocessing().transform()(wide).shape == (3, 224, 224)
    with pytest.raises(DataError, match="short side is resized to 1200"):
        Preprocessing((3, 1200, 1200), 1.0).transform()(wide)


@pytest.mark.parametrize(
    "size", [(3, 0, 224), (3, -1, 224), (3, 1 << 14, 1 << 14), (0, 28, 28), (1 << 13, 8, 8)]
)
def test_input_sizes_that_no_image_has(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="input_size"):
        Preprocessing(size, mean=(0.5,) * max(0, size[0]), std=(0.5,) * max(0, size[0]))
