"""Packing is exact: what comes out of the file is what the quantizer makes of the weight, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qzoo
from qzoo.errors import CheckpointError
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.tensor_quant import QuantDescriptor
from qzoo.quantizers import quantizers
from qzoo.zoo import packing

FORMATS = [2, 3, 4, 5, 8, "e4m3", "e5m2"]
SOME = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def quantizer(
    fmt: int | str, weight: torch.Tensor, block: int = 0, amax: float | None = None
) -> TensorQuantizer:
    bits = {"num_bits": fmt} if isinstance(fmt, int) else {"float_format": fmt}
    q = TensorQuantizer(
        QuantDescriptor(axis=0, narrow_range=True, block=(1, block) if block else None, **bits)
    )
    own = q._own_range(weight)
    q.amax = (own if amax is None else torch.full_like(own, amax)).numpy()
    return q


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A weight [O, I, k, k] whose channels differ by orders of magnitude, and a size of blocks along I (0: none)."""
    block = draw(st.sampled_from([0, 0, 1, 2, 3]))
    inputs = draw(st.integers(1, 4)) * max(block, 1)
    shape = (draw(st.integers(1, 5)), inputs, *[draw(st.integers(1, 3))] * 2)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    powers = draw(st.lists(st.integers(-30, 10), min_size=shape[0], max_size=shape[0]))
    return weight * 2.0 ** torch.tensor(powers).reshape(-1, 1, 1, 1), block


@pytest.mark.parametrize("fmt", FORMATS)
@SOME
@given(case=weights(), narrower=st.sampled_from([None, 0.5, 1e-7]))
def test_packing_keeps_the_quantized_weight_and_is_its_own_inverse(
    fmt: int | str, case: tuple[torch.Tensor, int], narrower: float | None
) -> None:
    weight, block = case
    q = quantizer(fmt, weight, block, narrower)
    packed = packing.pack_weight(weight, q)
    back = packing.unpack_weight(packed, weight.shape, q.amax, q.num_bits, q.block)
    assert back.dtype == torch.float32
    assert torch.equal(q(back), q(weight))
    again = packing.pack_weight(back, q)
    assert again.dtype == packed.dtype
    assert again.view(torch.uint8).tolist() == packed.view(torch.uint8).tolist()


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_eight_bit_floats_just_above_the_smallest_magnitude(fmt: str) -> None:
    """Values that the quantizer rounds to below the magnitude at which it makes zeros."""
    weight = (torch.linspace(1.0, 1.2, 500) * 2.0**-24).reshape(1, -1)
    low = 0
    for amax in (6e-6, 7e-6, 8e-6, 9e-6, 1e-5):
        q = quantizer(fmt, weight, amax=amax)
        kept = q(weight)
        low += int(((kept != 0) & (kept.abs() < 2.0**-24)).sum())
        back = packing.unpack_weight(packing.pack_weight(weight, q), weight.shape, q.amax, q.num_bits)
        assert torch.equal(q(back), kept)
    assert low > 0  # such values were among them


def test_stored_floats_are_those_of_the_format() -> None:
    weight = torch.tensor([[1.0, 0.5, -0.3, 0.001]])
    q = quantizer("e4m3", weight)
    stored = packing.pack_weight(weight, q)
    assert stored.dtype == torch.float8_e4m3fn
    # E4M3 has 3 bits of mantissa: 448, 224, 134.4 -> 128 (steps of 16), 0.448 -> 0.4375 (steps of 1 / 32)
    assert stored.float().tolist() == [[448.0, 224.0, -128.0, 0.4375]]


def test_blocks_have_ranges_of_their_own() -> None:
    weight = torch.tensor([[100.0, -50.0, 0.1, 0.05]]).reshape(1, 4, 1, 1)
    q = quantizer(4, weight, block=2)
    assert q.amax.flatten().tolist() == pytest.approx([100.0, 0.1])
    integers = qzoo.quant.ops.unpack_int4(packing.pack_weight(weight, q), weight.shape)
    assert integers.flatten().tolist() == [7, -4, 7, 4]  # 3.5 rounds to even


@pytest.mark.parametrize("rows", [1, 3, 64, 65])
def test_unpacking_in_pieces_equals_unpacking_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(rows, 3, 3, 3)
    for fmt in (4, 8, "e5m2"):
        q = quantizer(fmt, weight)
        packed = packing.pack_weight(weight, q)
        whole = packing.unpack_weight(packed, weight.shape, q.amax, q.num_bits)
        monkeypatch.setattr(packing, "_CHUNK", 100)
        assert torch.equal(packing.unpack_weight(packed, weight.shape, q.amax, q.num_bits), whole)
        monkeypatch.undo()


def test_what_packing_never_gives_is_refused() -> None:
    shape, amax = torch.Size([2, 3]), torch.ones(2, 1)
    for content in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            packing.unpack_weight(torch.full(shape, content).to(torch.float8_e5m2), shape, amax, (5, 2))
    with pytest.raises(CheckpointError, match=r"need torch.float8_e4m3fn \[2, 3\]"):
        packing.unpack_weight(torch.zeros(shape, dtype=torch.int8), shape, amax, (4, 3))
    with pytest.raises(CheckpointError, match="beyond -7 to 7"):
        packing.unpack_weight(torch.full((3,), 0x88, dtype=torch.uint8), shape, amax, 4)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        packing.pack_weight(torch.full((2, 3), float("nan")), quantizer(8, torch.ones(2, 3)))


# ---- columns ----


def calibrated(name: str = "resnet20.fmnist-w8a8") -> nn.Module:
    torch.manual_seed(0)
    model = qzoo.create_model(name)
    for q in quantizers(model).values():
        q.amax = np.float32(1.5) + np.zeros(())
    qzoo.calibrate(model, [torch.randn(2, 1, 28, 28)], method="max", progress=False)
    return model


def test_columns_hold_everything_but_weights_and_counters_once() -> None:
    model = calibrated()
    listed = [key for shapes in packing.columns(model).values() for key in shapes]
    state = model.state_dict()
    packed = {key for key, value in state.items() if value.dim() > 1 and not key.endswith("_amax")}
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    assert len(listed) == len(set(listed))
    assert set(listed) | packed | counters == set(state)
    assert set(packing.columns(model)) == {
        "*.weight", "*.bias", "*.running_mean", "*.running_var", "*._amax", "*._weight_quantizer._amax",
    }  # fmt: skip


def test_a_column_is_float16_only_where_that_changes_no_value() -> None:
    shapes = {"a": (2,), "b": (1, 2), "c": ()}
    for values, dtype in (
        ([1.0, -0.0, 65504.0, 2.0**-24, 0.5], torch.float16),
        ([1.0, 2.0, 3.0, 4.0, 0.1], torch.float32),
        ([1.0, 2.0, 3.0, 4.0, 1e6], torch.float32),
        ([1.0, 2.0, 3.0, 4.0, 1e-9], torch.float32),
    ):
        stored = packing._narrow(torch.tensor(values))
        assert stored.dtype == dtype
        back = dict(packing.expand("*.x", stored, shapes))
        assert torch.cat([v.reshape(-1) for v in back.values()]).tolist() == torch.tensor(values).tolist()
        assert {key: tuple(v.shape) for key, v in back.items()} == shapes
    for wrong in (torch.zeros(4), torch.zeros(5, 1), torch.zeros(5, dtype=torch.float64)):
        with pytest.raises(CheckpointError, match=r"column \*\.x holds .*needs float16 or float32 \[5\]"):
            dict(packing.expand("*.x", wrong, shapes))
