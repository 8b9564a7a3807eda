"""EfficientNetV2 small, medium and large for ImageNet, with torchvision's parameter names.

Paper: "EfficientNetV2: Smaller Models and Faster Training" (Tan and Le, 2021, arXiv:2104.00298).

Shapes of the small one at 384 pixels: stem [N, 24, 192, 192], then the stages [N, 24, 192, 192], [N, 48, 96, 96],
[N, 64, 48, 48], [N, 128, 24, 24], [N, 160, 24, 24], [N, 256, 12, 12], head [N, 1280, 12, 12], logits [N, num_classes].

Quantization: as of EfficientNet (:mod:`qzoo.models.efficientnet`). A block of the first stage ends in a SiLU: the
runtimes do not compute its add with a layer, so that both of its sides are skips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qzoo.models.efficientnet import Architecture, EfficientNet, Stage, timm_key_map
from qzoo.registry import SWISH, Family, FloatWeights, register_model, torchvision_weights

_CITATION = """@article{tan2021efficientnetv2,
  title = {EfficientNetV2: Smaller Models and Faster Training},
  author = {Tan, Mingxing and Le, Quoc V.},
  journal = {arXiv:2104.00298},
  year = {2021}
}
"""
FAMILY = Family(_CITATION, SWISH)

SMALL_STAGES = (
    Stage(1, 3, 1, 24, 24, 2, True),
    Stage(4, 3, 2, 24, 48, 4, True),
    Stage(4, 3, 2, 48, 64, 4, True),
    Stage(4, 3, 2, 64, 128, 6),
    Stage(6, 3, 1, 128, 160, 9),
    Stage(6, 3, 2, 160, 256, 15),
)
MEDIUM_STAGES = (
    Stage(1, 3, 1, 24, 24, 3, True),
    Stage(4, 3, 2, 24, 48, 5, True),
    Stage(4, 3, 2, 48, 80, 5, True),
    Stage(4, 3, 2, 80, 160, 7),
    Stage(6, 3, 1, 160, 176, 14),
    Stage(6, 3, 2, 176, 304, 18),
    Stage(6, 3, 1, 304, 512, 5),
)
LARGE_STAGES = (
    Stage(1, 3, 1, 32, 32, 4, True),
    Stage(4, 3, 2, 32, 64, 7, True),
    Stage(4, 3, 2, 64, 96, 7, True),
    Stage(4, 3, 2, 96, 192, 10),
    Stage(6, 3, 1, 192, 224, 19),
    Stage(6, 3, 2, 224, 384, 25),
    Stage(6, 3, 1, 384, 640, 7),
)

SMALL = Architecture(SMALL_STAGES, 1280, 0.2)
MEDIUM = Architecture(MEDIUM_STAGES, 1280, 0.3)
LARGE = Architecture(LARGE_STAGES, 1280, 0.4)

_SMALL_IN1K = torchvision_weights("efficientnet_v2_s-dd5fe13b.pth", 84.228, size=384, resize=384)
_MEDIUM_IN1K = torchvision_weights("efficientnet_v2_m-dc08266a.pth", 85.112, size=480, resize=480)
_LARGE_IN1K = torchvision_weights(
    "efficientnet_v2_l-59c71312.pth", 85.808, size=480, resize=480, interpolation="bicubic", half=True
)


def _published(
    weights: FloatWeights, architecture: Architecture, alias: str
) -> Callable[[Callable], Callable]:
    """Register a network with torchvision's weights; ``alias`` is timm's name."""
    return register_model({"tv_in1k": weights}, FAMILY, aliases=[alias], key_map=timm_key_map(architecture))


@_published(_SMALL_IN1K, SMALL, "efficientnetv2_s")
def efficientnet_v2_s(**options: Any) -> EfficientNet:
    """EfficientNetV2-Small: 21.5 M parameters, 8.4 G multiply-adds at 384 pixels."""
    return EfficientNet(SMALL, **options)


@_published(_MEDIUM_IN1K, MEDIUM, "efficientnetv2_m")
def efficientnet_v2_m(**options: Any) -> EfficientNet:
    """EfficientNetV2-Medium: 54.1 M parameters, 24.6 G multiply-adds at 480 pixels."""
    return EfficientNet(MEDIUM, **options)


@_published(_LARGE_IN1K, LARGE, "efficientnetv2_l")
def efficientnet_v2_l(**options: Any) -> EfficientNet:
    """EfficientNetV2-Large: 118.5 M parameters, 56.1 G multiply-adds at 480 pixels."""
    return EfficientNet(LARGE, **options)
