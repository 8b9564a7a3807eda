"""Arguments of ``load_data``, and the label names."""

from __future__ import annotations

import pytest

from qzoo.data import batch_for, label_names, load_data, parse_subset
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing


@pytest.mark.parametrize(
    ("subset", "expected"),
    [(None, (0, 10)), ("2:5", (2, 5)), (":4", (0, 4)), ("4:", (4, 10)), ("0:10", (0, 10))],
)
def test_parse_subset(subset: str | None, expected: tuple[int, int]) -> None:
    assert parse_subset(subset, 10) == expected


@pytest.mark.parametrize("subset", ["5:5", "6:5", "0:11", "10:", "0:0", "-3:5", "5", "a:b", "", "1:2:3"])
def test_subsets_that_do_not_fit(subset: str) -> None:
    with pytest.raises(DataError, match="subset"):
        parse_subset(subset, 10)


def test_label_names() -> None:
    imagenet = label_names("imagenet-1k")
    assert len(imagenet) == 1000
    assert "tench" in imagenet[0]
    assert "goldfish" in imagenet[1]
    assert "toilet tissue" in imagenet[999]
    assert label_names("fashion-mnist")[9] == "Ankle boot"


def test_label_names_are_a_copy() -> None:
    label_names("fashion-mnist")[0] = "changed"
    assert label_names("fashion-mnist")[0] == "T-shirt/top"


def test_unknown_labels_suggest_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'imagenet-1k'"):
        label_names("imagenet1k")
    with pytest.raises(DataError, match="no label set 'coco'"):
        load_data(Preprocessing(), "coco")


def test_batch_size_and_workers_are_checked() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        load_data(Preprocessing(), "fashion-mnist", batch_size=0)


def test_the_default_batch_keeps_activations_small() -> None:
    sizes = {28: 256, 32: 196, 224: 4, 300: 2, 1024: 1}
    assert {size: batch_for(Preprocessing((3, size, size))) for size in sizes} == sizes
