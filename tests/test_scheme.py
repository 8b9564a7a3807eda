"""Schemes, roles and targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qzoo.models.resnet_cifar import CifarResNet
from qzoo.quant import quantize_
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.tensor_quant import QuantDescriptor
from qzoo.quantizers import activation_descriptor, activation_quantizer, set_target, weight_descriptor
from qzoo.scheme import ROLES, TARGETS, Scheme, as_scheme, with_target

ALL = {"input", "weight", "residual", "branch", "pool", "output", "activation", "norm", "product", "stream"}


def test_text_and_scheme_are_one() -> None:
    assert Scheme.parse("w8a8") == Scheme() == Scheme(8, 8, "onnxruntime")
    assert Scheme.parse("w4a6", "openvino") == Scheme(4, 6, "openvino")
    for text in ("w8a8", "w4a8", "w2a3"):
        assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize("text", ["", "w8", "a8w8", "w8a8_qat", "W8A8", "w-8a8", " w8a8"])
def test_other_texts_are_no_schemes(text: str) -> None:
    with pytest.raises(ValueError, match="w<bits>a<bits>"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("weights", "activations", "field"), [(1, 8, "weight_bits"), (8, 9, "activation_bits")]
)
def test_bits_are_two_to_eight(weights: int, activations: int, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Scheme(weights, activations)


def test_unknown_targets_are_refused_with_the_known_ones() -> None:
    for attempt in (lambda: Scheme(target="tflite"), lambda: set_target(nn.Linear(1, 1), "tflite")):
        with pytest.raises(ValueError, match=r"'tflite'.*tensorrt, onnxruntime, openvino"):
            attempt()


def test_a_model_without_roles_is_told_that_nothing_changed(caplog: pytest.LogCaptureFixture) -> None:
    foreign = nn.Sequential(nn.Conv2d(3, 4, 3))
    quantize_(foreign)
    with caplog.at_level("WARNING"):
        set_target(foreign, "openvino")
    assert "set_target('openvino') changed nothing: Sequential has no quantizers with a role" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        set_target(nn.Sequential(activation_quantizer(Scheme(), "input")), "openvino")
    assert not caplog.records


def test_as_scheme() -> None:
    scheme = Scheme(4, 8)
    assert as_scheme(scheme) is scheme
    assert as_scheme(True) == Scheme()
    assert as_scheme("w4a8") == scheme
    assert as_scheme(None) is None
    assert as_scheme(False) is None
    with pytest.raises(TypeError, match="not int"):
        as_scheme(8)  # type: ignore[arg-type]


def test_with_target_changes_nothing_else() -> None:
    scheme = Scheme(4, 6)
    assert with_target(scheme, "openvino") == Scheme(4, 6, "openvino")
    assert scheme.target == "onnxruntime"


def test_descriptors() -> None:
    scheme = Scheme(4, 6)
    assert weight_descriptor(scheme) == QuantDescriptor(4, axis=0, narrow_range=True)
    assert activation_descriptor(scheme) == QuantDescriptor(6, calib_method="histogram")


def test_roles_and_targets_as_documented() -> None:
    assert set(ROLES) == ALL
    assert {name: (set(t.roles), t.unsigned) for name, t in TARGETS.items()} == {
        "tensorrt": ({"input", "weight", "residual", "norm", "product"}, False),
        "onnxruntime": (ALL - {"stream"}, True),
        "openvino": (ALL - {"branch", "output", "activation", "norm", "stream"}, True),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_a_quantizer_is_born_as_its_target_wants(target: str, role: str, nonnegative: bool) -> None:
    quantizer = activation_quantizer(Scheme(8, 6, target), role, nonnegative)
    assert (quantizer.role, quantizer.nonnegative, quantizer.dynamic) == (role, nonnegative, False)
    assert quantizer.num_bits == (
        6 if role in ("input", "product") else 8
    )  # what only adds or averages keeps 8 bits
    assert quantizer._disabled is (role not in TARGETS[target].roles)
    assert quantizer.unsigned is (nonnegative and TARGETS[target].unsigned and role != "weight")


def test_unknown_roles_are_refused() -> None:
    with pytest.raises(ValueError, match="'skip'"):
        activation_quantizer(Scheme(), "skip")


def _half_off(role: str, amax: float) -> tuple[nn.Module, torch.Tensor]:
    quantizer = activation_quantizer(Scheme(target="tensorrt"), role, nonnegative=True)
    quantizer.amax = amax
    return nn.Sequential(quantizer), torch.linspace(0.0, 1.2 * amax, 1000)


def test_set_target_changes_the_arithmetic() -> None:
    model, x = _half_off("input", 2.0)
    signed = model(x)
    assert len(signed.unique()) == 128  # 0 .. 127
    assert set_target(model, "onnxruntime") is model
    assert len(model(x).unique()) == 256
    torch.testing.assert_close(set_target(model, "tensorrt")(x), signed, rtol=0, atol=0)


def test_set_target_switches_roles_and_keeps_ranges() -> None:
    model, x = _half_off("branch", 2.0)
    assert torch.equal(model(x), x)  # off for TensorRT
    set_target(model, "onnxruntime")
    assert len(model(x).unique()) == 256
    assert model[0].amax.item() == 2.0


def test_set_target_leaves_foreign_quantizers_alone() -> None:
    foreign = TensorQuantizer(QuantDescriptor(unsigned=True), disabled=True)
    set_target(nn.Sequential(foreign), "tensorrt")
    assert foreign._disabled
    assert foreign.unsigned


def test_first_and_last_layers_keep_eight_bits_where_activations_have_few() -> None:
    model = CifarResNet(1, in_channels=1, quantize=Scheme.parse("w3a2"))
    bits = {
        name: module.num_bits for name, module in model.named_modules() if isinstance(module, TensorQuantizer)
    }
    low = {name for name, count in bits.items() if count != 8}
    assert {bits[name] for name in low if name.endswith("weight_quantizer")} == {3}
    assert {bits[name] for name in low if name.endswith("input_quantizer")} == {2}
    assert len(low) == 2 * (6 + 2)  # six 3x3 convolutions, two projections
    assert all((name.startswith("layer") and "conv" in name) or "downsample" in name for name in low)


@pytest.mark.parametrize(
    ("scheme", "bits"), [(Scheme(4, 8), 4), (Scheme(4, 4, edge_bits=6), 6), (Scheme(4, 4), 8)]
)
def test_bits_of_the_edge(scheme: Scheme, bits: int) -> None:
    """Weights alone at few bits: no exception for the edges, whose weights are most of what a file holds."""
    assert scheme.edge.weight_bits == bits
    with pytest.raises(ValueError, match="edge_bits"):
        Scheme(4, 4, edge_bits=9)


@pytest.mark.parametrize(
    ("text", "near"),
    [("w08a08", "w8a8"), ("\uff57\uff18\uff41\uff18", "w8a8"), ("w4g032a8", "w4g32a8"), ("W8A8", "w8a8")],
)
def test_a_scheme_has_one_name(text: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"is not a scheme.*did you mean {near!r}"):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["w\u0668a8", "w" + "9" * 5000 + "a8", "w0a8", "", "w8a8 " + "x" * 5000])
def test_texts_that_are_no_scheme(text: str) -> None:
    with pytest.raises(ValueError, match="is not a scheme") as error:
        Scheme.parse(text)
    assert len(str(error.value)) < 300
