"""How a checkpoint is made, as a value: flags, record and changes say the same."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from qzoo.commands.arguments import given_options, option_arguments
from qzoo.config import CalibrationRecord, Config, Trial
from qzoo.errors import ArgumentError, CheckpointError
from qzoo.options import Plan, Recipe, TrainOptions, build_options, flags_of, train_options
from qzoo.scheme import Scheme
from qzoo.zoo.request import new_config

PLANS = [
    Plan(),
    Plan(best=True, edge_bits=8, target="tensorrt"),
    Plan(Recipe(equalize=True, method="percentile", percentile=99.5, rounding="sequential"), drop=0.5),
    Plan(Recipe(smooth=True, alpha=0.7, bias_correction="empirical"), layer_bits=(("fc", 4), ("conv1", 8))),
    Plan(Recipe(method="batchnorm"), False, "0:32", "100:164", target="openvino"),
]


def parsed(words: list[str], options: dict[str, Any]) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    option_arguments(parser, options)
    return given_options(parser.parse_args(words), options)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: str(plan.recipe))
def test_the_flags_of_a_plan_give_it_again(plan: Plan) -> None:
    words = [word for flag, values in plan.flags().items() for word in (flag, *map(str, values))]
    assert Plan().changed(parsed(words, build_options())) == plan


def test_the_flags_of_a_training_give_it_again() -> None:
    options = TrainOptions(epochs=2, lr=1e-5, seed=-3, bf16=True, method="lsq", ema=0.999)
    flags = flags_of(train_options(), dataclasses.asdict(options))
    words = [word for flag, values in flags.items() for word in (flag, *map(str, values))]
    assert TrainOptions(**parsed(words, train_options())) == options


def record(**changes: Any) -> CalibrationRecord:
    return CalibrationRecord(**{"method": "mse", "data": "some", "subset": "0:9", "images": 9, **changes})


@pytest.mark.parametrize(
    ("changes", "recipe", "best"),
    [
        ({}, Recipe(method="mse"), False),
        ({"candidates": (Trial("mse", 1.0, 2.0),), "percentile": 99.99}, Recipe(), False),
        ({"candidates": (Trial("mse", 1.0, 2.0),), "percentile": 60.0}, Recipe(percentile=60.0), False),
        ({"candidates": (Trial("mse", 1.0, 2.0),), "recipe": "best"}, Recipe(method="mse"), True),
        ({"smooth": True, "alpha": 0.2}, Recipe(method="mse", smooth=True, alpha=0.2), False),
    ],
)
def test_a_record_says_the_plan(changes: dict[str, Any], recipe: Recipe, best: bool) -> None:
    scheme = Scheme.parse("w4a8", "openvino")
    config = dataclasses.replace(
        new_config("resnet20.fmnist-w4a8"),
        scheme=dataclasses.replace(scheme, edge_bits=8, layers=(("fc", 6),)),
        calibration=record(target="openvino", **changes),
    )
    plan = Config.from_json(config.to_json()).plan
    assert plan == Plan(
        recipe, best, "0:9", edge_bits=8, affine=False, layer_bits=(("fc", 6),), target="openvino"
    )
    assert plan.scheme(Scheme.parse("w4a8")) == dataclasses.replace(scheme, edge_bits=8, layers=(("fc", 6),))


@pytest.mark.parametrize(("words", "affine"), [([], None), (["--affine"], True), (["--no-affine"], False)])
def test_zero_points_are_the_familys_where_nothing_is_said(words: list[str], affine: bool | None) -> None:
    plan = Plan().changed(parsed(words, build_options()))
    assert plan.affine is affine
    assert list(plan.flags()) == words
    for family in (True, False):
        assert plan.scheme(Scheme(affine=family)).affine is (family if affine is None else affine)


def test_a_record_of_methods_that_exclude_each_other_is_refused() -> None:
    wrong = record(rounding="learned", bias_correction="analytic")
    config = dataclasses.replace(new_config("resnet20.fmnist-w8a8"), calibration=wrong)
    with pytest.raises(CheckpointError, match=r"calibration: rounding='learned' corrects biases itself"):
        Config.from_json(config.to_json())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "first"}, "recipe must be 'best', not 'first'"),
        ({"recipe": "best", "method": "max", "rounding": "learned"}, "chooses method, rounding itself"),
        ({"drop": 1.0, "layer_bits": (("fc", 4),)}, "drop chooses the bits of layers itself"),
        ({"drop": 1.0, "method": "batchnorm"}, "choose another method than batchnorm"),
        ({"metod": "max"}, "'metod' is no option of a build; known are .*method"),
        ({"percentile": "99"}, "percentile must be a number, not '99'"),
    ],
)
def test_changes_that_make_no_plan_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Plan().changed(changes)


def test_a_change_of_a_method_takes_the_place_of_the_choice_and_bits_that_of_mixed_precision() -> None:
    plan = Plan(Recipe(method="mse", rounding="learned"), best=True, drop=0.5)
    assert plan.changed({"rounding": "nearest", "method": None}) == Plan(Recipe(method="mse"), drop=0.5)
    bits = (("fc", 4),)
    assert plan.changed({"layer_bits": bits}) == dataclasses.replace(plan, drop=0.0, layer_bits=bits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "0.1"}, "TrainOptions.lr must be a number, not '0.1'"),
        ({"epochs": 1.5}, "TrainOptions.epochs must be a whole number, not 1.5"),
        ({"ema": None}, "TrainOptions.ema must be a number, not None"),
        ({"method": 3}, "TrainOptions.method must be one of ste, lsq, pact, not 3"),
    ],
)
def test_options_of_another_type_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainOptions(**changes)
