"""Linears whose weight is stored in 8 bits: multiplied in the input's dtype, or in 8 bits by the GPU's fp8 units.

Between 8 bits and more there is one pass of a kernel of ours where Triton can: PyTorch's casts take many times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import elementwise
from .products import KINDS, Plain, Product

MULTIPLE = 16
"""Both sides of a weight have to be multiples of it for cuBLAS's fp8 products."""
_OUTPUTS = (torch.bfloat16, torch.float16)
_library = torch.library.Library("hybrid_dit", "FRAGMENT")


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


class Fp8(Product):
    """A weight in 8 bits, times a scale.

    Args:
        weight: ``[out, in]``.
        scale: fp32, a scalar or ``[out, 1]``.
        alpha: the scalar's value where it is known on the host: then it costs no pass over the weight.
        input_scale: fp32 scalar that inputs are divided by to be multiplied in 8 bits, where fp8 units can; None to
            multiply in their dtype.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, alpha: float | None = None, input_scale: Tensor | None = None
    ) -> None:
        self.weight, self.scale, self.alpha, self.input_scale = weight, scale, alpha, input_scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def kind(self) -> str:
        return "fp8" if self.input_scale is None else "fp8 units"

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def title(self) -> str:
        return f"fp8 ({'dequantized' if self.input_scale is None else 'units'})"

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.input_scale is not None and x.numel() and can_multiply(self.weight, x.dtype):
            rows = quantized(x, self.input_scale, self.weight.dtype).reshape(-1, x.shape[-1]).contiguous()
            y = torch._scaled_mm(rows, self.weight.t(), self.input_scale, self.scale, bias, out_dtype=x.dtype)
            return y.view(*x.shape[:-1], -1)
        if self.alpha is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            # The compiler makes one pass of both; and one number a layer would be one graph a layer.
            return F.linear(x, self.dense(x.dtype), bias)
        inputs, weight = x.reshape(-1, x.shape[-1]), widened(self.weight, x.dtype).t()
        if bias is None:
            y = torch.addmm(x.new_empty(1), inputs, weight, beta=0, alpha=self.alpha)
        else:
            y = torch.addmm(bias, inputs, weight, alpha=self.alpha)
        return y.view(*x.shape[:-1], -1)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        if self.input_scale is not None or self.alpha is None or torch.compiler.is_compiling():
            return super().add_to(y, x)
        if torch.is_grad_enabled():
            return y + self.product(x)
        weight = widened(self.weight, x.dtype).t()
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight, alpha=self.alpha)
        return y

    def rows(self, first: int, end: int) -> Fp8:
        scale = self.scale if self.scale.ndim == 0 else self.scale[first:end]
        return Fp8(self.weight[first:end], scale, self.alpha, self.input_scale)

    def columns(self, first: int, end: int) -> Fp8:
        return Fp8(self.weight[:, first:end], self.scale, self.alpha, self.input_scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight times its scale, both rounded to ``dtype`` first, as ComfyUI does."""
        return widened(self.weight, dtype, self.scale.to(dtype))

    def repeated(self, dtype: torch.dtype) -> Product:
        return self if self.input_scale is not None and can_multiply(self.weight, dtype) else Plain(self.dense(dtype))

    def tensors(self) -> Sequence[Tensor]:
        return (self.weight, self.scale) if self.input_scale is None else (self.weight, self.scale, self.input_scale)


def _restored(options: str, tensors: Sequence[Tensor]) -> Fp8:
    weight, scale, *inputs = tensors
    return Fp8(weight, scale, None, *inputs)


KINDS["fp8"] = _restored


def widened(x: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """``x [rows, columns]`` in 8 bits in a wider dtype, times a factor of that, a scalar or ``[rows, 1]``."""
    if elementwise.has_kernels(x) and dtype != x.dtype:
        return (torch.ops.hybrid_dit.widened if torch.compiler.is_compiling() else _widened)(x, dtype, factor)
    return _plainly_widened(x, dtype, factor)


def _plainly_widened(x: Tensor, dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    y = x.to(dtype)
    if factor is None:
        return y
    return y * factor if torch.compiler.is_compiling() or dtype == x.dtype else y.mul_(factor)


def _widened(x: Tensor, dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    # Triton has the conversion where the GPU has.
    if not x.numel() or x.stride(1) != 1 or not has_fp8_units(x.device):
        return _plainly_widened(x, dtype, factor)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    elementwise.triton_kernels.widen(x, y, factor)
    return y


_library.define("widened(Tensor x, ScalarType dtype, Tensor? factor) -> Tensor")
_library.impl("widened", _widened, "CUDA")
torch.library.register_fake(
    "hybrid_dit::widened", lambda x, dtype, factor: x.new_empty(x.shape, dtype=dtype), lib=_library
)


def quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` over a scale, cut off at the ends of an 8-bit format and rounded to it; in the same steps as ComfyUI."""
    limit, factor = torch.finfo(dtype).max, scale.reciprocal().to(x.dtype)
    kernels = elementwise.has_kernels(x) and not torch.compiler.is_compiling() and has_fp8_units(x.device)
    if not kernels or not x.numel() or x.stride(-1) != 1:
        return (x * factor).clamp_(-limit, limit).to(dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    elementwise.triton_kernels.narrow(rows, y.view(rows.shape), factor, limit)
    return y
