"""What the retired toolkit got wrong: one test for each defect, in the order of the compatibility contract.

The number in a name is the item of the contract's list.
"""

import logging
import subprocess
import sys

import numpy as np
import pytest
import quant_oracle as oracle
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import qzoo.quant as P
from qzoo.quant import calib, quant_modules, tensor_quant
from qzoo.quant import nn as qnn
from qzoo.quant.optim import helper
from qzoo.quant.tensor_quant import QuantDescriptor


def histogram(*batches, bits=8, **kwargs):
    calibrator = calib.HistogramCalibrator(bits, None, False, **kwargs)
    for batch in batches:
        calibrator.collect(batch)
    return calibrator


@pytest.fixture
def _float_modules_again():
    yield
    quant_modules.deactivate()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_01_half_precision_is_computed_in_float32(dtype):
    x = (torch.linspace(-1, 1, 101) * 1e-3).to(dtype)
    y = tensor_quant.fake_tensor_quant(x, torch.tensor(1e-3, dtype=dtype), 8)
    amax = torch.tensor(1e-3, dtype=dtype).float().numpy()
    expected = torch.from_numpy(oracle.fake_quantize(x.float().numpy(), amax)).to(dtype)
    assert torch.equal(y, expected)
    assert y.any()
    conv = qnn.QuantConv2d(3, 4, 3).to(dtype)
    assert conv(torch.randn(1, 3, 5, 5).to(dtype)).dtype == dtype


def test_02_a_calibrated_checkpoint_loads_without_a_gpu():
    source = qnn.QuantLinear(3, 4)
    source.input_quantizer.amax = 1.5
    target = qnn.QuantLinear(3, 4)
    target.load_state_dict(source.state_dict())
    assert target.input_quantizer.amax.device.type == "cpu"


def test_03_mse_runs_where_the_histogram_is():
    assert histogram(torch.rand(1000)).compute_amax("mse").device.type == "cpu"
    layer = qnn.QuantLinear(3, 4)
    calib.calibrate_weights(layer, "mse")
    assert layer.weight_quantizer.amax.device.type == "cpu"


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_04_searches_do_not_loop_over_their_candidates(method):
    calibrator = histogram(torch.randn(100_000).abs())
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        calibrator.compute_amax(method)
    finally:
        sys.setprofile(None)
    assert 0 < calls < 1000, "a loop makes one call at least for each of more than 1,900 candidates"


def test_05_collecting_after_load_leaves_the_range_alone():
    quantizer = qnn.TensorQuantizer(if_calib=True)
    quantizer(torch.ones(3))
    quantizer.load_calib_amax()
    quantizer(torch.full((3,), 7.0))
    assert quantizer.amax.item() == 1.0


def test_06_tracked_maxima_are_copies_and_reset_clears_them():
    calibrator = calib.MaxCalibrator(8, None, False, track_amax=True)
    calibrator.collect(torch.ones(2))
    calibrator.collect(torch.full((2,), 3.0))
    assert [a.item() for a in calibrator.amaxs] == [1.0, 3.0]
    calibrator.reset()
    assert calibrator.amaxs == []
    assert calib.MaxCalibrator(8, None, False).amaxs == []


def test_07_counts_are_exact_beyond_2_to_the_24():
    calibrator = histogram(torch.tensor([0.0, 1.0]), num_bins=4)
    batch = torch.zeros(1_000_000)
    for _ in range(20):
        calibrator.collect(batch)
    calibrator.collect(torch.zeros(1))
    assert calibrator._calib_hist[0].item() == 20_000_002
    assert calibrator._calib_hist.dtype == torch.int64


@pytest.mark.parametrize("torch_hist", [True, False])
def test_08_entropy_leaves_the_histogram_alone(torch_hist):
    calibrator = histogram(torch.rand(1000), torch_hist=torch_hist)
    before = np.asarray(calibrator._calib_hist).copy()
    first = calibrator.compute_amax("percentile", percentile=50)
    calibrator.compute_amax("entropy")
    np.testing.assert_array_equal(np.asarray(calibrator._calib_hist), before)
    assert calibrator.compute_amax("percentile", percentile=50) == first


