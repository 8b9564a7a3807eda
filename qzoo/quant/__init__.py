"""The quantization core: descriptors, quantizers, quantized modules, calibration.

Takes the place of the retired ``pytorch_quantization`` package, under the same module paths and names, on PyTorch
and NumPy alone. Importing it changes nothing outside: no logger, no ``torch.nn``.
"""

from qzoo.quant import calib, nn, tensor_quant, utils
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer
from qzoo.quant.tensor_quant import QuantDescriptor

__all__ = ["QuantDescriptor", "TensorQuantizer", "calib", "nn", "tensor_quant", "utils"]
