"""Linears whose weight is stored in 8 bits: multiplied in the input's dtype, or in 8 bits by the GPU's fp8 units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16
"""Both sides of a weight have to be multiples of it for cuBLAS's fp8 products."""
_OUTPUTS = (torch.bfloat16, torch.float16)


def has_fp8_units(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit floats itself: NVIDIA's from compute capability 8.9 on."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def can_multiply(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether fp8 units can multiply inputs of ``dtype`` with a weight ``[out, in]`` that is stored in 8 bits.

    Not e5m2: they do not multiply two of that format, and inputs have to be quantized in the format of the weight.
    """
    return (
        weight.dtype == torch.float8_e4m3fn and dtype in _OUTPUTS and not any(size % MULTIPLE for size in weight.shape)
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    """``[..., in] -> [..., out]`` in the dtype of ``x``, with a weight ``[out, in]`` as it is or in 8 bits.

    Args:
        x, weight, bias: as of `torch.nn.functional.linear`.
        weight_scale: what an 8-bit weight is multiplied by, a scalar or ``[out, 1]``; None for a weight that is not in
            8 bits.
        input_scale: scalar that inputs are divided by to be multiplied in 8 bits (both scales are fp32 scalars then);
            None to multiply in their dtype.
    """
    if weight_scale is None:
        return F.linear(x, weight, bias)
    if input_scale is None or not x.numel() or not can_multiply(weight, x.dtype):
        return F.linear(x, scaled(weight, weight_scale, x.dtype), bias)
    rows = quantized(x, input_scale, weight.dtype).reshape(-1, x.shape[-1]).contiguous()
    y = torch._scaled_mm(rows, weight.t(), input_scale, weight_scale, bias, out_dtype=x.dtype)
    return y.view(*x.shape[:-1], -1)


def quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` over a scale, cut off at the ends of an 8-bit format and rounded to it; in the same steps as ComfyUI."""
    limit = torch.finfo(dtype).max
    return (x * scale.reciprocal().to(x.dtype)).clamp_(-limit, limit).to(dtype)


def scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An 8-bit weight times its scale, both rounded to ``dtype`` first, as ComfyUI does."""
    return weight.to(dtype).mul_(scale.to(dtype))
