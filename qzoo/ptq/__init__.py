"""Post-training methods that lower the error of a quantized model without training it, one a file.

All take a model that ``qzoo.calibrate`` has given its ranges, and change it in place.
"""

from qzoo.ptq.adaround import adaround
from qzoo.ptq.bias_correction import correct_bias

__all__ = ["adaround", "correct_bias"]
