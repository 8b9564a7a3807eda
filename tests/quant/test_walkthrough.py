"""The retired toolkit's documentation, as its readers typed it: only the imports have changed.

Every step of the user guide and of the ResNet tutorial, at small sizes; docs/migration.md has the lines.
"""

import io

import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import qzoo.quant
from qzoo.quant import calib, quant_modules, tensor_quant
from qzoo.quant import nn as quant_nn
from qzoo.quant.nn.modules import _utils as quant_nn_utils
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer
from qzoo.quant.tensor_quant import QuantDescriptor


@pytest.fixture(autouse=True)
def _defaults_again():
    """The walk-through changes class defaults and torch.nn, as scripts do; put them back afterwards."""
    before = [(c, c.default_quant_desc_input) for c in (quant_nn.QuantConv2d, quant_nn.QuantLinear)]
    yield
    for cls, default in before:
        cls.default_quant_desc_input = default
    quant_modules.deactivate()
    quant_nn.TensorQuantizer.use_fb_fake_quant = False


def loader(batches=2):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(batches)
    ]


# Quantization function


def test_quantization_functions_give_the_documented_values():
    torch.manual_seed(12345)
    x = torch.rand(10)
    fake_quant_x = tensor_quant.fake_tensor_quant(x, x.abs().max())
    quant_x, scale = tensor_quant.tensor_quant(x, x.abs().max())
    assert [round(v, 4) for v in fake_quant_x.tolist()] == [
        0.9843, 0.8828, 0.9921, 0.4609, 0.0859, 0.1797, 0.3672, 0.5703, 0.3359, 0.2109,
    ]  # fmt: skip
    assert quant_x.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
    assert round(scale.item(), 4) == 128.0057


# Descriptor and quantizer


def test_a_four_bit_unsigned_quantizer():
    quant_desc = QuantDescriptor(num_bits=4, fake_quant=False, axis=(0), unsigned=True)
    quantizer = TensorQuantizer(quant_desc)
    torch.manual_seed(12345)
    x = torch.rand(10, 9, 8, 7)
    quant_x = quantizer(x)
    assert quant_x.unique().tolist() == list(range(16))
    assert quantizer.scale.shape == (10, 1, 1, 1)
    assert torch.equal(quant_x, (x * (15 / x.amax((1, 2, 3), keepdim=True))).round())


# Quantized module


def test_quantized_modules_take_the_place_of_float_ones():
    quant_fc1 = quant_nn.Linear(
        8,
        4,
        bias=True,
        quant_desc_input=tensor_quant.QUANT_DESC_8BIT_PER_TENSOR,
        quant_desc_weight=tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW,
    )
    quant_conv1 = quant_nn.Conv2d(
        3,
        8,
        3,
        quant_desc_input=tensor_quant.QUANT_DESC_8BIT_PER_TENSOR,
        quant_desc_weight=tensor_quant.QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    )
    y = quant_fc1(quant_conv1(torch.randn(2, 3, 5, 5)).mean((2, 3)))
    assert y.shape == (2, 4)


# Post-training quantization


def test_calibration_by_hand():
    quant_modules.initialize()
    model = torchvision.models.resnet18(num_classes=4)
    model.eval()
    for name, module in model.named_modules():
        if name.endswith("_quantizer"):
            module.enable_calib()
            module.disable_quant()
    with torch.no_grad():
        model(loader()[0][0])
    for name, module in model.named_modules():
        if name.endswith("_quantizer"):
            module.load_calib_amax()
            module.disable_calib()
            module.enable_quant()
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    # 20 convolutions and the classifier have two each, the average pool has one.
    assert len(quantizers) == 43
    assert all(q.amax is not None and (q.amax > 0).all() for q in quantizers)


def collect_stats(model, data_loader, num_batches):
    """Feed data to the network and collect statistics."""
    for _, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.disable_quant()
                module.enable_calib()
            else:
                module.disable()
    for i, (image, _) in enumerate(data_loader):
        model(image)
        if i >= num_batches:
            break
    for _, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.enable_quant()
                module.disable_calib()
            else:
                module.enable()


