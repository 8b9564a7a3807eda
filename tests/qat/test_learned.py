"""LSQ and PACT: gradients against the papers' formulas in float64, the start, and writing back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qzoo.errors import CalibrationError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq.ranges import calibrate
from qzoo.qat import LearnedLimits, LearnedRange, freeze_ranges, learn_ranges, learned_parameters
from qzoo.quant.nn import QuantLinear, TensorQuantizer
from qzoo.scheme import Scheme


def lsq_by_the_book(x: Tensor, s: Tensor, grad: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Esser et al., equation 3, in float64: gradients of x and of the step, before the latter is scaled."""
    v = x.double() / s.double()
    inside = (v > low) & (v < high)
    of_step = torch.where(inside, v.round() - v, v.sign() * high)
    return grad * inside, (grad * of_step).sum_to_size(s.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("bits", "unsigned"), [(2, True), (4, False), (8, False)])
def test_lsq_gradients_per_tensor(bits: int, unsigned: bool, channels_last: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6)
    x = (x.abs() if unsigned else x).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    high = 2 ** (bits - 1 + unsigned) - 1
    learner = LearnedRange(torch.tensor(1.3), "lsq", high)
    x.requires_grad_()
    learner(x, bits, unsigned, True).backward(grad)
    step = learner.value.detach()
    of_x, of_step = lsq_by_the_book(x.detach(), step, grad.double(), -high, high)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), of_x)
    scale = (4 * 5 * 6 * high) ** -0.5
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    assert learner.value.grad is not None
    torch.testing.assert_close(
        learner.value.grad.double(), of_step * scale, rtol=tolerance, atol=tolerance * scale * 10
    )


def test_lsq_gradients_per_channel() -> None:
    torch.manual_seed(1)
    w = torch.randn(5, 2, 3, 3, requires_grad=True)
    amax = torch.rand(5, 1, 1, 1) + 0.5
    learner = LearnedRange(amax, "lsq", 7)
    grad = torch.randn(5, 2, 3, 3)
    learner(w, 4, False, True).backward(grad)
    _, of_step = lsq_by_the_book(w.detach(), learner.value.detach(), grad.double(), -7, 7)
    assert learner.value.grad is not None
    torch.testing.assert_close(learner.value.grad.double(), of_step * (18 * 7) ** -0.5, rtol=1e-4, atol=1e-5)


def test_pact_moves_by_what_is_clipped() -> None:
    torch.manual_seed(2)
    x = (3 * torch.rand(4, 3, 5, 5)).requires_grad_()
    learner = LearnedRange(torch.tensor(2.0), "pact", 15)
    grad = torch.randn_like(x)
    learner(x, 4, True, True).backward(grad)
    assert learner.value.grad is not None
    torch.testing.assert_close(learner.value.grad, grad[x > 2].sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, grad * (x <= 2))


def test_weights_start_from_their_mean_and_activations_from_calibration() -> None:
    model = nn.Sequential(QuantLinear(6, 4))
    quantizer = model[0]._weight_quantizer
    quantizer.num_bits = model[0]._input_quantizer.num_bits = 3
    calibrate(model, [torch.randn(8, 6)], progress=False)
    amax = model[0]._input_quantizer.amax.clone()
    names = learn_ranges(model, "lsq")
    assert names == ["0._input_quantizer", "0._weight_quantizer"]
    expected = 2 * model[0].weight.abs().mean(1, keepdim=True) / 3**0.5
    torch.testing.assert_close(quantizer.learner.value, expected)
    torch.testing.assert_close(model[0]._input_quantizer.learner.amax, amax)
    assert len(learned_parameters(model)) == 2


def test_pact_leaves_weights_alone() -> None:
    model = nn.Sequential(QuantLinear(6, 4))
    calibrate(model, [torch.randn(8, 6)], progress=False)
    assert learn_ranges(model, "pact") == ["0._input_quantizer"]


