"""Names to architectures."""

from __future__ import annotations

import pytest
from torch import nn

from qzoo import registry
from qzoo.errors import UnknownModelError
from qzoo.registry import FloatWeights, ModelName, parse_name


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A registry of our own, so that nothing stays registered."""
    empty: dict = {}
    monkeypatch.setattr(registry, "_entries", empty)
    monkeypatch.setattr(registry, "FAMILIES", ())
    return empty


def tiny(*, num_classes: int = 10, in_channels: int = 3, quantize: object = None) -> nn.Module:
    return nn.Linear(in_channels, num_classes)


PROMISED = (
    [f"resnet{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)]
    + ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]
    + ["mobilenet_v2"]
    + [f"{prefix}efficientnet_lite{number}" for prefix in ("", "tf_") for number in range(5)]
)


def test_the_zoo_has_the_architectures_it_promises() -> None:
    assert set(PROMISED) <= set(registry.list_architectures())


def test_list_is_filtered_and_in_a_readers_order() -> None:
    assert registry.list_architectures("resnet[0-9]*") == [
        f"resnet{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)
    ]
    assert registry.list_architectures("nothing*") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resnet50", ModelName("resnet50")),
        ("resnet50.tv_in1k", ModelName("resnet50", "tv_in1k")),
        ("resnet50.tv_in1k-w8a8", ModelName("resnet50", "tv_in1k", "w8a8")),
        ("resnet20.fmnist-w4a4_qat", ModelName("resnet20", "fmnist", "w4a4", True)),
        ("resnet20-w4a8", ModelName("resnet20", None, "w4a8")),
        ("resnext50_32x4d.tv_in1k", ModelName("resnext50_32x4d", "tv_in1k")),
    ],
)
def test_names_are_parsed_and_put_together_again(text: str, expected: ModelName) -> None:
    assert parse_name(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resnet50.",
        "resnet50-int8",
        "resnet50.tv_in1k-w8",
        "ResNet50",
        "resnet50 w8a8",
        "resnet50-w8a8_qatx",
    ],
)
def test_other_texts_are_no_names(text: str) -> None:
    with pytest.raises(UnknownModelError, match=r"arch\.tag-scheme"):
        parse_name(text)


def test_an_error_suggests_near_names() -> None:
    with pytest.raises(UnknownModelError, match="did you mean 'mobilenet_v2'"):
        registry.architecture("mobilenetv2")
    with pytest.raises(UnknownModelError, match="'resnet50'"):
        parse_name("resnet-50")
    with pytest.raises(UnknownModelError) as raised:
        registry.architecture("xyzzy")
    assert "did you mean" not in str(raised.value)


def test_register_model_keeps_the_function_and_its_weights(entries: dict) -> None:
    first, second = FloatWeights(("https://a",)), FloatWeights(("https://b",))
    assert registry.register_model({"one": first, "two": second})(tiny) is tiny
    entry = registry.architecture("tiny")
    assert (entry.name, entry.build, entry.default_tag) == ("tiny", tiny, "one")
    assert dict(entry.weights) == {"one": first, "two": second}
    with pytest.raises(TypeError):
        entry.weights["three"] = first  # type: ignore[index]


def test_a_name_is_given_once(entries: dict) -> None:
    registry.register_model()(tiny)
    assert registry.architecture("tiny").default_tag is None
    with pytest.raises(ValueError, match="'tiny' is registered already"):
        registry.register_model()(tiny)
