"""The channel of a group over several hosts: rank 0 has the client's, and passes on what it gets to the other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..wire.channel import Channel, ChannelClosedError
from ..wire.messages import Failed, Message, decode, encode
from ..wire.shared_tensors import ALIGNMENT, Buffer, arrange, checked

PATIENCE = timedelta(days=365)
"""Nobody may ask for anything for long."""
_LENGTH = 8
"""Bytes of the length of a text."""


class Relay:
    """Stands where a rank has its channel to the client; ``receive`` and ``send`` are collective.

    Args:
        channel: to the client on the first host, elsewhere to the process that looks after the host's ranks.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def receive(self) -> tuple[Message, dict[str, Tensor]]:
        """The next request and its tensors.

        Raises:
            ChannelClosedError: the client or another rank is gone.
        """
        if self.rank == 0:
            message, tensors = self.channel.receive()
            self._broadcast(_pack(message, tensors))
            return message, tensors
        return _unpack(self._broadcast(None))

    def _broadcast(self, shared: Tensor | None) -> Tensor:
        size = torch.tensor([0 if shared is None else len(shared)])
        try:
            dist.broadcast(size, 0, group=self.group)
            if shared is None:
                shared = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(shared, 0, group=self.group)
        except RuntimeError as error:
            raise ChannelClosedError(f"another rank is gone ({error})") from error
        return shared

    def send(self, message: Message) -> None:
        """Every rank's answer to a request, which rank 0 sends to the client.

        Raises:
            ChannelClosedError: the client or another rank is gone.
        """
        self.send_tensors(message, {})

    def send_tensors(self, message: Message, tensors: Mapping[str, Tensor], buffer: Buffer | None = None) -> None:
        """The same, with tensors of rank 0."""
        if isinstance(message, Failed):
            # Others may be waiting for this rank in a collective, and never come to the answers.
            self.channel.send(message)
        answers = self._gather(torch.frombuffer(bytearray(encode(message, [])), dtype=torch.uint8))
        if self.rank == 0:
            self.channel.send_tensors(message, tensors, buffer)
            for answer in answers[1:]:
                self.channel.send(decode(_bytes(answer))[0])

    def _gather(self, data: Tensor) -> list[Tensor]:
        """Bytes of every rank, on rank 0."""
        sizes = torch.empty(self.ranks, 1, dtype=torch.int64)
        try:
            dist.all_gather(list(sizes.unbind()), torch.tensor([len(data)]), group=self.group)
            padded = data.new_zeros(int(sizes.max()))
            padded[: len(data)] = data
            gathered = [torch.empty_like(padded) for _ in range(self.ranks)] if self.rank == 0 else None
            dist.gather(padded, gathered, 0, group=self.group)
        except RuntimeError as error:
            raise ChannelClosedError(f"another rank is gone ({error})") from error
        return [part[:size] for part, size in zip(gathered or [], sizes.flatten().tolist(), strict=False)]


def _pack(message: Message, tensors: Mapping[str, Tensor]) -> Tensor:
    """A message and its tensors as one piece of bytes: the text's length, the text, and the tensors' memory."""
    specs, size = arrange(tensors)
    text = encode(message, [vars(spec) for spec in specs])
    start = _start(len(text))
    shared = torch.empty(start + size, dtype=torch.uint8)
    shared[:_LENGTH] = torch.tensor([len(text)]).view(torch.uint8)
    shared[_LENGTH : _LENGTH + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    memory = shared[start:].numpy()
    for spec, tensor in zip(specs, tensors.values(), strict=True):
        spec.view(memory).copy_(tensor)
    return shared


def _unpack(shared: Tensor) -> tuple[Message, dict[str, Tensor]]:
    length = int(shared[:_LENGTH].view(torch.int64))
    message, described = decode(_bytes(shared[_LENGTH : _LENGTH + length]))
    memory = shared[_start(length) :].numpy()
    return message, {name: spec.view(memory) for name, spec in checked(described)[0].items()}


def _start(length: int) -> int:
    """Where the tensors' memory begins after a text."""
    return -(-(_LENGTH + length) // ALIGNMENT) * ALIGNMENT


def _bytes(data: Tensor) -> bytes:
    return data.numpy().tobytes()
