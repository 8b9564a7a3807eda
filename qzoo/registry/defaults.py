"""Settings of a family: how its networks are quantized where nothing else is said, with the papers behind it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qzoo.options import AUTO, Recipe
from qzoo.scheme import Scheme


@dataclass(frozen=True)
class Defaults:
    """How a kind of network is quantized where nothing else is said, and who found that it should be.

    Attributes:
        recipe: post-training methods of a checkpoint that is made with images. Without them its rounding and its
            smoothing stay (:func:`qzoo.zoo.calibrated.recipe_without_data`).
        affine: activations have zero points (``Scheme.affine``).
        source: papers and tables of results, as Markdown.

    Example:
        >>> from qzoo.registry import DEPTHWISE
        >>> str(DEPTHWISE.recipe), DEPTHWISE.affine
        ('mse + learned', False)
    """

    recipe: Recipe = Recipe()  # noqa: RUF009 - immutable
    affine: bool = False
    source: str = ""

    def recipe_for(self, scheme: Scheme) -> Recipe:
        """Return the recipe for the scheme: weights of few bits are rounded by learning, where that is possible."""
        rounding = self.recipe.rounding
        if not scheme.can_round:
            correction = self.recipe.bias_correction if rounding == "nearest" else "empirical"
            return dataclasses.replace(self.recipe, rounding="nearest", bias_correction=correction)
        if rounding == "nearest" and scheme.weight_bits < 8:
            rounding = "sequential" if self.recipe.smooth else "learned"
        return dataclasses.replace(self.recipe, rounding=rounding)


CONVOLUTIONAL = Defaults(
    source="a range per output channel of the weights and calibrated ranges of the activations are enough for 8 bits "
    "(Krishnamoorthi 2018, arXiv:1806.08342); no method of the ranges is the best one for all networks, so all four "
    "are compared (Wu et al. 2020, arXiv:2004.09602)",
)
DEPTHWISE = Defaults(
    Recipe(method="mse", rounding="learned"),
    source="networks of depthwise convolutions lose most by rounding to nearest (Nagel et al. 2019, arXiv:1906.04721): "
    "AdaRound (Nagel et al. 2020, arXiv:2004.10568), and ranges of least squared error (Nagel et al. 2021, "
    "arXiv:2106.08295). Here learned rounding is worth 5 dB on EfficientNet-Lite0",
)
SWISH = Defaults(
    Recipe(method="mse", rounding="sequential"),
    affine=True,
    source="symmetric ranges waste levels behind SiLU and hard-swish (Bhalgat et al. 2020, LSQ+, arXiv:2004.09576): "
    "here a zero point is worth 2.9 to 3.9 dB. What the layers before have moved must be corrected, too: by fast bias "
    "correction, which does not, MobileNetV3 loses 16 points in NNCF's table, and 1.4 by the full one. Rounding layer "
    "after layer corrects it (Li et al. 2025, arXiv:2504.02692; here it is 2.2 and 3.6 dB better than AdaRound alone). "
    "Qualcomm's AI Hub has MobileNetV3 and EfficientNet with 16-bit activations only",
)
TRANSFORMER = Defaults(
    Recipe(method="mse", smooth=True, alpha=AUTO),
    source="a few channels of a LayerNorm's output are many times larger than the others, and how much of that the "
    "weights should take over is searched for each model (Xiao et al. 2022, SmoothQuant, arXiv:2211.10438). NNCF's "
    "table has alpha 0.15 for ViT-B/16, 0.5 for Swin V2-S, and no smoothing for DeiT III-S, so none is among those "
    "compared",
)
HYBRID = Defaults(
    Recipe(method="mse", rounding="learned", smooth=True, alpha=AUTO),
    affine=True,
    source="convolutions and attention in one network, so a method for each. Depthwise convolutions lose most by "
    "rounding to nearest (Nagel et al. 2019, arXiv:1906.04721): AdaRound (Nagel et al. 2020, arXiv:2004.10568), and "
    "ranges of least squared error (Nagel et al. 2021, arXiv:2106.08295). Symmetric ranges waste levels behind SiLU: "
    "zero points (Bhalgat et al. 2020, LSQ+, arXiv:2004.09576). A few channels of a LayerNorm's output are many times "
    "larger than the others: smoothing, by how much is searched for each model (Xiao et al. 2022, SmoothQuant, "
    "arXiv:2211.10438)",
)
