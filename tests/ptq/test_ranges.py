"""``calibrate`` on small models, against ranges computed with NumPy from hooks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from qzoo.data import load_data
from qzoo.errors import CalibrationError, NonFiniteError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.preprocessing import Preprocessing
from qzoo.ptq.ranges import calibrate
from qzoo.quant import quantize_
from qzoo.quant.calib import HistogramCalibrator
from qzoo.quant.descriptor import QuantDescriptor
from qzoo.quant.nn import QuantConv2d, QuantLinear, TensorQuantizer
from qzoo.quantizers import activation_descriptor, activation_quantizer, set_target
from qzoo.scheme import TARGETS, Scheme

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """48 embedded images in three batches."""
    preprocessing = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))
    return list(load_data(preprocessing, "fashion-mnist", subset="0:48", batch_size=16))


def resnet8(target: str = "tensorrt") -> CifarResNet:
    """One block a stage; BatchNorm with statistics that are no identity."""
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme(target=target))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def ranges(model: nn.Module) -> dict[str, Tensor]:
    return {name: q.amax.clone() for name, q in quantizers(model).items() if q.amax is not None}


def float_inputs(model: nn.Module, batches: list[Batch]) -> dict[str, np.ndarray]:
    """All that reaches each activation quantizer of the float model, flattened."""
    seen: dict[str, list[np.ndarray]] = {}
    found = quantizers(model)
    handles = [
        q.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].numpy().ravel())
        )
        for name, q in found.items()
        if q.role != "weight"
    ]
    switches = {name: q._disabled for name, q in found.items()}
    for q in found.values():
        q.disable()
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    for name, q in found.items():
        q._disabled = switches[name]
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(values) for name, values in seen.items()}


def test_max_is_numpys_maximum(batches: list[Batch]) -> None:
    model = resnet8()
    result = calibrate(model, batches, progress=False)
    assert (result.method, result.images, result.candidates) == ("max", 48, ())
    inputs = float_inputs(model, batches)
    for name, quantizer in quantizers(model).items():
        if quantizer.role == "weight":
            weight = model.get_submodule(name.rpartition(".")[0]).weight.detach().numpy()
            expected = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
        else:
            expected = np.abs(inputs[name]).max()
        np.testing.assert_array_equal(quantizer.amax.numpy(), expected, err_msg=name)


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_histogram_methods_equal_a_calibrator_fed_alone(batches: list[Batch], method: str) -> None:
    model = resnet8()
    result = calibrate(model, batches, method=method, percentile=99.0, progress=False)
    assert result.percentile == (99.0 if method == "percentile" else None)
    inputs = float_inputs(model, batches)
    for name in ("conv1._input_quantizer", "layer2.0.residual_quantizer", "output_quantizer"):
        alone = HistogramCalibrator(8, None, False, any_order=True)
        for part in np.split(inputs[name], 3):
            alone.collect(torch.from_numpy(part))
        assert torch.equal(quantizers(model)[name].amax, alone.compute_amax(method, percentile=99.0)), name


def test_percentile_leaves_out_the_stated_share(batches: list[Batch]) -> None:
    model = resnet8()
    calibrate(model, batches, method="percentile", percentile=98.0, progress=False)
    for name, values in float_inputs(model, batches).items():
        amax, magnitudes = quantizers(model)[name].amax.item(), np.abs(values)
        width = magnitudes.max() / 2048  # of a bin, or a little more than that
        assert (magnitudes < amax - width).mean() < 0.98 <= (magnitudes <= amax + width).mean(), name


@pytest.mark.parametrize("target", list(TARGETS))
def test_every_role_is_calibrated_and_switches_stay(batches: list[Batch], target: str) -> None:
    model = resnet8(target)
    before = {
        name: (q._disabled, q._if_quant, q._if_calib, q.unsigned) for name, q in quantizers(model).items()
    }
    calibrators = {name: q._calibrator for name, q in quantizers(model).items()}
    calibrate(model, batches, progress=False)
    after = {
        name: (q._disabled, q._if_quant, q._if_calib, q.unsigned) for name, q in quantizers(model).items()
    }
    assert before == after
    assert all(q._calibrator is calibrators[name] for name, q in quantizers(model).items())
    assert ranges(model).keys() == quantizers(model).keys()
    for other in TARGETS:
        set_target(model, other)
        assert torch.isfinite(model(batches[0][0])).all()


def test_ranges_do_not_depend_on_the_target(batches: list[Batch]) -> None:
    found = []
    for target in TARGETS:
        model = resnet8(target)
        calibrate(model, batches, progress=False)
        found.append(ranges(model))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_readers_of_one_tensor_get_one_range(batches: list[Batch], method: str) -> None:
    model = resnet8("onnxruntime")
    # Whatever signedness the skip claims; the first convolution reads the same tensor.
    model.layer1[0].residual_quantizer.unsigned = False
    calibrate(model, batches, method=method, progress=False)
    found = ranges(model)
    assert torch.equal(found["layer1.0.residual_quantizer"], found["layer1.0.conv1._input_quantizer"])
    assert torch.equal(
        found["layer2.0.downsample.0._input_quantizer"], found["layer2.0.conv1._input_quantizer"]
    )
    assert not torch.equal(found["layer2.0.residual_quantizer"], found["layer2.0.conv1._input_quantizer"])


class CountedCalibrator(HistogramCalibrator):
    calls = 0

    def collect(self, x: Tensor) -> None:
        type(self).calls += 1
        super().collect(x)


def test_a_tensor_is_counted_once_a_batch(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qzoo.ptq.collect.HistogramCalibrator", CountedCalibrator)
    monkeypatch.setattr(CountedCalibrator, "calls", 0)
    model = resnet8()
    calibrate(model, batches, method="mse", progress=False)
    activations = sum(q.role != "weight" for q in quantizers(model).values())
    # The identity skip and two projections read what the block's first convolution reads.
    assert CountedCalibrator.calls == len(batches) * (activations - 3)


class InPlace(nn.Module):
    """The second quantizer gets the first one's tensor object, changed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a_quantizer, self.b_quantizer = TensorQuantizer(), TensorQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        self.a_quantizer(x)
        x.mul_(3)
        return self.b_quantizer(x)


