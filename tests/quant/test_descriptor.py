"""QuantDescriptor: what it takes, how it compares, how it is written down."""

import copy
import itertools

import numpy as np
import pytest
import torch

from qzoo.quant import tensor_quant as tq
from qzoo.quant.tensor_quant import QuantDescriptor, ScaledQuantDescriptor

EXAMPLES = [
    QuantDescriptor(),
    QuantDescriptor(4, "weights", axis=0, narrow_range=True),
    QuantDescriptor((4, 3), unsigned=True),
    QuantDescriptor(axis=(0, 1), amax=[1.0, 2.0], scale_amax=0.9, calib_method="histogram"),
    QuantDescriptor(amax=1.5, learn_amax=True, fake_quant=False),
    QuantDescriptor(float_format="e5m2"),
    QuantDescriptor(4, axis=0, block=(1, 32)),
    tq.QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    tq.QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL,
]


def test_one_class_under_two_names():
    assert ScaledQuantDescriptor is QuantDescriptor


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_bits": -1}, ValueError, "num_bits"),
        ({"num_bits": (5, 2)}, TypeError, "num_bits"),
        ({"num_bits": "8"}, TypeError, "num_bits"),
        ({"num_bits": 8.0}, TypeError, "num_bits"),
        ({"name": 5}, TypeError, "name"),
        ({"amax": 1}, TypeError, "amax must be float, list or ndarray"),
        ({"amax": np.float32(1)}, TypeError, "amax must be float, list or ndarray"),
        ({"amax": torch.tensor(1.0)}, TypeError, "amax must be float, list or ndarray"),
        ({"amax": "1"}, TypeError, "amax must be float, list or ndarray"),
        ({"learn_amax": 1}, TypeError, "learn_amax"),
        ({"learn_amax": True, "axis": 0}, TypeError, "axis is ignored and must be None"),
        ({"calib_method": "median"}, ValueError, "calib_method"),
        ({"float_format": "e3m4"}, ValueError, "float_format"),
        ({"num_bits": 4, "float_format": "e5m2"}, TypeError, "contradicts"),
        ({"block": (1, 0)}, ValueError, "block"),
        ({"colour": "red"}, TypeError, "Unused keys"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        QuantDescriptor(**arguments)


def test_only_two_positional_arguments():
    with pytest.raises(TypeError):
        QuantDescriptor(8, None, True)


@pytest.mark.parametrize("amax", [1.5, [1.0, 2.0], np.array([[1.0], [2.0]])])
def test_amax_is_float32(amax):
    stored = QuantDescriptor(amax=amax).amax
    assert stored.dtype == np.float32
    assert stored.shape == np.shape(amax)


@pytest.mark.parametrize("desc", EXAMPLES, ids=str)
def test_dict_and_yaml_round_trips(desc):
    assert QuantDescriptor(**desc.dict()) == desc
    assert QuantDescriptor.from_yaml(desc.to_yaml()) == desc
    assert copy.deepcopy(desc) == desc
    assert hash(QuantDescriptor(**desc.dict())) == hash(desc)


def test_dict_holds_only_what_differs():
    assert QuantDescriptor(axis=(0, 2)).dict() == {"num_bits": 8, "name": None, "axis": (0, 2)}
    assert QuantDescriptor(amax=[1.0]).dict() == {"num_bits": 8, "name": None, "amax": [1.0]}


def test_yaml_writes_axis_as_a_list():
    assert "- 0" in QuantDescriptor(axis=(0, 1)).to_yaml()
    with pytest.raises(ValueError, match="mapping"):
        QuantDescriptor.from_yaml("[1, 2]")


def test_all_examples_differ():
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    assert QuantDescriptor() != 8


def test_properties_are_read_only():
    with pytest.raises(AttributeError):
        QuantDescriptor().num_bits = 4
    with pytest.raises(ValueError, match="read-only"):
        QuantDescriptor(amax=[1.0]).amax[0] = 2.0


def test_text():
    assert str(QuantDescriptor()) == "QuantDescriptor(8bit fake axis= per-tensor)"
    text = str(QuantDescriptor(4, "mine", unsigned=True, axis=1, fake_quant=False, amax=2.0))
    assert text == "mine: (unsigned 4bit real axis=1 amax=2.0 full_range)"


def test_predefined_axes():
    assert tq.QUANT_DESC_8BIT_PER_TENSOR.axis is None
    assert tq.QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR.unsigned
    for n in (1, 2, 3):
        assert getattr(tq, f"QUANT_DESC_8BIT_CONV{n}D_WEIGHT_PER_CHANNEL").axis == 0
        assert getattr(tq, f"QUANT_DESC_8BIT_CONVTRANSPOSE{n}D_WEIGHT_PER_CHANNEL").axis == 1
    assert tq.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW.axis == 0


def test_yaml_of_strangers_is_refused_in_one_line() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{k}: &{k} [*{j}, *{j}]\n" for j, k in itertools.pairwise("abcdefghijklmn")
    )
    with pytest.raises(ValueError, match="aliases"):
        QuantDescriptor.from_yaml(bomb)
    for text in ("a: !!python/object/apply:os.system [id]", "a: !x 1", "[" * 5000, "a: [", "\x00", "a: b: c"):
        with pytest.raises(ValueError, match="no YAML of a QuantDescriptor"):
            QuantDescriptor.from_yaml(text)