def test_09_torch_and_numpy_histograms_agree():
    for seed in range(30):
        batches = [torch.randn(500, generator=torch.Generator().manual_seed(seed + i)) + 3 for i in (0, 100)]
        a, b = histogram(*batches), histogram(*batches, torch_hist=False)
        np.testing.assert_array_equal(a._calib_hist.numpy(), b._calib_hist)
        np.testing.assert_array_equal(a._calib_bin_edges.numpy(), b._calib_bin_edges)
        assert b._calib_bin_edges[0] == 0


METHODS = ["percentile", "mse", "entropy", "max"]


@pytest.mark.parametrize("method", METHODS)
def test_10a_zeros_first_then_data(method):
    data = torch.rand(1000)
    calibrator = histogram(torch.zeros(50), data)
    assert calibrator._calib_hist.sum() == 1050
    assert 0 < calibrator.compute_amax(method) <= data.max()


@pytest.mark.parametrize("method", METHODS)
def test_10b_nothing_but_zeros(method):
    assert histogram(torch.zeros(50)).compute_amax(method).item() == 0
    skipped = histogram(torch.zeros(50), skip_zeros=True)
    assert skipped.compute_amax(method) is None
    skipped.collect(torch.tensor([0.0, 2.0]))
    assert skipped._calib_hist.sum() == 1


def test_10c_empty_batches_change_nothing():
    calibrator = histogram(torch.empty(0), torch.ones(3), torch.empty(0, 4))
    assert calibrator._calib_hist.sum() == 3


@pytest.mark.parametrize("method", METHODS)
def test_10d_fewer_bins_than_start_bin(method):
    found = histogram(torch.rand(100), num_bins=16).compute_amax(method)
    assert 0 < found <= 1


def test_10e_a_tiny_first_batch_does_not_grow_bins_without_limit():
    calibrator = histogram(torch.tensor([1e-3]), torch.rand(1000) * 1000)
    assert len(calibrator._calib_hist) <= 2**16
    assert calibrator._calib_hist.sum() == 1001
    assert calibrator.compute_amax("percentile", percentile=50).item() == pytest.approx(500, rel=0.1)


def test_10f_entropy_of_a_floating_point_format_says_so():
    with pytest.raises(TypeError, match="floating point"):
        histogram(torch.rand(10), bits=(4, 3)).compute_amax("entropy")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_10g_nan_and_infinity_are_refused_and_not_counted(bad, first):
    calibrator = histogram() if first else histogram(torch.ones(2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        calibrator.collect(torch.tensor([1.0, bad]))
    assert first or calibrator._calib_hist.sum() == 2


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": "valid"}])
def test_11a_padding_by_name(options):
    x = torch.randn(1, 3, 6, 6)
    assert qnn.QuantConv2d(3, 4, 3, **options)(x).shape == nn.Conv2d(3, 4, 3, **options)(x).shape


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_11b_padding_modes_equal_torch(mode):
    torch.manual_seed(0)
    ours = qnn.QuantConv2d(3, 4, 3, padding=1, padding_mode=mode)
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    ours.input_quantizer.disable()
    ours.weight_quantizer.disable()
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda kw: qnn.QuantConv2d(3, 4, 3, **kw),
        lambda kw: qnn.QuantConvTranspose1d(3, 4, 3, **kw),
        lambda kw: qnn.QuantLinear(3, 4, **kw),
        lambda kw: qnn.QuantLSTM(3, 4, **kw),
        lambda kw: qnn.QuantLSTMCell(3, 4, **kw),
        lambda kw: qnn.QuantInstanceNorm2d(3, affine=True, **kw),
    ],
)
def test_12a_device_and_dtype_are_accepted(build):
    parameters = list(build({"device": "meta", "dtype": torch.float64}).parameters())
    assert parameters
    assert all(p.is_meta and p.dtype == torch.float64 for p in parameters)