def test_a_tensor_changed_in_place_is_another_tensor() -> None:
    model = InPlace()
    calibrate(model, [torch.full((1, 4), 2.0)], progress=False)
    assert (model.a_quantizer.amax.item(), model.b_quantizer.amax.item()) == (2.0, 6.0)


def test_training_mode_and_statistics_stay(batches: list[Batch]) -> None:
    model = resnet8().train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    running = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model, batches, method="auto", progress=False)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in running.items())


def test_auto_keeps_the_best_of_what_it_reports(batches: list[Batch]) -> None:
    model = resnet8("onnxruntime")
    select = [(images.flip(3), labels) for images, labels in batches[:2]]
    result = calibrate(model, batches, method="auto", select_loader=select, progress=False)
    assert {c.method for c in result.candidates} == {"max", "percentile", "mse", "entropy"}
    assert (result.images, result.select_images) == (48, 32)
    images = torch.cat([images for images, _ in select])
    measured = {}
    for candidate in result.candidates:
        fresh = resnet8("onnxruntime")
        calibrate(fresh, batches, method=candidate.method, progress=False)
        with torch.no_grad():
            quantized = fresh(images).double().numpy()
            for q in quantizers(fresh).values():
                q.disable()
            exact = fresh(images).double().numpy()
        measured[candidate.method] = 10 * np.log10((exact**2).sum() / ((exact - quantized) ** 2).sum())
        assert candidate.sqnr_db == pytest.approx(measured[candidate.method], abs=1e-3)
        assert candidate.agreement == pytest.approx(100 * (exact.argmax(1) == quantized.argmax(1)).mean())
        if candidate.method == result.method:
            assert all(torch.equal(ranges(model)[n], r) for n, r in ranges(fresh).items())
    assert measured[result.method] == max(measured.values())


