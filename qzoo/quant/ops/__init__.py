"""The operators of the quantization core, `torch.ops.qzoo.*`, and a Python function for each.

Every operator has a reference implementation in plain torch that runs on any device; the native library,
where it was built, adds faster kernels for the same arithmetic (see `qzoo.quant.native`).
"""

from qzoo.quant import native
from qzoo.quant.ops.affine import affine_parameters, fake_quantize_affine, fake_quantize_affine_backward
from qzoo.quant.ops.float8 import fake_quantize_fp8
from qzoo.quant.ops.int4 import dequantize_int4, pack_int4, quantize_int4, unpack_int4
from qzoo.quant.ops.integer import (
    dequantize,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_out,
    integer_dtype,
    quantize,
)
from qzoo.quant.ops.learned import fake_quantize_affine_learned_backward, fake_quantize_learned_backward
from qzoo.quant.ops.numbers import FP8_LIMIT, TINY, bounds
from qzoo.quant.ops.search import entropy_search, mse_search, search_limits
from qzoo.quant.ops.statistics import histogram_, histogram_rows, reduce_amax_op

native.load()

__all__ = [
    "FP8_LIMIT",
    "TINY",
    "affine_parameters",
    "bounds",
    "dequantize",
    "dequantize_int4",
    "entropy_search",
    "fake_quantize",
    "fake_quantize_affine",
    "fake_quantize_affine_backward",
    "fake_quantize_affine_learned_backward",
    "fake_quantize_backward",
    "fake_quantize_fp8",
    "fake_quantize_learned_backward",
    "fake_quantize_out",
    "histogram_",
    "histogram_rows",
    "integer_dtype",
    "mse_search",
    "pack_int4",
    "quantize",
    "quantize_int4",
    "reduce_amax_op",
    "search_limits",
    "unpack_int4",
]
