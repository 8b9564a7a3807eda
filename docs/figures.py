"""Pictures of the guide, drawn from the package and its checkpoints while the site is built.

``python docs/figures.py bits`` measures the table of docs/guide/post-training.md again.
"""

from __future__ import annotations

import functools
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np
import onnx
import torch
from matplotlib.figure import Figure

import qzoo
from qzoo.config import Config
from qzoo.data import load_data
from qzoo.quant import calib, tensor_quant
from qzoo.quantizers import quantizers
from qzoo.release.tables import embedded_configs, quantized_row

MODEL, QUANTIZER = "resnet20.fmnist", "layer1.0.conv2._input_quantizer"
GREY, BLUE, RED, GREEN, GOLD = "#808080", "#4051b5", "#c0392b", "#2e8b57", "#b8860b"
SIZE = (6.4, 3.4)
BITS = (8, 6, 5, 4, 3, 2)
SENSITIVITY = Path(__file__).parent / "sensitivity"  # what `qzoo sensitivity NAME --out FILE` wrote, by name
_TABLE = Path(__file__).parent / "guide" / "post-training.md"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, the reader's font
    "svg.hashsalt": "qzoo",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # Middle grey is seen on white and on black.
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}


def figures() -> dict[str, bytes]:
    """Every picture as SVG, by its path in the site."""
    drawn = {"levels": levels, "histogram": histogram, "error": error, "bits": bits, "graph": graph,
             "weights": weights, "logits": logits, "drop": drop}  # fmt: skip
    sizes = {"graph": (8.0, 1.3), "drop": (8.0, 6.6)}
    pictures = {f"figures/{name}.svg": svg(draw, *sizes.get(name, SIZE)) for name, draw in drawn.items()}
    for path in SENSITIVITY.glob("*.json"):
        pictures[f"figures/sensitivity-{path.stem}.svg"] = svg(
            functools.partial(sensitivity, path.stem), *SIZE
        )
    return pictures