def test_a_channel_of_zeros_has_range_zero_and_stays_zero(batches: list[Batch]) -> None:
    model = resnet8()
    with torch.no_grad():
        model.layer1[0].conv1.weight[3] = 0
    calibrate(model, batches, progress=False)
    conv = model.layer1[0].conv1
    assert conv._weight_quantizer.amax[3].item() == 0
    quantized = conv._weight_quantizer(conv.weight)
    assert torch.isfinite(quantized).all()
    assert (quantized[3] == 0).all()


def test_calibrating_again_replaces_ranges(batches: list[Batch]) -> None:
    model = resnet8()
    calibrate(model, batches, progress=False)
    first = ranges(model)
    calibrate(model, [(10 * images, labels) for images, labels in batches], progress=False)
    np.testing.assert_allclose(
        ranges(model)["conv1._input_quantizer"].numpy(),
        10 * first["conv1._input_quantizer"].numpy(),
        rtol=1e-6,
    )
    calibrate(model, batches, progress=False)
    assert all(torch.equal(first[name], amax) for name, amax in ranges(model).items())


def unused_layer() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = QuantLinear(4, 4), QuantLinear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    return Model()


def test_quantizers_that_see_nothing_are_named() -> None:
    model = unused_layer()
    with pytest.raises(CalibrationError, match=r"1 quantizers saw no data: spare\._input_quantizer;"):
        calibrate(model, [torch.ones(2, 4)], progress=False)
    assert not ranges(model)
    model.spare._input_quantizer.disable()
    calibrate(model, [torch.ones(2, 4)], progress=False)
    assert ranges(model).keys() == {
        "used._input_quantizer",
        "used._weight_quantizer",
        "spare._weight_quantizer",
    }


def test_an_empty_loader_and_a_float_model_are_refused(batches: list[Batch]) -> None:
    with pytest.raises(CalibrationError, match="no images"):
        calibrate(resnet8(), [], progress=False)
    with pytest.raises(CalibrationError, match="has no quantizers"):
        calibrate(CifarResNet(1, in_channels=1), batches, progress=False)


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_name_quantizer_and_batch(batches: list[Batch], method: str, bad: float) -> None:
    model = resnet8().train()
    poisoned = [(images.clone(), labels) for images, labels in batches]
    poisoned[1][0][0, 0, 0, 0] = bad
    before = {name: (q._disabled, q._if_quant, q._if_calib) for name, q in quantizers(model).items()}
    with pytest.raises(NonFiniteError, match=r"conv1\._input_quantizer.*batch 1"):
        calibrate(model, poisoned, method=method, progress=False)
    assert not ranges(model)
    assert model.training
    assert before == {name: (q._disabled, q._if_quant, q._if_calib) for name, q in quantizers(model).items()}


def test_bad_weight_is_named(batches: list[Batch]) -> None:
    model = resnet8()
    with torch.no_grad():
        model.layer2[0].conv2.weight[1, 1, 1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"weight of 'layer2\.0\.conv2'"):
        calibrate(model, batches, progress=False)


def test_a_generator_serves_one_pass(batches: list[Batch]) -> None:
    def once() -> Iterator[Batch]:
        yield from batches

    model = resnet8()
    calibrate(model, once(), method="mse", progress=False)
    before = ranges(model)
    with pytest.raises(CalibrationError, match="select_loader"):
        calibrate(model, once(), method="auto", progress=False)
    assert all(torch.equal(before[name], amax) for name, amax in ranges(model).items())
    with pytest.raises(CalibrationError, match="select_loader"):
        calibrate(resnet8(), once(), method="auto", progress=False)


def test_arguments_are_checked(batches: list[Batch]) -> None:
    with pytest.raises(ValueError, match="max, percentile, mse, entropy or auto, not 'kl'"):
        calibrate(resnet8(), batches, method="kl", progress=False)
    with pytest.raises(ValueError, match="percentile"):
        calibrate(resnet8(), batches, method="percentile", percentile=0, progress=False)


