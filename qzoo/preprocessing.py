"""How an image becomes a model's input: stored with every checkpoint, so that it is never guessed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from qzoo.errors import ArgumentError, DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PIXELS = 2**27  # about 134 million: half a gigabyte of RGB in Pillow
MAX_RATIO = 100


def check_size(width: int, height: int) -> None:
    """Refuse an image that would take too much memory: a few bytes of PNG hold any number of pixels.

    Raises:
        DataError: more than :data:`MAX_PIXELS`, or a long side of more than :data:`MAX_RATIO` short ones, which
            the resize of the short side would blow up.
    """
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(
            f"an image of {width} x {height} pixels; expected 1 to {MAX_PIXELS} pixels, so shrink it"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(
            f"an image of {width} x {height} pixels; the long side may have at most {MAX_RATIO} times the "
            "pixels of the short one, so crop it"
        )


MAX_INPUT = 1 << 24  # pixels of one input: 4096 x 4096


@dataclass(frozen=True)
class Preprocessing:
    """Resize the short side to ``floor(size / crop_pct)``, centre crop, scale to 0..1, normalize.

    Attributes:
        input_size: (channels, height, width) of one image.
        crop_pct: share of the resized short side that the crop keeps.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        mean: per-channel mean, in units of 0..1.
        std: per-channel standard deviation, in units of 0..1.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        channels, height, width = self.input_size
        if min(self.input_size) < 1 or channels > 1 << 12 or height * width > MAX_INPUT:
            raise ArgumentError(
                f"input_size {self.input_size} must be (channels, height, width) of 1 or more, with at most "
                f"{1 << 12} channels and {MAX_INPUT} pixels"
            )
        if len(self.mean) != channels or len(self.std) != channels:
            raise ArgumentError(
                f"mean {self.mean}, std {self.std}: need one entry for each of {channels} channels"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ArgumentError(f"interpolation must be 'bilinear' or 'bicubic', not {self.interpolation!r}")
        if not 0 < self.crop_pct <= 1:
            raise ArgumentError(f"crop_pct must be in (0, 1], not {self.crop_pct}")

    @property
    def resize(self) -> int:
        """Length of the short side, in pixels, before the crop (timm's rule)."""
        return math.floor(self.input_size[1] / self.crop_pct)

    def transform(self) -> Callable[[Any], Any]:
        """Return a torchvision transform: PIL image -> float32 tensor of shape ``input_size``.

        It raises DataError for images that :func:`check_size` refuses, before or after the resize.
        """
        from torchvision import transforms as T
        from torchvision.transforms import InterpolationMode

        return T.Compose(
            [
                self._check,
                T.Resize(self.resize, InterpolationMode(self.interpolation)),
                T.CenterCrop(self.input_size[1:]),
                T.ToTensor(),
                T.Normalize(self.mean, self.std, inplace=True),  # ToTensor made a tensor of its own
            ]
        )

    def _check(self, image: Any) -> Any:
        """The image as it is, unless it or its resized form is too large."""
        from torchvision.transforms.functional import get_dimensions

        _, height, width = get_dimensions(image)
        check_size(width, height)
        short, long = sorted((width, height))
        if self.resize**2 * long > MAX_PIXELS * short:
            raise DataError(
                f"an image of {width} x {height} pixels would have more than {MAX_PIXELS} pixels when its short "
                f"side is resized to {self.resize}; crop it"
            )
        return image

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Undo :meth:`to_dict` (JSON turns tuples into lists; they become tuples again)."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)
