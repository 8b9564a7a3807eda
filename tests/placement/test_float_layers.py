"""Layers that a scheme keeps in float: nothing else changes, and the runtimes' own graphs have these in float."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from qdq_graphs import read_precision
from small_data import write_folder
from torch import Tensor, nn

import qzoo
from qzoo.__main__ import main
from qzoo.cards.card import card
from qzoo.config import Config, config_of, read_config
from qzoo.errors import ArgumentError, CheckpointError, QuantizationError
from qzoo.export import export_onnx
from qzoo.export.lint import examine
from qzoo.quantizers import float_layers, quantizers
from qzoo.runtimes.ort import OnnxRuntimeRunner
from qzoo.runtimes.ov import OpenVinoRunner
from qzoo.scheme import Scheme
from qzoo.zoo.checkpoint import load_pretrained, save_pretrained

SIZE = 32
IN_FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


class Network(nn.Module):
    """A block with a skip whose input two layers read, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.short = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.second(self.norm(self.first(x)).relu()) + self.short(x)).relu()
        return self.head(x.mean([2, 3]))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def with_float(*names: str, target: str = "onnxruntime", by: str = "scheme") -> nn.Module:
    torch.manual_seed(0)
    layers = tuple((name, "float") for name in names) if by == "scheme" else ()
    exclude = names if by == "exclude" else ()
    model = qzoo.quantize(Network().eval(), images(1), Scheme(target=target, layers=layers), exclude=exclude)
    qzoo.calibrate(model, [images()], progress=False)
    return model


def executed(
    model: nn.Module, name: str, target: str, folder: Path, rules: set[str]
) -> tuple[list[str], Tensor]:
    """Names of the layers that the runtime computes in float, and its logits; lint finds nothing but ``rules``."""
    path = export_onnx(model, folder / f"{target}.onnx", target=target, example=images(2))
    report = examine(path)
    assert {finding.rule for finding in report.findings} == rules
    assert report.coverage[0].int8 == report.coverage[0].layers - 1
    assert report.summary().endswith(f"; in float, as asked for: {name}")
    if target == "onnxruntime":
        optimized = folder / "optimized.onnx"
        logits = OnnxRuntimeRunner(path, optimized=optimized)(images(4))
        found = [node.name for node in onnx.load(optimized).graph.node if node.op_type in IN_FLOAT]
    else:
        runner = OpenVinoRunner(path)
        logits = runner(images(4))
        found = []
        for op in runner.compiled.get_runtime_model().get_ordered_ops():
            source = op.get_rt_info()
            is_layer = source["layerType"].astype(str) in ("Convolution", "FullyConnected")
            if is_layer and read_precision(op) not in ("u8", "i8"):
                names = source["originalLayersNames"].astype(str).split(",")
                # Of the head, the name is that of the logits.
                found += [name for name in names if name.endswith(("/Conv", "/Gemm"))] or ["head"]
    return sorted({name.partition("/")[0] for name in found}), torch.as_tensor(logits)


