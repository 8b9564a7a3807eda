"""Max and histogram calibrators, and calibrate_weights, against NumPy and plain loops."""

import math

import numpy as np
import pytest
import quant_oracle as oracle
import torch
from torch import nn

from qzoo.quant import calib, quantize_
from qzoo.quant.nn import QuantConv2d, QuantConvTranspose2d, QuantLinear, QuantLSTM
from qzoo.quant.tensor_quant import QuantDescriptor


def histogram(x, **kwargs):
    calibrator = calib.HistogramCalibrator(8, None, False, **kwargs)
    for batch in x if isinstance(x, list) else [x]:
        calibrator.collect(batch)
    return calibrator


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Max


@pytest.mark.parametrize(
    ("axis", "shape"),
    [(None, ()), (1, (1, 4, 1, 1)), (-3, (1, 4, 1, 1)), ([0, 1], (3, 4, 1, 1)), ((-1,), (1, 1, 1, 6))],
)
def test_max(axis, shape):
    batches = [rand(3, 4, 5, 6, seed=i) - 0.5 for i in range(3)]
    calibrator = calib.MaxCalibrator(8, axis, False, track_amax=True)
    assert calibrator.compute_amax() is None
    for batch in batches:
        calibrator.collect(batch)
    reduced = tuple(d for d in range(4) if not shape or shape[d] == 1)
    each = [np.abs(b.numpy()).max(reduced, keepdims=True).reshape(shape) for b in batches]
    np.testing.assert_array_equal(calibrator.compute_amax().numpy(), np.maximum.reduce(each))
    for found, wanted in zip(calibrator.amaxs, each, strict=True):
        np.testing.assert_array_equal(found, wanted)
    calibrator.reset()
    assert calibrator.compute_amax() is None


def test_max_refuses_another_shape():
    calibrator = calib.MaxCalibrator(8, 1, False)
    calibrator.collect(rand(2, 3))
    with pytest.raises(RuntimeError, match="amax shape changed!"):
        calibrator.collect(rand(2, 4))


def test_base_and_texts():
    base = calib.calibrator._Calibrator(8, None, False)
    for call in (lambda: base.collect(None), base.reset, base.compute_amax):
        with pytest.raises(NotImplementedError):
            call()
    assert "num_bits=8 axis=None unsigned=False" in repr(base)
    assert str(calib.MaxCalibrator(8, None, False)) == "MaxCalibrator(track_amax=False)"
    assert "amaxs" in repr(calib.MaxCalibrator(8, None, False))
    empty = calib.HistogramCalibrator(8, None, False)
    assert str(empty) == "HistogramCalibrator(calib_bin_edges=None)"
    empty.collect(torch.tensor([0.0, 2.0]))
    assert str(empty) == "HistogramCalibrator(calib_bin_edges=[0.000, ..., 2.000](2049))"


# Histogram


@pytest.mark.parametrize("torch_hist", [True, False])
def test_counts_equal_numpy_and_old_counts_keep_their_place(torch_hist):
    first, second = rand(1000), rand(1000, seed=1) * 3
    calibrator = histogram([first, second], num_bins=64, torch_hist=torch_hist)
    width = np.float32(first.max() / 64)
    counts = np.bincount(np.floor(np.concatenate([first, second]) / width).astype(int))
    # The largest value of the first batch lies on the last edge then, and in the last bin.
    counts[63] += 1
    counts[64] -= 1
    found = np.asarray(calibrator._calib_hist)
    assert len(found) == math.ceil(second.max().item() / (first.max().item() / 64))
    np.testing.assert_array_equal(found, counts)
    assert len(calibrator._calib_bin_edges) == len(found) + 1
    edges = np.asarray(calibrator._calib_bin_edges)
    np.testing.assert_allclose(edges[:-1], np.arange(len(found)) * width, rtol=1e-6)
    assert isinstance(calibrator._calib_hist, torch.Tensor if torch_hist else np.ndarray)


def test_skip_zeros_and_integer_input():
    x = torch.tensor([0, 0, -3, 1, 4])
    assert histogram(x, num_bins=4)._calib_hist.tolist() == [2, 1, 0, 2]
    assert histogram(x, num_bins=4, skip_zeros=True)._calib_hist.tolist() == [0, 1, 0, 2]
    assert histogram(x.half(), num_bins=4)._calib_hist.tolist() == [2, 1, 0, 2]


def test_histogram_refuses_an_axis_and_warns_of_grow_method(caplog):
    with pytest.raises(NotImplementedError):
        calib.HistogramCalibrator(8, 0, False)
    calib.HistogramCalibrator(8, None, False, grow_method="append")
    assert "grow_method" in caplog.text


