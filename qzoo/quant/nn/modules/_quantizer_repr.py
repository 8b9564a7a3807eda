"""The text of a quantizer: what ``print(model)`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer


def describe(q: TensorQuantizer) -> str:
    """Describe a quantizer: ``8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator scale=1.0 quant``."""
    if q._disabled:
        return "disabled"
    parts = [f"{'unsigned ' if q._unsigned else ''}{q._num_bits}bit"]
    parts += ["narrow"] if q._narrow_range else []
    parts += ["affine"] if q._affine else []
    parts += ["fake"] if q._fake_quant else []
    parts.append(f"axis={q._axis}" if q._axis is not None else "per-tensor")
    parts += [f"block={q._block}"] if q._block is not None else []
    parts.append(f"amax={_range(q)}")
    parts += [f"limits={_ends(q)}"] if q.two_ended else []
    parts += [f"*{q._scale_amax}"] if q._scale_amax is not None else []
    parts += ["pre_quant_scale"] if q.pre_quant_scale is not None else []
    parts += ["learned"] if q._learn_amax else []
    parts += [f"calibrator={type(q._calibrator).__name__}"] if q._calibrator is not None else []
    parts.append(f"scale={q._scale}")
    parts += ["quant"] if q._if_quant else []
    parts += ["clip"] if q._if_clip else []
    parts += ["calib"] if q._if_calib else []
    return " ".join(parts)


def _range(q: TensorQuantizer) -> str:
    amax = q.amax
    if amax is None:
        return "dynamic"
    if amax.is_meta:
        return f"meta({amax.numel()})"
    if amax.numel() == 1:
        return f"{amax.item():.4f}"
    return f"[{amax.min().item():.4f}, {amax.max().item():.4f}]({amax.numel()})"


def _ends(q: TensorQuantizer) -> str:
    limits = q.limits
    if limits is None:
        return "dynamic"
    return "meta(2)" if limits.is_meta else "[{:.4f}, {:.4f}]".format(*limits.tolist())
