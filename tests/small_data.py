"""Small data sets in the real formats, folders of images and CIFAR as its authors wrote it; a shallow network, and
ranges found as in the guide of pytorch-quantization."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import datasets

from qzoo.models.resnet_cifar import CifarResNet
from qzoo.quant import TensorQuantizer
from qzoo.registry import ModelEntry, architecture


def write_folder(folder: Path, classes: tuple[str, ...], count: int, size: int = 32) -> Path:
    """``folder/CLASS/i.png``: noise around a grey that tells the class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        rng = np.random.default_rng(number)
        grey = 40 + 160 * number // max(1, len(classes) - 1)
        for i in range(count):
            pixels = np.clip(rng.normal(grey, 30, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def write_splits(folder: Path, train: int = 24, val: int = 8, size: int = 32) -> Path:
    """``folder/train`` and ``folder/val`` with the classes cat and dog."""
    write_folder(folder / "train", ("cat", "dog"), train, size)
    write_folder(folder / "val", ("cat", "dog"), val, size)
    return folder


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch, count: int = 16) -> Path:
    """CIFAR-10's files with ``count`` random images each, and their sums in place of torchvision's."""
    folder, rng = root / datasets.CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)

    def write(name: str, values: dict) -> list[str]:
        content = pickle.dumps(values, protocol=2)
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def batch() -> dict:
        return {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, count).tolist(),
        }

    train = [write(f"data_batch_{i}", batch()) for i in range(1, 6)]
    meta = write("batches.meta", {"label_names": ["x"] * 10})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch())])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "filename": meta[0], "md5": meta[1]}
    )
    return root


def shallow_resnet20() -> ModelEntry:
    """The registry's entry of resnet20, which builds it with one block a stage in place of three."""
    entry = architecture("resnet20")
    build = functools.wraps(entry.build)(functools.partial(CifarResNet, 1))
    return dataclasses.replace(entry, build=build)


def calibrate_as_in_the_guide(model: nn.Module, images: Tensor) -> None:
    """Give every quantizer the range of its calibrator, of one batch through the float model, in place."""
    found = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    for quantizer in found:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        model(images)
    for quantizer in found:
        quantizer.load_calib_amax()
        quantizer.enable_quant()
        quantizer.disable_calib()
