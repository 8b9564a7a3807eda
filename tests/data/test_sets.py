"""Data sets as values: true of the data, known without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torchvision import datasets

from qzoo.data import label_names, load_data
from qzoo.data.sets import DATA_SETS, data_set, is_embedded
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing


def test_they_are_known_without_torch() -> None:
    code = "import sys, qzoo.data.sets, qzoo.data; print('torch' in sys.modules, *dir(qzoo.data))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, *names = done.stdout.split()
    assert heavy == "False"
    assert {"load_data", "label_names", "ImageFolder"} <= set(names)


def test_what_is_said_is_true_of_the_data() -> None:
    for name, known in DATA_SETS.items():
        assert known.name == name
        if known.classes is not None:
            assert len(label_names(name)) == known.classes
    fashion = data_set("fashion-mnist")
    grey = Preprocessing((fashion.channels, 28, 28), 1.0, "bilinear", (0.5,), (0.5,))
    images = load_data(grey, "fashion-mnist", batch_size=fashion.batch)
    assert fashion.sizes == (60_000, len(images) * fashion.batch)
    assert [name for name in DATA_SETS if is_embedded(name)] == ["fashion-mnist"]
    assert (
        label_names("fashion-mnist")[1:] == datasets.FashionMNIST.classes[1:]
    )  # the first has another hyphen


def test_unknown_ones_suggest_and_folders_have_names_of_their_own() -> None:
    with pytest.raises(DataError, match="did you mean 'cifar-10'"):
        data_set("cifar10")
    with pytest.raises(DataError, match="named by the folders"):
        label_names("folders")
    with pytest.raises(DataError, match="your own data is not embedded: pass data=FOLDER"):
        load_data(Preprocessing(), "folders")
