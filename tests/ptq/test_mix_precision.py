"""Mixed precision from command to checkpoint: chosen on held-back images, recorded, packed, exported, shown."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qzoo
from qzoo.__main__ import main
from qzoo.cards.card import card
from qzoo.config import Config, config_of, read_config
from qzoo.data import load_data
from qzoo.errors import CalibrationError, CheckpointError, QuantizationError
from qzoo.ptq import Recipe, apply_recipe, mix_precision
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import set_layer_bits
from qzoo.scheme import Scheme
from qzoo.zoo.checkpoint import load_pretrained, save_pretrained

NAME = "resnet20.fmnist-w3a3"


def batches() -> list[torch.Tensor]:
    """96 test images; the training set is not embedded."""
    config = config_of(qzoo.create_model("resnet20.fmnist"))
    return [x for x, _ in load_data(config.preprocessing, config.labels, subset="0:96", batch_size=32)]


def bits_of(model: torch.nn.Module, name: str) -> tuple[int, int]:
    layer = model.get_submodule(name)
    return layer._weight_quantizer.num_bits, layer._input_quantizer.num_bits


@pytest.fixture(scope="module")
def mixed() -> torch.nn.Module:
    model = qzoo.create_model(NAME, pretrained="float", target="onnxruntime")
    before = copy.deepcopy(model)
    found = mix_precision(model, batches(), 2.0, progress=False)
    assert found.met
    assert 0 < len(found.order) < len(found.bits)
    # What it says, measured again: ranges of the first 72 images, agreement on the other 24.
    images = torch.cat(batches())
    apply_recipe(before, images[:72].split(32), Recipe(method="mse"), progress=False)
    exact = qzoo.create_model("resnet20.fmnist", pretrained=True).eval()
    with torch.no_grad():
        labels = exact(images[72:]).argmax(1)
        low = (before(images[72:]).argmax(1) == labels).double().mean().item()
        apply_recipe(model, images[:72].split(32), Recipe(method="mse"), progress=False)
        agreement = (model(images[72:]).argmax(1) == labels).double().mean().item()
    assert 100 * low < 98 <= 100 * agreement == pytest.approx(found.agreement)
    scheme = config_of(model).scheme
    assert scheme is not None
    assert {name for name, _ in scheme.layers} == set(found.order)
    for name in found.bits:
        edge = name in ("conv1", "fc")
        assert bits_of(model, name) == ((8, 8) if edge or name in found.order else (3, 3))
    return model


def test_the_checkpoint_keeps_the_bits(mixed: torch.nn.Module, tmp_path: Path) -> None:
    config = config_of(mixed)
    folder = save_pretrained(mixed, tmp_path / "mixed", config=config)
    assert read_config(folder).scheme == replace(config.scheme, target="onnxruntime")  # type: ignore[type-var]
    loaded = load_pretrained(folder, target="onnxruntime")
    images = batches()[0]
    with torch.no_grad():
        assert torch.equal(loaded(images), mixed.eval()(images))
    # Raised weights are packed as int8, the others two a byte.
    plain = qzoo.create_model(NAME, pretrained="float", target="onnxruntime")
    apply_recipe(plain, batches(), Recipe(method="mse"), progress=False)
    small = save_pretrained(plain, tmp_path / "plain")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, small)]
    assert config.scheme is not None
    raised = sum(mixed.get_submodule(name).weight.numel() for name, _ in config.scheme.layers)
    assert sizes[0] - sizes[1] == pytest.approx(raised / 2, abs=600)
    text = card(read_config(folder))
    assert f"8 bits, inputs too, have `{config.scheme.layers[0][0]}`" in text
    # A scheme without them does not describe the model.
    with pytest.raises(CheckpointError, match="has 8 bits, but the scheme w3a3 says 3"):
        save_pretrained(mixed, tmp_path / "wrong", config=replace(config, scheme=Scheme(3, 3)))


def test_inspect_and_export_show_them(mixed: torch.nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    scheme = config_of(mixed).scheme
    assert scheme is not None
    name = scheme.layers[0][0]
    formats = {q.name: q.format for q in qzoo.inspect(mixed).quantizers}
    assert formats[f"{name}._weight_quantizer"] == "int8"
    assert "int3" in formats.values()
    path = qzoo.export_onnx(mixed, tmp_path / "mixed.onnx", target="onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = batches()[0][:8]
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    with torch.no_grad():
        expected = mixed.eval()(images)
    assert (found - expected).square().sum() < 0.02 * expected.square().sum()


def test_out_of_reach() -> None:
    model = qzoo.create_model("resnet20.fmnist-w2a2", pretrained="float", target="onnxruntime")
    state = {n: m.num_bits for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    with pytest.raises(CalibrationError, match="with all layers at 2 bits"):
        mix_precision(model, batches(), 0.01, bits=2, progress=False)
    with pytest.raises(ValueError, match="between 0 and 100"):
        mix_precision(model, batches(), 0.0)
    with pytest.raises(CalibrationError, match="at least two images"):
        mix_precision(model, batches()[0][:1], 1.0)
    assert state == {n: m.num_bits for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    assert config_of(model).scheme == Scheme(2, 2, "onnxruntime")


def test_layers_of_a_scheme_are_checked() -> None:
    with pytest.raises(ValueError, match="names a layer twice"):
        Scheme(4, 4, layers=(("fc", 8), ("fc", 6)))
    with pytest.raises(ValueError, match="bits of 'fc' must be 2 to 8"):
        Scheme(4, 4, layers=(("fc", 9),))
    with pytest.raises(ValueError, match="needs integer weights"):
        Scheme(8, 8, weight_format="e4m3", layers=(("fc", 4),))
    model = qzoo.create_model("resnet20.fmnist-w4a4")
    with pytest.raises(QuantizationError, match="names 'layer9', which is no quantized layer of CifarResNet"):
        set_layer_bits(model, Scheme(4, 4, layers=(("layer9", 8),)))
    built = qzoo.create_model("resnet20", quantize=Scheme(4, 8, layers=(("layer1.0.conv1", 6),)))
    assert bits_of(built, "layer1.0.conv1") == (6, 8)
    assert bits_of(built, "layer1.0.conv2") == (4, 8)
    text = replace(
        config_of(built), scheme=Scheme(4, 8, layers=(("layer1.0.conv1", 6),)), name="resnet20-w4a8"
    )
    assert Config.from_json(text.to_json()) == text
    wrong = text.to_json().replace('"layer1.0.conv1"', "3")
    with pytest.raises(CheckpointError, match=r"scheme.layers\[0\]\[0\] must be a text"):
        Config.from_json(wrong)


@pytest.mark.slow
def test_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Needs the training set of Fashion-MNIST."""
    argv = ["calibrate", NAME, "--mixed-precision", "2", "--rounding", "learned", "--subset", "0:256"]
    assert main([*argv, "--out", str(tmp_path / "out"), "-q"]) == 0
    text = capsys.readouterr().out
    config = read_config(tmp_path / "out")
    assert config.scheme is not None
    assert config.scheme.layers
    assert config.calibration is not None
    assert config.calibration.drop == 2.0
    assert all(name in text for name, _ in config.scheme.layers)
