"""Names, arguments and defaults that scripts of the old toolkit rely on."""

import importlib
import inspect

import pytest
import torch

import qzoo.quant as P
from qzoo.quant.tensor_quant import QuantDescriptor

CONV = "in_channels out_channels kernel_size stride=1 padding=0 dilation=1 groups=1 bias=True padding_mode='zeros'"
TRANSPOSED = (
    "in_channels out_channels kernel_size stride=1 padding=0 output_padding=0 groups=1 bias=True dilation=1 "
    "padding_mode='zeros'"
)
QUANT = "inputs amax num_bits=8 unsigned=False narrow_range=True"
SIGNATURES = {
    "tensor_quant.QuantDescriptor": "num_bits=8 name=None * fake_quant=True axis=None amax=None learn_amax=False "
    "scale_amax=None calib_method='max' unsigned=False narrow_range=False",
    "tensor_quant.TensorQuantFunction.forward": f"ctx {QUANT}",
    "tensor_quant.FakeTensorQuantFunction.forward": f"ctx {QUANT}",
    "tensor_quant.LegacyFakeTensorQuantFunction.forward": f"ctx {QUANT}",
    "tensor_quant.FakeAffineTensorQuantFunction.forward": "ctx inputs min_range max_range num_bits=8",
    "tensor_quant.ScaledE4M3Function.forward": "ctx inputs amax=None E=4 M=3",
    "nn.modules.tensor_quantizer.TensorQuantizer": "quant_desc=QuantDescriptor(8bit fake axis= per-tensor) "
    "disabled=False if_quant=True if_clip=False if_calib=False",
    "nn.TensorQuantizer.load_calib_amax": "self *args strict=True",
    "nn.functional.ClipFunction.forward": "ctx input clip_value_min clip_value_max",
    "nn.modules.clip.Clip": "clip_value_min clip_value_max learn_min=False learn_max=False",
    **{f"nn.modules.quant_conv.QuantConv{n}d": CONV for n in (1, 2, 3)},
    **{f"nn.modules.quant_conv.QuantConvTranspose{n}d": TRANSPOSED for n in (1, 2, 3)},
    "nn.QuantConvTranspose2d.forward": "self input output_size=None",
    "nn.modules.quant_linear.QuantLinear": "in_features out_features bias=True",
    **{
        f"nn.modules.quant_pooling.QuantMaxPool{n}d": "kernel_size stride=None padding=0 dilation=1 "
        "return_indices=False ceil_mode=False"
        for n in (1, 2, 3)
    },
    "nn.QuantAvgPool1d": "kernel_size stride=None padding=0 ceil_mode=False count_include_pad=True",
    **{
        f"nn.QuantAvgPool{n}d": "kernel_size stride=None padding=0 ceil_mode=False count_include_pad=True "
        "divisor_override=None"
        for n in (2, 3)
    },
    **{f"nn.QuantAdaptiveAvgPool{n}d": "output_size" for n in (1, 2, 3)},
    **{
        f"nn.modules.quant_instancenorm.QuantInstanceNorm{n}d": "num_features eps=1e-05 momentum=0.1 "
        "affine=False track_running_stats=False"
        for n in (1, 2, 3)
    },
    "nn.modules.quant_rnn.QuantLSTM": "input_size hidden_size num_layers=1 bias=True batch_first=False dropout=0 "
    "bidirectional=False proj_size=0",
    "nn.modules.quant_rnn.QuantLSTMCell": "input_size hidden_size bias=True",
    "nn.modules._utils.QuantMixin.init_quantizer": "self quant_desc_input quant_desc_weight num_layers=None",
    "nn.modules._utils.QuantInputMixin.init_quantizer": "self quant_desc_input",
    "nn.modules._utils.pop_quant_desc_in_kwargs": "quant_cls input_only=False",
    "calib.calibrator._Calibrator": "num_bits axis unsigned",
    "calib.max.MaxCalibrator": "num_bits axis unsigned track_amax=False",
    "calib.histogram.HistogramCalibrator": "num_bits axis unsigned num_bins=2048 grow_method=None "
    "skip_zeros=False torch_hist=True",
    "calib.HistogramCalibrator.compute_amax": "self method * stride=1 start_bin=128 percentile=99.99",
    "calib.calibrate_weights": "model method='percentile' perchannel=True percentile=99.99 num_bins=2048",
    "quant_modules.initialize": "float_module_list=None custom_quant_modules=None",
    "quant_modules.deactivate": "",
    "quant_modules.enable_onnx_export": "",
    "quant_modules.QuantModuleReplacementHelper": "",
    "quant_modules.QuantModuleReplacementHelper.prepare_state": "self float_module_list=None custom_map=None",
    "optim.helper.match_parameters": "model patterns",
    "optim.helper.group_parameters": "model patterns_list lrs=None momentums=None weight_decays=None",
    "optim.helper.freeze_parameters": "model patterns",
    "optim.helper.quant_weight_inplace": "model",
    "utils.reduce_amax": "input axis=None keepdims=True",
    "utils.quant_logging.reset_logger_handler": "",
    "cuda_ext.fake_tensor_quant": QUANT,
    "cuda_ext.fake_tensor_quant_": QUANT,
    "cuda_ext.fake_tensor_quant_with_axis": "inputs amax axis num_bits=8 unsigned=False narrow_range=True",
    "cuda_ext.fake_e4m3fy": "inputs",
}