@pytest.mark.usefixtures("_float_modules_again")
def test_12b_a_timm_model_can_be_built_under_initialize():
    timm = pytest.importorskip("timm")
    P.initialize()
    model = timm.create_model("resnet10t", num_classes=3).eval()
    assert sum(isinstance(m, qnn.QuantConv2d) for m in model.modules()) > 5
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_13_transposed_output_size_counts_dilation():
    x = torch.randn(1, 2, 4, 4)
    plain = nn.ConvTranspose2d(2, 3, 3, stride=2, dilation=2)
    size = [n + 1 for n in plain(x).shape[2:]]
    assert qnn.QuantConvTranspose2d(2, 3, 3, stride=2, dilation=2)(x, size).shape == plain(x, size).shape


def test_14_transposed_groups_share_ranges_and_the_class_says_so():
    layer = qnn.QuantConvTranspose2d(4, 6, 3, groups=2)
    calib.calibrate_weights(layer, "max")
    assert layer.weight_quantizer.amax.shape == (1, 3, 1, 1)
    assert "groups" in type(layer).__mro__[1].__doc__


def test_15a_lstm_weights_are_quantized_once_a_call():
    layer = qnn.QuantLSTM(3, 4)
    calls = []
    layer._weight_quantizers[0].register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(7, 1, 3))
    assert len(calls) == 1


def test_15b_lstm_keeps_the_order_of_unsorted_sequences():
    torch.manual_seed(0)
    ours = qnn.QuantLSTM(3, 4)
    torch.manual_seed(0)
    plain = nn.LSTM(3, 4)
    for q in [*ours._input_quantizers, *ours._weight_quantizers]:
        q.disable()
    packed = pack_padded_sequence(torch.randn(4, 3, 3), [2, 4, 1], enforce_sorted=False)
    (a, (h, c)), (b, (k, d)) = ours(packed), plain(packed)
    torch.testing.assert_close(a.data, b.data, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((h, c), (k, d), rtol=1e-5, atol=1e-6)
    assert torch.equal(a.unsorted_indices, b.unsorted_indices)


def test_15c_lstm_takes_unbatched_input():
    output, (h, _) = qnn.QuantLSTM(3, 4)(torch.randn(5, 3))
    assert (output.shape, h.shape) == ((5, 4), (1, 4))


def test_15d_lstm_weights_take_part_in_calibration_and_quantization_in_place():
    model = nn.ModuleList([qnn.QuantLSTM(3, 4), qnn.QuantLSTMCell(3, 4)])
    calib.calibrate_weights(model, "max")
    assert model[0]._weight_quantizers[0].amax.shape == (16, 1)
    assert model[1].weight_quantizer.amax.shape == (16, 1)
    before = [p.detach().clone() for p in model.parameters()]
    helper.quant_weight_inplace(model)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [True, True, False, False] * 2
    assert model[0].input_quantizer is model[0]._input_quantizers


def test_16_rnn_and_gru_run():
    x = torch.randn(5, 2, 3)
    assert qnn.QuantGRU(3, 4)(x)[0].shape == (5, 2, 4)
    assert qnn.QuantRNN(3, 4)(x)[0].shape == (5, 2, 4)


@pytest.mark.usefixtures("_float_modules_again")
def test_17_initialize_and_deactivate_are_idempotent():
    original = nn.Linear
    P.initialize()
    P.initialize()
    second = quant_modules.QuantModuleReplacementHelper()
    second.prepare_state()
    second.apply_quant_modules()
    P.deactivate()
    second.restore_float_modules()
    P.deactivate()
    assert nn.Linear is original


@pytest.mark.usefixtures("_float_modules_again")
def test_18_initialize_starts_afresh():
    original = nn.Linear
    P.initialize(custom_quant_modules=[(nn, "MaxPool2d", qnn.QuantMaxPool2d)])
    P.deactivate()
    P.initialize(float_module_list=["Linear"])
    assert nn.Linear is original
    assert nn.Conv2d is qnn.QuantConv2d
    assert nn.MaxPool2d is not qnn.QuantMaxPool2d


def test_19_the_export_switch_is_reset_and_nests():
    with pytest.raises(KeyError), P.enable_onnx_export(), P.enable_onnx_export():
        raise KeyError
    assert not qnn.TensorQuantizer._enable_onnx_export


def test_20_a_disabled_uncalibrated_quantizer_does_not_block_the_export():
    x = torch.ones(2)
    with P.enable_onnx_export():
        assert qnn.TensorQuantizer(disabled=True)(x) is x
        with pytest.raises(AssertionError, match="Quantizer has not been calibrated"):
            qnn.TensorQuantizer()(x)


@pytest.mark.filterwarnings("ignore")
def test_21_an_uncalibrated_quantizer_is_refused_outside_the_context_manager_too(tmp_path):
    with pytest.raises(AssertionError, match="Quantizer has not been calibrated"):
        torch.onnx.export(qnn.QuantLinear(3, 4), (torch.ones(1, 3),), tmp_path / "m.onnx", dynamo=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, (4, 3)])
