"""Every architecture of the zoo against torchvision's or timm's, and its quantizers by execution."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest
import test_families
import test_vit
import torch
from references import TEMPLATE, entry, quantizers, random_state, reference, with_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qzoo import registry
from qzoo.quant.nn import QuantConv2d, QuantLinear
from qzoo.quantizers import set_target
from qzoo.scheme import Scheme

aten = torch.ops.aten

# What each runtime wants quantized, and whether what follows a ReLU is unsigned.
PLACEMENT = {
    "tensorrt": ({"input", "weight", "residual"}, False),
    "onnxruntime": ({"input", "weight", "residual", "branch", "pool", "output"}, True),
    "openvino": ({"input", "weight", "residual", "pool"}, True),
}


@dataclass
class Case:
    """One architecture three times, with one set of weights."""

    name: str
    reference: nn.Module
    plain: nn.Module
    quantized: nn.Module

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Small images, square and not, in 0..1 and normal noise."""
        generator = torch.Generator().manual_seed(1)
        return [
            torch.rand(2, 3, 64, 64, generator=generator),
            2 * torch.randn(1, 3, 45, 62, generator=generator),
        ]

    @cached_property
    def expected(self) -> list[Tensor]:
        """The reference's logits."""
        with torch.inference_mode():
            return [self.reference(x) for x in self.inputs]


# Of the other families there is a module of tests each.
FAMILIES = ("resnet", "resnext", "wide_resnet", "mobilenet_v2", "efficientnet_lite", "tf_efficientnet_lite")
CONVOLUTIONAL = [name for name in registry.list_architectures() if name.startswith(FAMILIES)]
# Over 80 M parameters; they differ from smaller ones in the shapes of their parameters alone.
LARGEST = ("resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2")
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in LARGEST else name for name in CONVOLUTIONAL]


@pytest.fixture(scope="module", params=[TEMPLATE, *CASES])
def case(request: pytest.FixtureRequest) -> Case:
    build = entry(request.param).build
    theirs = reference(request.param)
    state = random_state(theirs)
    with torch.device("meta"):
        plain, quantized = build(), build(quantize=Scheme())
    return Case(
        request.param, with_state(theirs, state), with_state(plain, state), with_state(quantized, state)
    )


@pytest.fixture
def disabled(case: Case) -> Iterator[nn.Module]:
    """The quantized model with every quantizer off, back as it was afterwards."""
    for quantizer in quantizers(case.quantized).values():
        quantizer.disable()
    yield case.quantized
    set_target(case.quantized, Scheme().target)


def test_outputs_equal_the_reference_bit_for_bit(case: Case) -> None:
    for x, expected in zip(case.inputs, case.expected, strict=True):
        assert expected.isfinite().all()
        assert expected.std() > 1e-3
        with torch.inference_mode():
            assert torch.equal(case.plain(x), expected)


def test_disabled_quantizers_change_no_bit(case: Case, disabled: nn.Module) -> None:
    for x, expected in zip(case.inputs, case.expected, strict=True):
        with torch.inference_mode():
            assert torch.equal(disabled(x), expected)


def test_state_dict_keys_are_the_references(case: Case) -> None:
    expected = list(case.reference.state_dict())
    assert list(case.plain.state_dict()) == expected
    assert list(case.quantized.state_dict()) == expected


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_have_the_parameters_of_the_reference(name: str) -> None:
    with torch.device("meta"):
        ours = entry(name).build()
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (ours, reference(name))]
    assert shapes[0] == shapes[1]


def test_docstring_tells_the_number_of_parameters(case: Case) -> None:
    stated = re.search(r"([\d.]+) M parameters", entry(case.name).build.__doc__ or "")
    assert stated is not None
    count = sum(p.numel() for p in case.reference.parameters())
    assert float(stated[1]) == round(count / 1e6, len(stated[1].partition(".")[2]))


def test_plain_model_has_no_quantized_layer(case: Case) -> None:
    assert not quantizers(case.plain)
    assert not [m for m in case.plain.modules() if isinstance(m, QuantConv2d | QuantLinear)]


def test_every_weighted_layer_is_quantized(case: Case) -> None:
    weighted = [
        (name, module)
        for name, module in case.quantized.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() > 1
    ]
    assert weighted
    for name, module in weighted:
        assert isinstance(module, QuantConv2d | QuantLinear), name
        assert (module.input_quantizer.role, module.weight_quantizer.role) == ("input", "weight"), name
        assert module.weight_quantizer.axis == 0, name
        assert module.weight_quantizer.narrow_range, name


def test_every_quantizer_has_a_role_and_demands_a_range(case: Case) -> None:
    for name, quantizer in quantizers(case.quantized).items():
        assert quantizer.role in PLACEMENT["onnxruntime"][0], name
        assert not quantizer.dynamic, name
        assert not (quantizer.role == "weight" and quantizer.nonnegative), name


