"""Where the ranks of a new group connect: who is no rank of it is turned away, and delays nobody."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from .channel import Channel, ChannelClosedError, peer
from .messages import Hello

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
"""How long a connection may stay silent; a rank says who it is at once."""


class Handshakes:
    """Takes connections from a listening socket until it is closed.

    Args:
        listener: of AF_UNIX.
        ranks: who they will be.
    """

    def __init__(self, listener: socket.socket, ranks: Iterable[int]) -> None:
        self._expected = set(ranks)
        self._waiting: dict[Channel, float] = {}
        self._listener = listener
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def arrivals(self, seconds: float) -> Iterator[tuple[Hello, Channel]]:
        """The ranks that have said who they are, waiting so long for something to happen."""
        now = time.monotonic()  # before what has arrived by then is read
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
                continue
            channel = key.fileobj
            assert isinstance(channel, Channel)
            self._selector.unregister(channel)
            del self._waiting[channel]
            hello = self._greet(channel)
            if isinstance(hello, Hello):
                self._expected.discard(hello.rank)
                yield hello, channel
            else:
                _turn_away(channel, hello)
        for channel, until in list(self._waiting.items()):
            if now > until:
                self._selector.unregister(channel)
                del self._waiting[channel]
                _turn_away(channel, "it said nothing")

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            connection.setblocking(True)
            channel = Channel(connection)
            self._waiting[channel] = time.monotonic() + HELLO_SECONDS
            self._selector.register(channel, selectors.EVENT_READ)

    def _greet(self, channel: Channel) -> Hello | str:
        """The rank behind a connection on which something has arrived, or why there is none."""
        pid, user = peer(channel.socket)
        if user != os.geteuid():
            return f"it belongs to user {user}"
        try:
            hello, _ = channel.receive()
        except ChannelClosedError:
            return "it left"
        except ValueError as error:
            return str(error)
        if not isinstance(hello, Hello):
            return f"it began with {type(hello).__name__}"
        if hello.rank not in self._expected or hello.pid != pid:
            return f"process {pid} says it is rank {hello.rank}, process {hello.pid}"
        return hello

    def close(self) -> None:
        """Take no more connections. Safe to call more than once."""
        for channel in self._waiting:
            channel.close()
        self._waiting.clear()
        self._selector.close()


def _turn_away(channel: Channel, why: str) -> None:
    log.warning("a connection to the workers' socket was turned away: %s", why)
    channel.close()
