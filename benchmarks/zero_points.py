"""Small transformers and SiLU networks on Fashion-MNIST: 8, 6 and 4 bits, with a zero point and without one.

    python -m benchmarks.zero_points --weights DIR --data DIR_OF_IDX_FILES

The zoo's ``vit_mini``, ``swin_mini`` and ``convnext_mini``, and inverted residuals with squeeze-and-excitation and SiLU
or hard-swish; images of 28 x 28 pixels. What has no file ``NAME.pt`` in the folder of weights is trained first, 8 to 33
passes of about a minute of one core: AdamW, cycles of the learning rate, bfloat16, images mirrored and shifted by a
pixel, targets half the label and half what the ResNet-20 of the zoo says (as DeiT was trained; Touvron et al., 2020,
arXiv:2012.12877). Calibrated on 512 training images, run in ONNX Runtime on the 10,000 test images. Prints a table in
Markdown.

    python -m benchmarks.zero_points --random

Networks of timm's with seeded random weights and uneven BatchNorms on procedural images, which need nothing.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qzoo
from qzoo.accuracy import Fidelity, wilson_interval
from qzoo.data.dead_leaves import dead_leaves
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.options import Recipe
from qzoo.preprocessing import Preprocessing
from qzoo.ptq import apply_recipe
from qzoo.runtimes import load
from qzoo.scheme import Scheme

MEAN, STD = 0.2860, 0.3530
BATCH, CALIBRATION = 128, 512
TEACHER = "resnet20.fmnist"
BITS = ((8, 8), (6, 6), (4, 8))


@dataclass(frozen=True)
class Network:
    """Way a network is made and trained.

    Attributes:
        cycles: of the learning rate, one after the other: passes over the images, and the peak.
        smooth: SmoothQuant comes before the ranges.
    """

    make: Callable[[], nn.Module]
    cycles: tuple[tuple[int, float], ...]
    smooth: bool = False


class Gate(nn.Module):
    """Squeeze-and-excitation, [N, C, H, W] -> the same."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)
        self.act = act()
        self.gate = nn.Hardsigmoid() if act is nn.Hardswish else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class MobileBlock(nn.Module):
    """Inverted residual with squeeze-and-excitation, [N, C, H, W] -> [N, C', H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        wide = 4 * inputs
        self.expand, self.bn1 = nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project, self.bn3 = nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.act1, self.act2, self.gate = act(), act(), Gate(wide, act)
        self.skip = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.expand(x)))
        y = self.gate(self.act2(self.bn2(self.depthwise(y))))
        y = self.bn3(self.project(y))
        return x + y if self.skip else y


def _mobile(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        act(),
        MobileBlock(16, 24, 1, act),
        MobileBlock(24, 24, 1, act),
        MobileBlock(24, 40, 2, act),
        MobileBlock(40, 40, 1, act),
        nn.Conv2d(40, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        act(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def _zoo(arch: str) -> Callable[[], nn.Module]:
    return partial(qzoo.create_model, arch, in_channels=1)


NETWORKS = {
    "vit": Network(_zoo("vit_mini"), ((16, 3e-3),), smooth=True),
    "swin": Network(_zoo("swin_mini"), ((11, 3e-3), (14, 3e-3), (8, 2e-3)), smooth=True),
    "convnext": Network(_zoo("convnext_mini"), ((11, 4e-3), (10, 3e-3)), smooth=True),
    "silu": Network(lambda: _mobile(nn.SiLU), ((8, 1e-2),)),
    "hardswish": Network(lambda: _mobile(nn.Hardswish), ((8, 1e-2),)),
}


def images(split: str, root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Normalized images [N, 1, 28, 28] and labels."""
    pixels, labels = fashion_mnist(split, root)
    return (pixels.float() / 255 - MEAN) / STD, labels


def train(name: str, root: Path | None) -> nn.Module:
    """Train a network from random weights."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x, y = images("train", root)
    teacher = in_onnxruntime(qzoo.create_model(TEACHER, pretrained=True), x)
    targets = (F.one_hot(y, 10) + (teacher / 2).softmax(1)) / 2
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    steps = len(x) // BATCH
    for epochs, lr in network.cycles:
        optimizer = torch.optim.AdamW(groups, lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps, pct_start=0.15)
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(BATCH)[:steps]:
                batch = augmented(x[index]).contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(batch)
                loss = F.cross_entropy(logits.float(), targets[index])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
    return model


def augmented(batch: Tensor) -> Tensor:
    """Images shifted by up to a pixel either way, half of them mirrored."""
    count, size = len(batch), batch.shape[-1]
    padded = F.pad(batch[:, 0], (1, 1, 1, 1), value=-MEAN / STD)
    rows = torch.arange(size) + torch.randint(0, 3, (count, 1))
    columns = torch.arange(size) + torch.randint(0, 3, (count, 1))
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def in_onnxruntime(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of all images, by the exported model."""
    with tempfile.TemporaryDirectory() as folder:
        file = qzoo.export_onnx(
            model.eval(), Path(folder) / "model.onnx", target="onnxruntime", example=x[:1]
        )
        session = load(file, "onnxruntime")
        return torch.cat([session(batch) for batch in x.split(250)])


