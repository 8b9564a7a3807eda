"""Reductions, histograms and range searches against NumPy, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant import ops
from qzoo.quant.ops.schema import references

BACKENDS = ["reference", "dispatched"]


def call(backend: str, name: str, *args: Any) -> Any:
    return references[name](*args) if backend == "reference" else getattr(torch.ops.qzoo, name)(*args)


# ---- largest magnitude ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_amax_equals_numpy(backend: str, dtype: torch.dtype, layout: str) -> None:
    x = (torch.randn(3, 4, 5, 6) * 60).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = x[:, :, 1:, ::2]
    plain = np.abs(x.double().numpy()).astype(np.float32)
    for count in range(5):
        for keep in itertools.combinations(range(4), count):
            reduced = tuple(axis for axis in range(4) if axis not in keep)
            wanted = plain.max(axis=reduced, keepdims=bool(keep)) if reduced else plain
            got = call(backend, "reduce_amax", x, list(keep))
            assert got.dtype == torch.float32
            assert np.array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_amax_corner_cases(backend: str) -> None:
    x = torch.tensor([[1.0, -2.0], [float("nan"), 3.0], [float("-inf"), 0.0]])
    assert torch.isnan(call(backend, "reduce_amax", x, []))
    assert call(backend, "reduce_amax", x, [0]).flatten().nan_to_num(7.0).tolist() == [
        2.0,
        7.0,
        np.finfo("f4").max,
    ]
    assert call(backend, "reduce_amax", x, [-1]).shape == (1, 2)
    assert call(backend, "reduce_amax", torch.tensor(-4.0), []).item() == 4.0
    assert call(backend, "reduce_amax", torch.zeros(0, 3), [1]).tolist() == [[0.0, 0.0, 0.0]]
    assert call(backend, "reduce_amax", torch.tensor([-128], dtype=torch.int8), []).item() == 128.0
    with pytest.raises(QuantizationError, match=r"\[2\]"):
        ops.reduce_amax_op(x, [2])


# ---- histogram ----


def expected_counts(x: Tensor, bins: int, width: float, limit: float, above: float, skip: bool) -> np.ndarray:
    a = np.abs(x.float().numpy()).ravel()
    a = a[(a <= np.float32(limit)) & (a > np.float32(above))]
    a = a[a != 0] if skip else a
    index = np.minimum(np.floor(a / np.float32(width)).astype(np.int64), bins - 1)
    return np.bincount(index, minlength=bins)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("size", "bins"), [(1, 1), (7, 3), (1000, 64), (1025, 100), (70001, 2048)])
def test_histogram_equals_numpy(backend: str, dtype: torch.dtype, skip: bool, size: int, bins: int) -> None:
    x = (torch.randn(size) * 3).to(dtype)
    x[size // 2 :: 2] = 0.0
    top = float(x.float().abs().max()) or 1.0
    for limit, width, above in [
        (top, top / bins, -1.0),
        (top / 2, top / 2 / bins, -1.0),
        (top, top / bins, top / 3),
    ]:
        counts = torch.full((bins,), 5)
        stats = call(backend, "histogram_", counts, x, width, limit, above, skip)
        wanted = expected_counts(x, bins, width, limit, above, skip)
        assert np.array_equal(counts.numpy() - 5, wanted)
        magnitude = np.abs(x.float().numpy())
        assert stats.tolist() == [magnitude.max(), (magnitude > np.float32(limit)).sum()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_histogram_of_bad_values_counts_nothing_and_shows_them(backend: str, bad: float) -> None:
    counts = torch.ones(8, dtype=torch.int64)
    largest, _ = call(
        backend, "histogram_", counts, torch.tensor([0.1, bad, 0.2]), 0.1, 0.8, -1.0, False
    ).tolist()
    assert not np.isfinite(largest)
    assert counts.tolist() == [1] * 8


def test_histogram_grows_by_counting_only_the_overflow() -> None:
    x = torch.randn(5000).abs()
    counts = torch.zeros(16, dtype=torch.int64)
    largest, overflow = ops.histogram_(counts, x, 0.1)
    assert overflow == int((x > np.float32(1.6)).sum())
    grown = torch.cat([counts, torch.zeros(40, dtype=torch.int64)])
    assert ops.histogram_(grown, x, 0.1, above=1.6) == (largest, 0)
    whole = torch.zeros(56, dtype=torch.int64)
    ops.histogram_(whole, x, 0.1)
    assert torch.equal(grown, whole)
    assert int(whole.sum()) == 5000


def test_histogram_counts_beyond_24_bits_exactly() -> None:
    # a float32 counter stops at 2**24
    counts = torch.zeros(4, dtype=torch.int64)
    ops.histogram_(counts, torch.zeros(1, dtype=torch.bfloat16).expand(2**24 + 3), 1.0)
    assert counts.tolist() == [2**24 + 3, 0, 0, 0]


def test_histogram_of_nothing() -> None:
    counts = torch.zeros(4, dtype=torch.int64)
    assert ops.histogram_(counts, torch.zeros(0), 1.0) == (0.0, 0)
    assert not counts.any()


def test_histogram_refuses_what_it_cannot_count_into() -> None:
    with pytest.raises(QuantizationError, match="float32"):
        ops.histogram_(torch.zeros(4), torch.zeros(3), 1.0)
    for width in (0.0, -1.0, float("nan"), 1e-45, float("inf")):
        with pytest.raises(QuantizationError, match="width"):
            ops.histogram_(torch.zeros(4, dtype=torch.int64), torch.zeros(3), width)


def test_histogram_rows_equal_each_row_alone() -> None:
    x = torch.randn(5, 3, 40)
    x[2] = 0.0
    x[3] = 1e-39
    counts, maximum = ops.histogram_rows(x, 32)
    assert torch.equal(maximum, x.abs().amax((1, 2)))
    for row in (0, 1, 4):
        alone = torch.zeros(32, dtype=torch.int64)
        ops.histogram_(alone, x[row], maximum[row].item() / 32, limit=maximum[row].item())
        assert torch.equal(counts[row], alone)
    for row in (2, 3):
        assert counts[row].tolist() == [120] + [0] * 31


# ---- searches ----


def histograms(bins: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(bins)

    def counted(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.bincount(values.astype(np.int64).clip(0, bins - 1), minlength=bins))

    outlier = counted(rng.uniform(0, bins / 10, 30000))
    outlier[-1] = 1
    return {
        "half normal": counted(np.abs(rng.normal(0, bins / 4, 50000))),
        "outlier": outlier,
        "sparse": torch.from_numpy(rng.integers(0, 2, bins)),
        "flat": torch.full((bins,), 10),
    }


def entropy_by_definition(counts: np.ndarray, groups: int, i: int) -> float:
    """KL(P || Q) of one candidate, bin by bin, as the definition reads."""
    p = counts[:i].astype(np.float64)
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    group = np.array([j * groups // i for j in range(i)])
    for g in np.unique(group):
        members = (group == g) & (counts[:i] > 0)
        if members.any():
            q[members] = counts[:i][members].sum() / members.sum()
    if q.sum() == 0:
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    held = p > 0
    with np.errstate(divide="ignore"):
        return float((p[held] * np.log(p[held] / q[held])).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bins", "groups", "start", "stride"), [(300, 128, 128, 1), (90, 8, 20, 7), (40, 256, 1, 1)]
)
def test_entropy_costs_equal_the_definition(
    backend: str, bins: int, groups: int, start: int, stride: int
) -> None:
    for counts in histograms(bins).values():
        wanted = [entropy_by_definition(counts.numpy(), groups, i) for i in range(start, bins + 1, stride)]
        got = call(backend, "entropy_costs", counts, groups, start, stride)
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_entropy_search_drops_an_outlier_and_leaves_the_histogram_alone() -> None:
    counts = torch.zeros(2048, dtype=torch.int64)
    ops.histogram_(counts, torch.cat([torch.rand(100000), torch.tensor([10.0])]), 10 / 2048)
    before = counts.clone()
    assert ops.entropy_search(counts) * 10 / 2048 < 1.1
    assert torch.equal(counts, before)


def test_entropy_search_treats_bin_zero_as_bin_one() -> None:
    counts = histograms(300)["half normal"]
    spike = counts.clone()
    spike[0] = 10**9
    assert ops.entropy_search(spike) == ops.entropy_search(counts)


@pytest.mark.parametrize(("bins", "wanted"), [(1, 1), (5, 5), (128, 128)])
def test_entropy_search_with_few_bins_gives_the_last_edge(bins: int, wanted: int) -> None:
    assert ops.entropy_search(torch.ones(bins, dtype=torch.int64)) == wanted
    assert ops.entropy_search(torch.zeros(bins, dtype=torch.int64)) == wanted


def test_entropy_search_takes_the_last_of_equal_candidates() -> None:
    # up to 128 bins every bin is its own group: nothing is lost with or without the empty bins at the end
    counts = torch.zeros(100, dtype=torch.int64)
    counts[:60] = torch.arange(1, 61)
    assert ops.entropy_search(counts, start_bin=60) == 100


def mse_by_definition(
    counts: np.ndarray, centers: np.ndarray, bits: int, unsigned: bool, start: int, stride: int
) -> int:
    bound = np.float32(2 ** (bits - 1 + unsigned) - 1)
    costs = []
    candidates = range(min(start, len(counts) - 1), len(counts), stride)
    for i in candidates:
        scale = bound / centers[i]
        y = np.minimum(np.rint(centers * scale), bound) / scale
        costs.append(float((((y - centers).astype(np.float64)) ** 2 * counts).mean()))
    return candidates[int(np.argmin(costs))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "unsigned"), [(8, False), (8, True), (4, False), (2, False)])
@pytest.mark.parametrize(("bins", "start", "stride"), [(300, 128, 1), (100, 1, 7), (50, 128, 1), (1, 1, 1)])
def test_mse_search_equals_the_definition(
    backend: str, bits: int, unsigned: bool, bins: int, start: int, stride: int
) -> None:
    centers = (torch.arange(bins) + 0.5) * 0.013
    rows = torch.stack(list(histograms(bins).values()))
    got = call(backend, "mse_search", rows, centers.expand(rows.shape), bits, unsigned, start, stride)
    wanted = [mse_by_definition(row.numpy(), centers.numpy(), bits, unsigned, start, stride) for row in rows]
    assert got.tolist() == wanted
    assert call(backend, "mse_search", rows[0], centers, bits, unsigned, start, stride).item() == wanted[0]


def test_mse_search_in_e4m3_takes_the_range_that_loses_least() -> None:
    counts = histograms(300)["half normal"]
    centers = (torch.arange(300) + 0.5) * 0.013
    got = ops.mse_search(counts, centers, (4, 3), start_bin=10)
    costs = [
        float(((ops.fake_quantize_fp8(centers, centers[i]) - centers).double() ** 2 * counts).sum())
        for i in range(10, 300)
    ]
    assert got.item() == 10 + int(np.argmin(costs))
    with pytest.raises(QuantizationError, match="3, 4"):
        ops.mse_search(counts, centers, (3, 4))


def test_searches_check_their_arguments() -> None:
    counts = torch.ones(10, dtype=torch.int64)
    with pytest.raises(QuantizationError, match="stride=0"):
        ops.entropy_search(counts, stride=0)
    with pytest.raises(QuantizationError, match="int64"):
        ops.entropy_search(counts.float())
    with pytest.raises(QuantizationError, match="centers"):
        ops.mse_search(counts, torch.ones(9))