def test_22a_traced_without_looking_at_values(bits):
    desc = QuantDescriptor(bits, amax=1.0)
    layer = qnn.QuantConv2d(3, 4, 3, quant_desc_input=desc, quant_desc_weight=desc)
    x = torch.randn(1, 3, 5, 5)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.filterwarnings("ignore")
def test_22b_per_channel_below_opset_13_is_refused(tmp_path):
    layer = qnn.QuantLinear(3, 4, quant_desc_input=QuantDescriptor(amax=1.0))
    calib.calibrate_weights(layer, "max")
    with pytest.raises(Exception, match="opset 12 has no QuantizeLinear per channel"), P.enable_onnx_export():
        torch.onnx.export(layer, (torch.ones(1, 3),), tmp_path / "m.onnx", dynamo=False, opset_version=12)


@pytest.mark.parametrize(
    "desc",
    [
        tensor_quant.QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
        QuantDescriptor((4, 3)),
        QuantDescriptor(narrow_range=True, calib_method="histogram", amax=[1.0, 2.0], axis=(0, 2)),
    ],
    ids=str,
)
def test_23_descriptors_survive_being_written_down(desc):
    assert QuantDescriptor.from_yaml(desc.to_yaml()) == desc
    assert QuantDescriptor(**desc.dict()) == desc
    assert {desc: 1}[QuantDescriptor(**desc.dict())] == 1
    assert desc != 8
    assert desc != QuantDescriptor(3)


def test_24_unknown_calib_method_is_refused_in_the_descriptor():
    with pytest.raises(ValueError, match="calib_method"):
        QuantDescriptor(calib_method="percentile")


@pytest.mark.parametrize(("bits", "unsigned"), [(0, False), (0, True), (1, False)])
def test_25_formats_without_a_step_give_zeros(bits, unsigned, caplog):
    x = torch.tensor([0.3, 2.0])
    for function in (tensor_quant.fake_tensor_quant, lambda *a: tensor_quant.tensor_quant(*a)[0]):
        assert function(x, torch.tensor(1.0), bits, unsigned).tolist() == [0, 0]
    assert tensor_quant.fake_tensor_quant(x, torch.tensor(1.0), 1, True).tolist() == [0, 1]
    with caplog.at_level(logging.ERROR):
        assert qnn.TensorQuantizer(QuantDescriptor(0, amax=1.0))(x).tolist() == [0, 0]
    assert "num_bits is 0" in caplog.text


