"""Whether tensors are the same, bit for bit: at once, or as far as a sample of them tells."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

GUESSED_BYTES = 2**20
"""Conditioning of so many bytes in host memory is compared in full only while the workers compute."""
SAMPLED = 4099
"""Before that, one in so many of its numbers is; a context of FLUX.2 has 15,360 a token."""

_LIBC = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def same_content(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit, on the same device."""
    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
        return False
    if a.device.type != "cpu" or not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    # Ten times as fast as torch.equal, which compares numbers: a context of FLUX.2 has 16 MB.
    return _LIBC.memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0


def looks_the_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose content takes a while to compare are the same in a sample of it."""
    large = all(x.device.type == "cpu" and x.nbytes >= GUESSED_BYTES and x.is_contiguous() for x in (a, b))
    return large and a.shape == b.shape and same_content(a.view(-1)[::SAMPLED], b.view(-1)[::SAMPLED])
