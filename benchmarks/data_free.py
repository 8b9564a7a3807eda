"""Calibration without data against 512 images: four families of networks, trained on Fashion-MNIST.

    python -m benchmarks.data_free --weights DIR [--data DIR]

Small networks, three of timm's classes and one of :mod:`benchmarks.zero_points`, images of 28 x 28 pixels,
channels_last. What is in DIR already is not trained again; those with convolutions take about three minutes each on one
core. Quantized by ``qzoo.quantize``, W8A8, and run in ONNX Runtime on the 10,000 test images. Prints a table in
Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet, decode_arch_def, round_channels
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils import clip_grad_norm_

import qzoo
from benchmarks import zero_points
from qzoo.accuracy import Fidelity
from qzoo.data import load_data
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.options import Recipe
from qzoo.preprocessing import Preprocessing
from qzoo.ptq import apply_recipe
from qzoo.runtimes import load

PREPROCESSING = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))
IMAGES = 512
RECIPES = {
    "none": Recipe(method="procedural", bias_correction="analytic"),
    f"{IMAGES} images": Recipe(method="mse", bias_correction="analytic"),
}


@dataclass(frozen=True)
class Network:
    """One family's network, and how long it trains.

    Attributes:
        what: what is in it.
        make: builds it with random weights.
        epochs: of its training.
        bf16: train in bfloat16 autocast; slower than float32 where layers are this small.
    """

    what: str
    make: Callable[[], nn.Module]
    epochs: int
    bf16: bool = False


def _hardswish() -> nn.Module:
    """MobileNetV3's blocks: inverted residuals, a gate in each."""
    return zero_points.NETWORKS["hardswish"].make(None)


def _efficientnet() -> nn.Module:
    """EfficientNet-B0's blocks with SiLU, fewer and narrower."""
    blocks = ["ds_r1_k3_s1_e1_c16_se0.25", "ir_r1_k3_s2_e6_c24_se0.25", "ir_r1_k5_s2_e6_c40_se0.25",
              "ir_r1_k3_s2_e6_c80_se0.25", "ir_r1_k5_s1_e6_c112_se0.25"]  # fmt: skip
    return EfficientNet(
        decode_arch_def([[block] for block in blocks]),
        stem_size=16,
        num_features=256,
        in_chans=1,
        num_classes=10,
        act_layer=nn.SiLU,
        round_chs_fn=lambda channels: round_channels(channels, 0.5),
    )


def _vit() -> nn.Module:
    return VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
    )


def _densenet() -> nn.Module:
    return DenseNet(growth_rate=12, block_config=(4, 4, 4), stem_type="", in_chans=1, num_classes=10)


NETWORKS = {
    "hardswish": Network("squeeze-and-excitation, hard-swish", _hardswish, 3),
    "efficientnet": Network("squeeze-and-excitation, SiLU", _efficientnet, 3),
    "vit": Network("LayerNorm, attention, GELU", _vit, 7, bf16=True),
    "densenet": Network("concatenations, BatchNorm behind them", _densenet, 2),
}
BATCH, RATE, DECAY = 128, 3e-3, 0.05


def trained(network: Network, data: Path | None) -> nn.Module:
    """A network trained from random weights: AdamW, one cycle of the learning rate, images shifted and mirrored."""
    torch.manual_seed(0)
    model = network.make().to(memory_format=torch.channels_last).train()
    images, labels = fashion_mnist("train", data)
    mean, std = PREPROCESSING.mean[0], PREPROCESSING.std[0]
    optimizer = torch.optim.AdamW(_groups(model), RATE)
    steps = network.epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.15)
    for _ in range(network.epochs):
        for index in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            batch = _augmented((images[index].float() / 255 - mean) / std)
            with torch.autocast("cpu", torch.bfloat16, enabled=network.bf16):
                logits = model(batch.contiguous(memory_format=torch.channels_last))
            loss = cross_entropy(logits.float(), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def _groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight decay on what has two dimensions or more."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def _augmented(batch: Tensor) -> Tensor:
    """Half of the images mirrored, all of them shifted by up to 2 pixels."""
    half = len(batch) // 2
    batch = torch.cat([batch[:half].flip(3), batch[half:]])
    down, right = torch.randint(0, 5, (2,)).tolist()
    padded = pad(batch, (2, 2, 2, 2), value=-PREPROCESSING.mean[0] / PREPROCESSING.std[0])
    return padded[:, :, down : down + batch.shape[2], right : right + batch.shape[3]]


def network_of(name: str, folder: Path, data: Path | None) -> nn.Module:
    """The trained network; its weights are in ``folder``, or are put there."""
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        state = trained(NETWORKS[name], data).state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    model = NETWORKS[name].make()
    model.load_state_dict(load_file(file))
    return model.eval()


@torch.no_grad()
def logits_in_onnxruntime(model: nn.Module, images: list[Tensor], file: Path) -> Tensor:
    """The logits of the exported model."""
    example = images[0][:1]
    session = load(qzoo.export_onnx(model, file, target="onnxruntime", example=example), "onnxruntime")
    return torch.cat([session(batch) for batch in images])


def rows(name: str, folder: Path, data: Path | None) -> list[str]:
    """The lines of the table for one network."""
    exact = network_of(name, folder, data)
    subset = f":{IMAGES}"
    calibration = load_data(PREPROCESSING, "fashion-mnist", data, split="train", subset=subset, batch_size=16)
    tests = list(load_data(PREPROCESSING, "fashion-mnist", batch_size=250))
    images, labels = [x for x, _ in tests], torch.cat([y for _, y in tests])
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        expected = logits_in_onnxruntime(exact, images, Path(scratch) / "float.onnx")
        for images_of, recipe in RECIPES.items():
            model = qzoo.quantize(exact, images[0][:1], "w8a8", target="onnxruntime")
            apply_recipe(model, calibration, recipe, preprocessing=PREPROCESSING, progress=False)
            outputs = logits_in_onnxruntime(model, images, Path(scratch) / "int8.onnx")
            fidelity = Fidelity.of(outputs, expected)
            top1 = [
                100 * (logits.argmax(1) == labels).double().mean().item() for logits in (expected, outputs)
            ]
            lines.append(
                f"| {name}: {NETWORKS[name].what} | {images_of} | {top1[0]:.2f} | {top1[1]:.2f} | "
                f"{fidelity.agreement:.2f} | {fidelity.sqnr_db:.1f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", default=list(NETWORKS), metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--weights", type=Path, required=True, help="folder of the trained weights")
    parser.add_argument(
        "--data", type=Path, help="folder of Fashion-MNIST's idx files; looked for if left out"
    )
    parser.add_argument("--train", action="store_true", help="train what is missing, and stop")
    args = parser.parse_args()
    if args.train:
        for name in args.names:
            network_of(name, args.weights, args.data)
        return
    print("| network | calibrated on | float top-1, % | int8 top-1, % | agreement, % | SQNR, dB |")
    print("|---|---|---|---|---|---|")
    for name in args.names:
        print("\n".join(rows(name, args.weights, args.data)), flush=True)


if __name__ == "__main__":
    main()
