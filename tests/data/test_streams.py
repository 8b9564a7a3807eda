"""Data where it lies: Parquet, shards, NPZ and Hugging Face data sets by the real libraries, against NumPy."""

from __future__ import annotations

import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qzoo.data import Augmentation, load_data, load_training_data
from qzoo.data.sets import imagenet_names, imagenet_synsets, label_names
from qzoo.data.sources import Sample
from qzoo.data.streams import LabelMap, StreamLoader
from qzoo.distributed import Group
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

SMALL = Preprocessing((3, 8, 8), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
COUNT = 10
LABELS = [(7 * i) % 10 for i in range(COUNT)]
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
INPUTS = torch.tensor((PIXELS.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).float()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path) -> str:
    """Three shards: labels as .cls, in .json, and as WordNet ids in the names."""
    samples = [(png(PIXELS[i]), LABELS[i]) for i in range(COUNT)]
    files: list[dict[str, bytes]] = [{}, {}, {}]
    for i, (image, label) in enumerate(samples):
        if i < 4:
            files[0] |= {f"{i:03}.png": image, f"{i:03}.cls": str(label).encode()}
        elif i < 8:
            files[1] |= {f"{i:03}.json": json.dumps({"label": label}).encode(), f"{i:03}.png": image}
        else:
            files[2] |= {f"{imagenet_synsets()[label]}/{i:03}.png": image}
    for i, content in enumerate(files):
        write_tar(folder / f"part-{i}.tar", content)
    return f"wds:{folder}/part-{{0..2}}.tar"


def write_parquet(folder: Path, names: tuple[str, ...] | None = None, labels: list | None = None) -> str:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    columns = {
        "image": [{"bytes": png(p), "path": f"{i}.png"} for i, p in enumerate(PIXELS)],
        "label": labels or LABELS,
    }
    features = datasets.Features({"image": datasets.Image(), "label": label})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features).to_parquet(folder / "test.parquet")
    return f"parquet:{folder / 'test.parquet'}"


def write_npz(folder: Path) -> str:
    np.savez(
        folder / "all.npz",
        test_images=PIXELS,
        test_labels=np.array(LABELS),
        train_images=PIXELS[:2],
        train_labels=[1, 2],
    )
    return f"npz:{folder / 'all.npz'}"


def write(kind: str, folder: Path) -> str:
    if kind == "hfds":
        write_parquet(folder / "set")
        (folder / "set" / "README.md").write_text(CARD)
        return f"hfds:{folder / 'set'}"
    if kind == "wds":
        pytest.importorskip("webdataset", reason="needs the extra 'data'")
    return {"wds": write_shards, "parquet": write_parquet, "npz": write_npz}[kind](folder)


def labels_of(loader: object) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]  # type: ignore[attr-defined]


