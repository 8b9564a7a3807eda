"""Quantizers with a range of two ends: state, switches, calibration, both ways to ONNX."""

from __future__ import annotations

import copy
import io
import logging

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError, MissingRangeError, NonFiniteError
from qzoo.quant import calib, enable_onnx_export, ops
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.onnx_translation import custom_translation_table
from qzoo.quant.tensor_quant import QuantDescriptor

METHODS = ("max", "percentile", "mse", "entropy")


def affine(bits: int = 8, **options: object) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(bits, affine=True, **options))  # type: ignore[arg-type]


def ranged(low: float = -0.25, high: float = 3.0, bits: int = 8) -> TensorQuantizer:
    quantizer = affine(bits)
    quantizer.set_range(torch.tensor(max(-low, high)), torch.tensor([low, high]))
    return quantizer


def silu(count: int = 20_000, seed: int = 0) -> Tensor:
    return nn.functional.silu(torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2)


# ---- descriptor ----


def test_descriptor_says_affine_and_survives_every_form() -> None:
    desc = QuantDescriptor(affine=True)
    assert desc.dict() == {"num_bits": 8, "name": None, "affine": True}
    assert (
        QuantDescriptor(**desc.dict())
        == desc
        == QuantDescriptor.from_yaml(desc.to_yaml())
        != QuantDescriptor()
    )
    assert "affine" in str(desc)
    assert "affine" not in QuantDescriptor().dict()


@pytest.mark.parametrize(
    "option",
    [
        {"axis": 0},
        {"block": (1, 2)},
        {"unsigned": True},
        {"narrow_range": True},
        {"amax": 1.0},
        {"learn_amax": True},
        {"scale_amax": 2.0},
        {"fake_quant": False},
        {"float_format": "e4m3"},
    ],
    ids=str,
)
def test_descriptor_refuses_what_has_no_zero_point(option: dict) -> None:
    with pytest.raises(TypeError, match=f"affine.*leave out {next(iter(option))}"):
        QuantDescriptor(affine=True, **option)


# ---- state ----


def test_state_holds_both_ranges_and_goes_round() -> None:
    quantizer = ranged()
    assert list(quantizer.state_dict()) == ["_amax", "_limits"]
    assert list(affine().state_dict()) == []
    other = affine()
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(silu()), quantizer(silu()))
    assert torch.equal(copy.deepcopy(quantizer)(silu()), quantizer(silu()))
    half = ranged(-0.2781, 3.0007).half()
    assert half.limits is not None
    assert half.limits.dtype == torch.float32
    assert half.limits.tolist() == torch.tensor([-0.2781, 3.0007]).tolist()
    assert affine().to("meta").load_state_dict(quantizer.state_dict(), assign=True)


def test_a_symmetric_state_loads_and_lacks_its_ends() -> None:
    old = TensorQuantizer(QuantDescriptor(amax=3.0))
    quantizer = affine()
    quantizer.load_state_dict(old.state_dict())
    for dynamic in (True, False):
        quantizer.dynamic = dynamic
        with pytest.raises(MissingRangeError, match="limits"):
            quantizer(silu())
    quantizer.affine = False
    assert torch.equal(quantizer(silu()), old(silu()))


def test_switch_between_the_two_ranges_is_lossless() -> None:
    x, quantizer = silu(), ranged()
    between = ops.fake_quantize_affine(x, torch.tensor([-0.25, 3.0]))
    symmetric = ops.fake_quantize(x, torch.tensor(3.0), narrow_range=False)
    for _ in range(2):
        quantizer.affine = True
        assert torch.equal(quantizer(x), between)
        assert (quantizer.maxbound, quantizer.zero_point) == (255, 20)
        assert quantizer.step_size is not None
        assert quantizer.step_size.item() == pytest.approx(3.25 / 255)
        quantizer.affine = False
        assert torch.equal(quantizer(x), symmetric)
        assert (quantizer.maxbound, quantizer.zero_point) == (127, 0)
    with pytest.raises(ArgumentError, match="one number"):
        TensorQuantizer().affine = True
    with pytest.raises(ArgumentError, match="one number"):
        TensorQuantizer().limits = [0.0, 1.0]


def test_setting_and_forgetting() -> None:
    quantizer = affine()
    quantizer.limits = np.array([-1.0, 2.0])
    assert quantizer.limits is not None
    assert quantizer.limits.tolist() == [-1.0, 2.0]
    with pytest.raises(ArgumentError, match=r"\[low, high\]"):
        quantizer.limits = 3.0
    quantizer.limits = [2.0, -1.0]
    with pytest.raises(ArgumentError, match="wrong way round"):
        quantizer(silu())
    quantizer.set_range(torch.tensor(2.0))
    assert quantizer.limits is None  # of another range
    quantizer.set_range(torch.tensor(2.0), torch.tensor([-1.0, 2.0]))
    assert quantizer.range is not None
    assert [part.tolist() for part in quantizer.range] == [2.0, [-1.0, 2.0]]  # type: ignore[union-attr]
    quantizer.reset_amax()
    assert quantizer.range is None
    assert quantizer.limits is None


