"""Quantized multi-head attention (https://arxiv.org/abs/1706.03762)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qzoo.errors import ArgumentError
from qzoo.quant import descriptor as d
from qzoo.quant.nn.modules._utils import QuantMixin, pop_quant_desc_in_kwargs
from qzoo.quant.nn.modules.quant_blocks import quantizer_with_role
from qzoo.quant.nn.modules.quant_linear import QuantLinear
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer

__all__ = ["MultiheadAttention", "QuantMultiheadAttention"]


class QuantMultiheadAttention(nn.Module, QuantMixin):
    """Quantized multi-head attention: ``nn.MultiheadAttention`` with every matrix product quantized.

    Quantized are: query, key and value inputs (one range each: ``_input_quantizer`` for the query,
    ``_key_quantizer``, ``_value_quantizer``) and the packed projection weight per row; both operands of
    ``q @ k.T`` and of ``softmax @ v``; the output projection, a :class:`QuantLinear`. The softmax is
    non-negative. Parameters have torch's names, so state dicts can be exchanged.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first: as in torch.
        add_bias_kv, add_zero_attn, kdim, vdim: only torch's defaults are supported.

    Raises:
        ValueError: an unsupported option; heads that don't divide ``embed_dim``.

    Example:
        >>> tokens = torch.randn(5, 2, 16)
        >>> output, weights = QuantMultiheadAttention(16, num_heads=4)(tokens, tokens, tokens)
        >>> output.shape
        torch.Size([5, 2, 16])
    """

    default_quant_desc_weight = d.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        input_desc, weight_desc = pop_quant_desc_in_kwargs(type(self), **kwargs)
        if add_bias_kv or add_zero_attn or kdim not in (None, embed_dim) or vdim not in (None, embed_dim):
            raise ArgumentError(
                "add_bias_kv, add_zero_attn and own sizes of key and value aren't supported here"
            )
        if embed_dim % num_heads:
            raise ArgumentError(f"embed_dim={embed_dim} isn't divisible by num_heads={num_heads}")
        self.embed_dim = embed_dim
        self._qkv_same_embed_dim = True  # torch's transformer layers ask for it
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **factory))
        self.register_parameter(
            "in_proj_bias", nn.Parameter(torch.empty(3 * embed_dim, **factory)) if bias else None
        )
        self.out_proj: QuantLinear = QuantLinear(
            embed_dim,
            embed_dim,
            bias,
            device,
            dtype,
            quant_desc_input=input_desc,
            quant_desc_weight=weight_desc,
        )
        self.init_quantizer(input_desc, weight_desc)
        self._input_quantizer.role, self._weight_quantizer.role = "input", "weight"
        self._key_quantizer: TensorQuantizer = quantizer_with_role(input_desc, "input")
        self._value_quantizer: TensorQuantizer = quantizer_with_role(input_desc, "input")
        self._query_heads_quantizer: TensorQuantizer = quantizer_with_role(
            input_desc, "input", symmetric=True
        )
        self._key_heads_quantizer: TensorQuantizer = quantizer_with_role(input_desc, "input", symmetric=True)
        self._value_heads_quantizer: TensorQuantizer = quantizer_with_role(
            input_desc, "input", symmetric=True
        )
        self._softmax_quantizer: TensorQuantizer = quantizer_with_role(input_desc, "input", nonnegative=True)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def quantized_weights(self) -> Any:
        """Return the packed projection weight with its quantizer (what ``calibrate_weights`` asks for)."""
        yield self.in_proj_weight, self._weight_quantizer

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over ``[T, N, E]`` (``[N, T, E]`` with ``batch_first``) or ``[T, E]``; masks and result as in torch.

        Raises:
            ValueError: ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise ArgumentError("is_causal is a hint about attn_mask; pass the mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        q = self._query_heads_quantizer(q / math.sqrt(q.shape[-1]))
        scores = q @ self._key_heads_quantizer(k).transpose(-2, -1)
        mask = _merged_mask(attn_mask, key_padding_mask, scores)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        context = self._softmax_quantizer(weights) @ self._value_heads_quantizer(v)
        output = self.out_proj(context.transpose(1, 2).flatten(2))
        if not batched:
            output, weights = output.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(dim=-3) if average_attn_weights else weights

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project to heads, ``[N, heads, T, E / heads]`` each."""
        weights = self._weight_quantizer(self.in_proj_weight).chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        quantized = (self._input_quantizer(query), self._key_quantizer(key), self._value_quantizer(value))
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip(quantized, weights, biases, strict=True)
        )
        return q, k, v

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _merged_mask(
    attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, scores: torch.Tensor
) -> torch.Tensor | None:
    """Both masks as one tensor to add to the scores ``[N, heads, T, S]``; True or -inf hides a position."""
    merged: torch.Tensor | None = None
    if attn_mask is not None:
        merged = _additive(attn_mask, scores)
        if merged.dim() == 3:  # [N * heads, T, S]
            merged = merged.reshape(scores.shape)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, scores)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))


MultiheadAttention = QuantMultiheadAttention
