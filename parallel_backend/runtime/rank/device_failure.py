"""What a rank says of its device: which one it is, and whether an error means that nothing can be done there."""

from __future__ import annotations

import os
import re

import torch

_NO_MORE = re.compile(
    r"CUDA error|CUDA driver error|unhandled cuda error|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
    r"|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)",
    re.IGNORECASE,
)


def describe_device(device: torch.device, local_rank: int) -> str:
    """A rank's device for messages, such as ``GPU 3, L20``, by the number that users know it by.

    Args:
        device: of the rank.
        local_rank: of the rank.
    """
    if device.type != "cuda":
        return "the CPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = visible[local_rank].strip() if local_rank < len(visible) and visible[local_rank] else str(local_rank)
    return f"GPU {number}, {torch.cuda.get_device_name(device)}"


def device_failed(error: BaseException) -> bool:
    """Whether an error is one of CUDA after which this process can do nothing on its GPU; no memory is none such."""
    return not isinstance(error, torch.OutOfMemoryError) and (
        isinstance(error, getattr(torch, "AcceleratorError", ())) or bool(_NO_MORE.search(str(error)))
    )