def test_other_modules_than_the_zoos(batches: list[Batch]) -> None:
    """A model of one's own: no roles, batches of images alone."""
    torch.manual_seed(0)
    model = nn.Sequential(QuantConv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), QuantLinear(4 * 26 * 26, 10))
    calibrate(model, [images for images, _ in batches], progress=False)
    assert model[0]._input_quantizer.amax == max(images.abs().max() for images, _ in batches)
    assert model[0]._weight_quantizer.amax.shape == (4, 1, 1, 1)
    with torch.no_grad():
        assert torch.isfinite(model(batches[0][0])).all()


def test_a_percentile_that_would_erase_everything_falls_back_to_the_maximum() -> None:
    x = torch.zeros(100_000)
    x[7] = 5.0
    model = nn.Sequential(TensorQuantizer(activation_descriptor(Scheme())))
    calibrate(model, [x], method="percentile", percentile=99.9, progress=False)
    assert model[0].amax.item() == 5.0


class Stream(IterableDataset):
    """Images without a length."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield from zip(images, labels, strict=True)


@pytest.mark.parametrize("method", ["mse", "auto"])
def test_a_stream_without_a_length(batches: list[Batch], method: str) -> None:
    models = [resnet8(), resnet8()]
    for model, loader in zip(models, (batches, DataLoader(Stream(batches), batch_size=16)), strict=True):
        calibrate(model, loader, method=method, select_loader=loader)
    found = [ranges(model) for model in models]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_inside_inference_mode(batches: list[Batch]) -> None:
    model, inside = resnet8("onnxruntime"), resnet8("onnxruntime")
    calibrate(model, batches, method="mse", progress=False)
    with torch.inference_mode():
        calibrate(
            inside, [(images.clone(), labels) for images, labels in batches], method="mse", progress=False
        )
    found = ranges(inside)
    assert all(torch.equal(amax, found[name]) for name, amax in ranges(model).items())


@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_signed_tensor_that_is_called_nonnegative_is_refused(method: str) -> None:
    """SiLU goes down to -0.28; an unsigned quantizer would cut that off."""
    torch.manual_seed(0)

    def network(activation: nn.Module) -> nn.Module:
        last = activation_quantizer(Scheme(8, 8), "output", nonnegative=True)
        return nn.Sequential(QuantConv2d(3, 4, 3), activation, last)

    images = [torch.randn(2, 3, 8, 8)]
    model = network(nn.SiLU())
    with pytest.raises(
        CalibrationError, match=r"quantizer '2' is nonnegative, but its input goes down to -0\.2"
    ):
        calibrate(model, images, method=method, progress=False)
    assert model[2].amax is None, "nothing is set"
    model[2].nonnegative = model[2].unsigned = False
    calibrate(model, images, method=method, progress=False)
    calibrate(network(nn.ReLU()), images, method=method, progress=False)
    unsigned = nn.Sequential(QuantConv2d(3, 4, 3), TensorQuantizer(QuantDescriptor(unsigned=True)))
    with pytest.raises(CalibrationError, match=r"quantizer '1' is unsigned"):
        calibrate(unsigned, images, method=method, progress=False)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, not a str"):
        calibrate("resnet20", [torch.randn(1, 3, 8, 8)])  # type: ignore[arg-type]


def test_an_auxiliary_head_is_named_with_its_cure() -> None:
    """torchvision's GoogLeNet has two, which only training uses."""
    images = [torch.randn(1, 3, 64, 64)]
    model = torchvision.models.googlenet(num_classes=4, init_weights=False).eval()
    quantize_(model)
    with pytest.raises(
        CalibrationError, match=r"does not reach aux1, aux2\. .*None.*exclude=\['aux1\*', 'aux2\*'\]"
    ):
        calibrate(model, images, progress=False)
    model.aux1 = model.aux2 = None
    calibrate(model, images, progress=False)
    model = torchvision.models.googlenet(num_classes=4, init_weights=False).eval()
    quantize_(model, exclude=["aux1*", "aux2*"])
    calibrate(model, images, progress=False)
