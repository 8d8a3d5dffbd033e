"""Products of numbers that share a scale block by block, by GPUs with units for them: nvfp4 and mxfp8.

Inputs are quantized as ComfyUI does it: nvfp4's blocks of 16 under one scale of the tensor, which a file may state
(NVIDIA's NVFP4), mxfp8's blocks of 32 under powers of two (OCP Microscaling Formats). comfy-kitchen has the kernels.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .kitchen import CODES, kitchen

logger = logging.getLogger(__name__)

LARGEST = 448.0 * 6.0
"""What nvfp4's largest number times its largest block scale stands for, times the tensor's scale."""
LEAST = 1e-30
"""Scale of a tensor of zeros, by which it is divided."""
ROWS_UNIT, COLUMNS_UNIT = 8, 32
"""cuBLAS wants a weight's sides in multiples of these."""
PADDED = {"nvfp4": 16, "mxfp8": 32}
"""Formats -> tokens are filled up to a multiple of it."""
DTYPES = (torch.bfloat16, torch.float16)
_MOST_ERROR = 0.25
"""Of the trial: 4 bits round inputs by about a tenth, and what is put together wrongly is wrong by all of it."""


def fits(shape: tuple[int, int]) -> bool:
    """Whether units can multiply with a weight of a shape."""
    return shape[0] % ROWS_UNIT == 0 and shape[1] % COLUMNS_UNIT == 0


def multiply(format: str, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """``x [tokens, in]`` times a quantized weight, plus ``bias [out]``: ``[tokens, out]`` in the dtype of ``x``.

    Args:
        format: of `PADDED`.
        x: contiguous, of `DTYPES`.
        parts: the weight's tensors by the names of `formats.FORMATS`.
        bias: or None.
    """
    ops, code, weight = torch.ops.comfy_kitchen, CODES[x.dtype], parts["weight"]
    padded = len(x) % PADDED[format] > 0
    if format == "mxfp8":
        numbers, blocks = ops.quantize_mxfp8(x, padded)
        scales = parts["weight_scale"].view(torch.float8_e8m0fnu)
        y = ops.scaled_mm_mxfp8(numbers, weight, blocks, scales, bias, code)
    else:
        scale = parts.get("input_scale")
        if scale is None:
            # Rounded to the dtype of the inputs, as ComfyUI has it.
            scale = (torch.linalg.vector_norm(x, math.inf) / LARGEST).float().clamp_min(LEAST)
        numbers, blocks = ops.quantize_nvfp4(x, scale, 0.0, padded, True)
        y = ops.scaled_mm_nvfp4(
            numbers, weight, scale, parts["weight_scale_2"], blocks, parts["weight_scale"], bias, code, None
        )
    return y[: len(x)]


@functools.cache
def works(format: str, device: torch.device) -> bool:
    """Whether a device's units multiply as the numbers say: tried once, as drivers and libraries differ in it.

    Where they do not, weights are made dense, and the log says why.
    """
    kitchen()
    ops, code = torch.ops.comfy_kitchen, CODES[torch.bfloat16]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 128, generator=generator).to(device, torch.bfloat16) for rows in (40, 128))
    try:
        if format == "mxfp8":
            numbers, scales = ops.quantize_mxfp8(weight, False)
            parts = {"weight": numbers, "weight_scale": scales.view(torch.uint8)}
            dense = ops.dequantize_mxfp8(numbers, scales, code)
        else:
            scale = weight.abs().amax().float() / LARGEST
            numbers, scales = ops.quantize_nvfp4(weight, scale, 0.0, False, True)
            parts = {"weight": numbers, "weight_scale": scales, "weight_scale_2": scale}
            dense = ops.dequantize_nvfp4(numbers, scale, scales, code, True)
        found, wanted = multiply(format, x, parts, None).float(), F.linear(x.float(), dense.float())
        error = float((found - wanted).norm() / wanted.norm())
    except Exception as failure:  # whatever a kernel that is not there fails with, there is another way
        logger.warning("weights in %s are made dense: %s cannot multiply them (%s)", format, device, failure)
        return False
    if not error <= _MOST_ERROR:
        logger.warning("weights in %s are made dense: a trial product on %s is %.2f off", format, device, error)
        return False
    return True
