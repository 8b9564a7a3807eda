"""The quantization core: descriptors, quantizers, quantized modules, calibration.

Takes the place of the retired ``pytorch_quantization`` package, under the same module paths and names, on
PyTorch and NumPy alone. Importing it changes nothing outside: no logger, no ``torch.nn``.
"""

from qzoo.quant import calib, cuda_ext, nn, optim, quant_modules, tensor_quant, utils
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer
from qzoo.quant.quant_modules import deactivate, enable_onnx_export, initialize
from qzoo.quant.swap import quantize_
from qzoo.quant.tensor_quant import QuantDescriptor
from qzoo.version import __version__

__all__ = [
    "QuantDescriptor",
    "TensorQuantizer",
    "__version__",
    "calib",
    "cuda_ext",
    "deactivate",
    "enable_onnx_export",
    "initialize",
    "nn",
    "optim",
    "quant_modules",
    "quantize_",
    "tensor_quant",
    "utils",
]