def find(path):
    """The object at a dotted path below `qzoo.quant`; names win over submodules."""
    found, place = P, "qzoo.quant"
    for name in path.split("."):
        place = f"{place}.{name}"
        found = getattr(found, name) if hasattr(found, name) else importlib.import_module(place)
    return found


def arguments(function):
    """`name`, `name=default`, `*` before keywords alone; `**kwargs` left out."""
    words, keyword_only = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            continue
        if p.kind is p.VAR_POSITIONAL:
            keyword_only = True
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        star = "*" if p.kind is p.VAR_POSITIONAL else ""
        words.append(f"{star}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}"))
    return words


@pytest.mark.parametrize("path", SIGNATURES)
def test_arguments_and_defaults(path):
    found = [word for text in arguments(find(path)) for word in text.split()]
    wanted = SIGNATURES[path].split()
    assert found[: len(wanted)] == wanted  # what was added comes after


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("tensor_quant", "tensor_quant fake_tensor_quant legacy_fake_tensor_quant fake_affine_tensor_quant"),
        ("tensor_quant", "scaled_e4m3 ScaledQuantDescriptor QUANT_DESC_8BIT_PER_TENSOR"),
        ("tensor_quant", "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW"),
        ("nn.modules.quant_conv", "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d"),
        ("nn.modules.quant_conv", "_QuantConvNd _ConvNd _QuantConvTransposeNd"),
        ("nn.modules.quant_linear", "Linear"),
        ("nn.modules.quant_pooling", "MaxPool2d AvgPool2d AdaptiveAvgPool2d"),
        (
            "nn.modules.quant_rnn",
            "LSTM LSTMCell QuantRNNBase QuantRNN GRU QuantRNNCellBase QuantRNNCell GRUCell",
        ),
        ("nn._functions.quant_rnn", "LSTMCell RNN"),
        ("nn.modules._utils", "QuantMixin QuantInputMixin pop_quant_desc_in_kwargs"),
        ("nn", "TensorQuantizer Clip QuantConv2d Conv2d QuantInstanceNorm1d modules functional"),
        ("quant_modules", "initialize deactivate enable_onnx_export QuantModuleReplacementHelper"),
    ],
)
def test_names(module, names):
    found = importlib.import_module(f"qzoo.quant.{module}")
    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_replaced_classes_of_torch():
    names = {e.mod_name for e in P.quant_modules.QuantModuleReplacementHelper().default_quant_map}
    convolutions = {
        f"{kind}{n}d" for kind in ("Conv", "ConvTranspose", "AvgPool", "AdaptiveAvgPool") for n in (1, 2, 3)
    }
    assert names == convolutions | {"Linear", "LSTM", "LSTMCell"}


