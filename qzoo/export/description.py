"""Read what an ONNX file takes and gives: what :func:`qzoo.export.naming.describe` wrote into it, else assumptions."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoo.data.sets import DATA_SETS, SeenImages, label_set
from qzoo.errors import ExportError, QzooError
from qzoo.fields import decode
from qzoo.preprocessing import Preprocessing
from qzoo.runtimes.base import check_ends, existing, opening
from qzoo.runtimes.operators import INTEGER_LAYERS, PAIR

if TYPE_CHECKING:
    import onnx_ir as ir

_SIZE = 224  # of images, where neither the file nor its shapes say one
_QUANTIZED = (*PAIR, *INTEGER_LAYERS)


@dataclass(frozen=True)
class OnnxDescription:
    """A classifier in an ONNX file.

    Attributes:
        preprocessing: of its images.
        labels: the set of its classes, as in a config; of a foreign file with 1000 classes ImageNet's, else "folders".
        classes: names of the classes of "folders", () where they are not known.
        batch: the only number of images that it takes; None where any will do.
        quantized: whether anything in it is.
        assumed: what the file does not say and was assumed, in words; "" where it says all.
        seen: images of a folder that the model was trained or calibrated on.
    """

    preprocessing: Preprocessing
    labels: str
    classes: tuple[str, ...]
    batch: int | None
    quantized: bool
    assumed: str
    seen: tuple[SeenImages, ...] = ()


def is_onnx(where: str | os.PathLike[str]) -> bool:
    """Check whether a name is that of an ONNX file, not of a checkpoint."""
    return Path(where).suffix.lower() == ".onnx"


def read_description(path: str | os.PathLike[str]) -> OnnxDescription:
    """Read how a file's images are prepared and what its classes are.

    Raises:
        ExportError: no ONNX file, or none from one batch of images to one tensor of logits.
        FileNotFoundError: no such file.
    """
    import onnx_ir as ir

    with opening("ONNX", path):
        model = ir.load(existing(path))
    graph, facts = model.graph, model.metadata_props
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    check_ends(path, [str(value.name) for value in inputs], [str(value.name) for value in graph.outputs])
    images = _sizes(inputs[0])
    if len(images) != 4:
        raise ExportError(f"{str(path)!r} takes a tensor {images}; expected images [B, C, H, W]")
    batch, quantized = images[0], any(node.op_type in _QUANTIZED for node in graph)
    if "qzoo.preprocessing" in facts:
        return _from_metadata(path, facts, batch, quantized)
    channels = images[1] or 3
    size = (channels, images[2] or _SIZE, images[3] or _SIZE)
    plain = (
        Preprocessing(size)
        if channels == 3
        else Preprocessing(size, mean=(0.5,) * channels, std=(0.5,) * channels)
    )
    labels = label_set((_sizes(graph.outputs[0]) or [None])[-1])
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (plain.mean, plain.std))
    assumed = (
        f"the file does not say how its images are prepared; {' x '.join(map(str, size))}, mean {mean} and "
    )
    assumed += f"standard deviation {std} are assumed, and the classes of {labels}"
    return OnnxDescription(plain, labels, (), batch, quantized, assumed)


def _from_metadata(
    path: str | os.PathLike[str], facts: dict[str, str], batch: int | None, quantized: bool
) -> OnnxDescription:
    """Read the metadata of a file that qzoo wrote. Raises ExportError where it did not write this."""
    try:
        preprocessing = Preprocessing.from_dict(json.loads(facts["qzoo.preprocessing"]))
        classes: Any = json.loads(facts.get("qzoo.classes", "[]"))
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError("classes are no list of texts")
        seen = decode(tuple[SeenImages, ...], json.loads(facts.get("qzoo.seen", "[]")), "qzoo.seen")
    except (QzooError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ExportError(
            f"the metadata of {str(path)!r} are none that qzoo wrote ({error}); export it again"
        ) from error
    labels = facts.get("qzoo.labels", "")
    labels = labels if labels in DATA_SETS else "folders"
    return OnnxDescription(preprocessing, labels, tuple(classes), batch, quantized, "", seen)


def _sizes(value: ir.Value) -> list[int | None]:
    """The sizes of an input or output; None for any."""
    return [size if isinstance(size, int) and size else None for size in value.shape or ()]
