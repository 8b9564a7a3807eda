"""What is done to a model of the zoo is done to a quantized network of others: ranges, methods, training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from networks import with_statistics
from torch import Tensor, nn

import qzoo
from qzoo import ptq
from qzoo.errors import CalibrationError
from qzoo.options import Recipe, TrainOptions
from qzoo.preprocessing import Preprocessing
from qzoo.quantizers import quantizers, quantizers_off, shared_ranges

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LOADER = [(IMAGES[:4], torch.tensor([0, 1, 2, 3])), (IMAGES[4:], torch.tensor([3, 2, 1, 0]))]


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "convolutions":
        network = torchvision.models.ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 32], num_classes=4)
        return with_statistics(network, IMAGES)
    size = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **size).eval()


@pytest.fixture(scope="module", params=["convolutions", "attention"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    return qzoo.quantize(built(request.param), IMAGES)


def check(model: nn.Module, expected: Tensor | None = None) -> None:
    """Every range that is shared is one, and the logits are near the float ones."""
    found = quantizers(model)
    for names in shared_ranges(model):
        assert len({found[name].amax.item() for name in names}) == 1, names
    with torch.no_grad():
        logits = model(IMAGES)
        with quantizers_off(model):
            exact = model(IMAGES)
    assert (logits - exact).square().mean() < exact.square().mean()
    if expected is not None:
        torch.testing.assert_close(exact, expected, rtol=1e-3, atol=1e-3)


RECIPES = [
    Recipe(method="max"),
    Recipe(method="entropy"),
    Recipe(method="mse", bias_correction="empirical"),
    Recipe(method="mse", rounding="learned"),
    Recipe(method="max", equalize=True),
    Recipe(method="max", smooth=True),
    pytest.param(Recipe(method="procedural"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_methods(network: nn.Module, recipe: Recipe) -> None:
    model = copy.deepcopy(network)
    with torch.no_grad(), quantizers_off(model):
        expected = model(IMAGES)
    is_attention = isinstance(model, timm.models.VisionTransformer)
    if (recipe.equalize and is_attention) or (recipe.smooth and not is_attention):
        with pytest.raises(CalibrationError, match=r"nothing to (equalize|smooth)"):
            ptq.apply_recipe(model, LOADER, recipe, progress=False)
        return
    ptq.apply_recipe(model, LOADER, recipe, preprocessing=Preprocessing((3, 32, 32)), progress=False)
    check(model, expected if recipe.equalize or recipe.smooth else None)


@pytest.mark.parametrize("method", ["lsq", "pact", "ste"])
def test_training(network: nn.Module, method: str, tmp_path: Path) -> None:
    model = copy.deepcopy(network)
    qzoo.calibrate(model, LOADER, progress=False)
    before = {name: q.amax.clone() for name, q in quantizers(model).items()}
    qzoo.train(model, LOADER, TrainOptions(epochs=1, lr=0.001, method=method), progress=False)
    found = quantizers(model)
    for names in shared_ranges(model):
        assert len({found[name].amax.item() for name in names}) == 1, names
    moved = [name for name, q in found.items() if not torch.equal(q.amax, before[name])]
    assert method == "ste" or moved
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 1 + len(LOADER)
    other = copy.deepcopy(network)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model.eval()(IMAGES))


def test_mixed_precision(network: nn.Module) -> None:
    kind = "attention" if isinstance(network, timm.models.VisionTransformer) else "convolutions"
    model = qzoo.quantize(built(kind), IMAGES, "w3a8")
    ptq.mix_precision(model, LOADER, 60.0, progress=False)
    qzoo.calibrate(model, LOADER, progress=False)
    bits = dict(model.qzoo_scheme.layers)
    found = quantizers(model)
    assert all(found[f"{name}._weight_quantizer"].num_bits == 8 for name in bits)
    assert sum(q.num_bits == 3 for q in found.values()) == sum(
        q.role == "weight" for q in found.values()
    ) - len(bits)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_deploy_and_evaluate(network: nn.Module, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    model = copy.deepcopy(network)
    qzoo.calibrate(model, LOADER, progress=False)
    qzoo.set_target(model, target)
    deployed = qzoo.deploy(model, runtime=target, example=IMAGES[:1])
    assert qzoo.evaluate(deployed, LOADER, progress=False).images == len(IMAGES)
    with torch.no_grad():
        expected = model(IMAGES)
    error = torch.as_tensor(deployed(IMAGES)) - expected
    assert error.square().mean() < 0.03 * expected.square().mean()
