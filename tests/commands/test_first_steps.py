"""What newcomers try first: it works, or the error says what to do instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import timm
import torch
import torchvision
from PIL import Image
from small_data import write_folder
from torch import Tensor, nn

import qzoo
from qzoo.__main__ import main
from qzoo.cards.card import write_card
from qzoo.config import Measurement, config_of
from qzoo.errors import CalibrationError, CheckpointError, DataError, UnknownModelError
from qzoo.models.layers import conv2d, linear
from qzoo.preprocessing import Preprocessing
from qzoo.registry import _entries, register_model
from qzoo.scheme import Scheme
from qzoo.zoo import hub
from qzoo.zoo.create import open_model


def test_pretrained_comes_second_as_in_timm() -> None:
    model = qzoo.create_model("resnet20", True, "w8a8")
    assert config_of(model).name == "resnet20.fmnist-w8a8"


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (lambda: qzoo.create_model("org/name", True), UnknownModelError, "qzoo.load_pretrained loads"),
        (lambda: qzoo.load_pretrained("hf-hub:org/name"), CheckpointError, "did you mean 'org/name'"),
        (lambda: qzoo.load_pretrained("https://huggingface.co/org/name"), CheckpointError, "mean 'org/name'"),
        (lambda: qzoo.load_pretrained(__file__), CheckpointError, "is a file.*load_calibrated"),
        (lambda: qzoo.resnet20(quantize="W8A8"), ValueError, "did you mean 'w8a8'"),
        (lambda: qzoo.resnet56(pretrained=True, quantize=True), UnknownModelError, "none of resnet56 has been"),
        (lambda: open_model("my-tuned"), UnknownModelError, "there is no folder 'my-tuned', either"),
        (lambda: open_model("runs/my-tuned/best"), CheckpointError, "is no folder"),
        (lambda: qzoo.save_pretrained(nn.Linear(2, 2), "unused"), CheckpointError, "register_model"),
        (lambda: qzoo.publish("unused"), CheckpointError, "unused is no checkpoint: there is no such folder"),
        (lambda: qzoo.data.load_data(Preprocessing(), "imagenet-1k"), DataError, "--data FOLDER"),
    ],
    ids=range(11),
)  # fmt: skip
def test_errors_say_what_to_do(action: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        action()


def test_a_replaced_head_is_not_saved_as_what_would_not_load(tmp_path: Path) -> None:
    model = qzoo.create_model("resnet20", True)
    model.fc = nn.Linear(64, 5)
    with pytest.raises(
        CheckpointError, match=r"fc\.bias is \[5\].*num_classes=10.*qzoo\.create_model with it"
    ):
        model.save_pretrained(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    right = qzoo.create_model("resnet20", num_classes=5, in_channels=1)
    right.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 28, 28)
    loaded = qzoo.load_pretrained(right.save_pretrained(tmp_path / "c"))
    assert torch.equal(loaded(x), right.eval()(x))


def test_a_float_head_in_a_quantized_model_is_named(tmp_path: Path) -> None:
    model = qzoo.create_model("resnet20", True, True)
    model.fc = nn.Linear(64, 10)
    with pytest.raises(CheckpointError, match=r"no quantizer fc\._input_quantizer, unlike resnet20 as w8a8"):
        model.save_pretrained(tmp_path / "c")
    model = qzoo.create_model("resnet20", True)
    qzoo.quant.quantize_(model)
    qzoo.calibrate(model, [torch.randn(2, 1, 28, 28)], progress=False)
    with pytest.raises(CheckpointError, match=r"has a quantizer .*, unlike resnet20 as float"):
        model.save_pretrained(tmp_path / "c")
    model = qzoo.create_model("resnet20", True, True)
    model.layer4 = nn.Conv2d(64, 64, 1)
    with pytest.raises(CheckpointError, match=r"layer4\.bias is \[64\], but .* has no such tensor"):
        model.save_pretrained(tmp_path / "c")


def test_ranges_into_a_float_model_are_explained() -> None:
    state = qzoo.create_model("resnet20", True, True).state_dict()
    with pytest.raises(CheckpointError, match="no quantizers; build the model with quantize=True"):
        qzoo.load_calibrated(qzoo.create_model("resnet20.fmnist"), state)


class Own(qzoo.HubMixin, nn.Module):
    """A network of a project of its own."""

    def __init__(self, num_classes: int, in_channels: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.conv = conv2d(in_channels, 8, 3, padding=1, quantize=quantize)
        self.fc = linear(8, num_classes, quantize=quantize, nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def test_an_architecture_of_ones_own_project(tmp_path: Path) -> None:
    def own_net(*, num_classes: int = 4, in_channels: int = 3, quantize: Scheme | None = None) -> Own:
        return Own(num_classes, in_channels, quantize)

    register_model()(own_net)
    try:
        model = qzoo.create_model("own_net-w8a8")
        images = torch.randn(4, 3, 16, 16)
        qzoo.calibrate(model, [images], progress=False)
        folder = model.save_pretrained(tmp_path / "own")
        assert torch.equal(Own.from_pretrained(folder)(images), model.eval()(images))
    finally:
        del _entries["own_net"]
    with pytest.raises(CheckpointError, match="import the module that registers it"):
        qzoo.load_pretrained(folder)


def test_the_command_alone_helps_and_knows_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "benchmark" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"qzoo {qzoo.__version__}\n"


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint of somebody's own data, in a folder ``tuned`` of the current one."""
    torch.manual_seed(0)
    model = qzoo.create_model("resnet20-w8a8", num_classes=3)
    qzoo.calibrate(model, [torch.randn(2, 3, 32, 32)], progress=False)
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config_of(model), labels="folders")
    return str(qzoo.save_pretrained(model, "tuned", config=config).relative_to(tmp_path))


