"""A model that nobody has published: downloaded, calibrated without data, kept, and loaded again."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
import threading
import warnings
from pathlib import Path
from types import MappingProxyType

import pytest
import safetensors.torch
import torch
from hub_server import Hub, Repo
from small_data import shallow_resnet20
from test_hub import server  # noqa: F401 - a fixture
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import qzoo
from qzoo import registry
from qzoo.cards.card import card
from qzoo.config import Config, FloatSource, config_of, read_config
from qzoo.errors import ArgumentError, CheckpointError, HubError, UnknownModelError
from qzoo.models.resnet import Bottleneck, ResNet
from qzoo.options import Recipe
from qzoo.preprocessing import Preprocessing
from qzoo.ptq import apply
from qzoo.ptq.procedural import Comparison, procedural_batches
from qzoo.quantizers import active_quantizers
from qzoo.scheme import Scheme
from qzoo.zoo import calibrated, create, hub
from qzoo.zoo.sources import known_digests

NAME = "resnet50.tv_in1k"
RECIPE = Recipe(method="procedural", bias_correction="analytic")
A, B = "a" * 64, "b" * 64


def serve_resnet50(server: Hub, monkeypatch: pytest.MonkeyPatch, pixels: int) -> Repo:  # noqa: F811
    """timm's repository with random weights of a shallow network, one block a stage, and its pin; images of so many
    pixels."""
    entry = registry.architecture("resnet50")
    shallow = functools.wraps(entry.build)(functools.partial(ResNet, Bottleneck, (1, 1, 1, 1)))
    torch.manual_seed(0)
    model = shallow()
    content = safetensors.torch.save(dict(model.state_dict()))
    repo = server.repos.setdefault("timm/resnet50.tv_in1k", Repo())
    commit = repo.commit({"model.safetensors": content, "config.json": b"{}"})
    weights = dataclasses.replace(
        entry.weights["tv_in1k"],
        sources=("hf:timm/resnet50.tv_in1k/model.safetensors",),
        sha256=(hashlib.sha256(content).hexdigest(),),
        revision=commit,
        preprocessing=Preprocessing((3, pixels, pixels)),
    )
    changed = dataclasses.replace(entry, build=shallow, weights=MappingProxyType({"tv_in1k": weights}))
    monkeypatch.setitem(registry._entries, "resnet50", changed)
    return repo


@pytest.fixture(autouse=True)
def nothing_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "nothing")
    monkeypatch.setattr(hub, "pins", dict)


@pytest.fixture
def resnet50(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Repo:  # noqa: F811
    return serve_resnet50(server, monkeypatch, 32)


def test_download_calibrate_keep_and_load_again(
    resnet50: Repo,
    server: Hub,  # noqa: F811
    qzoo_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    said = (
        "no published checkpoint of resnet50.tv_in1k-w8a8: calibrated from its float weights without images; "
        "unmeasured"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        model = qzoo.resnet50(pretrained=True, quantize=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    record = config_of(model).calibration
    assert record is not None
    assert (record.method, record.images, record.data) == ("procedural", 0, "none")
    assert f"agree on {record.agreement:.1f} % of 64 procedural images" in str(caught[0].message)
    assert ("do not rely on it" in str(caught[0].message)) == (record.agreement < 90)

    (folder,) = (qzoo_home / "calibrated" / f"{NAME}-w8a8").iterdir()
    text = (folder / "README.md").read_text()
    assert "Calibrated without data, accuracy not measured." in text
    assert text == card(read_config(folder))
    assert read_config(folder).float_source.source == "hf:timm/resnet50.tv_in1k/model.safetensors"

    requests = len(server.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(create, "load_float", None)  # neither fetched nor calibrated again
    x = torch.randn(2, 3, 32, 32)
    for again in (
        qzoo.resnet50(pretrained=True, quantize=True),
        qzoo.create_model(f"{NAME}-w8a8", pretrained=True),
    ):
        assert torch.equal(again(x), model(x))
    assert len(server.log) == requests
    other = qzoo.resnet50(pretrained=True, quantize=True, target="tensorrt")
    assert len(active_quantizers(other)) < len(active_quantizers(model))
    assert qzoo.list_models("resnet50", pretrained=True) == [NAME]  # none of the user's own


def test_float_weights_that_are_not_the_pinned_ones(
    resnet50: Repo,
    server: Hub,  # noqa: F811
    qzoo_home: Path,
) -> None:
    server.fault("GET /lfs/", "wrong")
    with pytest.raises(HubError, match=r"(?s)resnet50.tv_in1k can't be had.*SHA-256"):
        qzoo.resnet50(pretrained=True, quantize=True)
    assert not list(qzoo_home.rglob("config.json"))


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_never(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"calibrate": "never"} if by == "argument" else {}
    if by == "environment":
        monkeypatch.setenv("QZOO_CALIBRATE", "never")
    with pytest.raises(UnknownModelError, match=r"no checkpoint 'resnet50.tv_in1k-w8a8'.*qzoo build"):
        qzoo.resnet50(pretrained=True, quantize=True, **given)


def test_refusals_come_before_any_download(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="calibrate must be 'auto' or 'never', not 'yes'"):
        qzoo.resnet50(pretrained=True, quantize=True, calibrate="yes")
    with pytest.raises(CheckpointError, match="a quantized checkpoint gets no new classifier"):
        qzoo.resnet50(pretrained=True, quantize=True, num_classes=5)
    with pytest.raises(CheckpointError, match="in_channels=1"):
        qzoo.resnet50(pretrained=True, quantize=True, in_channels=1)
    with pytest.raises(UnknownModelError, match="no checkpoint"):  # which is trained, not calibrated
        qzoo.create_model("resnet18.tv_in1k-w8a8_qat", pretrained=True)
    monkeypatch.setenv("QZOO_CALIBRATE", "sometimes")
    with pytest.raises(ArgumentError, match="QZOO_CALIBRATE must be"):
        qzoo.resnet50(pretrained=True, quantize=True)


# ---- the cache, with a small network ----


class Small:
    """``load_calibrated`` on resnet20 with random weights, said to be of a file; counts how often it starts."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.state = qzoo.create_model("resnet20.fmnist").state_dict()
        self.config: Config = config_of(qzoo.create_model("resnet20.fmnist-w8a8"))
        self.digest = A
        self.started = 0

    def start(self) -> nn.Module:
        self.started += 1
        model = qzoo.create_model("resnet20.fmnist-w8a8")
        model.load_state_dict({**model.state_dict(), **self.state}, strict=False)
        source = FloatSource("folder:resnet20", "", self.digest, "mit")
        model.qzoo_config = dataclasses.replace(config_of(model), float_source=source)
        return model.eval()

    def load(
        self, digest: str = A, recipe: Recipe = RECIPE, known: bool = True
    ) -> tuple[nn.Module, list[str]]:
        self.digest = digest
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = calibrated.load_calibrated(self.config, recipe, [digest] * known, self.start, None)
        return found, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("arch", "scheme", "rounding", "correction"),
    [
        ("resnet50", "w8a8", "nearest", "analytic"),
        ("resnet50", "w4a8", "learned", "none"),
        ("resnet50", "w4g32a8", "nearest", "analytic"),
        ("tf_efficientnet_lite0", "w8a8", "learned", "none"),
        ("deit_tiny_patch16_224", "w8a8", "nearest", "analytic"),
        ("deit_tiny_patch16_224", "w4a8", "sequential", "none"),  # has no BatchNorms
    ],
)
def test_rounding_without_data(arch: str, scheme: str, rounding: str, correction: str) -> None:
    defaults = registry.architecture(arch).family.defaults
    recipe = calibrated.recipe_without_data(defaults, Scheme.parse(scheme))
    assert (recipe.method, recipe.rounding, recipe.bias_correction) == ("procedural", rounding, correction)
    assert (recipe.smooth, recipe.alpha) == (defaults.recipe.smooth, defaults.recipe.alpha)


