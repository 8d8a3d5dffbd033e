"""comfy-kitchen, ComfyUI's own library of quantized formats: imported when a quantized model first needs it.

Its operators are `torch.ops.comfy_kitchen`. No version of it is asked for: what ComfyUI has installed is used.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

REMEDY = "install comfy-kitchen into ComfyUI's Python (pip install comfy-kitchen), or take the model in bf16 or fp8"


CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Its numbers for dtypes."""


def has_kitchen() -> bool:
    """Whether it is installed; it is not imported."""
    return importlib.util.find_spec("comfy_kitchen") is not None


@functools.cache
def kitchen() -> ModuleType:
    """The library, with the backends that ComfyUI uses: no Triton, and CUDA from CUDA 13 on.

    Raises:
        ValueError: it is not installed, or cannot be imported.
    """
    try:
        import comfy_kitchen
    except ImportError as error:
        raise ValueError(f"the model's number format needs comfy-kitchen ({error}): {REMEDY}") from None
    comfy_kitchen.registry.disable("triton")
    if torch.version.cuda is None or int(torch.version.cuda.split(".")[0]) < 13:
        comfy_kitchen.registry.disable("cuda")
    module: ModuleType = comfy_kitchen
    return module


def has_kernels(device: torch.device) -> bool:
    """Whether products of quantized weights run on a device's units; on the CPU they run as ComfyUI runs them there."""
    return device.type == "cpu" or (device.type == "cuda" and bool(kitchen().registry.is_available("cuda")))