@pytest.mark.parametrize("percentile", [0, 10, 50, 99.99, 100])
def test_percentile(percentile):
    x = rand(100_000)
    found = histogram(x).compute_amax("percentile", percentile=percentile).item()
    assert found == pytest.approx(np.percentile(x, percentile), abs=2 / 2048)


@pytest.mark.parametrize("percentile", [-1, 101])
def test_percentile_out_of_range(percentile):
    with pytest.raises(ValueError, match="range"):
        histogram(rand(10)).compute_amax("percentile", percentile=percentile)


def test_unknown_method():
    with pytest.raises(TypeError, match="Unknown calibration method"):
        histogram(rand(10)).compute_amax("median")


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy", "max"])
def test_no_data_gives_none(method):
    assert calib.HistogramCalibrator(8, None, False).compute_amax(method) is None


def loop_mse(counts, edges, bits, unsigned, start, stride):
    centers = (edges[1:] + edges[:-1]) / np.float32(2)
    costs = []
    for i in range(start, len(counts), stride):
        y = oracle.fake_quantize(centers, centers[i], bits, unsigned)
        costs.append(np.mean((y - centers).astype(np.float64) ** 2 * counts))
    return centers[start + stride * int(np.argmin(costs))]


def loop_entropy(counts, edges, bits, unsigned, start, stride):
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    groups = 2 ** (bits - 1 + unsigned)
    best, answer = np.inf, len(counts)
    for i in range(start, len(counts) + 1, stride):
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        group = np.floor(np.arange(i) * groups / i).astype(int)
        for g in range(groups):
            members = (group == g) & (counts[:i] > 0)
            if members.any():
                q[members] = counts[:i][group == g].sum() / members.sum()
        if q.sum() == 0 or np.any((p > 0) & (q == 0)):
            continue
        p, q = p / p.sum(), q / q.sum()
        cost = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
        if cost <= best + 1e-12:
            best, answer = min(cost, best), i
    return edges[answer]