def test_commands_take_folders(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    Image.new("RGB", (40, 30), "teal").save("photo.png")
    assert main(["predict", "photo.png", "--model", tuned]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("%")[1].strip() for line in lines) == ["class 0", "class 1", "class 2"]
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.02)
    assert main(["inspect", tuned]) == 0
    assert "output_quantizer" in capsys.readouterr().out


def test_verify_takes_folders_and_never_checks_nothing(
    tuned: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["verify", tuned, "-q"]) == 0
    assert capsys.readouterr().out.split() == ["ok", "tuned", "folder"]
    Path(tuned, "README.md").write_bytes(b"\xff no card")
    assert main(["verify", tuned, "-q"]) == 1
    assert "README.md differs" in capsys.readouterr().out
    monkeypatch.setattr(hub, "EMBEDDED", Path.cwd())
    assert main(["verify", "-q"]) == 1  # without names: all
    assert "tuned" in capsys.readouterr().out


@pytest.fixture
def pets_and_clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with two checkpoints: one of a folder's images, and one of Fashion-MNIST, whose images it has."""
    torch.manual_seed(0)
    for name, labels, classes, channels, images in (
        ("pets", "folders", 8, 3, "pets (8 images)"),
        ("clothes", "fashion-mnist", 10, 1, "Fashion-MNIST test"),
    ):
        model = qzoo.create_model("resnet20-w8a8", num_classes=classes, in_channels=channels)
        size = model.qzoo_config.preprocessing.input_size
        qzoo.calibrate(model, [torch.randn(2, *size)], progress=False)
        row = Measurement(
            "torch", "w8a8", "tensorrt", images, "2:8", 6, 50.0, (0.0, 100.0), 50.0, (0.0, 100.0), 2.3
        )
        config = dataclasses.replace(config_of(model), labels=labels, metrics=(row,))
        write_card(qzoo.save_pretrained(model, tmp_path / "zoo" / name, config=config))
    write_folder(tmp_path / "pets", tuple("abcdefgh"), 1)
    write_folder(tmp_path / "others", tuple("abcdefgh"), 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "zoo")


@pytest.mark.usefixtures("pets_and_clothes")
@pytest.mark.parametrize(
    ("options", "status", "pets", "clothes"),
    [
        ([], 0, "embedded", "embedded"),
        (["--measure"], 0, "not at hand: pets (8 images)", "1 figures measured"),
        (["--data", "pets"], 0, "1 figures measured", "1 figures measured"),
        (["--data", "others"], 0, "not at hand: pets (8 images)", "1 figures measured"),
        (["--data", "nowhere"], 0, "not at hand: pets (8 images)", "1 figures measured"),
        (["pets", "--measure"], 1, "not at hand: pets (8 images)", ""),
    ],
)
def test_verify_measures_again_what_it_has_the_images_of(
    options: list[str], status: int, pets: str, clothes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *options, "-q"]) == status
    out, error = capsys.readouterr()
    found = dict(line.split(maxsplit=2)[1:] for line in out.splitlines())
    assert found["pets"].endswith(pets)
    assert found.get("clothes", "").endswith(clothes)
    assert ("no figure was measured again" in error) == (status == 1)


def foreign(name: str) -> nn.Module:
    """A network of somebody else, quantized and calibrated as docs/migration.md says; its images are IMAGES."""
    torch.manual_seed(0)
    if name == "timm":
        model = timm.create_model("mobilenetv3_small_050", num_classes=7)
    else:
        model = torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=7)
        nn.init.normal_(model.heads.head.weight)
    qzoo.quant.quantize_(model.eval())
    qzoo.calibrate(model, [IMAGES], progress=False)
    return model


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [pytest.param("timm", marks=pytest.mark.slow), "torchvision"])
def test_networks_of_timm_and_torchvision_run_as_simulated(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = foreign(name)
    path = qzoo.export_onnx(model, tmp_path / "m.onnx", target="onnxruntime", example=IMAGES)
    with torch.inference_mode():
        expected, found = model(IMAGES), qzoo.deploy(path)(IMAGES)
    assert expected.std() > 1e-3
    assert (found - expected).square().mean() < 1e-3 * expected.var()
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) > 1}
    assert onnx.TensorProto.INT8 in kinds


def test_batches_that_are_none_are_said() -> None:
    model = qzoo.create_model("resnet20", True, True)
    images = torch.randn(2, 1, 28, 28)
    with pytest.raises(CalibrationError, match="gave a dict; expected batches of images"):
        qzoo.calibrate(model, [{"image": images}], progress=False)
    for batch, message in (
        (images, "gave a Tensor; expected"),
        ({"image": images}, "gave a dict"),
        ((images, torch.eye(10)[:2]), r"torch.float32 \[2, 10\]; expected one class index an image"),
    ):
        with pytest.raises(DataError, match=message):
            qzoo.evaluate(model, [batch], progress=False)
