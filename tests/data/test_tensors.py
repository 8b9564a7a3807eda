"""``TensorLoader``: what resuming relies on, and the augmentation."""

from __future__ import annotations

import pytest
import torch

from qzoo.data.tensors import TensorLoader, crop_flip_erase
from qzoo.preprocessing import Preprocessing

GREY = Preprocessing((1, 8, 8), 1.0, "bilinear", (0.5,), (0.5,))


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is filled with i."""
    labels = torch.arange(count)
    return labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous(), labels


def test_an_epoch_depends_on_seed_and_number_only() -> None:
    def batches(epoch: int, seed: int = 0, before: int = 0) -> list[torch.Tensor]:
        loader = TensorLoader(*numbered(50), GREY, 8, shuffle=True, augment=crop_flip_erase, seed=seed)
        for e in range(before):
            loader.set_epoch(e)
            list(loader)
        loader.set_epoch(epoch)
        return [images for images, _ in loader]

    first = batches(3)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, batches(3, before=3)))
    assert not all(map(torch.equal, first, batches(4)))
    assert not all(map(torch.equal, first, batches(3, seed=1)))


def test_shuffling_keeps_images_with_their_labels_and_drops_a_short_batch() -> None:
    loader = TensorLoader(*numbered(50), GREY, 8, shuffle=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    labels = torch.cat([labels for _, labels in batches])
    images = torch.cat([images for images, _ in batches])
    assert len(set(labels.tolist())) == 48
    restored = (images[:, 0, 0, 0] * 0.5 + 0.5) * 255
    assert torch.equal(restored.round().long(), labels)
    assert labels.tolist() != sorted(labels.tolist())


def test_without_shuffling_every_image_comes_once() -> None:
    loader = TensorLoader(*numbered(50), GREY, 8)
    assert torch.cat([labels for _, labels in loader]).tolist() == list(range(50))
    assert len(loader) == 7


def test_refusals() -> None:
    images, labels = numbered(4)
    with pytest.raises(ValueError, match=r"uint8 of shape \[N, 1, 8, 8\]"):
        TensorLoader(images.float(), labels, GREY)
    with pytest.raises(ValueError, match="4 images but 3 labels"):
        TensorLoader(images, labels[:3], GREY)


def test_shift_and_mirror_only_move_pixels() -> None:
    """Without erasing each result is a window of the padded image, or of its mirror image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(32, 1, 8, 8, generator=generator) + 0.1
    results = crop_flip_erase(images, generator, pad=1, erase=0.0)
    seen = set()
    for image, result in zip(images, results, strict=True):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        windows = {
            (top, left, flip): window.flip(-1) if flip else window
            for top in range(3)
            for left in range(3)
            for flip in (False, True)
            for window in [padded[:, top : top + 8, left : left + 8]]
        }
        matches = [key for key, window in windows.items() if torch.equal(window, result)]
        assert matches
        seen.add(matches[0])
    assert {flip for _, _, flip in seen} == {False, True}
    assert len(seen) > 8


def test_erased_rectangles_have_the_stated_area() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.full((400, 1, 28, 28), 2.0)  # outside 0..1, so that noise can be told from image
    results = crop_flip_erase(images, generator, pad=0, erase=1.0)
    share = (results < 1).float().mean((1, 2, 3))
    assert ((share > 0) & (share < 0.33)).all()
    assert 0.1 < share.mean() < 0.17  # uniform in 0.02 .. 0.25
    untouched = crop_flip_erase(images, generator, pad=0, erase=0.25)
    assert 0.15 < ((untouched < 1).flatten(1).any(1)).float().mean() < 0.35
