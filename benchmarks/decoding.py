"""What JPEGs cost before a network sees them: ``python -m benchmarks.decoding DIR`` writes ``results/decoding.json``.

CPU milliseconds for an image, with one thread and by turns: decoders alone (Pillow, torchvision, simplejpeg where it
is installed) with the number of images of other pixels than Pillow's; then from file to input, qzoo's against
torchvision's ``ImageFolder`` with the transform of its weights, and against a pipeline of tensors, with what differs;
then both in loaders, the workers' time included; and what a build does with each image in the network that is fed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import io
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms._presets import ImageClassification

import qzoo
from benchmarks.measure import interleaved, machine
from qzoo.data import image_files
from qzoo.data.files import decode_image
from qzoo.preprocessing import Preprocessing
from qzoo.runtimes import load

ROUNDS = 5
PREPROCESSING = Preprocessing()


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Each decoder: the bytes of a file to RGB pixels [H, W, 3]."""

    def torchvision(content: bytes) -> np.ndarray:
        image = io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), io.ImageReadMode.RGB)
        return image.permute(1, 2, 0).numpy()

    choices = {
        "Pillow": lambda content: np.asarray(decode_image(content, "image")),
        "torchvision": torchvision,
    }
    try:
        import simplejpeg
    except ImportError:
        return choices
    return {**choices, "simplejpeg": lambda content: simplejpeg.decode_jpeg(content, "RGB")}


def of_decoders(contents: list[bytes], rounds: int) -> dict[str, Any]:
    """Milliseconds, and images whose pixels are not Pillow's."""
    choices = decoders()
    work = {name: lambda decode=decode: [decode(c) for c in contents] for name, decode in choices.items()}
    times = interleaved(work, rounds=rounds, warmup=1)
    other = {
        name: sum(not np.array_equal(decode(c), choices["Pillow"](c)) for c in contents)
        for name, decode in choices.items()
    }
    return {
        name: {"ms": 1000 * taken / len(contents), "images of other pixels": other[name]}
        for name, taken in times.items()
    }


def of_pipelines(root: Path, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds from a file to an input, and how far the tensors' resize is from Pillow's."""
    ours = image_files("imagenet-1k", root, PREPROCESSING)
    size = PREPROCESSING.input_size[1]
    preset = ImageClassification(crop_size=size, resize_size=PREPROCESSING.resize)
    folder = ImageFolder(str(root), transform=preset)
    paths = {path: i for i, (path, _) in enumerate(folder.samples)}
    places = [paths[str(path)] for path, _ in ours.files[:count]]
    tensors = T.Compose(
        [
            T.Resize(PREPROCESSING.resize, InterpolationMode.BILINEAR, antialias=True),
            T.CenterCrop(size),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
        ]
    )

    def of_tensors(i: int) -> Tensor:
        content = torch.frombuffer(bytearray(ours.files[i][0].read_bytes()), dtype=torch.uint8)
        return tensors(io.decode_jpeg(content, io.ImageReadMode.RGB))  # type: ignore[no-any-return]

    work = {
        "qzoo": lambda: [ours[i] for i in range(count)],
        "torchvision": lambda: [folder[i] for i in places],
        "tensors": lambda: [of_tensors(i) for i in range(count)],
    }
    times = interleaved(work, rounds=rounds, warmup=1)
    assert all(torch.equal(ours[i][0], folder[place][0]) for i, place in enumerate(places))
    std = torch.tensor(PREPROCESSING.std).view(-1, 1, 1) * 255
    apart = [((of_tensors(i) - ours[i][0]) * std).abs().round() for i in range(count)]
    return {
        "ms": {name: 1000 * taken / count for name, taken in times.items()},
        "qzoo, of torchvision's": times["qzoo"] / times["torchvision"],
        "tensors: share of other pixels": float(torch.stack([(x > 0).float().mean() for x in apart]).mean()),
        "tensors: largest difference, of 255": float(torch.stack([x.max() for x in apart]).max()),
    }


def of_loaders(root: Path, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU an image in batches of 32, by workers; and images a second of the clock."""
    preset = ImageClassification(crop_size=PREPROCESSING.input_size[1], resize_size=PREPROCESSING.resize)
    folder = Subset(ImageFolder(str(root), transform=preset), range(count))

    def ours(workers: int) -> Any:
        return qzoo.data.load_data(
            PREPROCESSING, "imagenet-1k", root, subset=f":{count}", batch_size=32, workers=workers
        )

    def theirs(workers: int) -> Any:
        return DataLoader(folder, batch_size=32, num_workers=workers)

    figures: dict[str, Any] = {}
    for workers in (0, 1, 2):
        work = {"qzoo": lambda w=workers: list(ours(w)), "torchvision": lambda w=workers: list(theirs(w))}
        figures[f"{workers} workers"] = with_children(work, count, rounds)
    return figures


def with_children(work: Mapping[str, Callable[[], Any]], count: int, rounds: int) -> dict[str, Any]:
    """Medians of CPU time, that of finished children included, and of images a second; by turns."""
    cpu: dict[str, list[float]] = {name: [] for name in work}
    wall: dict[str, list[float]] = {name: [] for name in work}

    def clock() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    for _ in range(rounds):
        for name, run in work.items():
            before, began = clock(), time.perf_counter()
            run()
            cpu[name].append(1000 * (clock() - before) / count)
            wall[name].append(count / (time.perf_counter() - began))
    return {
        name: {"CPU ms": statistics.median(cpu[name]), "images/s of the clock": statistics.median(wall[name])}
        for name in work
    }


def of_network(name: str, rounds: int) -> dict[str, float]:
    """CPU milliseconds an image of a network, one thread, batches of 4: what a build does with each image."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, *PREPROCESSING.input_size), torch.arange(4)
    exact = qzoo.create_model(name).eval()
    model = qzoo.create_model(f"{name}-w8a8").eval()
    qzoo.calibrate(model, [images], progress=False)

    def passes(network: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode():
            network(images)

    def step() -> None:
        model.zero_grad()
        with torch.no_grad():
            exact(images)  # the teacher
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    with tempfile.TemporaryDirectory() as folder:
        path = qzoo.export_onnx(model, Path(folder) / "model.onnx", target="onnxruntime")
        session = load(path, runtime="onnxruntime", threads=1)
        work = {
            "float": lambda: passes(exact),
            "simulated": lambda: passes(model),
            "ONNX Runtime": lambda: session(images),
            "training step": step,
        }
        times = interleaved(work, rounds=rounds, warmup=1)
    return {key: 1000 * taken / len(images) for key, taken in times.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="JPEGs of ImageNet: a folder a class")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--network", default="resnet50", help='that is fed; "" leaves it out')
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decoding.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = image_files("imagenet-1k", args.folder, PREPROCESSING).files[: args.images]
    contents = [path.read_bytes() for path, _ in files]
    shapes = [np.asarray(decode_image(content, "image")).shape for content in contents]
    results = {
        **machine(),
        "images": len(contents),
        "kilobytes": statistics.mean(map(len, contents)) / 1000,
        "kilopixels": statistics.mean(h * w for h, w, _ in shapes) / 1000,
        "decoders": of_decoders(contents, args.rounds),
        "pipelines": of_pipelines(args.folder, len(contents), args.rounds),
        "loaders": of_loaders(args.folder, len(contents), args.rounds),
        f"{args.network}, CPU ms": of_network(args.network, args.rounds) if args.network else {},
    }
    text = json.dumps(results, indent=2, ensure_ascii=False)
    print(text)
    args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
