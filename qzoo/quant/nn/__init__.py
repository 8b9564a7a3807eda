"""Quantized modules, ``TensorQuantizer`` and ``Clip``: the names of ``torch.nn``, and with a Quant prefix."""
# ruff: noqa: F401, F403 - this package is the sum of its modules' __all__

from qzoo.quant.nn import functional, modules
from qzoo.quant.nn.modules.clip import *
from qzoo.quant.nn.modules.quant_attention import *
from qzoo.quant.nn.modules.quant_blocks import *
from qzoo.quant.nn.modules.quant_conv import *
from qzoo.quant.nn.modules.quant_conv_same import *
from qzoo.quant.nn.modules.quant_instancenorm import *
from qzoo.quant.nn.modules.quant_linear import *
from qzoo.quant.nn.modules.quant_pooling import *
from qzoo.quant.nn.modules.quant_rnn import *
from qzoo.quant.nn.modules.tensor_quantizer import *