def test_alpha_is_searched_on_procedural_images() -> None:
    torch.manual_seed(0)
    network = VisionTransformer(28, 4, 1, num_classes=10, embed_dim=32, depth=1, num_heads=2)
    model = qzoo.quantize(network.eval(), torch.zeros(1, 1, 28, 28), Scheme(), factory="net.py:make")
    recipe = calibrated.recipe_without_data(registry.TRANSFORMER, Scheme())
    made = calibrated.calibrate_without_data(model, recipe)
    assert (made.method, made.recipe, made.held_back) == ("procedural", "alpha", 8)
    found = [trial.sqnr_db or 0.0 for trial in made.candidates]
    assert len(found) == 4
    assert found == sorted(found, reverse=True)
    assert made.candidates[0].method == str(made.applied())
    assert made.asked() == recipe
    assert (made.agreement or 0) > 90


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    """With one block a stage and few images: what counts here is what is made and kept, not how good it is."""
    monkeypatch.setitem(registry._entries, "resnet20", shallow_resnet20())
    monkeypatch.setattr(apply, "procedural_batches", functools.partial(procedural_batches, images=16))
    monkeypatch.setattr(calibrated, "Comparison", functools.partial(Comparison, images=8))
    return Small()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 2, 2 * 28 * 28).reshape(2, 1, 28, 28))


