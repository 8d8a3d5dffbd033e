"""One connection between client and rank: messages over an AF_UNIX socket, tensors in anonymous shared memory.

The memory is a memfd whose descriptor is passed along (SCM_RIGHTS). It has no name, so nothing is left behind, whoever
dies and when.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .messages import Message, decode, encode

MAX_PACKET = 1 << 17
_ALIGNMENT = 64
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
}
"""Of tensors that can be sent, by name."""


class ChannelClosedError(ConnectionError):
    """The other end is gone."""


@dataclass(frozen=True)
class Parcel:
    """Tensors in shared memory, ready to be sent to any number of ranks; close it after the last one."""

    descriptor: int | None
    tensors: list[dict[str, Any]]

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def pack(tensors: Mapping[str, Tensor]) -> Parcel:
    """Copy tensors (from any device) into one piece of shared memory."""
    specs: list[dict[str, Any]] = []
    size = 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"tensor {name} has dtype {dtype}, which is not sent; one of {', '.join(DTYPES)} is")
        specs.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "offset": size})
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    if not size:
        return Parcel(None, specs)
    descriptor = os.memfd_create("hybrid-dit", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        for spec, tensor in zip(specs, tensors.values(), strict=True):
            _view(memory, spec).copy_(tensor)
    except BaseException:
        os.close(descriptor)
        raise
    return Parcel(descriptor, specs)


def unpack(descriptor: int | None, specs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Map the tensors of a parcel; what is written to them is not seen by other ranks. Takes the descriptor over."""
    if descriptor is None:
        return {spec["name"]: torch.empty(spec["shape"], dtype=DTYPES[spec["dtype"]]) for spec in specs}
    try:
        size = os.fstat(descriptor).st_size
        memory = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    return {spec["name"]: _view(memory, spec) for spec in specs}


def _view(memory: mmap.mmap, spec: dict[str, Any]) -> Tensor:
    dtype = DTYPES[spec["dtype"]]
    count = 1
    for length in spec["shape"]:
        count *= length
    if not count:
        return torch.empty(spec["shape"], dtype=dtype)
    # The tensor keeps the mapping alive.
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=spec["offset"]).view(spec["shape"])


class Channel:
    """A connected SOCK_SEQPACKET socket that carries messages and parcels. Not for several threads at once."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message, parcel: Parcel | None = None) -> None:
        """Send one message.

        Raises:
            ChannelClosedError: the other end is gone.
        """
        data = encode(message, parcel.tensors if parcel else [])
        if len(data) > MAX_PACKET:
            raise ValueError(f"a {type(message).__name__} of {len(data)} bytes is over the limit of {MAX_PACKET}")
        descriptors = [parcel.descriptor] if parcel and parcel.descriptor is not None else []
        try:
            socket.send_fds(self.socket, [data], descriptors)
        except OSError as error:
            raise ChannelClosedError(f"the other end is gone ({error})") from error

    def send_tensors(self, message: Message, tensors: Mapping[str, Tensor]) -> None:
        """Send one message with tensors to this one rank."""
        parcel = pack(tensors)
        try:
            self.send(message, parcel)
        finally:
            parcel.close()

    def receive(self) -> tuple[Message, dict[str, Tensor]]:
        """Wait for one message and its tensors.

        Raises:
            ChannelClosedError: the other end is gone.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(self.socket, MAX_PACKET, 1)
        except OSError as error:
            raise ChannelClosedError(f"the other end is gone ({error})") from error
        if not data:
            raise ChannelClosedError("the other end is gone")
        try:
            message, specs = decode(data)
        except ValueError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return message, unpack(descriptors[0] if descriptors else None, specs)

    def close(self) -> None:
        self.socket.close()
