"""``qzoo.predict``: the most likely labels of one photo, by default int8 in ONNX Runtime."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from qzoo.config import config_of
from qzoo.data import label_names
from qzoo.data.files import open_image
from qzoo.preprocessing import Preprocessing
from qzoo.registry import parse_name
from qzoo.runtimes import Runner, check, load
from qzoo.zoo import create_model


def predict(
    image: str | os.PathLike[str], model: str, runtime: str = "onnxruntime", k: int = 5
) -> list[tuple[str, float]]:
    """Label an image with a checkpoint of the zoo.

    The model is exported and loaded on the first call; later calls with the same name reuse it.

    Args:
        image: path of an image file.
        model: ``"arch"``, ``"arch.tag"`` (their W8A8 checkpoint) or the checkpoint's own name, such as
            ``"resnet20.fmnist-w4a4_qat"``.
        runtime: ``"onnxruntime"``, ``"openvino"`` or ``"pytorch"`` (which simulates int8).
        k: number of labels; fewer when the model has fewer classes.

    Returns:
        ``(label, probability)``, the most likely first; probabilities of all classes add up to 1.

    Raises:
        DataError: the file is missing or no image.
        UnknownModelError: no such checkpoint; the message has near names.
        MissingDependencyError: the runtime is not installed.
        ValueError: an unknown runtime, ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    check(runtime)
    name = parse_name(model)
    runner, preprocessing, labels = _ready(str(name), name.scheme is None, runtime)
    picture = open_image(image, "L" if preprocessing.input_size[0] == 1 else "RGB")
    logits = runner(preprocessing.transform()(picture).unsqueeze(0))[0]
    best = torch.softmax(logits.double(), 0).topk(min(k, len(logits)))
    return [(labels[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@lru_cache(maxsize=4)
def _ready(name: str, quantize: bool, runtime: str) -> tuple[Runner, Preprocessing, list[str]]:
    """The running model, its preprocessing and its labels."""
    target = "onnxruntime" if runtime == "pytorch" else runtime
    model = create_model(name, pretrained=True, quantize=True if quantize else None, target=target).eval()
    config = config_of(model)
    return load(model, runtime, threads=os.cpu_count() or 1), config.preprocessing, label_names(config.labels)
