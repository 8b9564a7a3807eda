"""Replacing classes of torch.nn, and quantizing existing models in place."""

import io
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import nn

from qzoo.errors import MissingRangeError
from qzoo.quant import TensorQuantizer, deactivate, enable_onnx_export, initialize, quant_modules, quantize_
from qzoo.quant import nn as qnn
from qzoo.quant.fold import fold_weight_standardization_
from qzoo.quant.nn.modules._utils import QuantInputMixin
from qzoo.quant.quant_modules import QuantModuleReplacementHelper
from qzoo.quant.tensor_quant import QuantDescriptor

NAMES = [entry.mod_name for entry in QuantModuleReplacementHelper().default_quant_map]
FLOAT = {name: getattr(nn, name) for name in NAMES}


@pytest.fixture(autouse=True)
def _nothing_leaks():
    yield
    deactivate()
    assert {name: getattr(nn, name) for name in NAMES} == FLOAT


def replaced():
    return {name for name in NAMES if getattr(nn, name) is not FLOAT[name]}


def test_initialize_and_deactivate():
    initialize()
    assert replaced() == set(NAMES)
    assert len(NAMES) == 15
    assert type(nn.Linear(2, 3)) is qnn.QuantLinear
    assert nn.MaxPool2d is torch.nn.modules.pooling.MaxPool2d
    deactivate()
    assert replaced() == set()


def test_float_list_and_custom_map():
    initialize(["Linear", "Conv2d"], [(nn, "Linear", qnn.QuantLinear), (nn, "MaxPool2d", qnn.QuantMaxPool2d)])
    assert replaced() == set(NAMES) - {"Conv2d"}
    assert nn.MaxPool2d is qnn.QuantMaxPool2d
    deactivate()
    assert nn.MaxPool2d is torch.nn.modules.pooling.MaxPool2d


def test_the_context_manager_restores_whatever_happens():
    seen = set()

    def fail():
        seen.update(replaced())
        raise KeyError

    with pytest.raises(KeyError), initialize():
        fail()
    assert seen == set(NAMES)
    assert not replaced()


def test_contexts_nest():
    with initialize(["Linear"]):
        with initialize(["Conv2d"]):
            assert "Conv2d" not in replaced()
            assert "Linear" in replaced()
        assert "Linear" not in replaced()
        assert "Conv2d" in replaced()
    assert not replaced()


def test_helpers_in_any_order():
    a, b = QuantModuleReplacementHelper(), QuantModuleReplacementHelper()
    a.prepare_state()
    b.prepare_state(["Linear"])
    a.apply_quant_modules()
    b.apply_quant_modules()
    assert {e.mod_name for e in a.orginal_func_map} == set(NAMES)
    assert all(e.replace_mod is FLOAT[e.mod_name] for e in b.orginal_func_map)
    a.restore_float_modules()
    b.restore_float_modules()
    assert not replaced()


def test_unknown_names_replace_nothing():
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        initialize(custom_quant_modules=[(nn, "NoSuchLayer", qnn.QuantLinear)])
    assert not replaced()


def test_entries_have_their_names():
    entry = QuantModuleReplacementHelper().default_quant_map[0]
    assert (entry.orig_mod, entry.mod_name, entry.replace_mod) == (nn, "Conv1d", qnn.QuantConv1d)


def test_a_torchvision_model_built_inside_is_quantized():
    with initialize():
        model = torchvision.models.resnet18(num_classes=3)
    assert sum(isinstance(m, qnn.QuantConv2d) for m in model.modules()) == 20
    assert list(model.state_dict()) == list(torchvision.models.resnet18(num_classes=3).state_dict())


# quantize_


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def test_in_place_keeps_parameters_names_and_values():
    model = net()
    x = torch.randn(2, 3, 6, 6)
    expected, parameters, state = model(x), list(model.parameters()), list(model.state_dict())
    assert quantize_(model) == ["0", "2", "4"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state
    assert type(model[0]) is qnn.QuantConv2d
    for m in model.modules():
        if isinstance(m, TensorQuantizer):
            m.disable()
    assert torch.equal(model(x), expected)
    assert quantize_(model) == []


def test_in_place_equals_building_under_initialize():
    model = net()
    quantize_(model)
    with initialize():
        other = net()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model(x), other(x))
    assert repr(model) == repr(other)


def test_include_exclude_and_descriptors():
    model = torchvision.models.resnet18(num_classes=3)
    names = quantize_(model, ["layer1.*", "fc"], "*.conv2", quant_desc_input=QuantDescriptor(6))
    assert names == ["fc", "layer1.0.conv1", "layer1.1.conv1"]
    assert model.fc.input_quantizer.num_bits == 6
    assert type(model.layer1[0].conv2) is nn.Conv2d


def test_hooks_mode_and_shared_layers_stay():
    layer = nn.Linear(3, 3)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    quantize_(model)
    assert model[0] is model[2]
    assert not model[0].training
    model(torch.randn(2, 3))
    assert len(calls) == 2
    assert not isinstance(layer, qnn.QuantLinear)


