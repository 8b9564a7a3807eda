"""What the Hub's client reads out of ``.eval_results``."""

from __future__ import annotations

import dataclasses

import yaml
from huggingface_hub import parse_eval_result_entries
from test_card import example

from qzoo.cards.eval_results import eval_results


def test_the_hubs_client_reads_every_measured_row() -> None:
    config = example()
    entries = parse_eval_result_entries(yaml.safe_load(eval_results(config)))
    assert [e.value for e in entries] == [77.1, 76.9, 76.8]
    assert {e.dataset_id for e in entries} == {"ILSVRC/imagenet-1k"}
    for entry, row in zip(entries, config.metrics, strict=True):
        for fact in (row.precision, f"{row.images} images", row.subset, "72.60 to 81.10"):
            assert fact in entry.notes


def test_nothing_measured_is_nothing_claimed() -> None:
    assert eval_results(example(metrics=())) == ""
    assert eval_results(dataclasses.replace(example(), labels="")) == ""
