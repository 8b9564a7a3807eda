"""``qzoo.predict``: the most likely labels of one photo, by default int8 in ONNX Runtime."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch

from qzoo.config import config_of
from qzoo.data import label_names
from qzoo.data.files import open_image
from qzoo.errors import ArgumentError
from qzoo.preprocessing import Preprocessing
from qzoo.registry import parse_name
from qzoo.runtimes import Runner, check, load
from qzoo.zoo.checkpoint import load_pretrained
from qzoo.zoo.create import create_model


def predict(
    image: str | os.PathLike[str], model: str, runtime: str = "onnxruntime", k: int = 5
) -> list[tuple[str, float]]:
    """Label an image with a checkpoint of the zoo.

    The model is exported and loaded on the first call; later calls with the same name reuse it.

    Args:
        image: path of an image file.
        model: ``"arch"``, ``"arch.tag"`` (their W8A8 checkpoint) or the checkpoint's own name, such as
            ``"resnet20.fmnist-w4a4_qat"``; or a checkpoint folder, or a Hub repository.
        runtime: ``"onnxruntime"``, ``"openvino"`` or ``"pytorch"`` (which simulates int8).
        k: number of labels; fewer when the model has fewer classes.

    Returns:
        ``(label, probability)``, the most likely first; probabilities of all classes add up to 1. Where the data
        set is not one of qzoo's, labels are ``"class 0"``, ``"class 1"``, ...

    Raises:
        DataError: the file is missing or no image.
        UnknownModelError: no such checkpoint; the message has near names.
        MissingDependencyError: the runtime is not installed.
        ValueError: an unknown runtime, ``k`` below 1.
    """
    if k < 1:
        raise ArgumentError(f"k must be at least 1, not {k}")
    check(runtime)
    runner, preprocessing, labels = _ready(model, runtime)
    picture = open_image(image, "L" if preprocessing.input_size[0] == 1 else "RGB")
    logits = runner(preprocessing.transform()(picture).unsqueeze(0))[0]
    best = torch.softmax(logits.double(), 0).topk(min(k, len(logits)))
    named = [labels[i] if labels else f"class {i}" for i in best.indices.tolist()]
    return list(zip(named, best.values.tolist(), strict=True))


@lru_cache(maxsize=4)
def _ready(where: str, runtime: str) -> tuple[Runner, Preprocessing, list[str]]:
    """The running model, its preprocessing and its labels; none where they are not known."""
    target = "onnxruntime" if runtime == "pytorch" else runtime
    if Path(where).is_dir() or "/" in where:
        model = load_pretrained(where, target=target)
    else:
        quantize = True if parse_name(where).scheme is None else None
        model = create_model(where, pretrained=True, quantize=quantize, target=target).eval()
    config = config_of(model)
    labels = label_names(config.labels) if config.labels not in ("", "folders") else []
    return load(model, runtime, threads=os.cpu_count() or 1), config.preprocessing, labels