def test_26_importing_leaves_logging_alone():
    code = (
        "import logging; logging.basicConfig(level='INFO'); before = list(logging.root.handlers);"
        "import qzoo.quant as P;"
        "assert logging.root.handlers == before and logging.root.level == logging.INFO;"
        "P.nn.QuantLinear(2, 3, quant_desc_input=P.QuantDescriptor((4, 3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_27_negative_axis_of_a_dynamic_quantizer():
    x = torch.randn(2, 3, 4)
    for axis in (-1, (-1,), (0, -1)):
        positive = tuple(a % 3 for a in ((axis,) if isinstance(axis, int) else axis))
        a, b = (qnn.TensorQuantizer(QuantDescriptor(axis=x))(x_) for x, x_ in ((axis, x), (positive, x)))
        assert torch.equal(a, b)
        assert not torch.equal(a, qnn.TensorQuantizer()(x))


def test_28_narrow_range_and_the_axis_of_a_flat_range():
    x = torch.tensor([[-2.0, -2.0], [2.0, 2.0]])
    narrow = tensor_quant.fake_tensor_quant(x, torch.tensor(1.0), 8, False, True)
    full = tensor_quant.fake_tensor_quant(x, torch.tensor(1.0), 8, False, False)
    assert narrow[0, 0] == -1
    assert full[0, 0] == np.float32(-128) / np.float32(127)
    # The functions broadcast (last axis), on every device; a quantizer puts a flat range where its axis is.
    flat = torch.tensor([1.0, 2.0])
    assert tensor_quant.fake_tensor_quant(x, flat)[1].tolist() == [1, 2]
    assert qnn.TensorQuantizer(QuantDescriptor(axis=0, amax=[1.0, 2.0], narrow_range=True))(x).tolist() == [
        [-1, -1],
        [2, 2],
    ]


def test_29_an_amax_list_lies_along_the_axis():
    x = torch.full((2, 3, 3, 2), 5.0)
    quantizer = qnn.TensorQuantizer(QuantDescriptor(amax=[1.0, 2.0, 3.0], axis=1))
    assert quantizer.amax.shape == (3,)
    assert quantizer(x)[0, :, 0, 0].tolist() == [1, 2, 3]


def test_30_keepdims_false_squeezes_only_reduced_axes():
    x = torch.randn(1, 3, 4)
    assert P.utils.reduce_amax(x, 2, keepdims=False).shape == (1, 3)
    assert P.utils.reduce_amax(x, (1, 2), keepdims=True).shape == ()


def test_31_clip_with_fixed_bounds():
    x = torch.randn(2, 3, requires_grad=True)
    qnn.functional.clip(x, -torch.ones(3), torch.ones(3)).sum().backward()
    assert torch.equal(x.grad, (x.abs() < 1).float())
    assert qnn.Clip(-0.5, 0.5)(torch.tensor([-1.0, 1.0])).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("value", [np.float64(1.5), np.array([1, 2]), 1, [1, 2]])
def test_32_ranges_are_float32(value):
    quantizer = qnn.TensorQuantizer()
    quantizer.amax = value
    assert quantizer.amax.dtype == torch.float32
    assert quantizer.amax.tolist() == np.asarray(value, dtype=np.float32).tolist()


@pytest.mark.parametrize("method", ["max", "mse", "percentile"])
def test_33_calibrate_weights_takes_zeros_one_range_and_another_granularity(method):
    layer = qnn.QuantConv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    calib.calibrate_weights(layer, method)
    amax = layer.weight_quantizer.amax.flatten()
    assert amax[1] == 0
    assert (amax[[0, 2, 3]] > 0).all()
    calib.calibrate_weights(layer, method, perchannel=False, num_bins=16)
    coarse = layer.weight_quantizer.amax
    assert coarse.dim() == 0
    expected = histogram(layer.weight.detach(), num_bins=16)
    arguments = {"percentile": 99.99} if method == "percentile" else {}
    assert coarse == expected.compute_amax(method, **arguments)
    calib.calibrate_weights(layer, method)
    assert layer.weight_quantizer.amax.shape == (4, 1, 1, 1)
