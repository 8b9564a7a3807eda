"""The whole road of an ImageNet checkpoint, with random weights: from a Hub on this machine, and back to it.

``QZOO_IMAGENET_SAMPLE`` names the images, which are repeated to ``QZOO_REHEARSAL_IMAGES``, 5000 before a release;
``QZOO_REHEARSAL_SIZE`` is the side of the network's input. It prints what each command took.
"""

# ruff: noqa: F811 - fixtures of another file are arguments here

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import resource
import tarfile
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType

import pytest
import safetensors.torch
import torch
from hub_server import Hub, Repo
from test_hub import server  # noqa: F401 - a fixture

import qzoo
from qzoo import registry
from qzoo.__main__ import main
from qzoo.cards.card import card
from qzoo.config import WEIGHTS, read_config
from qzoo.pipeline.build import build
from qzoo.pipeline.plan import BuildJob, BuildOptions
from qzoo.pipeline.recipes import recipes
from qzoo.preprocessing import Preprocessing
from qzoo.zoo import hub

COUNT = int(os.environ.get("QZOO_REHEARSAL_IMAGES", "24"))
SIZE = int(os.environ.get("QZOO_REHEARSAL_SIZE", "32"))
FLOAT, NAME = "resnet50.tv_in1k", "resnet50.tv_in1k-w8a8"
SUBSET = min(128, COUNT // 4)
FEW = [] if COUNT >= 512 else ["--calibration-subset", f":{SUBSET}"]  # the recipe has 128

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def float_weights(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's repository with random weights in the real layout, and its pin; nothing is published."""
    torch.manual_seed(0)
    content = safetensors.torch.save(dict(qzoo.create_model("resnet50").state_dict()))
    commit = server.repos.setdefault(f"timm/{FLOAT}", Repo()).commit({WEIGHTS: content, "config.json": b"{}"})
    entry = registry.architecture("resnet50")
    weights = dataclasses.replace(
        entry.weights["tv_in1k"],
        sources=(f"hf:timm/{FLOAT}/{WEIGHTS}",),
        sha256=(hashlib.sha256(content).hexdigest(),),
        revision=commit,
        preprocessing=Preprocessing((3, SIZE, SIZE)),
    )
    put(dataclasses.replace(entry, weights=MappingProxyType({"tv_in1k": weights}), published={}), monkeypatch)
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)


def put(entry: registry.Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries, "resnet50", entry)


@pytest.fixture
def images(imagenet_sample: Path) -> list[Path]:
    """Photos of the sample, repeated."""
    return list(islice(cycle(sorted(imagenet_sample.glob("n*/*.jp*g"))), COUNT))


def write_folder(folder: Path, images: list[Path]) -> Path:
    for i, path in enumerate(images):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / f"{i}.jpg").symlink_to(path)
    return folder


def write_shards(folder: Path, images: list[Path], shards: int = 4) -> str:
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i, path in enumerate(images[shard::shards]):
                content = path.read_bytes()
                member = tarfile.TarInfo(f"{path.parent.name}/{shard}-{i}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return f"wds:{folder}/{{0..{shards - 1}}}.tar"


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command, which must succeed; gives what it prints."""
    took: dict[str, float] = {}

    def run(*command: object) -> str:
        before = resource.getrusage(resource.RUSAGE_SELF)
        status = main([*map(str, command), "-q"] if command[0] != "publish" else [*map(str, command)])
        after = resource.getrusage(resource.RUSAGE_SELF)
        took[" ".join(map(str, command[:2]))] = (
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        )
        output = capsys.readouterr()
        assert status == 0, output.err
        return output.out

    yield run
    with capsys.disabled():
        for name, seconds in took.items():
            print(f"\n{COUNT} images of {SIZE} px: qzoo {name}: {seconds:.1f} s of CPU", end="")


def publish_and_load(folder: Path, name: str, run: Run, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the Hub, into the registry, and back by name: verified, and the same to the bit."""
    run("publish", folder, "--to", f"lab/{name}")
    repo = server.repos[f"lab/{name}"]
    commit = repo.refs["main"]
    digest = hashlib.sha256(repo.commits[commit]["config.json"]).hexdigest()
    pins = {name: registry.Pin(f"lab/{name}", commit, digest)}
    put(dataclasses.replace(registry.architecture("resnet50"), published=pins), monkeypatch)
    assert run("verify", name).startswith(f"ok    {name}")
    x = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(qzoo.create_model(name, pretrained=True)(x), qzoo.load_pretrained(folder)(x))


def test_calibrated_from_a_folder(
    images: list[Path], run: Run, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_folder(Path("val"), images)
    options = BuildOptions(calibration_subset=f":{SUBSET}") if FEW else None

    def stop(line: str) -> None:
        if line.startswith("evaluate float"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(NAME, options, BuildJob(data=data, out="made", progress=False), report=stop)
    assert not Path("made").exists()
    said: list[str] = []
    build(NAME, options, BuildJob(data=data, out="made", progress=False), report=said.append)
    assert said[:2] == ["calibrate: done before", "export for onnxruntime: done before"]
    config = read_config("made")
    assert config.float_source is not None
    assert config.float_source.source == f"hf:timm/{FLOAT}/{WEIGHTS}"
    assert [row.images for row in config.metrics] == [COUNT - SUBSET] * 4
    assert Path("made/README.md").read_text() == card(config)

    simulated = next(row for row in config.metrics if row.target == "onnxruntime" and row.runtime == "torch")
    output = run("evaluate", "made", "--data", data)
    assert f"{COUNT - SUBSET} images ({SUBSET} images that it was made on are left out)" in output
    assert f"top-1      {simulated.top1:.2f} %" in output
    run("export", "made", "model.onnx", "--target", "openvino")
    assert Path("model.onnx").stat().st_size < 30e6  # int8
    publish_and_load(Path("made"), NAME, run, server, monkeypatch)


def test_calibrated_from_shards(images: list[Path], run: Run) -> None:
    data = write_shards(Path("shards"), images)
    output = run("build", NAME, "--data", data, "--out", "made", "--no-onnx", *FEW)
    assert output.strip() == str(Path("made").absolute())
    config = read_config("made")
    assert config.calibration is not None
    assert (config.calibration.subset, config.calibration.images) == (f"0:{SUBSET}", SUBSET)
    assert [row.images for row in config.metrics] == [COUNT - SUBSET] * 4


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_tuned(kind: str, images: list[Path], run: Run, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's options, but one epoch and small batches; of shards, which are one split, a fifth is measured on."""
    name = f"{NAME}_qat"
    recipe = next(config for config in recipes() if config.name == name)
    assert recipe.training is not None
    assert (recipe.training["epochs"], recipe.training["batch_size"]) == (15, 256)
    short = {**recipe.training, "epochs": 1, "batch_size": 8}
    Path("made").mkdir()
    Path("made/config.json").write_text(dataclasses.replace(recipe, training=short).to_json())
    data: object = write_shards(Path("shards"), images)
    if kind == "folder":
        data = Path("imagenet")
        write_folder(data / "train", images)
        write_folder(data / "val", images)
    run("build", name, "--data", data, "--out", "made")
    config = read_config("made")
    assert config.training is not None
    assert config.training["images"] == (COUNT if kind == "folder" else COUNT * 4 // 5)
    assert [row.images for row in config.metrics] == [
        COUNT if kind == "folder" else COUNT - COUNT * 4 // 5
    ] * 3
    if kind == "folder":
        publish_and_load(Path("made"), name, run, server, monkeypatch)