def svg(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    """One picture: axes that the function draws on."""
    with mpl.rc_context(_STYLE):
        figure = Figure((width, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def levels(axes: Any) -> None:
    """What fake quantization does to a number, at three bits."""
    x = torch.linspace(-1.6, 1.6, 1601)
    axes.plot(x, x, color=GREY, linewidth=1, linestyle="--", label="float")
    axes.plot(
        x, tensor_quant.fake_tensor_quant(x, torch.tensor(1.0), 3), color=BLUE, label="3 bits, amax = 1"
    )
    axes.axvspan(-1.6, -1, color=GREY, alpha=0.12)
    axes.axvspan(1, 1.6, color=GREY, alpha=0.12)
    axes.text(1.3, -1.2, "clipped", ha="center")
    axes.set(xlabel="x", ylabel="quantized x", xlim=(-1.6, 1.6))
    axes.legend(loc="upper left")


@functools.cache
def activation() -> list[torch.Tensor]:
    """The values at one quantizer of the float network, batch by batch of the first 128 embedded images."""
    model = qzoo.create_model(MODEL, pretrained="float", quantize="w8a8").eval()
    seen: list[torch.Tensor] = []
    quantizer = quantizers(model)[QUANTIZER]
    handle = quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten()))
    with torch.inference_mode(), qzoo.quantizers.quantizers_off(model):
        for images, _ in _images("0:128"):
            model(images)
    handle.remove()
    return seen


def _images(subset: str) -> Any:
    return load_data(qzoo.create_model(MODEL, True).qzoo_config.preprocessing, "fashion-mnist", subset=subset)


def histogram(axes: Any) -> None:
    """One activation, and the range that each method of calibration takes."""
    values = torch.cat(activation())
    calibrator = calib.HistogramCalibrator(8, None, True, any_order=True)
    for batch in activation():
        calibrator.collect(batch)
    axes.hist(values[values > 0].numpy(), bins=120, color=GREY, alpha=0.5, log=True)
    colors = {"max": RED, "percentile": GOLD, "mse": BLUE, "entropy": GREEN}
    for i, (method, color) in enumerate(colors.items()):
        amax = calibrator.compute_amax(method, percentile=99.99).item()
        axes.axvline(amax, color=color, linewidth=1.5)
        axes.text(amax - 0.05, 0.97 - 0.09 * i, f"{method} {amax:.2f}", color=color, ha="right", va="top",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set(xlabel=f"input of {QUANTIZER.removesuffix('._input_quantizer')}", ylabel="values (logarithmic)")


def error(axes: Any) -> None:
    """Squared error of a 4-bit activation against its range, in the part that is clipped and the part that is not."""
    values = torch.cat(activation())
    largest = values.max().item()
    ranges = torch.linspace(0.05, 1, 60) * largest
    rounding, clipping = [], []
    for amax in ranges:
        squared = (tensor_quant.fake_tensor_quant(values, amax, 4, True) - values).square()
        beyond = values > amax
        rounding.append(squared[~beyond].sum().item() / len(values))
        clipping.append(squared[beyond].sum().item() / len(values))
    total = np.add(rounding, clipping)
    axes.plot(ranges, rounding, color=GREEN, linestyle="--", label="rounding")
    axes.plot(ranges, clipping, color=GOLD, linestyle=":", label="clipping")
    axes.plot(ranges, total, color=BLUE, label="both")
    best = int(total.argmin())
    axes.plot(ranges[best], total[best], "o", color=BLUE)
    axes.annotate(f"least at {ranges[best]:.1f}, maximum {largest:.1f}", (ranges[best], total[best]),
                  (8, -14), textcoords="offset points")  # fmt: skip
    axes.set(xlabel="range (amax), 4 bits unsigned", ylabel="mean squared error", ylim=(0, 3 * total[-1]))
    axes.legend()


def bits(axes: Any) -> None:
    """Accuracy against bits: the table of the guide, and the checkpoints of the zoo."""
    rows = _measured()
    for column, (method, color) in enumerate((("max", GOLD), ("mse", GREEN)), start=1):
        axes.plot(
            [row[0] for row in rows],
            [row[column] for row in rows],
            "o--",
            color=color,
            label=f"calibrated, {method}",
        )
    trained = [
        (config.scheme.weight_bits, quantized_row(config).top1) for config in _of_model() if config.scheme
    ]
    axes.plot(
        *zip(*sorted(trained), strict=True),
        "s-",
        color=BLUE,
        label="checkpoints of the zoo (below 8: trained)",
    )
    axes.set(xlabel="bits of weights and activations", ylabel="top-1, %", ylim=(0, 100))
    axes.invert_xaxis()
    axes.legend(loc="lower left")


def _of_model() -> list[Config]:
    return [config for config in embedded_configs() if config.architecture == MODEL.partition(".")[0]]


def _measured() -> list[tuple[float, ...]]:
    """Bits, and the top-1 of each method, from the table of the guide."""
    rows = re.findall(
        r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \|", _TABLE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return [(int(bits), float(largest), float(mse)) for bits, largest, mse in rows]


def weights(axes: Any) -> None:
    """Weights of one channel of a checkpoint, on their levels."""
    layer = qzoo.create_model(f"{MODEL}-w8a8", True).get_submodule("layer1.0.conv1")
    weight = qzoo.create_model(MODEL, True).get_submodule("layer1.0.conv1").weight[0].detach().flatten()
    step = layer.weight_quantizer.step_size.flatten()[0].item()
    shown = torch.round(weight / step)
    axes.plot(weight, shown, "o", color=BLUE, markersize=3)
    axes.plot(weight, weight / step, color=GREY, linewidth=0.7)
    axes.set(xlabel="float weight", ylabel="stored integer", xlim=(-9 * step, 9 * step), ylim=(-9, 9))


def logits(axes: Any) -> None:
    """Float logits against those of the int8 file in ONNX Runtime, on 500 images."""
    float_model, model = (qzoo.create_model(name, True) for name in (MODEL, f"{MODEL}-w8a8"))
    fast = qzoo.deploy(model, "onnxruntime")
    with torch.inference_mode():
        pairs = [(float_model(images), fast(images)) for images, _ in _images("0:500")]
    exact, int8 = (torch.cat(part) for part in zip(*pairs, strict=True))
    same = (exact.argmax(1) == int8.argmax(1)).float().mean().item()
    axes.plot(exact.flatten(), int8.flatten(), ".", color=BLUE, markersize=1, rasterized=True)
    axes.set(xlabel="logit, float in torch", ylabel="logit, int8 in ONNX Runtime",
             title=f"500 images, 10 classes: the same answer on {100 * same:.1f} %")  # fmt: skip


def sensitivity_of(name: str) -> dict[str, Any] | None:
    """What ``qzoo sensitivity`` measured of a checkpoint; None where nothing is kept."""
    path = SENSITIVITY / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def sensitivity_command(name: str) -> str:
    """How the picture of a checkpoint was measured."""
    measured = sensitivity_of(name)
    assert measured is not None
    data = "" if ".fmnist" in name else f" --data imagenet --images {measured['images']}"
    return f"qzoo sensitivity {name}{data}"


def sensitivity(name: str, axes: Any) -> None:
    """The layers that cost most when they alone are quantized."""
    measured = sensitivity_of(name)
    assert measured is not None
    layers = [layer for layer in measured["layers"] if layer["sqnr_db"] is not None][:15]
    axes.barh([layer["name"] for layer in layers], [layer["sqnr_db"] for layer in layers], color=BLUE)
    axes.axvline(measured["sqnr_db"], color=RED, linestyle="--")
    axes.text(measured["sqnr_db"], 1.01, f"all quantized {measured['sqnr_db']:.1f}", color=RED,
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel=f"SQNR of the logits with one layer quantized, dB ({measured['images']} images)")
    axes.tick_params(axis="y", labelsize=7)


_COLORS = {"QuantizeLinear": GOLD, "DequantizeLinear": GREEN, "Conv": BLUE, "Add": BLUE, "Relu": GREY}
_SHORT = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}


def graph(axes: Any) -> None:
    """The nodes of the first residual block in the file for ONNX Runtime, from left to right."""
    with TemporaryDirectory() as folder:
        path = qzoo.export_onnx(
            qzoo.create_model(f"{MODEL}-w8a8", True), Path(folder) / "m.onnx", target="onnxruntime"
        )
        nodes = list(onnx.load(path).graph.node)
    end = next(i for i, node in enumerate(nodes) if node.op_type == "Add") + 3  # the Add, its ReLU, Q and DQ
    relu = next(i for i, node in enumerate(nodes) if node.op_type == "Relu")
    block = nodes[relu + 1 : end + 1]
    shown = [node for node in block if node.op_type != "DequantizeLinear" or node.input[0] in _outputs(block)]
    place = {node.output[0]: x for x, node in enumerate(shown)}
    for x, node in enumerate(shown):
        for source in (place[name] for name in node.input if name in place):
            near = x - source == 1
            axes.annotate("", (x - 0.42, 0) if near else (x, 0.1), (source + 0.42, 0) if near else (source, 0.1),
                          arrowprops={"arrowstyle": "->", "color": GREY, "linewidth": 0.8,
                                      "connectionstyle": "arc3,rad=0" if near else "arc3,rad=-0.25"})  # fmt: skip
        axes.text(x, 0, _SHORT.get(node.op_type, node.op_type), ha="center", va="center", color="white", fontsize=8,
                  bbox={"boxstyle": "round", "facecolor": _COLORS.get(node.op_type, GREY), "linewidth": 0})  # fmt: skip
    axes.set(xlim=(-0.6, len(shown) - 0.4), ylim=(-0.3, 1.2))
    axes.axis("off")


QUESTIONS = (
    ("The float model, too, is below\nits published accuracy?", "Mend the preprocessing"),
    ("The file's answers differ\nfrom the simulation's?", "The engine differs"),
    ("The drop is smaller\nthan its interval?", "Measure more images"),
    ("Calibrated by max?", "--method auto"),
    ("A depthwise network?", "build --recipe best"),
    ("A transformer?", "--smooth"),
    ("One layer costs most?", "Keep it in float"),
    ("Four bits or fewer,\nor still a point at eight?", "Train (QAT)"),
)


def drop(axes: Any) -> None:
    """What to do about lost accuracy: the questions in their order, and where a yes leads."""
    arrow = {"arrowstyle": "->", "color": GREY, "linewidth": 0.8}
    for y, (question, action) in enumerate(QUESTIONS):
        for x, text, color in ((0.0, question, BLUE), (1.0, action, GREEN)):
            axes.text(x, -y, text, ha="center", va="center", color="white",
                      bbox={"boxstyle": "round", "facecolor": color, "linewidth": 0})  # fmt: skip
        axes.annotate("", (0.72, -y), (0.38, -y), arrowprops=arrow)
        axes.text(0.55, -y + 0.08, "yes", ha="center")
        if y:
            axes.annotate("", (0, -y + 0.3), (0, -y + 0.7), arrowprops=arrow)
            axes.text(0.04, -y + 0.45, "no")
    axes.set(xlim=(-0.5, 1.5), ylim=(-len(QUESTIONS) + 0.5, 0.5))
    axes.axis("off")


def _outputs(nodes: list[Any]) -> set[str]:
    return {name for node in nodes for name in node.output}


def measure_bits() -> None:
    """Print the rows of the guide's table: ResNet-20 calibrated at each number of bits."""
    float_model = qzoo.create_model(MODEL, True)
    print(f"float: {qzoo.evaluate(float_model, _images('512:2512'), progress=False).top1:.2f} %")
    for number in BITS:
        found = []
        for method in ("max", "mse"):
            model = qzoo.create_model(MODEL, pretrained="float", quantize=f"w{number}a{number}")
            qzoo.calibrate(model, _images("0:512"), method=method, progress=False)
            found.append(qzoo.evaluate(model, _images("512:2512"), progress=False).top1)
        print(f"| {number} | " + " | ".join(f"{top1:.2f}" for top1 in found) + " |", flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["bits"]:
    measure_bits()
