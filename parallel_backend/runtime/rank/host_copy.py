"""A part's weights in host memory, page-locked where there is a GPU, so that they travel at the link's speed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ALIGNMENT = 256


class HostCopy:
    """Copies of tensors in one piece of host memory.

    One piece, page-locked in place, because torch's own page-locked allocations are rounded up to powers of two: up to
    twice the memory.

    Args:
        tensors: what is copied, on any device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        offsets, size = [], 0
        for tensor in tensors:
            offsets.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = torch.empty(size, dtype=torch.uint8)
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if on_gpu and size:
            _page_lock(self, buffer)
        self.tensors = []
        for tensor, offset in zip(tensors, offsets, strict=True):
            copy = buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self.tensors.append(copy.copy_(tensor.detach(), non_blocking=True))
        if on_gpu:
            torch.cuda.synchronize()


class HostCopies:
    """Copies of some of a component's tensors, by their places among them; each is made once."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self._pieces: list[HostCopy] = []

    def add(self, tensors: Mapping[int, Tensor]) -> None:
        """Have copies of these, too."""
        new = {place: tensor for place, tensor in tensors.items() if place not in self.tensors}
        if new:
            piece = HostCopy(list(new.values()))
            self._pieces.append(piece)
            self.tensors.update(zip(new, piece.tensors, strict=True))


def _page_lock(owner: HostCopy, buffer: Tensor) -> None:
    """Page-lock a buffer for as long as its owner lives; without it copies are slower, and that is all."""
    runtime = torch.cuda.cudart()
    address = buffer.data_ptr()
    if int(runtime.cudaHostRegister(address, buffer.nbytes, 0)) != 0:
        log.warning("%d MiB of host memory could not be page-locked; moving weights is slower", buffer.nbytes >> 20)
        return
    # The buffer is named here so that its memory outlives the registration.
    weakref.finalize(owner, lambda _: runtime.cudaHostUnregister(address), buffer)
