"""Post-training methods that lower the error of a quantized model without training it, one a file.

The order is ``without_relu6`` and ``equalize``, or ``smooth``, ``qzoo.calibrate``, ``raise_bits``, then
``adaround_sequential`` or ``adaround`` or, where float weights must stay, ``correct_bias``, and last
``round_biases``. Without data, ``calibrate_data_free`` stands for all of them. All change the model in place. A
``Recipe`` names a combination.
"""

from qzoo.ptq.adaround import adaround
from qzoo.ptq.apply import RECIPES, Choice, Recipe, apply_recipe, best_alpha, best_recipe
from qzoo.ptq.bias_correction import correct_bias
from qzoo.ptq.bias_grid import round_biases
from qzoo.ptq.data_free import calibrate_data_free
from qzoo.ptq.equalize import equalize
from qzoo.ptq.mixed_precision import MixedPrecision, mix_precision, raise_bits
from qzoo.ptq.relu6 import without_relu6
from qzoo.ptq.sequential import adaround_sequential
from qzoo.ptq.smoothquant import smooth

__all__ = [
    "RECIPES",
    "Choice",
    "MixedPrecision",
    "Recipe",
    "adaround",
    "adaround_sequential",
    "apply_recipe",
    "best_alpha",
    "best_recipe",
    "calibrate_data_free",
    "correct_bias",
    "equalize",
    "mix_precision",
    "raise_bits",
    "round_biases",
    "smooth",
    "without_relu6",
]
