"""Tensors in anonymous shared memory: a memfd, and what is where in it.

It has no name, so nothing is left behind, whoever dies and when. Its size is sealed, so nobody can cut it off under a
reader, who would die of that.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .field_checks import Fields
from .messages import BadMessageError

with contextlib.suppress(ImportError):  # on Windows, where the pack still loads
    import fcntl

MAX_TENSORS = 256
MAX_DIMS = 16
ALIGNMENT = 64
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
}


@dataclass(frozen=True)
class Spec:
    """Where a tensor is in the memory.

    Raises:
        ValueError: a dtype that is not sent, or a shape that no memory holds.
    """

    name: str
    dtype: str
    shape: list[int]
    offset: int

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ValueError(f"tensor {self.name} has dtype {self.dtype}, which is not sent; one of {known} is")
        # Without the dims of 0, too: torch multiplies the others for an empty tensor's strides.
        most = math.prod(max(1, length) for length in self.shape) * _DTYPES[self.dtype].itemsize
        if len(self.shape) > MAX_DIMS or most >= 2**63:
            raise ValueError(f"tensor {self.name} has {len(self.shape)} dims and {most} bytes")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    def view(self, memory: Any) -> Tensor:
        """The tensor in memory (anything with the buffer protocol), which it keeps alive; an empty one needs none."""
        dtype = _DTYPES[self.dtype]
        if memory is None or not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(self.shape), offset=self.offset).view(self.shape)


_FIELDS = Fields.of(Spec)


@dataclass(frozen=True)
class SharedTensors:
    """Tensors in shared memory, ready to be sent to any number of ranks; close it after the last one."""

    descriptor: int | None
    tensors: list[dict[str, Any]]

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


class Buffer:
    """Shared memory that is used again and again, as the pages of fresh memory cost more than what is written to them.

    Who uses it knows that nobody reads the last shared any more.
    """

    def __init__(self) -> None:
        self.descriptor: int | None = None
        self.memory: mmap.mmap | None = None

    def take(self, size: int) -> tuple[int, mmap.mmap]:
        """A descriptor of the memory, which the caller closes, and the memory; at least so many bytes."""
        if self.memory is None or self.descriptor is None or len(self.memory) < size:
            self.close()
            self.descriptor, self.memory = _shared(size)
        return os.dup(self.descriptor), self.memory

    def close(self) -> None:
        """Forget the memory; who has a shared of it keeps it."""
        descriptor, self.descriptor, self.memory = self.descriptor, None, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = close


def pack(tensors: Mapping[str, Tensor], buffer: Buffer | None = None) -> SharedTensors:
    """Copy tensors (from any device) into one piece of shared memory: that of a buffer, or fresh one.

    Raises:
        ValueError: see `arrange`.
    """
    specs, size = arrange(tensors)
    plain = [vars(spec) for spec in specs]
    if not size:
        return SharedTensors(None, plain)
    descriptor, memory = _shared(size) if buffer is None else buffer.take(size)
    try:
        for spec, tensor in zip(specs, tensors.values(), strict=True):
            copy_into(spec.view(memory), tensor)
    except BaseException:
        os.close(descriptor)
        raise
    return SharedTensors(descriptor, plain)


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into contiguous host memory of the same dtype and shape, by one thread where it can be.

    PyTorch has several, of which each has to get a core before the copy is complete: on a busy host that takes many
    times what one needs for a latent.
    """
    if source.device.type == "cpu" and source.is_contiguous() and not source.is_neg():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def _shared(size: int) -> tuple[int, mmap.mmap]:
    descriptor = os.memfd_create("hybrid-dit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return descriptor, mmap.mmap(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise


def arrange(tensors: Mapping[str, Tensor]) -> tuple[list[Spec], int]:
    """Where each tensor goes in one piece of memory, and how many bytes that has.

    Raises:
        ValueError: a dtype that is not sent, or too many tensors.
    """
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors are sent at once; at most {MAX_TENSORS} can be")
    specs: list[Spec] = []
    size = 0
    for name, tensor in tensors.items():
        specs.append(Spec(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size))
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return specs, size


def unpack(descriptor: int | None, described: list[Any]) -> dict[str, Tensor]:
    """Map the tensors of a shared; what is written to them is not seen by other ranks. Takes the descriptor over.

    Raises:
        BadMessageError: the descriptions are not of such a shared, or the descriptor is not of the memory they need.
    """
    try:
        specs, size = checked(described)
        memory = _map(descriptor, size)
        return {name: spec.view(memory) for name, spec in specs.items()}
    except (ValueError, OSError) as error:
        raise BadMessageError(f"tensors that do not fit their description: {error}") from None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def checked(described: list[Any]) -> tuple[dict[str, Spec], int]:
    """Descriptions of tensors in one piece of memory, by name, and the bytes that it must have.

    Raises:
        ValueError: they are not such descriptions, or do not go together.
    """
    if len(described) > MAX_TENSORS:
        raise ValueError(f"{len(described)} tensors, of at most {MAX_TENSORS}")
    specs: dict[str, Spec] = {}
    end = 0
    for values in described:
        if type(values) is not dict:
            raise ValueError(f"a {type(values).__name__} in the place of a description")
        _FIELDS.verify(values)
        spec = Spec(**values)
        if spec.name in specs:
            raise ValueError(f"two tensors {spec.name}")
        if spec.offset % ALIGNMENT or spec.offset < end:
            raise ValueError(f"tensor {spec.name} is at byte {spec.offset}, misaligned or within the one before")
        specs[spec.name] = spec
        end = spec.offset + spec.nbytes
    return specs, max((spec.offset + spec.nbytes for spec in specs.values() if spec.nbytes), default=0)


def _map(descriptor: int | None, size: int) -> mmap.mmap | None:
    """The first ``size`` bytes of a memfd, in a copy of this process's own; no bytes have no descriptor."""
    if descriptor is None or not size:
        if descriptor is not None or size:
            raise ValueError(f"{size} bytes of tensors and the descriptor {descriptor}")
        return None
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        raise ValueError("the descriptor is not that of a memfd") from None
    if not sealed:
        raise ValueError("the memory may be cut off while it is read: it is not sealed")
    if os.fstat(descriptor).st_size < size:
        raise ValueError(f"{size} bytes of tensors in a memory of {os.fstat(descriptor).st_size}")
    return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