def test_other_weights_recipes_bits_and_versions_are_other_checkpoints(
    small: Small, qzoo_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.load()
    small.load()
    assert small.started == 1
    small.load(B)
    assert small.started == 2
    made = {path.parent.name for path in qzoo_home.rglob("config.json")}
    six = dataclasses.replace(small.config, scheme=Scheme(edge_bits=6))
    keys = [calibrated._key(small.config, RECIPE, digest) for digest in (A, B)]
    assert made == set(keys)
    keys += [calibrated._key(six, RECIPE, A), calibrated._key(small.config, Recipe(method="procedural"), A)]
    monkeypatch.setattr(calibrated, "VERSION", 0)
    assert len({*keys, calibrated._key(small.config, RECIPE, A)}) == 5


def test_the_key_is_of_the_file_that_was_used(small: Small, qzoo_home: Path) -> None:
    """Of a source without a pinned SHA-256 the file is read, but not calibrated again."""
    small.load(A, known=False)
    (made,) = (path.parent.name for path in qzoo_home.rglob("config.json"))
    assert made == calibrated._key(small.config, RECIPE, A)
    _, said = small.load(A, known=False)
    assert small.started == 2
    assert said == []
    small.load(A)
    assert small.started == 2
    _, said = small.load(B, known=False)
    assert len(said) == 1


def test_known_digests_are_whole(qzoo_home: Path) -> None:
    weights = registry.FloatWeights(
        ("hf:a/b/c", "https://d/e", "pypi:f/g", "https://h"), (A, B[:8], "", B[:8])
    )
    assert known_digests(weights) == [A]
    qzoo_home.mkdir()
    (qzoo_home / "float_sha256.json").write_text(f'{{"https://d/e": "{B}"}}')
    assert known_digests(weights) == [A, B]
    for damage in ("{", "[]"):
        (qzoo_home / "float_sha256.json").write_text(damage)
        assert known_digests(weights) == [A]


def test_what_is_made_is_what_is_loaded_and_a_damaged_one_is_made_again(
    small: Small, qzoo_home: Path
) -> None:
    made, _ = small.load()
    assert torch.equal(outputs(small.load()[0]), outputs(made))
    (weights,) = qzoo_home.rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert torch.equal(outputs(small.load()[0]), outputs(made))
    assert small.started == 2


def test_two_at_once_make_it_once(small: Small) -> None:
    found: list[Tensor] = []
    first = threading.Event()

    def start() -> nn.Module:
        first.set()
        return small.start()

    def load() -> None:
        model = calibrated.load_calibrated(small.config, RECIPE, [A], start, None)
        found.append(outputs(model))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=load) for _ in range(2)]
        threads[0].start()
        first.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join()
    assert small.started == 1
    assert torch.equal(found[0], found[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_the_middle_leaves_nothing_and_no_lock(small: Small, qzoo_home: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            calibrated.load_calibrated(small.config, RECIPE, [A], lambda: os._exit(9), None)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not list(qzoo_home.rglob("config.json"))
    small.load()
    assert small.started == 1


def test_a_full_disk_still_gives_the_model(
    small: Small, qzoo_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected, _ = small.load(B)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    model, said = small.load()
    assert len(said) == 1
    assert "It is not kept for the next call" in said[0]
    assert "No space left on device" in said[0]
    assert torch.equal(outputs(model), outputs(expected))
    assert not list(qzoo_home.rglob("*.tmp"))


def test_a_cache_that_cant_be_written_to_is_read_and_else_left_alone(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QZOO_HOME", str(tmp_path / "file" / "home"))
    model, said = small.load()
    assert "It is not kept for the next call" in said[0]
    assert config_of(model).calibration is not None


def test_a_model_that_does_not_agree_is_warned_of_each_time(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated, "RELIABLE", 100.1)
    _, said = small.load()
    assert len(said) == 1
    assert "do not rely on it; its costliest layers are " in said[0]
    layers = said[0].partition("costliest layers are ")[2].split(", ")
    names = {name for name, _ in small.start().named_modules()}
    assert len(layers) == 3
    assert set(layers) <= names
    _, said = small.load()
    assert len(said) == 1
    assert "`qzoo sensitivity` ranks its layers" in said[0]
