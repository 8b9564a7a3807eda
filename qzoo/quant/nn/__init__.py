"""Quantized modules, ``TensorQuantizer`` and ``Clip``, under the names of ``torch.nn`` and with a Quant prefix."""

from qzoo.quant.nn import functional, modules
from qzoo.quant.nn.modules.clip import *
from qzoo.quant.nn.modules.quant_conv import *
from qzoo.quant.nn.modules.quant_linear import *
from qzoo.quant.nn.modules.quant_pooling import *
from qzoo.quant.nn.modules.tensor_quantizer import *