def test_without_a_range_each_tensor_has_its_own_ends() -> None:
    x = silu()
    assert torch.equal(affine()(x), ops.fake_quantize_affine(x, torch.stack(x.aminmax())))


def test_repr() -> None:
    assert "8bit affine fake per-tensor amax=3.0000 limits=[-0.2500, 3.0000]" in repr(ranged())
    assert "amax=dynamic limits=dynamic" in repr(affine())
    assert "limits" not in repr(TensorQuantizer())


def test_gradient_reaches_the_input_only() -> None:
    quantizer, x = ranged(), silu().requires_grad_()
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, ((x >= -0.25) & (x <= 3.0)).float())  # type: ignore[arg-type]


# ---- calibration ----


def collected(
    kind: str, batches: list[Tensor], **options: object
) -> calib.HistogramCalibrator | calib.MaxCalibrator:
    made = getattr(calib, kind)(8, None, False, two_ended=True, **options)
    for batch in batches:
        made.collect(batch)
    return made


@pytest.mark.parametrize("kind", ["MaxCalibrator", "HistogramCalibrator"])
def test_largest_magnitude_is_what_it_was_and_the_ends_are_exact(kind: str) -> None:
    batches = [silu(seed=seed) * (1 + seed) for seed in range(4)] + [torch.zeros(3), torch.empty(0)]
    found, plain = collected(kind, batches), getattr(calib, kind)(8, None, False)
    for batch in batches:
        plain.collect(batch)
    everything = torch.cat(batches)
    assert found.compute_limits("max").tolist() == [everything.min().item(), everything.max().item()]  # type: ignore[union-attr]
    for method in METHODS if kind == "HistogramCalibrator" else ("max",):
        assert torch.equal(found.compute_amax(method), plain.compute_amax(method))  # type: ignore[arg-type]
    assert plain.compute_limits("max") is None
    found.reset()
    assert found.compute_limits("max") is None


def test_histogram_below_zero_equals_numpy() -> None:
    batches = [silu(seed=seed) * (1 + 3 * seed) for seed in range(3)]
    found = collected("HistogramCalibrator", batches, num_bins=64, any_order=True)
    assert isinstance(found, calib.HistogramCalibrator)
    assert found._raw is not None
    for row, values in ((0, torch.cat(batches)), (1, torch.cat(batches).clamp(max=0))):
        held = values if row == 0 else values[values < 0]
        index = (
            np.floor(held.abs().numpy() / np.float32(found._width))
            .astype(int)
            .clip(max=found._raw.shape[1] - 1)
        )
        assert np.array_equal(np.bincount(index, minlength=found._raw.shape[1]), found._raw[row].numpy())


@pytest.mark.parametrize("method", METHODS)
def test_batches_in_any_order_and_merged_give_the_same_ends(method: str) -> None:
    first, *rest = [silu(seed=seed) * (1 + 3 * seed) for seed in range(4)]
    one = collected("HistogramCalibrator", [first, *rest], any_order=True)
    parts = [collected("HistogramCalibrator", [first], any_order=True)]
    assert isinstance(parts[0], calib.HistogramCalibrator)
    other = parts[0].empty_like_this()
    for batch in rest[::-1]:
        other.collect(batch)
    parts[0].merge(other)
    assert torch.equal(one.compute_limits(method), parts[0].compute_limits(method))  # type: ignore[arg-type]


def test_percentile_cuts_half_of_the_rest_at_either_end() -> None:
    x = silu(200_000)
    found = collected("HistogramCalibrator", [x]).compute_limits("percentile", percentile=99.0)
    assert found is not None
    wanted = np.quantile(x.numpy(), [0.005, 0.995])
    assert np.abs(found.numpy() - wanted).max() < x.max().item() / 1000
    with pytest.raises(ArgumentError, match="range 0 to 100"):
        collected("HistogramCalibrator", [x]).compute_limits("percentile", percentile=101.0)


def squared_error(x: Tensor, low: float, high: float, bits: int) -> float:
    return (ops.fake_quantize_affine(x, torch.tensor([low, high]), bits) - x).double().square().mean().item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", ["silu", "normal", "nonnegative", "nonpositive", "heavy"])
def test_squared_error_is_that_of_an_exhaustive_search(shape: str, bits: int) -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    x = {"silu": silu(), "normal": normal, "nonnegative": normal.relu(), "nonpositive": -normal.relu()}.get(
        shape, normal**3 + 1
    )
    calibrator = calib.HistogramCalibrator(bits, None, False, two_ended=True)
    calibrator.collect(x)
    found = calibrator.compute_limits("mse")
    assert found is not None
    lowest, highest = min(x.min().item(), 0), max(x.max().item(), 0)
    assert lowest <= found[0] <= 0 <= found[1] <= highest
    shares = np.linspace(0.02, 1, 40)
    best = min(
        squared_error(x, lowest * a, highest * b, bits)
        for a in (shares if lowest < 0 else [1.0])
        for b in (shares if highest > 0 else [1.0])
    )
    assert squared_error(x, *found.tolist(), bits) <= 1.02 * best


