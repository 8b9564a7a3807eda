"""The families against torchvision's or timm's networks, and in the runtimes; the small one of each by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import shelf
from torch import Tensor, nn

import qzoo
from qzoo.quantizers import quantizers
from qzoo.registry import architecture


@dataclass(frozen=True)
class Family:
    """Architectures, the smallest one first.

    Attributes:
        size: of the images for the comparison with torchvision or timm.
        int8_size: of those for the runtimes, 0 if the same.
        joins: how many kernels of some kinds ONNX Runtime executes for the smallest one.
        floats: operators that it executes in float.
        rules: of lint, which names them.
        exact: runtimes whose kernels give what is simulated, on ranges of powers of two.
    """

    architectures: tuple[str, ...]
    size: int = 64
    int8_size: int = 0
    joins: tuple[tuple[str, int], ...] = ()
    floats: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    exact: tuple[str, ...] = ("onnxruntime", "openvino")


# What a transformer has between its layers, and what lint says of it.
TRANSFORMER = ("LayerNormalization", "Gelu", "Softmax", "Add")
FLOAT_STREAM = ("float-island-openvino", "float-island-tensorrt", "residual-float")

FAMILIES = (
    Family(("alexnet",), 64, 224),
    Family(("squeezenet1_1", "squeezenet1_0"), joins=(("QLinearConcat", 8),)),
    Family(("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"), joins=(("QLinearAdd", 10),)),
    Family(tuple(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")), 32, 224),
    Family(
        ("mobilenet_v3_small", "mobilenet_v3_large"),
        joins=(("QLinearMul", 9), ("QLinearAdd", 6), ("QLinearGlobalAveragePool", 10)),
        floats=("HardSigmoid", "Mul"),  # a hard-swish is both
        rules=("float-island", "float-island-openvino"),
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
        tuple(f"regnet_y_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf")),
        joins=(("QLinearAdd", 16), ("QLinearMul", 16), ("QLinearSigmoid", 16)),
    ),
    # One gate's sigmoid, of 20,000, ends between two codes.
    Family(("regnet_y_32gf",), exact=("onnxruntime",)),
    Family(
        tuple(f"densenet{depth}" for depth in (121, 161, 169, 201)),
        joins=(("QLinearConcat", 58), ("average", 3)),
        floats=("BatchNormalization",),  # behind a concatenation there is no layer to fold it into
        rules=("bn-after-dq", "signed-after-relu", "max-pool-before-q"),
    ),
    Family(
        tuple(f"efficientnet_b{number}" for number in range(8)),
        joins=(("QLinearMul", 65), ("QLinearSigmoid", 65), ("QLinearAdd", 9)),
        exact=("onnxruntime",),  # OpenVINO's sigmoid rounds in its own way
    ),
    Family(("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"), exact=("onnxruntime",)),
    Family(("inception_v3",), 128, joins=(("QLinearConcat", 15), ("average", 9))),
    Family(
        ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
        joins=(("QLinearAdd", 14),),
        floats=("LayerNormalization", "Gelu", "Add"),
        rules=("float-island", "add-float-input", "move-not-crossed", *FLOAT_STREAM),
        # OpenVINO adds 128 before it rounds: of the stream, in float, a value within 2**-17 of a step of the middle
        # between two codes goes the other way. An image has one now and then.
        exact=("onnxruntime",),
    ),
    Family(
        ("swin_t", "swin_s", "swin_b"),
        floats=(*TRANSFORMER, "Mul", "Concat"),
        rules=("float-island", "add-float-input", "move-not-crossed", *FLOAT_STREAM),
        exact=(),  # a softmax in float ends between two codes now and then
    ),
    Family(
        ("swin_v2_t", "swin_v2_s", "swin_v2_b"),
        floats=(
            *TRANSFORMER,
            "Mul",
            "Concat",
            "ReduceL2",
            "Clip",
            "Expand",
            "Div",
        ),
        rules=("float-island", "add-float-input", "move-not-crossed", *FLOAT_STREAM),
        exact=(),  # lengths of queries and keys are sums of squares
    ),
    Family(
        ("maxvit_t",),
        224,
        floats=(*TRANSFORMER, "Mul", "Tanh", "BatchNormalization"),  # before a convolution
        rules=("float-island", "bn-after-dq", "op-output-float", *FLOAT_STREAM),
        exact=(),  # a sum in float ends between two codes now and then
    ),
    Family(
        ("convnextv2_tiny", "convnextv2_base", "convnextv2_large"),
        joins=(("QLinearAdd", 32),),
        floats=(
            *("LayerNormalization", "Gelu", "Mul", "Add"),
            *("ReduceL2", "ReduceMean", "Div"),
        ),
        rules=("float-island", "add-float-input", "move-not-crossed", *FLOAT_STREAM),
        exact=(),  # norms of the responses are sums of squares
    ),
    Family(("seresnet50",), joins=(("QLinearAdd", 16), ("QLinearMul", 16), ("QLinearSigmoid", 16))),
    Family(("res2net50_26w_4s", "res2net50_14w_8s", "res2net101_26w_4s"), joins=(("QLinearConcat", 16),)),
    Family(
        tuple(f"repvgg_{size}" for size in ("a0", "a1", "a2", "b0", "b1")),
        joins=(("QLinearAdd", 39),),
        floats=("BatchNormalization",),  # of a block's input: there is no layer to fold it into
        rules=("bn-after-dq",),
    ),
    Family(tuple(f"repvgg_{size}_reparam" for size in ("a0", "a1", "a2", "b0", "b1"))),
    Family(
        ("lcnet_050", "lcnet_075", "lcnet_100"),
        joins=(("QLinearMul", 2), ("QLinearGlobalAveragePool", 3)),
        floats=("HardSigmoid", "Mul"),  # a hard-swish is both
        rules=("float-island", "float-island-openvino"),
    ),
    Family(
        tuple(f"mobilenetv4_conv_{size}" for size in ("small", "medium", "large")),
        joins=(("QLinearAdd", 10),),
    ),
    Family(("dla34",), joins=(("QLinearConcat", 6), ("QLinearAdd", 12))),
    Family(
        ("resnest14d", "resnest26d", "resnest50d"),
        joins=(("QLinearAdd", 12), ("QLinearMul", 4), ("QLinearSoftmax", 4), ("average", 6)),
        rules=("float-island-openvino",),
    ),
    Family(
        ("ghostnetv2_100", "ghostnetv2_130", "ghostnetv2_160"),
        joins=(("QLinearConcat", 32), ("QLinearAdd", 16), ("QLinearMul", 21), ("average", 14)),
        floats=("HardSigmoid", "Resize", "Concat"),  # the gates' size is put together of two numbers
        rules=("float-island", "float-island-openvino"),
    ),
    Family(
        ("hrnet_w18_small", "hrnet_w18"),
        joins=(("QLinearAdd", 46),),
        floats=("Resize",),  # of integers
        rules=("float-island-openvino",),
    ),
    Family(
        ("mobilevit_xxs", "mobilevit_xs", "mobilevit_s"),
        floats=("LayerNormalization", "Softmax", "Add", "Mul", "QuickGelu"),
        rules=("float-island", "add-float-input", *FLOAT_STREAM),
        exact=(),  # in one of four batches a value that LayerNorms made in float is between two codes
    ),
    Family(
        tuple(f"levit_{width}" for width in ("128s", "128", "192", "256", "384")),
        224,
        joins=(("QLinearAdd", 21), ("QLinearConv", 4), ("QGemm", 48)),
        floats=("HardSigmoid", "Mul", "Add", "Softmax", "ReduceMean", "BatchNormalization", "Div"),
        rules=("output-float", "float-island", "reduce-mean", "pool-float-input", "residual-float"),
        exact=(),  # see test_levit_is_exact_but_for_softmax_and_hard_swish
    ),
    Family(
        tuple(f"edgenext_{size}" for size in ("xx_small", "x_small", "small", "base")),
        joins=(("QLinearConcat", 3), ("QLinearAdd", 9)),
        floats=(
            *(*TRANSFORMER, "Mul"),
            *("ReduceL2", "Clip", "Expand", "Div", "Concat"),  # of queries and keys, by their lengths
        ),
        rules=("float-island", "add-float-input", "move-not-crossed", *FLOAT_STREAM),
        exact=("onnxruntime",),
    ),
    Family(("vit_mini",), 28, floats=(*TRANSFORMER, "Concat", "Expand"), rules=FLOAT_STREAM),
    Family(
        ("swin_mini",),
        28,
        floats=(*TRANSFORMER, "Concat"),
        rules=("float-island", "add-float-input", *FLOAT_STREAM),
    ),
    Family(
        ("convnext_mini",),
        28,
        joins=(("QLinearAdd", 3),),
        floats=("LayerNormalization", "Gelu", "Add"),
        rules=("float-island", "add-float-input", *FLOAT_STREAM),
        exact=("onnxruntime",),
    ),
)
FIRST = {family.architectures[0]: family for family in FAMILIES}
ALL = {arch: family for family in FAMILIES for arch in family.architectures}
# These take their time.
COMPARED_SLOWLY = (
    *("vgg11", "regnet_y_32gf", "swin_v2_t", "maxvit_t", "convnextv2_tiny"),
    *(
        "seresnet50",
        "res2net50_26w_4s",
        "repvgg_a0_reparam",
        "dla34",
        "resnest14d",
        "ghostnetv2_100",
        "hrnet_w18_small",
    ),
)
COMPARED_BY_DEFAULT = tuple(arch for arch in FIRST if arch not in COMPARED_SLOWLY)


def slow_but(names: tuple[str, ...]) -> list[object]:
    return [arch if arch in names else pytest.param(arch, marks=pytest.mark.slow) for arch in ALL]


@pytest.mark.parametrize("arch", slow_but(COMPARED_BY_DEFAULT))
def test_family_is_the_references(arch: str) -> None:
    shelf.is_the_reference_in_eval_and_in_training(arch, ALL[arch].size)


# In DenseNet's first block the signs of what is joined differ, where the definition has one range for all.
JOINED = ("squeezenet1_1", "googlenet", "shufflenet_v2_x0_5")
JOINED_SLOWLY = ("inception_v3", "dla34", "ghostnetv2_100", "levit_128s")


@pytest.mark.parametrize(
    "arch", [*JOINED, *(pytest.param(arch, marks=pytest.mark.slow) for arch in JOINED_SLOWLY)]
)
def test_what_is_joined_has_one_range(arch: str) -> None:
    """The ranges, by a method that looks at the distribution, are those that ``qzoo.quantize`` finds."""
    size = ALL[arch].int8_size or ALL[arch].size
    plain, ours = shelf.three(arch)[1:]
    automatic = qzoo.quantize(plain.eval(), shelf.images(size))
    for quantizer in quantizers(ours).values():
        quantizer.enable()
    assert shelf.ranges(ours, size) == shelf.ranges(automatic, size)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ALL)
def test_family_runs_in_int8(arch: str, tmp_path: Path) -> None:
    family = ALL[arch]
    size = family.int8_size or family.size
    onnxruntime, openvino = (runtime in family.exact for runtime in ("onnxruntime", "openvino"))
    operators = shelf.runs_in_int8_in_onnxruntime(
        arch, size, tmp_path, family.floats, family.rules, onnxruntime
    )
    if arch in FIRST:
        assert {name: operators[name] for name, _ in family.joins} == dict(family.joins)
    shelf.runs_in_int8_in_openvino(arch, size, tmp_path, family.rules, openvino)
    if not openvino:
        shelf.is_as_near_in_openvino(arch, size, tmp_path)
    shelf.is_clean_for_tensorrt(arch, size, tmp_path, family.rules)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ALL if arch.startswith("levit")])
def test_levit_is_exact_but_for_softmax_and_hard_swish(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in float, and end between two codes now and then; with exact ones both runtimes are, too."""
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: x.relu() * 0.5)
    monkeypatch.setattr(nn.Hardswish, "forward", lambda self, x: x.relu())
    shelf.is_exact(arch, ALL[arch].size, tmp_path)


# Those with LayerNorms (a ConvNeXt's layers behind them are linear ones, too), and one with BatchNorms.
TRANSFORMERS = {
    arch: family.int8_size or family.size
    for arch, family in FIRST.items()
    if architecture(arch).family.defaults.recipe.smooth or arch.startswith("levit")
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size"),
    [*TRANSFORMERS.items(), ("deit_tiny_patch16_224", 224), ("vit_small_patch14_dinov2", 518)],
)
def test_transformer_runs_in_int8_whatever_the_batch(arch: str, size: int, tmp_path: Path) -> None:
    shelf.runs_in_int8_whatever_the_batch(arch, size, tmp_path)
