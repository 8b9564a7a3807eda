"""A deployed model in place of the module: same logits, any thread, eval mode, errors that say what to do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qzoo
from qzoo import runtimes
from qzoo.errors import DataError, ExportError, MissingDependencyError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq.ranges import calibrate
from qzoo.quant import quantize_
from qzoo.quantizers import set_target
from qzoo.scheme import Scheme

FAST = [name for name in runtimes.installed() if name != "torch.compile"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.9), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).train()


@pytest.fixture(scope="module", params=FAST)
def fast(request, model: nn.Module) -> nn.Module:
    return qzoo.deploy(model, request.param, threads=1, example=torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def ort(model: nn.Module) -> nn.Module:
    return qzoo.deploy(model, "onnxruntime", example=torch.zeros(1, 3, 8, 8))


def expected(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits = model(images)
    model.train()
    return logits


def test_in_place_of_the_module(fast: nn.Module, model: nn.Module) -> None:
    images = torch.randn(3, 3, 8, 8, requires_grad=True)
    logits = fast.eval()(images)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected(model, images), rtol=1e-4, atol=1e-5)
    assert model.training, "the module stays as it is"
    whole = nn.Sequential(fast, nn.Softmax(1))
    torch.testing.assert_close(whole(images).sum(1), torch.ones(3))
    batch = [(images.detach(), logits.argmax(1))]
    assert qzoo.evaluate(fast, batch, progress=False).top1 == 100.0


def test_eight_threads(fast: nn.Module, model: nn.Module) -> None:
    batches = [torch.randn(1 + i % 3, 3, 8, 8) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(fast, batches))
    for images, logits in zip(batches, results, strict=True):
        torch.testing.assert_close(logits, expected(model, images), rtol=1e-4, atol=1e-5)


def test_only_inference(fast: nn.Module) -> None:
    with pytest.raises(ExportError, match="can't be trained"):
        fast.train()
    assert not fast.training


def test_quantized_as_its_simulation() -> None:
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme()).eval()
    images = torch.randn(16, 1, 12, 12)
    calibrate(model, [images], progress=False)
    logits = qzoo.deploy(model, example=images)(images)
    with torch.no_grad():
        simulated = set_target(model, "onnxruntime")(images)
    noise = (logits - simulated).square().sum()
    assert 10 * torch.log10(simulated.square().sum() / noise) > 30


def test_images_are_not_copied(ort: nn.Module, model: nn.Module, monkeypatch) -> None:
    """The session gets the tensor's own memory."""
    images = torch.randn(2, 3, 8, 8)
    seen: list[int] = []
    session = ort.runner._session

    class Spy:
        def run(self, names, feeds):
            seen.append(feeds["image"].__array_interface__["data"][0])
            return session.run(names, feeds)

    monkeypatch.setattr(ort.runner, "_session", Spy())
    torch.testing.assert_close(ort(images), expected(model, images), rtol=1e-4, atol=1e-5)
    assert seen == [images.data_ptr()]


def test_binding_of_addresses(ort: nn.Module, model: nn.Module) -> None:
    """What the GPU providers go through, on the CPU: the session reads and writes the tensors at their addresses."""
    images = torch.randn(2, 3, 8, 8)
    logits = ort.runner._run_on_device(images)
    torch.testing.assert_close(logits, expected(model, images), rtol=1e-4, atol=1e-5)
    ort.runner._run_on_device(images + 1)
    torch.testing.assert_close(logits, expected(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 9, 8), torch.zeros(2, 3, 8, 8).double(), torch.zeros(3, 8, 8)]
)
def test_wrong_images(fast: nn.Module, images: Tensor) -> None:
    if fast.runner.runtime == "pytorch":
        pytest.skip("the module's own words")
    with pytest.raises(DataError, match=r"the model takes torch\.float32"):
        fast(images)


def test_arrays_are_refused(fast: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"must be a tensor .*not ndarray; torch\.from_numpy"):
        fast(np.zeros((1, 3, 8, 8), np.float32))


def test_the_type_stays(ort: nn.Module) -> None:
    """Not silently, as of a module without parameters."""
    for change in (ort.half, ort.double, lambda: nn.Sequential(ort).to(torch.bfloat16)):
        with pytest.raises(ExportError, match=r"deployed to onnxruntime stays torch\.float32"):
            change()
    assert ort.float().cpu().to("cpu") is ort


@pytest.mark.parametrize("runtime", [name for name in ("onnxruntime", "openvino") if name in FAST])
def test_double_precision_is_refused_in_words(runtime: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    if runtime == "openvino":  # which runs float models of that type
        quantize_(model)
        calibrate(model.eval(), [torch.randn(2, 3, 8, 8)], progress=False)
    with pytest.raises(ExportError, match=r"the export of Sequential.*float64: deploy model\.float\(\)") as e:
        qzoo.deploy(model.double(), runtime, example=torch.zeros(1, 3, 8, 8))
    assert "Exception from" not in str(e.value)
    assert "/tmp" not in str(e.value)


def test_out_of_a_wrapper(model: nn.Module) -> None:
    images = torch.randn(2, 3, 8, 8)
    fast = qzoo.deploy(nn.DataParallel(model), example=images)
    torch.testing.assert_close(fast(images), expected(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("runtime", [name for name in runtimes.RUNTIMES if name not in runtimes.installed()])
def test_what_is_not_installed_is_named(model: nn.Module, runtime: str) -> None:
    with pytest.raises(MissingDependencyError, match="pip install"):
        qzoo.deploy(model, runtime, example=torch.zeros(1, 3, 8, 8))


def test_refusals(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="onnxruntime-cuda"):
        qzoo.deploy(model, "tflite")
    with pytest.raises(ExportError, match="pass example="):
        qzoo.deploy(model)
    with pytest.raises(ValueError, match="threads"):
        qzoo.deploy(model, "pytorch", threads=0)


@pytest.mark.slow
def test_compiled(model: nn.Module) -> None:
    fast = qzoo.deploy(model, "torch.compile", threads=1)
    batches = [torch.randn(2 + i % 2, 3, 8, 8) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(fast, batches))
    for images, logits in zip(batches, results, strict=True):
        torch.testing.assert_close(logits, expected(model, images), rtol=1e-4, atol=1e-5)