def divergence(x: np.ndarray, low: float, high: float, width: float, codes: int) -> float:
    """Relative entropy of a histogram and its quantized form, bin by bin, as the TensorRT slides have it."""
    a, b = round(low / width), round(high / width)
    index = np.floor(x / width).astype(int)
    counts = np.bincount(np.clip(index, a, b - 1) - a, minlength=b - a).astype(float)
    inner = np.bincount(index[(index >= a) & (index < b)] - a, minlength=b - a).astype(float)
    level = np.zeros_like(counts)
    for g in range(codes):
        part = slice(-(-g * (b - a) // codes), -(-(g + 1) * (b - a) // codes))
        filled = (inner[part] > 0).sum()
        level[part] = np.where(inner[part] > 0, inner[part].sum() / max(filled, 1), 0)
    p, q, held = counts / counts.sum(), level / level.sum(), counts > 0
    with np.errstate(divide="ignore"):
        return float((p[held] * np.log(p[held] / q[held])).sum())


def test_relative_entropy_is_that_of_an_exhaustive_search_and_drops_an_outlier() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.cat([torch.rand(50_000, generator=generator) * 1.5 - 0.5, torch.tensor([10.0])])
    calibrator = calib.HistogramCalibrator(4, None, False, num_bins=512, two_ended=True)
    calibrator.collect(x)
    found = calibrator.compute_limits("entropy")
    assert found is not None
    assert -0.6 < found[0] < -0.4
    assert found[1] < 1.3
    values, width = x.numpy().astype(np.float64), calibrator._width
    values = values[(values < 0) | (values >= width)]  # the bin of zeros counts as its neighbour
    values = np.concatenate([values, np.full(((values >= width) & (values < 2 * width)).sum(), width / 2)])
    best = min(
        divergence(values, x.min().item() * a, 10.0 * b, width, 16)
        for a in np.arange(1, 25) / 24
        for b in np.arange(1, 25) / 24
        if round(10.0 * b / width) - round(x.min().item() * a / width) >= 16
    )
    assert divergence(values, *found.tolist(), width, 16) <= best + 1e-9


def test_calibrating_a_quantizer_sets_both_ranges() -> None:
    for method, options in (("histogram", {"method": "mse"}), ("max", {})):
        quantizer = affine(calib_method=method)
        quantizer.disable_quant()
        quantizer.enable_calib()
        with pytest.raises(NonFiniteError):
            quantizer(torch.tensor([1.0, float("nan")]))
        quantizer(silu())
        quantizer.disable_calib()
        quantizer.enable_quant()
        quantizer.load_calib_amax(**options)
        assert quantizer.range is not None
        assert torch.equal(quantizer.limits, quantizer.calibrator.compute_limits(*options.values()))  # type: ignore[arg-type]
        error = {}
        for quantizer.affine in (True, False):
            error[quantizer.affine] = (quantizer(silu()) - silu()).square().mean().item()
        assert error[True] < 0.4 * error[False]  # half the step


def test_no_data_is_said(caplog: pytest.LogCaptureFixture) -> None:
    quantizer = affine()
    with pytest.raises(RuntimeError, match="Calibrator returned None"):
        quantizer.load_calib_amax()
    with caplog.at_level(logging.WARNING):
        quantizer.load_calib_amax(strict=False)
    assert quantizer(silu()).isnan().all()


# ---- ONNX ----


def by_onnx_runtime(model: nn.Module, x: Tensor, dynamo: bool) -> tuple[Tensor, bytes]:
    buffer = io.BytesIO()
    if dynamo:
        program = torch.onnx.export(
            model, (x,), dynamo=True, custom_translation_table=custom_translation_table()
        )
        assert program is not None
        program.optimize()
        program.save(buffer)
    else:
        with enable_onnx_export():
            torch.onnx.export(model, (x,), buffer, opset_version=17, dynamo=False)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    return torch.from_numpy(
        session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    ), buffer.getvalue()


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_onnx_computes_the_same(dynamo: bool, bits: int) -> None:
    x = silu(1000)
    for low, high in ((-0.25, 3.0), (0.0, 1.7), (-2.0, 0.0), (0.0, 0.0)):
        quantizer = ranged(low, high, bits).eval()
        if bits != 8 and not dynamo:
            with pytest.raises(AssertionError, match="Only INT8"):
                by_onnx_runtime(nn.Sequential(quantizer), x, dynamo)
            return
        y, _ = by_onnx_runtime(nn.Sequential(quantizer), x, dynamo)
        assert torch.equal(y, quantizer(x))


def test_export_without_ends_is_refused() -> None:
    quantizer = affine()
    quantizer.amax = 3.0
    with pytest.raises(AssertionError, match=r"Quantizer has not been calibrated.*limits"):
        by_onnx_runtime(nn.Sequential(quantizer), silu(10), dynamo=False)