def compute_amax(model, **kwargs):
    """Load the calibration result."""
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                if isinstance(module._calibrator, calib.MaxCalibrator):
                    module.load_calib_amax()
                else:
                    module.load_calib_amax(**kwargs)
            print(f"{name:40}: {module}")


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def test_the_resnet_tutorial(capsys, tmp_path):
    quant_desc_input = QuantDescriptor(calib_method="histogram")
    quant_nn.QuantConv2d.set_default_quant_desc_input(quant_desc_input)
    quant_nn.QuantLinear.set_default_quant_desc_input(quant_desc_input)
    quant_modules.initialize()
    model = small_net()
    with torch.no_grad():
        collect_stats(model, loader(), num_batches=2)
        ranges = {}
        for options in (
            {"method": "percentile", "percentile": 99.99},
            {"method": "mse"},
            {"method": "entropy"},
        ):
            compute_amax(model, **options)
            ranges[options["method"]] = model[0].input_quantizer.amax.item()
    assert isinstance(model[0].input_quantizer._calibrator, calib.HistogramCalibrator)
    largest = max(image.abs().max().item() for image, _ in loader())
    assert all(0 < r <= largest for r in ranges.values())
    printed = capsys.readouterr().out
    assert "0._input_quantizer" in printed
    assert "TensorQuantizer(8bit fake per-tensor amax=" in printed
    assert "calibrator=HistogramCalibrator scale=1.0 quant)" in printed
    # Save it, and load it into a fresh model.
    torch.save(model.state_dict(), tmp_path / "calibrated.pth")
    fresh = small_net()
    fresh.load_state_dict(torch.load(tmp_path / "calibrated.pth"))
    x = loader()[0][0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))


# Quantization-aware training


def test_fine_tuning_with_sgd():
    quant_modules.initialize()
    model = small_net()
    with torch.no_grad():
        collect_stats(model, loader(), num_batches=2)
    compute_amax(model)
    ranges = [m.amax.clone() for m in model.modules() if isinstance(m, TensorQuantizer)]
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    image, target = loader()[0]
    for _ in range(40):
        optimizer.zero_grad()
        loss = criterion(model(image), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    now = [m.amax for m in model.modules() if isinstance(m, TensorQuantizer)]
    assert all(torch.equal(a, b) for a, b in zip(ranges, now, strict=True))


# Modules of one's own


def test_a_custom_max_pool_on_the_input_mixin():
    class QuantMaxPool2d(nn.MaxPool2d, quant_nn_utils.QuantInputMixin):
        default_quant_desc_input = tensor_quant.QUANT_DESC_8BIT_PER_TENSOR

        def __init__(
            self,
            kernel_size,
            stride=None,
            padding=0,
            dilation=1,
            return_indices=False,
            ceil_mode=False,
            **kwargs,
        ):
            super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
            quant_desc_input = quant_nn_utils.pop_quant_desc_in_kwargs(
                self.__class__, input_only=True, **kwargs
            )
            self.init_quantizer(quant_desc_input)

        def forward(self, input):
            return super().forward(self._input_quantizer(input))

    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(QuantMaxPool2d(2)(x), quant_nn.QuantMaxPool2d(2)(x))


def test_a_custom_linear_on_the_mixin():
    class QuantLinear(nn.Linear, quant_nn_utils.QuantMixin):
        default_quant_desc_input = tensor_quant.QUANT_DESC_8BIT_PER_TENSOR
        default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

        def __init__(self, in_features, out_features, bias=True, **kwargs):
            super().__init__(in_features, out_features, bias)
            quant_desc_input, quant_desc_weight = quant_nn_utils.pop_quant_desc_in_kwargs(
                self.__class__, **kwargs
            )
            self.init_quantizer(quant_desc_input, quant_desc_weight)

        def forward(self, input):
            quant_input = self._input_quantizer(input)
            quant_weight = self._weight_quantizer(self.weight)
            return F.linear(quant_input, quant_weight, bias=self.bias)

    torch.manual_seed(0)
    mine = QuantLinear(5, 3)
    torch.manual_seed(0)
    theirs = quant_nn.QuantLinear(5, 3)
    x = torch.randn(2, 5)
    assert torch.equal(mine(x), theirs(x))


def test_a_quantizer_on_the_input_of_an_operation():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = quant_nn.QuantConv2d(4, 4, 3, padding=1)
            self.residual_quantizer = quant_nn.TensorQuantizer(quant_nn.QuantConv2d.default_quant_desc_input)

        def forward(self, x):
            return self.conv(x) + self.residual_quantizer(x)

    block = Block()
    x = torch.randn(1, 4, 6, 6)
    quantized = tensor_quant.fake_tensor_quant(x, x.abs().max(), 8, False, False)
    assert torch.equal(block(x), block.conv(x) + quantized)


# ONNX


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("old", [True, False], ids=["use_fb_fake_quant", "enable_onnx_export"])
def test_export_to_onnx(old):
    quant_modules.initialize()
    model = small_net()
    with torch.no_grad():
        collect_stats(model, loader(), num_batches=2)
    compute_amax(model)
    model.eval()
    dummy_input = torch.randn(4, 3, 32, 32)
    file = io.BytesIO()
    arguments = {"opset_version": 18, "input_names": ["actual_input_1"], "output_names": ["output1"]}
    if old:
        quant_nn.TensorQuantizer.use_fb_fake_quant = True
        torch.onnx.export(model, (dummy_input,), file, **arguments)
    else:
        with qzoo.quant.enable_onnx_export():
            torch.onnx.export(model, (dummy_input,), file, **arguments)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert sum(n.op_type == "QuantizeLinear" for n in graph.node) == 5
    assert [i.name for i in graph.input] == ["actual_input_1"]