def test_bases_of_the_quantized_layers():
    nn = torch.nn
    assert issubclass(P.nn.QuantLinear, nn.Linear)
    assert issubclass(P.nn.QuantConv2d, nn.modules.conv._ConvNd)
    assert not issubclass(P.nn.QuantConv2d, nn.Conv2d)
    assert issubclass(P.nn.QuantConvTranspose2d, nn.modules.conv._ConvTransposeNd)
    assert issubclass(P.nn.QuantMaxPool2d, nn.MaxPool2d)
    assert issubclass(P.nn.QuantInstanceNorm2d, nn.InstanceNorm2d)
    assert not issubclass(P.nn.QuantLSTM, nn.LSTM)


def test_default_descriptors():
    for layer in (P.nn.QuantConv1d, P.nn.QuantConv3d, P.nn.QuantLinear, P.nn.QuantLSTM, P.nn.QuantLSTMCell):
        assert layer.default_quant_desc_weight == QuantDescriptor(8, axis=0)
    assert P.nn.QuantConvTranspose2d.default_quant_desc_weight == QuantDescriptor(8, axis=1)
    for layer in (P.nn.QuantConv2d, P.nn.QuantAvgPool2d, P.nn.QuantInstanceNorm1d, P.nn.QuantLSTM):
        assert layer.default_quant_desc_input == QuantDescriptor(8)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: QuantDescriptor(8, foo=1), TypeError, "Unused keys"),
        (lambda: QuantDescriptor(amax=1), TypeError, "amax must be float, list or ndarray"),
        (lambda: QuantDescriptor(axis=0, learn_amax=True), TypeError, "axis is ignored and must be None"),
        (lambda: P.tensor_quant.fake_tensor_quant(torch.ones(2), torch.tensor(-1.0)), ValueError,
         "Negative values in amax"),
        (lambda: P.tensor_quant.fake_tensor_quant(-torch.ones(2), torch.tensor(1.0), 8, True), TypeError,
         "Negative values encountered in unsigned quantization"),
        (lambda: P.tensor_quant.tensor_quant(torch.ones(2).half(), torch.tensor(1e-4)), ValueError,
         "scale is too large for FP16"),
        (lambda: P.nn.TensorQuantizer().enable_clip(), ValueError, "learn_amax is False. Cannot enable clip."),
        (lambda: P.nn.TensorQuantizer().load_calib_amax(), RuntimeError, "Calibrator returned None"),
        (lambda: setattr(P.nn.TensorQuantizer(QuantDescriptor(amax=1.0)), "amax", [1.0, 2.0]), RuntimeError,
         "Changing shape when setting amax is not allowed."),
        (lambda: P.calib.HistogramCalibrator(8, None, False).compute_amax("x"), TypeError,
         "Unknown calibration method"),
        (lambda: P.nn.QuantLinear(2, 2, quant_desc_input=QuantDescriptor(fake_quant=False)), ValueError,
         "Only fake quantization is supported"),
        (lambda: P.optim.helper.group_parameters(None, ["a"]), TypeError, "must be list of list of patterns"),
        (lambda: P.optim.helper.group_parameters(None, [["a"]], lrs=[1, 2]), TypeError, "must match"),
        (lambda: P.nn.Clip(torch.tensor(0.0), 1.0, learn_min=True), ValueError, "must be scalar"),
        (lambda: P.nn.QuantConv2d(1, 1, 1, foo=2), TypeError, "Unused keys"),
    ],
)  # fmt: skip
def test_errors_say_what_scripts_look_for(act, error, words):
    with pytest.raises(error) as caught:
        act()
    assert words in str(caught.value)
