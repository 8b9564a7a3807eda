"""The families against torchvision's networks, and in the runtimes; the small one of each by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import shelf


@dataclass(frozen=True)
class Family:
    """Architectures, the smallest one first.

    Attributes:
        size: of the images for the comparison with torchvision.
        int8_size: of those for the runtimes, 0 if the same.
        joins: how many kernels of some kinds ONNX Runtime executes for the smallest one.
        floats: operators that it has no integer kernels for.
        openvino: OpenVINO's kernels, too, give what is simulated, on ranges of powers of two.
    """

    architectures: tuple[str, ...]
    size: int = 64
    int8_size: int = 0
    joins: tuple[tuple[str, int], ...] = ()
    floats: tuple[str, ...] = ()
    openvino: bool = True


FAMILIES = (
    Family(("alexnet",), 64, 224),
    Family(("squeezenet1_1", "squeezenet1_0"), joins=(("QLinearConcat", 8),)),
    Family(("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"), joins=(("QLinearAdd", 10),)),
    Family(tuple(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")), 32, 224),
    Family(
        ("mobilenet_v3_small", "mobilenet_v3_large"),
        joins=(("QLinearMul", 9), ("QLinearAdd", 6), ("QLinearGlobalAveragePool", 10)),
        floats=("HardSigmoid", "Mul"),  # a hard-swish is both
    ),
    Family(("googlenet",), joins=(("QLinearConcat", 9),)),
    Family(
        tuple(f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")),
        joins=(("QLinearConcat", 16), ("Split", 13)),
    ),
    Family(
        tuple(f"regnet_x_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")),
        joins=(("QLinearAdd", 22),),
    ),
    Family(
        tuple(f"regnet_y_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")),
        joins=(("QLinearAdd", 16), ("QLinearMul", 16), ("QLinearSigmoid", 16)),
    ),
    Family(
        tuple(f"densenet{depth}" for depth in (121, 161, 169, 201)),
        joins=(("QLinearConcat", 58),),
    ),
    Family(tuple(f"efficientnet_b{number}" for number in range(8))),
    Family(("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l")),
    Family(("inception_v3",), 128),
)
FIRST = {family.architectures[0]: family for family in FAMILIES}
ALL = {arch: family for family in FAMILIES for arch in family.architectures}
# The others take their time: VGG's 133 M parameters, and the runtimes.
COMPARED_BY_DEFAULT = tuple(arch for arch in FIRST if arch != "vgg11")
RUN_BY_DEFAULT = ("squeezenet1_1",)


def slow_but(names: tuple[str, ...]) -> list[object]:
    return [arch if arch in names else pytest.param(arch, marks=pytest.mark.slow) for arch in ALL]


@pytest.mark.parametrize("arch", slow_but(COMPARED_BY_DEFAULT))
def test_family_is_torchvisions(arch: str) -> None:
    shelf.is_torchvisions_in_eval_and_in_training(arch, ALL[arch].size)


@pytest.mark.parametrize("arch", slow_but(RUN_BY_DEFAULT))
def test_family_runs_in_int8(arch: str, tmp_path: Path) -> None:
    family = ALL[arch]
    size = family.int8_size or family.size
    operators = shelf.runs_in_int8_in_onnxruntime(arch, size, tmp_path, family.floats)
    if arch in FIRST:
        assert {name: operators[name] for name, _ in family.joins} == dict(family.joins)
    shelf.runs_in_int8_in_openvino(arch, size, tmp_path, family.floats, family.openvino)
    shelf.is_clean_for_tensorrt(arch, size, tmp_path)
