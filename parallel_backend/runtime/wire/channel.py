"""One connection between client and rank: messages over an AF_UNIX socket, tensors in shared memory beside them.

The memory's descriptor is passed along (SCM_RIGHTS). Whatever comes in is checked: what is no message, or does not fit
its tensors, is a `BadMessageError` and leaves no descriptor behind.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Mapping

from torch import Tensor

from .messages import BadMessageError, Message, decode, encode
from .shared_tensors import Buffer, SharedTensors, pack, unpack

MAX_PACKET = 1 << 17
MOST_UNREAD = 1 << 15
"""Bytes in the buffer of an end that does not read, beyond which what may be lost is; the rest is for what may not."""
SEND_SECONDS = 30.0
"""How long a message waits for room in the buffer of an end that does not read: a stopped process."""


class ChannelClosedError(ConnectionError):
    """The other end is gone."""


class ChannelStuckError(ChannelClosedError):
    """The other end is there and takes nothing; the channel is to be given up."""


class Channel:
    """A connected SOCK_SEQPACKET socket that carries messages and parcels. Not for several threads at once.

    Args:
        connection: blocking.
        send_seconds: most that `send` may wait; 0 is forever.
    """

    def __init__(self, connection: socket.socket, send_seconds: float = SEND_SECONDS) -> None:
        self.socket, self.send_seconds = connection, send_seconds
        seconds, rest = divmod(send_seconds, 1)
        timeout = struct.pack("@ll", int(seconds), int(rest * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message, shared: SharedTensors | None = None) -> None:
        """Send one message.

        Raises:
            ValueError: it is too long.
            ChannelClosedError: the other end is gone.
            ChannelStuckError: it takes nothing.
        """
        data = encode(message, shared.tensors if shared else [])
        if len(data) > MAX_PACKET:
            raise ValueError(f"a {type(message).__name__} of {len(data)} bytes is over the limit of {MAX_PACKET}")
        descriptors = [shared.descriptor] if shared and shared.descriptor is not None else []
        try:
            socket.send_fds(self.socket, [data], descriptors)
        except BlockingIOError:
            raise ChannelStuckError(
                f"the other end has taken no message for {self.send_seconds:g} s: it hangs or was stopped"
            ) from None
        except OSError as error:
            raise ChannelClosedError(f"the other end is gone ({error})") from error

    def try_to_send(self, message: Message) -> None:
        """Send a short message that may as well be lost, such as where nobody reads; also in another thread."""
        import fcntl  # not on Windows, where the pack still loads
        import termios

        with contextlib.suppress(OSError):
            unread = struct.unpack("i", fcntl.ioctl(self.socket, termios.TIOCOUTQ, b"\0" * 4))[0]
            if unread < MOST_UNREAD:
                self.socket.send(encode(message, []), socket.MSG_DONTWAIT)

    def send_tensors(self, message: Message, tensors: Mapping[str, Tensor], buffer: Buffer | None = None) -> None:
        """Send one message with tensors to this one rank, in a buffer or in fresh memory; raises what `pack` and `send`
        do."""
        shared = pack(tensors, buffer)
        try:
            self.send(message, shared)
        finally:
            shared.close()

    def receive(self) -> tuple[Message, dict[str, Tensor]]:
        """Wait for one message and its tensors.

        Raises:
            ChannelClosedError: the other end is gone.
            BadMessageError: it sent something else; the next message can be received all the same.
        """
        try:
            # Not recv_fds, which leaves out the flags in some versions of Python.
            one_descriptor = socket.CMSG_LEN(array.array("i").itemsize)
            data, ancillary, flags, _ = self.socket.recvmsg(MAX_PACKET, one_descriptor, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise ChannelClosedError(f"the other end is gone ({error})") from error
        descriptors = _descriptors(ancillary)
        if not data and not descriptors:
            raise ChannelClosedError("the other end is gone")
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise BadMessageError(f"a packet over {MAX_PACKET} bytes, or with more than one descriptor")
            message, described = decode(data)
        except BadMessageError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return message, unpack(descriptors[0] if descriptors else None, described)

    def close(self) -> None:
        self.socket.close()


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of who connected an AF_UNIX socket, as the kernel noted them at that time."""
    form = "iII"
    size = struct.calcsize(form)
    pid, uid, _ = struct.unpack(form, connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Descriptors that came with a packet; each is ours to close."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