CARD = """---
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: int64}
  splits:
  - {name: test, num_bytes: 1, num_examples: 10}
---
"""
KINDS = ["wds", "parquet", "npz", "hfds"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package ``datasets`` writes nothing outside."""
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_images_labels_and_order(kind: str, tmp_path: Path) -> None:
    loader = load_data(SMALL, "imagenet-1k", write(kind, tmp_path), batch_size=4)
    assert len(loader) == 3
    for _ in range(2):
        batches = list(loader)
        torch.testing.assert_close(torch.cat([images for images, _ in batches]), INPUTS)
        assert torch.cat([labels for _, labels in batches]).tolist() == LABELS
    assert [len(labels) for _, labels in batches] == [4, 4, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_subsets_workers_and_ranks_part_the_images(kind: str, tmp_path: Path) -> None:
    data = write(kind, tmp_path)
    loader = load_data(SMALL, "imagenet-1k", data, subset="3:9", batch_size=2, workers=2)
    assert torch.cat([labels for _, labels in loader]).tolist() == LABELS[3:9]
    whole = load_data(SMALL, "imagenet-1k", data, batch_size=3)
    expected = sorted(labels.tolist() for _, labels in whole)
    for world in (2, 3, 4):
        for start in (0, 1):
            parts = [list(Group(rank, world).deal(whole, start)) for rank in range(world)]
            numbers = [number for part in parts for number, _ in part]
            assert len(set(numbers)) == len(numbers)
            dealt = [labels.tolist() for part in parts for _, (_, labels) in part]
            assert sorted([*dealt, *([LABELS[:3]] if start else [])]) == expected
    with pytest.raises(DataError, match="does not fit 10 images"):
        load_data(SMALL, "imagenet-1k", data, subset="5:11")


def test_names_of_classes_become_the_models_indices(tmp_path: Path) -> None:
    spelled = tuple(name.replace("-", " - ").upper() for name in label_names("fashion-mnist"))
    grey = Preprocessing((1, 8, 8), 1.0, "bilinear", (0.5,), (0.25,))
    backwards = write_parquet(tmp_path / "b", spelled[::-1])
    assert next(iter(load_data(grey, "fashion-mnist", backwards)))[1].tolist() == [9 - i for i in LABELS]
    same = write_parquet(tmp_path / "s", spelled)
    assert next(iter(load_data(grey, "fashion-mnist", same)))[1].tolist() == LABELS
    wnids = tuple(imagenet_synsets()[500:510])
    some = write_parquet(tmp_path / "w", wnids)
    assert next(iter(load_data(SMALL, "imagenet-1k", some)))[1].tolist() == [500 + i for i in LABELS]
    with pytest.raises(DataError, match="'airplane', which is no class of fashion-mnist"):
        load_data(grey, "fashion-mnist", write_parquet(tmp_path / "o", label_names("cifar-10")))
    with pytest.raises(DataError, match="the data have 10 classes"):
        load_data(grey, "cifar-100", same)


def test_names_of_a_models_own_classes(tmp_path: Path) -> None:
    """Of a network of the user's: its names are in another order in the data, or are the labels themselves."""
    cat_dog = Preprocessing((3, 8, 8), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    labels = [i % 2 for i in range(COUNT)]
    data = write_parquet(tmp_path / "a", ("dog", "cat"), labels)
    of_model = [1 - i for i in labels]
    assert next(iter(load_data(cat_dog, "folders", data, classes=("cat", "dog"))))[1].tolist() == of_model
    assert next(iter(load_data(cat_dog, "folders", data)))[1].tolist() == labels
    files = {f"{i}.png": png(p) for i, p in enumerate(PIXELS)}
    files |= {f"{i}.cls": (b"cat", b"dog")[k] for i, k in enumerate(labels)}
    shard = f"wds:{write_tar(tmp_path / 'a.tar', dict(sorted(files.items())))}"
    assert next(iter(load_data(cat_dog, "folders", shard, classes=("cat", "dog"))))[1].tolist() == labels
    with pytest.raises(DataError, match="'dog', which is no class of folders"):
        load_data(cat_dog, "folders", data, classes=("cat", "cow"))
    with pytest.raises(
        DataError, match="the data have 2 classes, such as 'dog', which are not the model's 3"
    ):
        load_data(cat_dog, "folders", data, classes=3)


def test_imagenets_own_names_keep_their_order() -> None:
    assert LabelMap("imagenet-1k", imagenet_names()).order == list(range(1000))  # two of them are cranes
    assert LabelMap("imagenet-1k").index(Sample("x", b"", "n15075141")) == 999


@pytest.mark.parametrize("label", [-1, 10, 1 << 40])
def test_a_label_outside_the_classes_is_named(label: int, tmp_path: Path) -> None:
    data = write_parquet(tmp_path, labels=[*LABELS[:6], label, *LABELS[7:]])
    loader = load_data(SMALL, "cifar-10", data, batch_size=4, skip_broken=True)
    with pytest.raises(DataError, match=rf"image 6 \(6.png\) has the label {label}.* classes 0 to 9"):
        list(loader)
    with pytest.raises(DataError, match="classes 0 to 2"):
        list(load_data(SMALL, "folders", data, classes=3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_skipped_only_if_asked(workers: int, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the extra 'data'")
    files = {f"{i}.png": png(PIXELS[i]) for i in range(5)} | {f"{i}.cls": b"1" for i in range(5)}
    files["2.png"] = files["2.png"][:60]
    data = f"wds:{write_tar(tmp_path / 'a.tar', dict(sorted(files.items())))}"
    with pytest.raises(DataError, match=r"a.tar, 2 can't be read as an image") as error:
        list(load_data(SMALL, "cifar-10", data, workers=workers))
    assert "\n" not in str(error.value)
    loader = load_data(SMALL, "cifar-10", data, workers=workers, batch_size=2, skip_broken=True)
    for _ in range(2):
        torch.testing.assert_close(torch.cat([images for images, _ in loader]), INPUTS[[0, 1, 3, 4]])
        assert len(loader.broken) == 1
        assert "a.tar, 2" in loader.broken[0]


def test_a_broken_file_of_a_folder_is_skipped_if_asked(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{i}.png").write_bytes(png(PIXELS[i]) if i else b"nothing")
    loader = load_data(SMALL, "folders", tmp_path, batch_size=2, skip_broken=True)
    assert sum(len(labels) for _, labels in loader) == 3
    assert ["0.png" in text for text in loader.broken] == [True]
    with pytest.raises(DataError, match=r"0.png can't be read"):
        list(load_data(SMALL, "folders", tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_has_another_image_in_the_place_of_a_broken_one(workers: int, tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "photo.png").write_bytes(png(PIXELS[i]) if i != 4 else b"nothing")
    loader = load_training_data(SMALL, "folders", tmp_path, batch_size=3, workers=workers, skip_broken=True)
    for epoch in range(2):
        loader.set_epoch(epoch)
        labels = labels_of(loader)
        assert [len(batch) for batch in labels] == [3, 3]
        assert sorted(set(labels[0] + labels[1])) == [0, 1, 2, 3, 5]
        assert sorted(len(set(batch)) for batch in labels) == [2, 3]  # the other is of the same batch
        assert ["4/photo.png" in text for text in loader.broken] == [True]
    refusing = load_training_data(SMALL, "folders", tmp_path, batch_size=3, workers=workers)
    with pytest.raises(DataError, match=r"4/photo.png can't be read") as error:
        list(refusing)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no image of a batch decodes"):
        list(load_training_data(SMALL, "folders", tmp_path, batch_size=1, skip_broken=True))


@pytest.mark.parametrize("kind", ["parquet", "hfds"])
def test_files_of_rows_are_read_one_by_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files whose rows are counted, and a data set that says how many rows all of its files have."""
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    monkeypatch.setattr("qzoo.data.sources._LARGE", 3)
    (tmp_path / "set").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for i, (start, stop) in enumerate([(0, 4), (4, 7), (7, 10)]):
        rows = [{"bytes": png(p), "path": ""} for p in PIXELS[start:stop]]
        table = datasets.Dataset.from_dict({"image": rows, "label": LABELS[start:stop]}, features)
        table.to_parquet(tmp_path / "set" / f"test-{i}.parquet")
    (tmp_path / "set" / "README.md").write_text(CARD)
    loader = load_data(SMALL, "imagenet-1k", f"{kind}:{tmp_path / 'set'}", subset="2:", batch_size=2)
    assert labels_of(loader) == [LABELS[2:4], LABELS[4:6], LABELS[6:7], LABELS[7:9], LABELS[9:]]
    parts = [[y.tolist() for _, (_, y) in Group(rank, 3).deal(loader)] for rank in range(3)]
    assert parts == [[LABELS[2:4]], [LABELS[4:6], LABELS[6:7]], [LABELS[7:9], LABELS[9:]]]
    epoch = load_training_data(SMALL, "imagenet-1k", f"{kind}:{tmp_path / 'set'}", batch_size=5)
    assert sorted(label for labels in labels_of(epoch) for label in labels) == sorted(LABELS)


# ---- shards ----


class Server:
    """Files of a folder over HTTP, with ranges as any file server has them; ``sent`` counts bytes of content."""

    def __init__(self, folder: Path) -> None:
        self.sent: dict[str, int] = {}
        self.cut: set[str] = set()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not (folder / self.path.strip("/")).is_file():
                    self.send_error(404)
                    return
                content = (folder / self.path.strip("/")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                content = content[: len(content) // 2] if self.path in server.cut else content
                server.sent[self.path] = server.sent.get(self.path, 0) + len(content)
                self.wfile.write(content)
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("webdataset", reason="needs the extra 'data'")
    write_shards(tmp_path)
    running = Server(tmp_path)
    yield running
    running.http.shutdown()
    running.http.server_close()


def test_shards_over_http_are_read_no_further_than_asked(server: Server) -> None:
    data = f"wds:{server.url}/part-{{0..2}}.tar"
    first = load_data(SMALL, "imagenet-1k", data, subset=":3", workers=1)
    assert torch.cat([labels for _, labels in first]).tolist() == LABELS[:3]
    assert list(server.sent) == ["/part-0.tar"]
    rest = load_data(SMALL, "imagenet-1k", data, subset="3:", batch_size=4)
    assert torch.cat([labels for _, labels in rest]).tolist() == LABELS[3:]
    with pytest.raises(DataError, match="the data end after 10 images"):
        list(load_data(SMALL, "imagenet-1k", data, subset="8:12"))
    server.cut.add("/part-1.tar")
    with pytest.raises(DataError, match=r"part-1.tar is cut off"):
        list(load_data(SMALL, "imagenet-1k", data))
    with pytest.raises(DataError, match=r"part-9.tar can't be read .*404"):
        list(load_data(SMALL, "imagenet-1k", f"wds:{server.url}/part-9.tar"))


def test_a_process_reads_its_own_shards_and_no_others(server: Server) -> None:
    """All of them only where the place in the data is to be found out, or there are fewer shards than processes."""
    data = f"wds:{server.url}/part-{{0..2}}.tar"
    found: list[int] = []
    for rank in range(3):
        server.sent.clear()
        loader = load_data(SMALL, "imagenet-1k", data, subset="2:", batch_size=3)
        found += [label for _, (_, labels) in Group(rank, 3).deal(loader) for label in labels.tolist()]
        assert list(server.sent) == list(dict.fromkeys(["/part-0.tar", f"/part-{rank}.tar"]))
    assert found == LABELS[2:]
    server.sent.clear()
    list(Group(1, 4).deal(load_data(SMALL, "imagenet-1k", data)))
    assert len(server.sent) == 3


@pytest.mark.parametrize("end", ["in an image", "between two"])
def test_a_shard_that_is_cut_off_is_named(end: str, server: Server, tmp_path: Path) -> None:
    content = (tmp_path / "part-0.tar").read_bytes()
    with tarfile.open(tmp_path / "part-0.tar") as tar:
        last = tar.getmember("003.png").offset
    (tmp_path / "part-0.tar").write_bytes(content[: last + (600 if end == "in an image" else 0)])
    with pytest.raises(DataError, match=r"part-0.tar (is cut off|can't be read)"):
        load_data(SMALL, "imagenet-1k", f"wds:{tmp_path}/part-0.tar")
    with pytest.raises(DataError, match=r"part-0.tar (is cut off|can't be read)"):
        list(load_data(SMALL, "imagenet-1k", f"wds:{server.url}/part-{{0..1}}.tar"))


class Trap:
    def __reduce__(self) -> tuple:
        return os.abort, ()


def test_nothing_is_unpickled_and_no_shell_is_run(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the extra 'data'")
    trap = pickle.dumps(Trap())
    files = {"0.png": png(PIXELS[0]), "0.cls": b"3", "0.pyd": trap, "0.pickle": trap, "0.pth": trap}
    data = f"wds:{write_tar(tmp_path / 'a.tar', files)}"
    assert next(iter(load_data(SMALL, "cifar-10", data)))[1].tolist() == [3]
    (tmp_path / "b.tar").write_bytes(trap)
    with pytest.raises(DataError, match=r"b.tar"):
        load_data(SMALL, "cifar-10", f"wds:{tmp_path / 'b.tar'}")
    with pytest.raises(DataError):
        load_data(SMALL, "cifar-10", f"wds:pipe:touch {tmp_path / 'ran'}")
    np.savez(tmp_path / "a.npz", images=np.array([Trap()], dtype=object), labels=np.array([0]))
    (tmp_path / "c.npz").write_bytes(trap)
    for name in ("a.npz", "c.npz"):
        with pytest.raises(DataError, match=rf"{name} can't be read"):
            load_data(SMALL, "cifar-10", f"npz:{tmp_path / name}")
    assert not (tmp_path / "ran").exists()


# ---- epochs ----


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_each_image_once_in_an_order_of_its_own(kind: str, tmp_path: Path) -> None:
    plain = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    data = write(kind, tmp_path)
    if kind == "npz":
        data = f"npz:{tmp_path / 'test.npz'}"
        np.savez(tmp_path / "test.npz", images=PIXELS, labels=LABELS)
    inputs = {tuple(image.flatten().tolist()): label for image, label in zip(INPUTS, LABELS, strict=True)}

    def loader(**options: object) -> StreamLoader:
        given = {"batch_size": 3, "seed": 5, "augmentation": plain, **options}
        return load_training_data(SMALL, "imagenet-1k", data, **given)  # type: ignore[arg-type, return-value]

    epochs = []
    for epoch in range(4):
        one = loader()
        one.set_epoch(epoch)
        batches = list(one)
        epochs.append([label for _, labels in batches for label in labels.tolist()])
        assert [len(labels) for _, labels in batches] == [3, 3, 3]
        pairs = [
            (tuple(x.flatten().tolist()), y)
            for xs, ys in batches
            for x, y in zip(xs, ys.tolist(), strict=True)
        ]
        assert len(set(pairs)) == 9
        near = torch.tensor(list(inputs))
        for image, label in pairs:
            distance = (near - torch.tensor(image)).abs().amax(1)
            assert distance.min() < 1e-5
            assert list(inputs.values())[int(distance.argmin())] == label
    assert len({tuple(labels) for labels in epochs}) == 4
    whole = loader(subset="1:9", augmentation=Augmentation(), batch_size=2)
    expected = [(images, labels.tolist()) for images, labels in whole]
    assert sorted(label for _, labels in expected for label in labels) == sorted(LABELS[1:9])
    whole.set_epoch(0, 3)
    ((images, labels),) = whole
    assert torch.equal(images, expected[3][0])
    halves = [
        loader(subset="1:9", augmentation=Augmentation(), batch_size=2, workers=rank) for rank in (0, 1)
    ]
    for rank, half in enumerate(halves):
        half.take(rank, 2)
    for (images, labels), *parts in zip(expected, *halves, strict=True):
        assert torch.equal(torch.cat([x for x, _ in parts]), images)
        assert [label for _, part in parts for label in part.tolist()] == labels


def test_an_epoch_needs_a_length(server: Server) -> None:
    data = f"wds:{server.url}/part-{{0..2}}.tar"
    with pytest.raises(DataError, match=r"not known before the end.*--subset"):
        load_training_data(SMALL, "imagenet-1k", data)
    loader = load_training_data(SMALL, "imagenet-1k", data, subset=":8", batch_size=4)
    assert sorted(label for labels in labels_of(loader) for label in labels) == sorted(LABELS[:8])
    with pytest.raises(DataError, match="the data end before 12 images"):
        list(load_training_data(SMALL, "imagenet-1k", data, subset=":12", batch_size=4))


# ---- arrays and names ----


def test_arrays_of_other_layouts(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS.transpose(0, 3, 1, 2), y_train=np.array(LABELS)[:, None])
    images, labels = next(iter(load_data(SMALL, "cifar-10", f"npz:{tmp_path / 'a.npz'}")))
    torch.testing.assert_close(images, INPUTS)
    assert labels.tolist() == LABELS
    assert len(next(iter(load_data(SMALL, "cifar-10", write_npz(tmp_path), split="train")))[1]) == 2
    np.savez(tmp_path / "b.npz", images=PIXELS / 255, labels=LABELS)
    with pytest.raises(DataError, match=r"images are float64 \[10, 8, 8, 3\]"):
        load_data(SMALL, "cifar-10", f"npz:{tmp_path / 'b.npz'}")
    np.savez(tmp_path / "c.npz", a=PIXELS)
    with pytest.raises(DataError, match="holds a; expected"):
        load_data(SMALL, "cifar-10", f"npz:{tmp_path / 'c.npz'}")
    with pytest.raises(DataError, match="nothing follows the colon"):
        load_data(SMALL, "cifar-10", "npz:")


@pytest.mark.parametrize("data", ["parquet:none.parquet", "npz:none.npz", "wds:none-*.tar"])
def test_data_that_are_not_there_are_named(data: str) -> None:
    if not data.startswith("npz"):
        pytest.importorskip("webdataset", reason="needs the extra 'data'")
        pytest.importorskip("datasets", reason="needs the extra 'data'")
    with pytest.raises(DataError, match=r"none.*"):
        load_data(SMALL, "cifar-10", data)


_GATED = """
import sys, http.server, threading
class Gate(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403 if "Authorization" in self.headers else 401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "2")
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(b"{}")
    do_HEAD = do_POST = do_GET
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gate)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
from qzoo.data import Augmentation, load_data, load_training_data
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing
try:
    load_data(Preprocessing(), "imagenet-1k", "hfds:org/gated:validation")
except DataError as error:
    print(error)
"""


def test_a_gated_data_set_asks_for_a_token(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra 'data'")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_TOKEN", None)
    done = subprocess.run([sys.executable, "-c", _GATED], capture_output=True, text=True, env=environment)
    assert "access is refused" in done.stdout, done.stderr
    assert "hf auth login" in done.stdout
    assert done.stdout.count("\n") == 1
