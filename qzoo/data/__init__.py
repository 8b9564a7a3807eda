"""Data: a label set and a folder become batches of preprocessed images and class indices.

Names are resolved when they are asked for: :mod:`qzoo.data.sets` says what is known of data sets without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qzoo.data.image_folder import ImageFolder as ImageFolder
    from qzoo.data.loading import Loader as Loader
    from qzoo.data.loading import batch_for as batch_for
    from qzoo.data.loading import image_files as image_files
    from qzoo.data.loading import load_data as load_data
    from qzoo.data.loading import load_training_data as load_training_data
    from qzoo.data.loading import parse_subset as parse_subset
    from qzoo.data.sets import label_names as label_names
    from qzoo.data.transforms import Augmentation as Augmentation
    from qzoo.data.transforms import training_transform as training_transform

_HOMES = {
    "Augmentation": "transforms",
    "ImageFolder": "image_folder",
    "Loader": "loading",
    "batch_for": "loading",
    "image_files": "loading",
    "label_names": "sets",
    "load_data": "loading",
    "load_training_data": "loading",
    "parse_subset": "loading",
    "training_transform": "transforms",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