def test_recurrent_layers_in_place():
    for name, kwargs in (("LSTM", {"num_layers": 2}), ("GRU", {}), ("RNN", {"nonlinearity": "relu"})):
        model = nn.ModuleDict({"r": getattr(nn, name)(3, 4, bidirectional=True, **kwargs)})
        x = torch.randn(5, 2, 3)
        expected = model["r"](x)[0]
        weight = model["r"].weight_ih_l0
        assert quantize_(model) == ["r"]
        assert model["r"].weight_ih_l0 is weight
        for m in model.modules():
            if isinstance(m, TensorQuantizer):
                m.disable()
        torch.testing.assert_close(model["r"](x)[0], expected, rtol=1e-5, atol=1e-6)


def test_own_mapping_and_subclasses_that_are_left(caplog):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class QuantReLU(nn.ReLU, QuantInputMixin):
        def forward(self, x):
            return super().forward(self._input_quantizer(x))

    model = nn.Sequential(Doubled(3, 3), nn.ReLU())
    assert quantize_(model, mapping={nn.ReLU: QuantReLU}) == ["1"]
    assert type(model[0]) is Doubled
    assert "0 (Doubled)" in caplog.text
    assert model(torch.randn(2, 3)).shape == (2, 3)


def test_a_layer_itself_is_refused():
    with pytest.raises(ValueError, match="Sequential"):
        quantize_(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="proj_size"):
        quantize_(nn.ModuleList([nn.LSTM(3, 4, proj_size=2)]))


def test_quant_modules_names():
    for name in ("initialize", "deactivate", "enable_onnx_export", "QuantModuleReplacementHelper"):
        assert name in quant_modules.__all__


@pytest.mark.parametrize("size", [(7, 8), (9, 5)])
@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": (2, 3), "dilation": 2}, {"groups": 2}])
def test_timm_same_padding_in_place(options, size):
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.Conv2dSame(4, 6, (3, 5), **options))
    x = torch.randn(2, 4, *size)
    expected = model(x)
    assert quantize_(model) == ["0"]
    assert type(model[0]) is qnn.QuantConv2dSame
    model[0].input_quantizer.disable()
    model[0].weight_quantizer.disable()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
@pytest.mark.parametrize("options", [{"stride": 2, "bias": True}, {"groups": 2, "bias": False}])
def test_timm_weight_standardization_folds_to_the_bit(kind: str, options: dict, caplog):
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    layer = getattr(layers, kind)(4, 6, 3, **options)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": layer}).eval()
    x = torch.randn(2, 4, 9, 8)
    expected = layer(x)
    with caplog.at_level("WARNING"):
        assert quantize_(model) == []
    assert f"a.0 ({kind})" in caplog.text
    assert "fold_weight_standardization_" in caplog.text
    assert fold_weight_standardization_(model) == ["a.0", "b"]
    assert model["a"][0] is model["b"], "a layer that occurs twice stays one"
    assert torch.equal(model["b"](x), expected)
    assert set(quantize_(model)) == {"a.0", "b"}
    assert fold_weight_standardization_(model) == []
    if isinstance(getattr(layer, "gain", None), nn.Parameter):
        assert "a.0.gain" not in model.state_dict()


def test_timm_linear_in_place():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.Linear(4, 6))
    assert quantize_(model) == ["0"]
    x = torch.randn(2, 4)
    by_hand = qnn.QuantLinear(4, 6)
    by_hand.load_state_dict(model[0].state_dict())
    assert torch.equal(model(x), by_hand(x))


def test_timm_models_in_place():
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    names = quantize_(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    assert set(layers) | {"global_pool.pool"} == set(names)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("exclude", [(), "*self_attn*"], ids=["all", "linear layers"])
def test_the_fused_kernel_of_transformer_encoders_does_not_pass_quantizers_by(exclude):
    """torch's eval-mode kernel reads the weights of all layers of an encoder block itself."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    quantize_(encoder, exclude=exclude)
    quantizers = [m for m in encoder.modules() if isinstance(m, TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.enable_calib()
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        inside = encoder(x, src_key_padding_mask=padding)
    assert all(q._calibrator.compute_amax() is not None for q in quantizers)
    outside = encoder(x, src_key_padding_mask=padding)  # with gradients torch takes the plain path
    torch.testing.assert_close(inside[~padding], outside[~padding])


@pytest.fixture
def built() -> nn.Module:
    torch.manual_seed(0)
    with initialize():
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1)).eval()


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_the_first_example_of_the_old_guide_is_told_to_calibrate(
    built: nn.Module, dynamo: bool, inside: bool
):
    """Build under initialize() and export: also outside enable_onnx_export(), where torch asks twice."""
    if dynamo:
        pytest.importorskip("onnxscript")
    with (
        enable_onnx_export() if inside else nullcontext(),
        pytest.raises(
            Exception, match=r"has not been calibrated: quantizer '0\.0\._input_quantizer' has no amax"
        ),
    ):
        torch.onnx.export(built, (torch.randn(1, 3, 8, 8),), io.BytesIO(), dynamo=dynamo)


def test_quantizers_made_under_initialize_have_names_in_messages(built: nn.Module):
    quantizer = built[0][0].weight_quantizer
    with pytest.raises(RuntimeError, match="the weight quantizer of a QuantConv2d"):
        quantizer.load_calib_amax()
    quantizer.dynamic = False
    with pytest.raises(MissingRangeError, match=r"quantizer '0\.0\._weight_quantizer' has no range"):
        built(torch.randn(1, 3, 8, 8))
    with pytest.raises(MissingRangeError, match="weight quantizer of a QuantConv2d"):
        torch.compile(built, backend="eager")(torch.randn(1, 3, 8, 8))
