"""Names to architectures."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import qzoo
from qzoo import registry
from qzoo.errors import ArgumentError, UnknownModelError
from qzoo.registry import FloatWeights, ModelName, parse_name


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A registry of our own, so that nothing stays registered."""
    empty: dict = {}
    monkeypatch.setattr(registry, "_entries", empty)
    monkeypatch.setattr(registry, "families", tuple)
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


def test_a_name_is_another_modules_once_and_a_cell_that_runs_again_replaces_it(entries: dict) -> None:
    registry.register_model()(tiny)
    assert registry.architecture("tiny").default_tag is None

    def other(*, num_classes: int = 10, in_channels: int = 3, quantize: object = None) -> nn.Module:
        return nn.Identity()

    other.__name__ = "tiny"
    with pytest.warns(UserWarning, match="'tiny' is registered anew") as caught:
        registry.register_model()(other)
    assert caught[0].filename == __file__
    assert registry.architecture("tiny").build is other
    tiny_elsewhere = functools.partial(tiny)
    tiny_elsewhere.__name__, tiny_elsewhere.__module__ = "tiny", "elsewhere"  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match=f"'tiny' is registered already, by {__name__}"):
        registry.register_model()(tiny_elsewhere)


def test_names_and_builders_of_another_form_are_refused_where_they_are_registered(entries: dict) -> None:
    def MyNet2(*, num_classes: int = 10, in_channels: int = 3, quantize: object = None) -> nn.Module:
        return nn.Identity()

    with pytest.raises(ArgumentError, match=r"'MyNet2' is no name.*call the builder 'my_net2'"):
        registry.register_model()(MyNet2)

    def no_channels(*, num_classes: int = 10, quantize: object = None) -> nn.Module:
        return nn.Identity()

    with pytest.raises(ArgumentError, match=r"no_channels does not take in_channels"):
        registry.register_model()(no_channels)
    assert registry.list_architectures() == []


def test_a_builder_may_have_no_defaults_and_take_its_arguments_by_place(entries: dict) -> None:
    @registry.register_model()
    def bare(num_classes: int, in_channels: int, quantize: object = None) -> nn.Module:
        return nn.Conv2d(in_channels, num_classes, 1)

    with pytest.raises(ArgumentError, match=r"bare has no default for in_channels; pass in_channels="):
        qzoo.create_model("bare", num_classes=4)
    assert qzoo.create_model("bare", num_classes=4, in_channels=2).weight.shape == (4, 2, 1, 1)


MY_NET = """
from torch import nn
from qzoo.models.layers import linear
from qzoo.registry import register_model

class Net(nn.Module):
    def __init__(self, classes, channels, quantize):
        super().__init__()
        self.fc = linear(channels, classes, quantize=quantize)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))

@register_model()
def {name}(*, num_classes=10, in_channels=3, quantize=None):
    return Net(num_classes, in_channels, quantize)
"""


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports, registers and puts on the path goes again."""
    registry.list_architectures()  # the zoo's own register once
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    registry._load_plugins.cache_clear()


def test_a_file_and_a_module_of_ones_own(
    imports: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_net_file.py").write_text(MY_NET.format(name="net_of_file"))
    registry.import_models(str(tmp_path / "my_net_file.py"))
    registry.import_models(str(tmp_path / "my_net_file.py"))  # twice is once
    assert "net_of_file" in registry.list_architectures()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "my_net_module.py").write_text(MY_NET.format(name="net_of_module"))
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    registry.import_models("my_net_module")
    assert "net_of_module" in registry.list_architectures()


def test_what_is_no_file_or_module_is_said(imports: None, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no file 'nowhere.py'"):
        registry.import_models("nowhere.py")
    with pytest.raises(ArgumentError, match=r"no module 'no.such.module'"):
        registry.import_models("no.such.module")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    with pytest.raises(ArgumentError, match=r"has the name of the module json"):
        registry.import_models(str(tmp_path / "json.py"))
    assert json.dumps(1) == "1"


def test_installed_packages_bring_models_by_entry_point(
    imports: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "my_nets-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-nets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qzoo.models]\nmine = my_nets_plugin\nbroken = my_nets_broken\n")
    (tmp_path / "my_nets_plugin.py").write_text(MY_NET.format(name="net_of_plugin"))
    (tmp_path / "my_nets_broken.py").write_text("raise RuntimeError('out of order')")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._load_plugins.cache_clear()
    with pytest.warns(
        UserWarning, match=r"broken = my_nets_broken can't be imported: RuntimeError: out of order"
    ):
        assert "net_of_plugin" in registry.list_architectures()
    assert qzoo.create_model("net_of_plugin-w8a8").fc.weight.shape == (10, 3)