@pytest.mark.parametrize("by", ["scheme", "exclude"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "name", ["first", *(pytest.param(each, marks=pytest.mark.slow) for each in ("stem", "second", "head"))]
)
def test_the_runtime_computes_exactly_this_layer_in_float(
    name: str, target: str, by: str, tmp_path: Path
) -> None:
    pytest.importorskip(target)
    model = with_float(name, target=target, by=by)
    # OpenVINO computes the add with the layer in int8 then, and leaves out the Q between.
    rules = {"branch-not-rounded"} if (name, target) == ("second", "openvino") else set()
    found, logits = executed(model, name, target, tmp_path, rules)
    assert found == [name]
    with torch.inference_mode():
        expected = model(images(4))
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_what_is_quantized_around_it() -> None:
    whole, model = quantizers(with_float()), quantizers(with_float("first", "head"))
    # An integer kernel makes the input of both; the stem's is read in int8 by the other branch, too.
    assert {name: q.role for name, q in model.items() if whole[name].role != q.role} == {
        "head._input_quantizer": "activation"
    }
    assert whole.keys() - model.keys() == {
        "first._weight_quantizer",
        "head._weight_quantizer",
        "output_quantizer",
    }
    # The image and what a float layer makes are no integers.
    both = quantizers(with_float("stem", "first", "short"))
    assert not {"stem._input_quantizer", "first._input_quantizer", "short._input_quantizer"} & both.keys()


@pytest.mark.parametrize("names", [("stem",), ("first",), ("second", "head"), ("first", "short")])
def test_excluded_layers_have_the_same_quantizers(names: tuple[str, ...]) -> None:
    schemes, excluded = (quantizers(with_float(*names, by=by)) for by in ("scheme", "exclude"))
    assert {n: q.role for n, q in excluded.items()} == {n: q.role for n, q in schemes.items()}


def test_a_float_layer_computes_in_float_for_every_target() -> None:
    torch.manual_seed(0)
    network = Network().eval()
    model = with_float("stem", "head")
    pooled, batch = torch.randn(2, 16), images(2)
    weight, bias = (p.detach().double().numpy() for p in network.head.parameters())
    by_hand = pooled.double().numpy() @ weight.T + bias
    with torch.inference_mode():
        for target in ("tensorrt", "openvino", "onnxruntime"):
            qzoo.set_target(model, target)
            assert torch.equal(model.get_submodule("stem")(batch), network.stem(batch))
            is_exact = np.allclose(model.get_submodule("head")(pooled), by_hand, atol=1e-5)
            assert is_exact == (target != "onnxruntime")  # the pooling before has an integer kernel there


def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    layers = (("layer1.0.conv2", "float"), ("fc", 4))
    model = qzoo.create_model("resnet20.fmnist", quantize=Scheme(layers=layers))
    shape = (4, *config_of(model).preprocessing.input_size)
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    qzoo.calibrate(model, [batch], progress=False)
    assert float_layers(model) == ["layer1.0.conv2"]
    assert "in float: layer1.0.conv2, as the scheme says" in str(qzoo.inspect(model))
    folder = save_pretrained(model, tmp_path / "kept", form="packed")
    config = read_config(folder)
    assert config.scheme is not None
    assert config.scheme.layers == layers
    assert json.loads((folder / "config.json").read_text())["scheme"]["layers"] == [
        list(pair) for pair in layers
    ]
    assert config.plan.flags()["--layer-bits"] == ["layer1.0.conv2=float", "fc=4"]
    assert "In float stay `layer1.0.conv2`." in card(config)
    loaded = load_pretrained(folder, target="onnxruntime")
    assert quantizers(loaded).keys() == quantizers(model).keys()
    assert torch.equal(
        loaded.get_submodule("layer1.0.conv2").weight, model.get_submodule("layer1.0.conv2").weight
    )
    with torch.inference_mode():
        assert torch.equal(loaded(batch), model.eval()(batch))
    for wrong, text in (
        ("16", "the bits of 'fc' must be 2 to 8, or 'float'"),
        ("true", "must be a whole number"),
    ):
        with pytest.raises(CheckpointError, match=text):
            Config.from_json(config.to_json().replace('"fc",\n        4', f'"fc",\n        {wrong}'))


def test_wrong_names_and_bits() -> None:
    with pytest.raises(ArgumentError, match="'fc' must be 2 to 8, or 'float', not 'flaot'"):
        Scheme(layers=(("fc", "flaot"),))
    with pytest.raises(QuantizationError, match="names 'layer9', which is no quantized layer of CifarResNet"):
        qzoo.create_model("resnet20", quantize=Scheme(layers=(("layer9", "float"),)))
    assert Scheme(8, 8, weight_format="e4m3", layers=(("fc", "float"),)).float_layers == ("fc",)


@pytest.mark.parametrize(
    "layers",
    [
        {"conv1": "float"},
        {},
        ("conv1", "float"),
        ("ab",),
        "conv1",
        None,
        5,
        (("conv1",),),
        ((3, 4),),
        {"x" * 99: 4},
    ],
)
def test_layers_are_pairs(layers: object) -> None:
    with pytest.raises(
        ArgumentError, match=r"takes pairs .* layers=\(\('conv1', 'float'\),\), not "
    ) as caught:
        Scheme(layers=layers)  # type: ignore[arg-type]
    assert str(layers)[:60] in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("bits", ["float", 4])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("layer1.0.conv", "; did you mean 'layer1.0.conv2', 'layer1.0.conv1', 'layer3.0.conv2'?"),
        ("layer1.0", "; it is a block: name its layers, 'layer1.0.conv1', 'layer1.0.conv2'"),
        ("layer1", "name its layers, 'layer1.0.conv1', 'layer1.0.conv2', 'layer1.1.conv1' and 3 more"),
        ("something", "; its layers are 'conv1', 'layer1.0.conv1', 'layer1.0.conv2' and "),
        ("x" * 100, "names 'xxx"),
    ],
)
def test_a_wrong_name_gets_near_ones_or_the_layers_of_its_block(
    name: str, bits: str | int, hint: str
) -> None:
    with pytest.raises(QuantizationError) as caught:
        qzoo.create_model("resnet20", quantize=Scheme(layers=((name, bits),)))
    assert hint in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_command_refuses_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "resnet20.fmnist-w8a8", "--layer-bits", "fc=half"]) == 2
    assert "--layer-bits takes LAYER=BITS, such as fc=4 or fc=float, not 'fc=half'" in capsys.readouterr().err


def test_the_command_for_any_network(tmp_path: Path) -> None:
    file = tmp_path / "two_layers.py"
    file.write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), "
        "nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))\n"
    )
    photos = write_folder(tmp_path / "photos", ("cat", "dog"), 2)
    words = ["quantize", f"{file}:make", "--random", "--size", "32", "--data", str(photos), "-q"]
    assert main([*words, "--subset", "0:4", "--layer-bits", "0=float", "--out", str(tmp_path / "made")]) == 0
    assert float_layers(load_pretrained(tmp_path / "made")) == ["0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer2.0.downsample.0", "layer3.2.conv2", "fc"])
@pytest.mark.parametrize("recipe", ["max", "sequential"])
def test_recipes_leave_it_as_it_is(name: str, recipe: str) -> None:
    """Ranges, learned rounding, equalization and bias correction go around a float layer's weight."""
    from qzoo.ptq import Recipe, apply_recipe

    scheme = Scheme(4, 8, layers=((name, "float"),))
    model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize=scheme)
    before = model.get_submodule(name).weight.clone()
    batch = torch.randn(
        (16, *config_of(model).preprocessing.input_size), generator=torch.Generator().manual_seed(1)
    )
    chosen = Recipe(method="mse", rounding="sequential") if recipe == "sequential" else Recipe()
    apply_recipe(model, [batch], chosen, progress=False)
    assert torch.equal(model.get_submodule(name).weight, before)
    assert qzoo.sensitivity(model, [batch], images=4, progress=False).images == 4
