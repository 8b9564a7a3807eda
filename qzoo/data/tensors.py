"""Draw batches from a data set that fits in memory, augmented as whole batches: no workers, no Python for each image.

Epoch ``e`` of seed ``s`` always has the same batches, so that a training resumed at an epoch's start goes
on as if it had not been stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qzoo.errors import ArgumentError
from qzoo.preprocessing import Preprocessing

Augment = Callable[[Tensor, torch.Generator], Tensor]


class TensorLoader:
    """Iterates over ``(images, labels)``: float32 [B, C, H, W], normalized, and int64 [B].

    Args:
        images: uint8, [N, C, H, W], already of the model's input size.
        labels: int64, [N].
        preprocessing: its mean and std are applied; nothing is resized.
        batch_size: images a batch; the last batch of an epoch may be smaller.
        shuffle: draw a new order every epoch (see :meth:`set_epoch`), and drop a last incomplete batch.
        augment: changes a batch of images (float32, 0..1) with draws from the generator it is handed.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing,
        batch_size: int = 256,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != preprocessing.input_size:
            raise ArgumentError(
                f"images must be uint8 of shape [N, {', '.join(map(str, preprocessing.input_size))}], "
                f"not {images.dtype} {list(images.shape)}"
            )
        if len(images) != len(labels):
            raise ArgumentError(f"{len(images)} images but {len(labels)} labels")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self.epoch, self.start = 0, 0
        self.mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
        self.std = torch.tensor(preprocessing.std).view(1, -1, 1, 1)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch whose order and augmentation the next iteration has, and how many batches it leaves out."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        count = len(self.images)
        return count // self.batch_size if self.shuffle else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for i in range(len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size]
            batch = self.images[index].float().div_(255)
            if self.augment is not None:
                batch = self.augment(batch, generator)  # also of batches left out: the draws are one sequence
            if i < self.start:
                continue
            yield (batch - self.mean) / self.std, self.labels[index]


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels and mirror half of the images: the usual augmentation of CIFAR (He et al., 2015)."""
    return crop_flip_erase(images, generator, pad=4, erase=0.0)


def crop_flip_erase(images: Tensor, generator: torch.Generator, pad: int = 2, erase: float = 0.5) -> Tensor:
    """Shift by up to ``pad`` pixels, mirror half of the images, erase a rectangle in a share of them.

    The rectangle covers 2 to 25 % of the image with an aspect ratio of 0.4 to 2.5 and gets uniform noise
    ("Random Erasing Data Augmentation", Zhong et al., 2017, arXiv:1708.04896).

    Args:
        images: float32, [B, C, H, W], in 0..1.
    """
    count, _, height, width = images.shape
    rows = torch.arange(height).view(1, -1, 1)
    columns = torch.arange(width).view(1, 1, -1)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    down = torch.randint(0, 2 * pad + 1, (count, 1, 1), generator=generator)
    right = torch.randint(0, 2 * pad + 1, (count, 1, 1), generator=generator)
    mirrored = draw(0, 1) < 0.5
    column = torch.where(mirrored, width - 1 - columns, columns)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    picture = torch.arange(count).view(-1, 1, 1)
    shifted = padded[picture, :, rows + down, column + right].permute(0, 3, 1, 2)

    area = draw(0.02, 0.25) * height * width
    ratio = torch.exp(draw(-0.916, 0.916))
    tall = (area * ratio).sqrt().clamp(max=height)
    wide = (area / ratio).sqrt().clamp(max=width)
    top, left = draw(0, 1) * (height - tall), draw(0, 1) * (width - wide)
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    erased = (inside & (draw(0, 1) < erase)).unsqueeze(1)
    noise = torch.rand(images.shape, generator=generator)
    return torch.where(erased, noise, shifted)