def measure(name: str, state: dict[str, Tensor], root: Path | None) -> None:
    """Print the rows of one network."""
    (x, y), (seen, _) = images("test", root), images("train", root)
    exact = NETWORKS[name].make().eval()
    exact.load_state_dict(state)
    expected = in_onnxruntime(exact, x)
    right = expected.argmax(1) == y
    low, high = wilson_interval(int(right.sum()), len(y))
    print(
        f"| {name} | float | | {100 * right.double().mean():.2f} ({low:.2f} to {high:.2f}) | | | |",
        flush=True,
    )
    for weights, activations in BITS:
        for affine in (False, True):
            model = qzoo.quantize(exact, x[:1], Scheme(weights, activations, affine=affine))
            recipe = Recipe(
                method="mse",
                smooth=NETWORKS[name].smooth,
                rounding="learned" if weights < 6 else "nearest",
                bias_correction="none" if weights < 6 else "analytic",
            )
            apply_recipe(model, list(seen[:CALIBRATION].split(BATCH)), recipe, progress=False)
            outputs = in_onnxruntime(model, x)
            fidelity = Fidelity.of(outputs, expected)
            hit = outputs.argmax(1) == y
            change = 100 * (hit.double() - right.double())
            spread = 1.96 * change.std().item() / len(y) ** 0.5
            print(
                f"| {name} | W{weights}A{activations} | {'affine' if affine else 'symmetric'} "
                f"| {100 * hit.double().mean():.2f} | {change.mean():+.2f} ± {spread:.2f} "
                f"| {fidelity.agreement:.2f} | {fidelity.sqnr_db:.2f} |",
                flush=True,
            )


FITS = (
    Recipe(method="mse"),
    Recipe(method="mse", bias_correction="analytic"),
    Recipe(method="mse", bias_correction="empirical"),
    Recipe(method="mse", rounding="learned"),
    Recipe(method="mse", rounding="learned", bias_correction="empirical"),
    Recipe(method="mse", rounding="sequential"),
)


@torch.no_grad()
def measure_recipes(name: str, state: dict[str, Tensor], root: Path | None) -> None:
    """Print the row of one network: what each way to round weights and correct biases reaches."""
    x, seen = images("test", root)[0][:2000], images("train", root)[0][:CALIBRATION]
    exact = NETWORKS[name].make().eval()
    exact.load_state_dict(state)
    expected, cells = exact(x), []
    for recipe in FITS:
        model = qzoo.quantize(exact, x[:1], Scheme(affine=True))
        apply_recipe(model, list(seen.split(BATCH)), recipe, progress=False)
        cells.append(f"{Fidelity.of(model(x), expected).sqnr_db:.2f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


RANDOM = {
    "mobilenetv3_small_100": 128,
    "mobilenetv3_large_100": 128,
    "efficientnet_b0": 128,
    "convnext_atto": 128,
    "deit_tiny_patch16_224": 224,
}
"""Networks of timm's, each with the side of its images."""


@torch.no_grad()
def random_network(name: str, x: Tensor) -> nn.Module:
    """Seeded weights; BatchNorms with uneven scales, and the statistics of the images; LayerScale that counts."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
            module.momentum = None  # the mean of all that it sees
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.any():
            module.reset_parameters()
    for parameter in model.parameters():
        if 0 < parameter.abs().max() <= 1e-3:
            parameter.uniform_(0.5, 1.5)
    model.train()(x)
    return model.eval()


@torch.no_grad()
def measure_random(name: str, size: int) -> None:
    """Print the rows of one network: W8A8, 32 images to calibrate on, 64 others to compare."""
    images = dead_leaves(Preprocessing((3, size, size)), images=96)
    seen, others = images[:32], images[32:]
    exact = random_network(name, seen)
    expected = torch.cat([exact(batch) for batch in others.split(16)])
    for method in ("max", "mse"):
        cells = []
        for affine in (False, True):
            model = qzoo.quantize(copy.deepcopy(exact), seen[:1], Scheme(8, 8, affine=affine))
            qzoo.calibrate(model, list(seen.split(16)), method=method, progress=False)
            fidelity = Fidelity.of(torch.cat([model(batch) for batch in others.split(16)]), expected)
            cells.append(f"{fidelity.sqnr_db:.2f} dB, {fidelity.agreement:.1f} %")
        print(f"| {name} | {method} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Train what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(NETWORKS), metavar="NAME", help=", ".join(NETWORKS))
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--weights", type=Path, help="folder of NAME.pt")
    where.add_argument("--random", action="store_true", help="random weights of timm's networks")
    parser.add_argument("--data", type=Path, help="folder of the idx files; looked for if left out")
    parser.add_argument("--recipes", action="store_true", help="compare recipes, in place of bits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.random:
        print("| network | ranges | symmetric | affine |\n|---|---|---|---|")
        for name, size in RANDOM.items():
            measure_random(name, size)
        return
    if args.recipes:
        print(f"| network | {' | '.join(map(str, FITS))} |\n|---{'|---' * len(FITS)}|")
    else:
        print("| network | bits | activations | top-1, % | change, points | agreement, % | SQNR, dB |")
        print("|---|---|---|---|---|---|---|")
    for name in args.names:
        file = args.weights / f"{name}.pt"
        if not file.is_file():
            args.weights.mkdir(parents=True, exist_ok=True)
            torch.save(train(name, args.data).state_dict(), file)
        run = measure_recipes if args.recipes else measure
        run(name, torch.load(file, weights_only=True), args.data)


if __name__ == "__main__":
    main()