@pytest.mark.parametrize(("bits", "unsigned"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize(("method", "loop"), [("mse", loop_mse), ("entropy", loop_entropy)])
def test_searches_equal_plain_loops(method, loop, bits, unsigned):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(3)).abs()
    calibrator = calib.HistogramCalibrator(bits, None, unsigned, num_bins=512)
    calibrator.collect(x)
    counts, edges = calibrator._calib_hist.numpy().copy(), calibrator._calib_bin_edges.numpy()
    found = calibrator.compute_amax(method, start_bin=130, stride=3)
    assert found.item() == loop(counts, edges, bits, unsigned, 130, 3)
    np.testing.assert_array_equal(calibrator._calib_hist.numpy(), counts)


def test_entropy_discards_an_outlier():
    calibrator = histogram([rand(10_000), torch.tensor([10.0])])
    assert calibrator.compute_amax("entropy").item() < 1.1


def test_mse_of_e4m3():
    calibrator = calib.HistogramCalibrator((4, 3), None, False)
    calibrator.collect(rand(1000))
    assert 0.05 < calibrator.compute_amax("mse").item() <= 1


# Merging


def test_merged_calibrators_equal_one():
    a, b = rand(500), rand(500, seed=1) * 2
    one = calib.MaxCalibrator(8, None, False)
    parts = [calib.MaxCalibrator(8, None, False) for _ in range(2)]
    for part, x in zip(parts, (a, b), strict=True):
        one.collect(x)
        part.collect(x)
    parts[0].merge(parts[1])
    assert parts[0].compute_amax() == one.compute_amax()


def test_merged_histograms_of_one_width_equal_one():
    a, b = rand(500), rand(500, seed=1) * 2
    top = torch.tensor([1.0])
    one = histogram([top, a, top, b])
    left, right = histogram([top, a]), histogram([top, b])
    left.merge(right)
    assert torch.equal(left._calib_hist, one._calib_hist)
    assert left.compute_amax("max") == one.compute_amax("max")
    for other in (histogram(torch.zeros(7)), calib.HistogramCalibrator(8, None, False)):
        total = int(left._calib_hist.sum())
        extra = 0 if other._calib_hist is None else 7
        left.merge(other)
        assert int(left._calib_hist.sum()) == total + extra


@pytest.mark.parametrize("seed", range(6))
def test_any_order_and_any_split_give_the_same_histogram(seed):
    """Values on every last edge that occurs, growth beyond the largest number of bins, batches of zeros."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(200, generator=generator)
    scales = [1.0, 3.0, 1.0, 0.2, 2.5, 7.0 if seed % 2 else 90.0]
    batches = [scale * torch.rand(200, generator=generator) for scale in scales] + [torch.zeros(5)]
    edges = [float(batch.max()) for batch in (first, *batches)]
    width = float(first.max()) / 2048
    edges += [math.ceil(edge / width) * width for edge in edges[:-1]]
    batches = [
        torch.cat([batch, torch.tensor(edges)[torch.tensor(edges) <= batch.max()]]) for batch in batches
    ]
    one = histogram([first, *batches], any_order=True)
    counted = torch.cat([first, *batches])
    assert int(one._calib_hist.sum()) == len(counted)
    factor = 2 ** round(math.log2(one._width / width))
    expected = np.bincount(np.floor(counted.numpy() / np.float32(width * factor)).astype(int))
    expected = np.pad(expected, (0, max(0, len(one._calib_hist) - len(expected))))
    if len(expected) > len(one._calib_hist):
        expected = np.append(expected[:-2], expected[-2:].sum())
    np.testing.assert_array_equal(one._calib_hist.numpy(), expected)

    order = torch.randperm(len(batches), generator=generator).tolist()
    start = histogram([first], any_order=True)
    parts = [start, start.empty_like_this(), start.empty_like_this()]
    for i, k in enumerate(order):
        parts[i % 3].collect(batches[k])
    whole = calib.HistogramCalibrator(8, None, False, any_order=True)
    for k in (1, 0, 2):
        whole.merge(parts[k])
    for other in (histogram([first, *(batches[k] for k in order)], any_order=True), whole):
        assert torch.equal(other._calib_hist, one._calib_hist)
        assert torch.equal(other._calib_bin_edges, one._calib_bin_edges)
        for method in ("percentile", "mse", "entropy", "max"):
            assert torch.equal(other.compute_amax(method), one.compute_amax(method)), method


def test_merged_histograms_of_two_widths_keep_all_counts():
    left, right = histogram(rand(500)), histogram(rand(500, seed=1) * 7)
    left.merge(right)
    assert int(left._calib_hist.sum()) == 1000
    assert left.compute_amax("percentile", percentile=75).item() == pytest.approx(7 / 2, abs=0.6)


# Weights


def loop_weights(weight, axis, method, bits=8):
    rows = weight.detach().movedim(axis, 0).reshape(weight.shape[axis], -1)
    found = []
    for row in rows:
        calibrator = calib.HistogramCalibrator(bits, None, False)
        calibrator.collect(row)
        found.append(calibrator.compute_amax(method).item())
    return found


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
@pytest.mark.parametrize(
    ("layer", "axis", "shape"),
    [
        (QuantConv2d(3, 5, 3), 0, (5, 1, 1, 1)),
        (QuantConvTranspose2d(3, 5, 3), 1, (1, 5, 1, 1)),
        (QuantLinear(7, 5), 0, (5, 1)),
    ],
)
def test_weights_equal_the_calibrator_on_each_channel(layer, axis, shape, method):
    calib.calibrate_weights(layer, method=method)
    amax = layer.weight_quantizer.amax
    assert tuple(amax.shape) == shape
    assert amax.flatten().tolist() == loop_weights(layer.weight, axis, method)


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
def test_weights_per_tensor(method):
    layer = QuantLinear(30, 20)
    calib.calibrate_weights(layer, method=method, perchannel=False)
    assert layer.weight_quantizer.amax.dim() == 0
    calibrator = histogram(layer.weight.detach())
    assert layer.weight_quantizer.amax == calibrator.compute_amax(method)


def test_weights_refuse_other_methods():
    with pytest.raises(TypeError):
        calib.calibrate_weights(QuantLinear(3, 4), method="entropy")


def test_weights_of_recurrent_layers():
    layer = QuantLSTM(3, 4, bidirectional=True)
    calib.calibrate_weights(layer, method="max")
    joined = torch.cat([layer.weight_ih_l0_reverse, layer.weight_hh_l0_reverse], 1)
    assert torch.equal(layer._weight_quantizers[1].amax, joined.detach().abs().amax(1, keepdim=True))


def test_weights_with_blocks():
    model = nn.Sequential(nn.Linear(8, 5))
    quantize_(model, quant_desc_weight=QuantDescriptor(4, axis=0, block=(1, 4)))
    calib.calibrate_weights(model, method="max")
    expected = model[0].weight.detach().abs().reshape(5, 2, 4).amax(2)
    assert torch.equal(model[0].weight_quantizer.amax, expected)
