"""Check what ``export_onnx`` is asked for before the work that takes long: module, file, format and batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qzoo.errors import ArgumentError, ExportError
from qzoo.export.formats import check_opset
from qzoo.runtimes.base import check_example
from qzoo.scheme import target_named

WEIGHTS = ("int8", "int4", "float")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Order:
    """Checked arguments of :func:`qzoo.export_onnx`; see there.

    Attributes:
        model: out of its wrappers.
        image: an example batch [B, C, H, W] on the CPU, in the type of the model.
        half: what is not quantized is float16.
    """

    model: nn.Module
    path: Path
    target: str
    opset: int | None
    dynamic: bool
    weights: str
    image: Tensor
    reduce_range: bool = False
    half: bool = False

    @classmethod
    def of(
        cls,
        model: Any,
        path: str | os.PathLike[str],
        target: str,
        opset: int | None,
        batch: str | int,
        weights: str,
        example: Tensor | None,
        reduce_range: bool,
        dtype: str,
    ) -> Order:
        """Check the arguments of :func:`qzoo.export_onnx`; raises what that raises for them."""
        target_named(target)
        module, place = plain_module(model), check_place(path)
        if weights not in WEIGHTS:
            raise ArgumentError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
        if dtype not in DTYPES:
            raise ArgumentError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        half = dtype == "float16"
        if half and target != "tensorrt":
            raise ArgumentError(
                f"dtype 'float16' is for target 'tensorrt': the int8 kernels of {target!r} take and give float32; "
                "leave it out"
            )
        check_opset(opset)
        check_batch(batch)
        dynamic = batch == "dynamic"
        image = example_batch(module, example, 2 if dynamic else int(batch))
        return cls(module, place, target, opset, dynamic, weights, image, reduce_range, half)


def plain_module(model: Any) -> nn.Module:
    """Take a module out of the wrappers of ``torch.compile`` and of data parallel training.

    Raises:
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, not {model!r:.60}; qzoo.create_model(NAME, pretrained=True) makes one"
        )
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_place(path: str | os.PathLike[str]) -> Path:
    """Check that a file can be written to a path; folders that are missing are made later.

    Raises:
        ExportError: it is a folder or a device, or the first of its folders that exists can't be written to.
        TypeError: no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a text or a Path, the file to write, not {path!r:.60}")
    file = Path(path)
    if file.is_dir():
        raise ExportError(f"{os.fspath(path)!r} is a folder; give the file to write")
    place = Path(os.path.realpath(file))
    if place.exists() and not place.is_file():
        raise ExportError(f"{os.fspath(path)!r} is no regular file; give another one to write")
    folder = next(parent for parent in place.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise ExportError(f"can't write {os.fspath(path)!r}: {str(folder)!r} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ExportError(
            f"can't write {os.fspath(path)!r}: no permission to write in the folder {str(folder)!r}"
        )
    return file


def check_batch(batch: str | int) -> None:
    """Raise ValueError for anything but ``"dynamic"`` and a positive number."""
    if (batch != "dynamic" and not (isinstance(batch, int) and batch > 0)) or batch is True:
        raise ArgumentError(f"batch must be 'dynamic' or a positive number, not {batch!r}")


def example_batch(model: nn.Module, example: Tensor | None, batch: int) -> Tensor:
    """Make a batch of one image, repeated, on the CPU in the dtype of the model.

    Raises:
        ExportError: none is given and the model's config names no size, or what is given is no batch of numbers.
        TypeError: no tensor.
    """
    if example is None:
        config = getattr(model, "qzoo_config", None)
        if config is None:
            raise ExportError(
                "the input size is not known: pass example=, a batch such as torch.zeros(1, 3, 224, 224)"
            )
        example = torch.zeros(1, *config.preprocessing.input_size)
    check_example(example, ExportError)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    one = example[:1].detach().cpu().to(dtype)
    if not one.isfinite().all():
        raise ExportError("example has NaN or infinity in its first image; pass real images, or zeros")
    return one.expand(batch, *one.shape[1:]).contiguous()


class _Operators(TorchDispatchMode):
    """Collects the names of torch's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def check_output(model: nn.Module, images: Tensor) -> set[str]:
    """Run one image, since an ONNX file of the zoo takes one batch and gives one tensor.

    Returns:
        The names of torch's operators that ran, such as ``"aten::gelu"``.

    Raises:
        ExportError: the module can't run it, or returns anything else.
    """
    name, operators = type(model).__name__, _Operators()
    try:
        with operators:
            result: Any = model(images[:1])
    except Exception as error:  # of the module, of its hooks, of torch
        raise ExportError(
            f"{name} can't run the example, {list(images.shape)} {images.dtype}, as its only input: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, Tensor):
        raise ExportError(
            f"{name} returns {_words(result)}; to be exported it has to return one tensor: wrap it in a module that "
            "picks one"
        )
    return operators.ran


def _words(result: Any) -> str:
    """``a dict of 'out', 'aux'`` and the like."""
    if result is None:
        return "None"
    kind = type(result).__name__
    if isinstance(result, dict):
        return f"a {kind} of {', '.join(map(repr, result))}"
    return f"a {kind} of {len(result)}" if isinstance(result, (tuple, list)) else f"a {kind}"