@pytest.mark.parametrize("rule", ["lsq", "pact"])
def test_frozen_ranges_compute_the_same_to_the_bit(rule: str) -> None:
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme.parse("w3a3", "onnxruntime"))
    x = torch.randn(4, 1, 28, 28)
    calibrate(model, [x], progress=False)
    keys = model.state_dict().keys()
    learn_ranges(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        before = model(x)
        learned = copy.deepcopy(model)
        assert freeze_ranges(model)
        assert torch.equal(model(x), before)
        assert torch.equal(learned(x), before)
    assert model.state_dict().keys() == keys
    assert freeze_ranges(model) == []


def test_what_cannot_be_learned_is_said() -> None:
    model = nn.Sequential(QuantLinear(6, 4))
    with pytest.raises(ValueError, match="'adam'"):
        learn_ranges(model, "adam")
    model[0]._input_quantizer.dynamic = False
    with pytest.raises(CalibrationError, match=r"0\._input_quantizer"):
        learn_ranges(model, "lsq")


def test_a_step_never_falls_to_zero() -> None:
    learner = LearnedRange(torch.tensor(1.0), "lsq", 7)
    with torch.no_grad():
        learner.value.fill_(-3.0)
    assert learner.amax > 0
    assert torch.isfinite(learner(torch.randn(5), 4, False, True)).all()


def test_a_learner_is_part_of_the_state(tmp_path: object) -> None:
    """So that a run can resume."""
    quantizer = TensorQuantizer()
    quantizer.amax = 1.0
    quantizer.learner = LearnedRange(torch.tensor(2.0), "lsq", 127)
    assert "learner.value" in quantizer.state_dict()


def lsq_plus_by_the_book(
    x: Tensor, s: float, beta: float, grad: Tensor, top: int
) -> tuple[Tensor, float, float]:
    """Bhalgat et al., equations 4 to 6, in float64: gradients of x, of the step and of the offset."""
    v = (x.double() - beta) / s
    below, above = v < 0, v > top
    inside = ~(below | above)
    # With the offset on the grid round(v) - v is what the rounding adds.
    of_step = torch.where(inside, v.round() - v, torch.where(above, float(top), 0.0))
    of_offset = torch.where(inside, 0.0, 1.0)
    return grad * inside, float((grad * of_step).sum()), float((grad * of_offset).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_plus_gradients(bits: int) -> None:
    torch.manual_seed(0)
    x, grad, top = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), 2**bits - 1
    step = 0.75 / 2 ** (bits - 2)
    low = -step * (top // 4)  # on the grid, where the paper's offset and the rounded zero point are one
    learner = LearnedLimits(torch.tensor([low, low + top * step]), "lsq", top)
    x.requires_grad_()
    learner(x, bits, False, False).backward(grad)
    of_x, of_step, of_offset = lsq_plus_by_the_book(x.detach(), step, low, grad.double(), top)
    torch.testing.assert_close(x.grad.double(), of_x)  # type: ignore[union-attr]
    scale = (4 * 5 * 6 * top) ** -0.5 * top
    of_low, of_high = learner.value.grad / scale  # type: ignore[operator]
    # low = beta, high = beta + s p: by the chain rule
    assert of_high.item() == pytest.approx(of_step / top, rel=1e-4, abs=1e-4)
    assert (of_low + of_high).item() == pytest.approx(of_offset, rel=1e-4, abs=1e-4)


def test_pact_moves_an_end_by_what_is_clipped_there() -> None:
    x, learner = (
        torch.tensor([-3.0, -0.1, 0.2, 5.0, 6.0]),
        LearnedLimits(torch.tensor([-1.0, 2.0]), "pact", 255),
    )
    learner(x, 8, False, False).sum().backward()
    assert learner.value.grad.tolist() == [1.0, 2.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_two_ended_ranges_start_where_they_were_and_come_back(target: str) -> None:
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme(affine=True, target=target)).eval()
    images = torch.randn(8, 1, 28, 28) + 0.5
    calibrate(model, [images], progress=False)
    before = model(images)
    with_ends = [q for q in model.modules() if isinstance(q, TensorQuantizer) and q.affine]
    assert bool(with_ends) == (target == "onnxruntime")
    names = learn_ranges(model, "lsq")
    assert sum(isinstance(m, LearnedLimits) for m in model.modules()) == len(with_ends)
    assert len(learned_parameters(model)) == len(names)
    torch.testing.assert_close(model(images), before, rtol=0, atol=before.abs().max().item() / 20)
    optimizer = torch.optim.SGD(learned_parameters(model), lr=1e-2)
    model(images).square().sum().backward()
    optimizer.step()
    after = model(images)
    assert not torch.equal(after, before)
    assert freeze_ranges(model) == names
    assert torch.equal(model(images), after)
    for quantizer in (m for m in model.modules() if isinstance(m, TensorQuantizer) and m.two_ended):
        assert quantizer.limits is not None
        low, high = quantizer.limits.tolist()
        assert low <= 0 <= high
        if quantizer.affine:
            assert quantizer.amax.item() == max(-low, high)  # type: ignore[union-attr]