def test_nonnegative_flags_hold_when_executed(case: Case, disabled: nn.Module) -> None:
    lowest: dict[str, float] = {}

    def watch(name: str, quantizer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, args: tuple[Tensor]) -> None:
            lowest[name] = min(lowest.get(name, 0.0), args[0].min().item())

        return quantizer.register_forward_pre_hook(note)

    activations = {n: q for n, q in quantizers(disabled).items() if q.role != "weight"}
    hooks = [watch(name, quantizer) for name, quantizer in activations.items()]
    with torch.inference_mode():
        for x in case.inputs:
            disabled(x)
    for hook in hooks:
        hook.remove()

    assert lowest.keys() == activations.keys()  # all of them are visited
    wrong = [n for n, q in activations.items() if q.nonnegative != (lowest[n] >= 0)]
    assert wrong == []


class _Adds(TorchDispatchMode):
    """Records the operands of every addition."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (aten.add.Tensor, aten.add_.Tensor):
            self.operands.append(args[:2])
        return func(*args, **(kwargs or {}))


def test_both_sides_of_every_add_are_quantized(case: Case, disabled: nn.Module) -> None:
    role_of: dict[int, str] = {}
    kept = []  # so that no address is used twice
    hooks = []
    for quantizer in quantizers(disabled).values():
        if quantizer.role in ("residual", "branch"):

            def note(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
                assert out.data_ptr() != args[0].data_ptr()
                kept.append((args, out))
                role_of[out.data_ptr()] = module.role

            quantizer.dynamic = True  # a range of the moment: what counts is whether its output is used
            quantizer.enable()
            hooks.append(quantizer.register_forward_hook(note))
    with torch.inference_mode(), _Adds() as adds:
        disabled(case.inputs[0])
    for hook in hooks:
        hook.remove()
    for quantizer in quantizers(disabled).values():
        quantizer.dynamic = False

    assert adds.operands
    for a, b in adds.operands:
        assert {role_of.get(a.data_ptr()), role_of.get(b.data_ptr())} == {"residual", "branch"}
    assert len(role_of) == 2 * len(adds.operands)


def test_pooling_and_classifier_are_closed_by_quantizers(case: Case, disabled: nn.Module) -> None:
    seen = {}
    pool, output = disabled.pool_quantizer, disabled.output_quantizer
    assert (pool.role, output.role) == ("pool", "output")
    hooks = [
        pool.register_forward_hook(lambda module, args, out: out + 1.0),
        output.register_forward_hook(lambda module, args, out: out + 2.0),
        disabled.avgpool.register_forward_pre_hook(lambda module, args: seen.update(pool=args[0])),
        output.register_forward_pre_hook(lambda module, args: seen.update(output=args[0])),
        pool.register_forward_pre_hook(lambda module, args: seen.update(features=args[0])),
    ]
    with torch.inference_mode():
        logits = disabled(case.inputs[0])
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen["pool"], seen["features"] + 1.0)
    assert torch.equal(logits, seen["output"] + 2.0)


@pytest.mark.parametrize("target", PLACEMENT)
def test_targets_enable_their_roles(case: Case, target: str) -> None:
    roles, unsigned = PLACEMENT[target]
    model = set_target(case.quantized, target)
    for name, quantizer in quantizers(model).items():
        assert quantizer._disabled is (quantizer.role not in roles), name
        assert quantizer.unsigned is (unsigned and quantizer.nonnegative), name
    set_target(model, Scheme().target)


@pytest.mark.parametrize("quantize", [None, Scheme()], ids=["float", "w8a8"])
def test_classes_and_channels_can_be_chosen(case: Case, quantize: Scheme | None) -> None:
    with torch.device("meta"):
        model = entry(case.name).build(num_classes=7, in_channels=1, quantize=quantize)
        for quantizer in quantizers(model).values():
            quantizer.disable()
        assert model.eval()(torch.empty(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("arch", [TEMPLATE, "resnet20", "mobilenet_v2", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("target", PLACEMENT)
def test_eight_bits_stay_near_float(arch: str, target: str) -> None:
    state = random_state(reference(arch))
    plain = with_state(entry(arch).build(), state)
    quantized = with_state(entry(arch).build(quantize=Scheme(target=target)), state)
    for quantizer in quantizers(quantized).values():
        quantizer.dynamic = True  # each tensor's own range
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        signal, error = plain(x), quantized(x) - plain(x)
    assert not torch.equal(error, torch.zeros_like(error))
    decibels = 10 * torch.log10(signal.square().sum() / error.square().sum())
    assert decibels > 10  # a tensor that loses its negative half costs far more


@pytest.mark.parametrize("arch", [TEMPLATE, "resnet20", "mobilenet_v2", "tf_efficientnet_lite0"])
def test_float_and_quantized_models_start_from_the_same_draws(arch: str) -> None:
    states = []
    for quantize in (None, Scheme()):
        torch.manual_seed(0)
        states.append(entry(arch).build(quantize=quantize).state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_every_network_is_compared_with_another_implementation() -> None:
    compared = {*CONVOLUTIONAL, *test_families.ALL, *test_vit.ARCHITECTURES}
    missing = [name for name in registry.list_architectures() if name not in compared]
    assert missing == ["regnet_y_128gf"], "644.8 M parameters; another one needs a row in test_families.py"


def test_the_template_is_no_model_of_the_zoo() -> None:
    entry(TEMPLATE)
    assert TEMPLATE not in registry.list_architectures()
