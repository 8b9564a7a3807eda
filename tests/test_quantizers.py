"""Finding, naming and switching the quantizers of a model; what a getter leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qzoo
from qzoo.errors import CalibrationError
from qzoo.quant import quantize_
from qzoo.quant.descriptor import QuantDescriptor
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import (
    active_quantizers,
    device_of,
    name_quantizers,
    quantizers,
    quantizers_off,
    require_quantizers,
    weight_quantizers,
)


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(TensorQuantizer(QuantDescriptor(learn_amax=True)))
    )
    quantize_(model)
    return model.eval()


def test_finding_them_writes_nothing(small: nn.Module) -> None:
    for quantizer in quantizers(small).values():
        quantizer.name = "mine"
    before = copy.deepcopy([vars(quantizer) for quantizer in quantizers(small).values()])
    expected = ["0._input_quantizer", "0._weight_quantizer", "1.0"]
    assert (
        list(quantizers(small))
        == list(require_quantizers(small))
        == list(active_quantizers(small))
        == expected
    )
    assert list(weight_quantizers(small)) == ["0.weight"]
    qzoo.inspect(small)
    with quantizers_off(small):
        pass
    assert str([vars(quantizer) for quantizer in quantizers(small).values()]) == str(before)
    assert list(name_quantizers(small)) == [q.name for q in quantizers(small).values()] == expected


def test_off_is_the_float_model_and_all_is_as_before(small: nn.Module) -> None:
    plain = nn.Conv2d(3, 4, 3)
    plain.load_state_dict({key: small[0].state_dict()[key] for key in ("weight", "bias")})
    x = torch.randn(2, 3, 6, 6)
    small[0].input_quantizer.disable()
    small[0].weight_quantizer.enable_calib()
    before = [q.switches for q in quantizers(small).values()]
    with quantizers_off(small):
        small[0].weight_quantizer.disable_calib()
        assert torch.equal(small(x), plain(x))
        assert list(active_quantizers(small)) == []
    assert [q.switches for q in quantizers(small).values()] == before
    assert list(active_quantizers(small)) == ["0._weight_quantizer", "1.0"]
    assert small[1][0].clip.clip_value_max.requires_grad, "learned bounds stay learned"


def test_none_and_no_model_are_refused() -> None:
    with pytest.raises(CalibrationError, match="Conv2d has no quantizers"):
        require_quantizers(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="not a str"):
        require_quantizers("resnet20")  # type: ignore[arg-type]
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")


def test_what_a_quantizer_tells_of_itself() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(axis=0))
    x = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    assert quantizer.range_of(x).tolist() == quantizer.range_for(x).tolist() == [[2.0], [0.5]]
    quantizer.set_range(torch.tensor(3.0))
    assert (quantizer.range_for(x).item(), quantizer.range_of(x).shape) == (3.0, (2, 1))
    quantizer.set_range(torch.tensor([[1.0], [2.0]]))
    assert quantizer.amax.shape == (2, 1), "another shape than before"
    assert quantizer.is_on
    quantizer.disable_quant()
    assert not quantizer.is_on
    assert quantizer.switches == (False, False, False, False)
    assert not quantizer.learns_amax
    with pytest.raises(AttributeError):
        quantizer.is_on = True  # type: ignore[misc]
