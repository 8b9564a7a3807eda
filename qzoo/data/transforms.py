"""Build timm's training transforms around a model's preprocessing, as ImageNet weights are trained with them.

The evaluation transform is :meth:`qzoo.preprocessing.Preprocessing.transform`, which equals timm's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qzoo.preprocessing import Preprocessing


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images; the defaults (crop and flip) suit fine-tuning of a trained network.

    Attributes:
        scale, ratio: share of the image's area and aspect ratio of the random crop.
        flip: probability of a mirror image.
        color_jitter: brightness, contrast and saturation vary by up to this share; 0 turns it off.
        policy: of timm's auto augmentation, such as ``"rand-m9-mstd0.5-inc1"``; "" is none (it replaces the jitter).
        erase: probability that a rectangle is replaced by noise.

    Example:
        >>> qzoo.data.Augmentation(flip=0.0, policy="rand-m9-mstd0.5-inc1").erase
        0.0
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.0
    policy: str = ""
    erase: float = 0.0


def training_transform(
    preprocessing: Preprocessing, augmentation: Augmentation | None = None
) -> Callable[[Any], Any]:
    """Make the transform of training images: crop, flip and the like, then a normalized tensor.

    It draws by the global generators of PyTorch, Python and NumPy.

    Args:
        preprocessing: size, mean and standard deviation of the model's images.
        augmentation: how images vary; the defaults if None.

    Returns:
        A function: PIL image -> float32 tensor of shape ``preprocessing.input_size``.

    Example:
        >>> from PIL import Image
        >>> from qzoo.preprocessing import Preprocessing
        >>> training_transform(Preprocessing((3, 32, 32)))(Image.open("photo.jpg")).shape
        torch.Size([3, 32, 32])
    """
    from timm.data import create_transform

    augmentation = augmentation or Augmentation()
    return create_transform(  # type: ignore[no-any-return]
        preprocessing.input_size,
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.flip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.policy or None,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augmentation.erase,
        re_mode="pixel",
    )
