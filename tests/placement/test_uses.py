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
from qzoo.accuracy import Fidelity
from qzoo.distributed import Group
from qzoo.errors import CalibrationError
from qzoo.options import Recipe, TrainOptions
from qzoo.preprocessing import Preprocessing
from qzoo.ptq.ranges import calibrate
from qzoo.quantizers import quantizers, quantizers_off, shared_ranges

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LOADER = [(IMAGES[:4], torch.tensor([0, 1, 2, 3])), (IMAGES[4:], torch.tensor([3, 2, 1, 0]))]


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "convolutions":
        network = torchvision.models.ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 32], num_classes=4)
        return with_statistics(network, IMAGES)
    if kind == "gates":
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(True), *head).eval()
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


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Block(nn.Module):
    """A skip whose add is a call of the block's own, or of a module below, which runs none of the block's layers."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.sum = Sum() if apart else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(self.norm(x)).relu())
        return x + y if self.sum is None else self.sum(x, y)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="max", bias_correction="analytic"),
        Recipe(method="max", bias_correction="empirical"),
        Recipe(method="max", smooth=True),
    ],
    ids=str,
)
def test_what_hooks_compute_is_no_call_of_the_block(recipe: Recipe) -> None:
    images, results = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), []
    for apart in (False, True):
        torch.manual_seed(0)
        model = qzoo.quantize(nn.Sequential(nn.Linear(16, 16), Block(apart)).eval(), images[:1], "w4a8")
        ptq.apply_recipe(model, images.split(4), recipe, progress=False)
        with torch.no_grad():
            results.append(model(images))
    assert torch.equal(*results)


def test_learned_rounding_where_the_add_is_a_module() -> None:
    images = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = qzoo.quantize(nn.Sequential(nn.Linear(16, 16), Block(apart=True)).eval(), images[:1], "w4a8")
    ptq.apply_recipe(model, images.split(4), Recipe(method="max", rounding="sequential"), progress=False)
    with torch.no_grad(), quantizers_off(model):
        rounded = model(images)  # weights are on their grid, which the layers' own rounding leaves as it is
    with torch.no_grad():
        assert Fidelity.of(model(images), rounded).sqnr_db > 20


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


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "target"),
    [("convolutions", "onnxruntime"), ("attention", "openvino"), ("gates", "onnxruntime")],
)
def test_sensitivity(kind: str, target: str) -> None:
    """Each layer alone in int8, as if the whole model ran for it."""
    model = qzoo.quantize(built(kind), IMAGES, target=target)
    qzoo.calibrate(model, LOADER, progress=False)
    report = qzoo.sensitivity(model, LOADER, progress=False)
    found = quantizers(model)
    with quantizers_off(model):
        exact = model(IMAGES)
        for layer in report.layers:
            own = [q for name, q in found.items() if name == layer.name or name.startswith(f"{layer.name}.")]
            for quantizer in own:
                quantizer.enable_quant()
            alone = Fidelity.of(model(IMAGES), exact).sqnr_db
            assert layer.sqnr_db == pytest.approx(alone, abs=0.01), layer
            for quantizer in own:
                quantizer.disable_quant()
    active = {q for q in found.values() if q.is_on}
    assert len(active) == sum(len(layer.quantizers) for layer in report.layers)


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


def _of_two(rank: int, kind: str, folder: str) -> None:
    """One of two processes: ranges and gradients of a half of the images, then an epoch of learned ranges."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        group = Group(rank, 2)
        model = qzoo.quantize(built(kind), IMAGES)
        calibrate(model, LOADER, progress=False, group=group)
        ranges = {name: q.amax.clone() for name, q in quantizers(model).items()}
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model).eval())
        wrapped(LOADER[rank][0]).square().mean().backward()
        gradients = {name: p.grad for name, p in wrapped.module.named_parameters()}
        options = TrainOptions(epochs=1, lr=0.001, method="lsq")
        qzoo.train(model, LOADER, options, progress=False, group=group)
        torch.save((ranges, gradients, model.state_dict()), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convolutions", "attention"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    """They find the ranges and the gradients of one process, and have the same model after a step of training."""
    torch.multiprocessing.spawn(_of_two, (kind, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = qzoo.quantize(built(kind), IMAGES)
    qzoo.calibrate(model, LOADER, progress=False)
    model.eval()(IMAGES).square().mean().backward()
    expected = {name: q.amax for name, q in quantizers(model).items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for ranges, found, _ in (first, second):
        torch.testing.assert_close(ranges, expected, rtol=0, atol=0)
        torch.testing.assert_close(found, gradients)
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=0)
    moved = [name for name, range_ in expected.items() if not torch.equal(range_, first[2][f"{name}._amax"])]
    assert moved


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
